"""Any text of your own as a dataset.

    python data/text/prepare.py --input book.txt notes/ --tokenizer=char
    python data/text/prepare.py --input essays/ --tokenizer=gpt2 --out=data/essays

--input takes text files, and folders whose .txt files are read in the order of their names. The last tenth of
all characters is for validation. A file is a document: all tokenizers but char put <|endoftext|> between two.
For a corpus longer than memory use python -m corpus.pack build.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from corpus.options import Parser, print_next
from corpus.pack import make_tokenizer, name_source, write_texts
from corpus.readers import find_files, read_text
from files import one_line_errors


def main():
    options = ['input', 'out', 'encoding', 'tokenizer', 'eot', 'val_fraction']
    args = Parser(__doc__, None, options, out=HERE, val_fraction=0.1).parse_args()
    paths = [path for path, _ in find_files(args.input, 'text')]
    texts = [read_text(path, args.encoding) for path in paths]
    tokenizer = make_tokenizer(args.tokenizer, texts, args.eot)
    write_texts(args.out, texts, tokenizer, name_source(paths), args.val_fraction)
    print_next(args.out, ['config/quickstart.py'])


if __name__ == '__main__':
    with one_line_errors():
        main()
