"""Any text of your own as a dataset.

    python data/text/prepare.py --input book.txt notes/ --tokenizer char
    python data/text/prepare.py --input essays/ --tokenizer gpt2 --out data/essays

--input takes UTF-8 files, and folders whose .txt files are read in the order of their names. The last tenth of all
characters is for validation (--val_fraction). --tokenizer is char, gpt2, byte, or the folder of one that tokens/tokenizer.py trained.
A file is a document: all but char put <|endoftext|> between two. Memory holds one file at a time.
"""
import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from corpus.pack import dataset_name, write_dataset
from corpus.readers import find_files, read_text
from files import one_line_errors
from tokens.tokenizer import CharTokenizer, load_tokenizer, tokenizer_meta


def characters(paths, start, end):
    """Characters start to end of all files in a row, one text per file."""
    for path in paths:
        text = read_text(path)
        yield text[max(start, 0):max(end, 0)]
        start, end = start - len(text), end - len(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', nargs='+', required=True, metavar='PATH')
    parser.add_argument('--tokenizer', required=True, metavar='NAME', help='char, gpt2, byte, or a folder with tokenizer.json')
    parser.add_argument('--out', type=Path, default=HERE, help='dataset folder (default: the folder of this script)')
    parser.add_argument('--val_fraction', type=float, default=0.1)
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        raise ValueError(f'--val_fraction={args.val_fraction} must lie between 0 and 1')

    tokenizer = None if args.tokenizer == 'char' else load_tokenizer(tokenizer_meta(args.tokenizer, also=['char']))
    paths = [Path(path) for path, _ in find_files(args.input, 'text')]
    n_chars, chars = 0, set()
    for path in paths:
        text = read_text(path)
        n_chars += len(text)
        chars.update(text)
    if n_chars == 0:
        raise ValueError(f'{" ".join(args.input)}: no text in there')
    tokenizer = tokenizer or CharTokenizer(''.join(sorted(chars)))
    n_train = int(n_chars * (1 - args.val_fraction))
    splits = {'train': characters(paths, 0, n_train), 'val': characters(paths, n_train, n_chars)}
    source = paths[0].name if len(paths) == 1 else f'{len(paths)} files, {paths[0].name} to {paths[-1].name}'
    write_dataset(args.out, tokenizer, splits, source)
    print(f'next: python train.py config/quickstart.py --dataset={dataset_name(args.out)} --out_dir=out-{args.out.resolve().name}')


if __name__ == '__main__':
    with one_line_errors():
        main()
