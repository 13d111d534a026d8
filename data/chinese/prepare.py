"""Chinese text of your own, or from a package mirror, as a dataset with a tokenizer made for it.

    python data/chinese/prepare.py
    python data/chinese/prepare.py --input novels/ zhwiki.xml.bz2 --vocab_size=16384 --clean

--input takes every format of corpus/readers.py. Without it, the first of these that is available is used:
1. input.txt in this folder, whatever text it holds;
2. 21,053 Song lyric poems in simplified characters, from the npm package chinese-poetry (MIT licence);
3. the Debian Reference in Chinese, from the Debian package debian-reference-zh-cn (GPL).
A document is then a paragraph. The tokenizer, a byte-level BPE, goes to data/tokenizers/; --tokenizer names
an existing one.
"""
import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from corpus.fetch import fetch
from corpus.options import OPTIONS, Parser, print_next
from corpus.pack import name_source, pack_files
from corpus.train_tokenizer import read_texts, save_tokenizer, train_bpe
from files import one_line_errors, write_atomically

POEMS_SHA256 = '25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86'
POEMS = f'npm:chinese-poetry@2.0.1#{POEMS_SHA256}!'
REFERENCE_SHA256 = '6d2d8d9a646397e28b04cdff23d2e4374101ebf9be348e35961af62c8a2d0977'
REFERENCE = f'apt:debian-reference-zh-cn=2.100#{REFERENCE_SHA256}!'


def fetch_text(folder):
    """Return the path of input.txt in folder, written first if it is not there."""
    path, failures = folder / 'input.txt', []
    if path.exists():
        return path
    archives = [('chinese-poetry-2.0.1.tgz', POEMS, POEMS_SHA256, read_poems),
                ('debian-reference-zh-cn_2.100_all.deb', REFERENCE, REFERENCE_SHA256, read_reference)]
    for name, source, sha256, read in archives:
        try:
            data = read(fetch(name, [source], sha256)).encode('utf-8')
        except OSError as error:
            failures.append(str(error))
            continue
        write_atomically(path, lambda file, data=data: file.write(data))
        print(f'{path}: {len(data):,} bytes from {name}', flush=True)
        return path
    raise OSError(f'no text to train on: put one at {path}, or name files and folders with --input '
                  f'({"; ".join(failures)})')


def read_poems(archive):
    """Join all poems, each with its tune, its author and its lines."""
    poems = []
    with tarfile.open(archive) as tar:
        names = [name for name in tar.getnames() if '/songci/ci.song.' in name]
        for name in sorted(names, key=lambda name: int(name.split('.')[-2].rstrip('y'))):
            for poem in json.load(tar.extractfile(name)):
                lines = [poem['rhythmic'], poem['author'], *poem['paragraphs']]
                poems.append('\n'.join(line.strip() for line in lines if line.strip()))
    return '\n\n'.join(poems) + '\n'


def read_reference(archive):
    """Return the text of the book. The package is an ar archive whose last member is a tar of the files."""
    data = archive.read_bytes()
    header = data.index(b'data.tar.xz')  # 60 bytes; bytes 48 to 58 are the member's size
    size = int(data[header + 48:header + 58])
    name = './usr/share/debian-reference/debian-reference.zh-cn.txt.gz'
    with tarfile.open(fileobj=io.BytesIO(data[header + 60:header + 60 + size]), mode='r:xz') as tar:
        return gzip.decompress(tar.extractfile(name).read()).decode('utf-8')


def main():
    parser = Parser(__doc__, None, OPTIONS, input=None, out=HERE, tokenizer=None)
    parser.add_argument('--vocab_size', type=int, default=4096,
                        help='of the tokenizer to make, unless --tokenizer names one')
    args = parser.parse_args()
    if not args.input:
        args.input, args.format = [str(fetch_text(HERE))], 'paragraphs'
    if not args.tokenizer:
        args.tokenizer = str(HERE.parent / 'tokenizers' / args.out.resolve().name)
        tokenizer = train_bpe(read_texts(args), args.vocab_size)
        save_tokenizer(tokenizer, args.tokenizer)
        print(f'{args.tokenizer}: {tokenizer.vocab_size:,} tokens', flush=True)
    pack_files(args, ', '.join(name_source([path]) for path in args.input))
    print_next(args.out, ['config/train_chinese.py'], own_dataset='chinese')


if __name__ == '__main__':
    with one_line_errors():
        main()
