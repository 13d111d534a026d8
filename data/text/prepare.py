"""Any text of your own as a dataset.

    python data/text/prepare.py --input book.txt notes/ --tokenizer=char
    python data/text/prepare.py --input essays/ --tokenizer=gpt2 --out=data/essays

--input takes text files, and folders whose .txt files are read in the order of their names. The last tenth of
all characters is for validation (--val_fraction). A file is a document: all tokenizers but char put
<|endoftext|> between two. Memory holds one file at a time.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from corpus.options import Parser, print_next
from corpus.pack import name_source, write_dataset
from corpus.readers import find_files, read_text
from files import one_line_errors
from tokens.tokenizer import CharTokenizer, load_tokenizer, tokenizer_meta


def characters(paths, encoding, start, end):
    """Yield the characters from start to end of all files in sequence, one text per file."""
    for path in paths:
        text = read_text(path, encoding)
        yield text[max(start, 0):max(end, 0)]
        start, end = start - len(text), end - len(text)


def main():
    options = ['input', 'out', 'encoding', 'tokenizer', 'eot', 'val_fraction']
    args = Parser(__doc__, None, options, out=HERE, val_fraction=0.1).parse_args()

    # A first pass counts the characters and finds which there are.
    tokenizer = None
    if args.tokenizer != 'char':
        tokenizer = load_tokenizer(tokenizer_meta(args.tokenizer, ['char'], args.eot))
    paths = [path for path, _ in find_files(args.input, 'text')]
    n_chars, chars = 0, set()
    for path in paths:
        text = read_text(path, args.encoding)
        n_chars += len(text)
        chars.update(text)
    if n_chars == 0:
        raise ValueError(f'{" ".join(args.input)}: no text in there')
    tokenizer = tokenizer or CharTokenizer(''.join(sorted(chars)))

    n_train = int(n_chars * (1 - args.val_fraction))
    splits = {'train': characters(paths, args.encoding, 0, n_train),
              'val': characters(paths, args.encoding, n_train, n_chars)}
    write_dataset(args.out, tokenizer, splits, name_source(paths))
    print_next(args.out, ['config/quickstart.py'])


if __name__ == '__main__':
    with one_line_errors():
        main()
