"""Turn any corpus into the token files that training reads.

    python -m corpus.pack build --input corpus.jsonl.gz news/ --tokenizer=gpt2 --out=data/mine
    python -m corpus.pack build --input zhwiki.xml.bz2 --tokenizer=data/tokenizers/zh --clean --out=data/zh
    python -m corpus.pack mix zhwiki:0.6,news:0.4 --out=data/mixed
    python -m corpus.pack inspect data/mixed

build reads every format of corpus/readers.py and writes train.bin (train_000000.bin and so on if
--shard_tokens is given), train.idx, the same for val, and meta.json. One thread reads and writes, a pool of
threads encodes. The hash of a document decides whether it is for validation, so that it stays there when
documents are added. Memory holds a few megabytes per thread, however large the corpus is. The same command
continues a run that was killed. The files are the same byte for byte for any number of threads and after
any number of kills.

    from corpus.pack import write_dataset
    write_dataset('data/mine', tokenizer, {'train': ['one text', 'another'], 'val': ['a third']}, 'my notes')

packs documents that a script has at hand.
"""
import hashlib
import itertools
import os
import sys
from pathlib import Path

import numpy as np

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder
from corpus import mix, readers
from corpus.encode import Characters, Encoder, Record
from corpus.options import BUILDING, PACKING, READING, Parser, add_options, print_next
from corpus.run import Job, Meter, Progress, pack, taken
from corpus.writer import Seen
from files import one_line_errors
from tokens.tokenizer import GPT2_META, CharTokenizer, load_tokenizer, tokenizer_meta


def write_dataset(folder, tokenizer, splits, source, shard_tokens=None, *, masked=False, eot_in_rows=False):
    """Pack documents into a dataset folder, replacing the dataset that was there.

    splits        {'train': iterable of documents, 'val': iterable of documents}. A document is a text, with
                  end-of-text between two texts if the tokenizer has one, or a row of ids, written as it is
    source        in words, the text and its origin
    shard_tokens  cut into train_000000.bin, train_000001.bin ... of this many tokens; None: one train.bin
    masked        write .mask files; documents may be pairs (ids, mask), mask is 1 where a token is a target
    eot_in_rows   put end-of-text between rows of ids as well
    returns       the dict in meta.json
    """
    records = (Record(document, f'{name} document {n}', split=name)
               for name, documents in splits.items() for n, document in enumerate(documents))
    job = Job(lambda start: records, source, tuple(splits), shard_tokens, masked)
    return pack(folder, Encoder(tokenizer, eot_in_rows=eot_in_rows), job)


# -----------------------------------------------------------------------------
# files of a corpus


def pack_files(out, files, tokenizer, source, args, *, sizes=None):
    """Pack the files that corpus.readers.find_files lists.

    tokenizer  'char': one token for each character in the files
    args       the options as build's command line names them
    sizes      bytes of each file; None: ask the disk
    """
    sizes = sizes or [readers.n_bytes_of(path) for path, _ in files]
    names = hashlib.sha256()
    for (path, _), size in zip(files, sizes, strict=True):
        names.update(b'%d %b\0' % (size, os.fsencode(os.path.basename(path))))
    formats = sorted({format for _, format in files})
    fields = args.field.split(',')
    recipe = {'files': [len(files), sum(sizes), names.hexdigest()], 'format': formats,
              'fields': fields, 'encoding': args.encoding}

    def read(start):
        documents = readers.read_documents(files, fields=fields, errors=args.errors, encoding=args.encoding,
                                           start=start)
        return (Record(*document) for document in documents)

    job = Job(read, source, shard_tokens=args.shard_tokens, masked='blocks' in formats,
              max_docs=args.max_docs, n_threads=args.workers, recipe=recipe, n_bytes=sum(sizes))
    options = {name: getattr(args, name) for name in ('val_fraction', 'clean', 'min_chars', 'sample')}
    try:
        if tokenizer == 'char':
            characters, n_records = find_characters(Encoder(Characters(), **options), job)
            tokenizer = CharTokenizer(characters)
            if args.max_docs:  # documents after the last one may hold other characters
                job.read = lambda start: itertools.islice(read(start), max(n_records - start, 0))
        pack(out, Encoder(tokenizer, **options), job)
    except KeyboardInterrupt:
        print('interrupted: the same command continues', file=sys.stderr)
        sys.exit(130)


def find_characters(encoder, job):
    """Find the documents to pack; return their characters in order, and the number of records to read."""
    progress, codes = Progress(), np.zeros(0, dtype='<u4')
    seen = Seen('') if encoder.clean else None
    meter = Meter('characters', job, progress)
    with meter.bar:
        for documents in taken(encoder, job.read(0), progress, seen, job):
            codes = np.unique(np.concatenate([codes, *(document.ids for document in documents)]))
            meter.bar.update(meter.done() - meter.bar.n)
    if not len(codes):
        raise ValueError('there is no text in the corpus')
    return ''.join(map(chr, codes)), progress.last_taken + 1


# -----------------------------------------------------------------------------
# commands


def build(argv):
    """Pack the files of a corpus into a dataset."""
    parser = Parser(f'{build.__doc__}\n\n{readers.__doc__}', 'python -m corpus.pack build')
    add_options(parser, [*READING, *BUILDING])
    args = parser.parse_args(argv)
    files = readers.find_files(args.input, args.format)
    tokenizer = 'char'
    if args.tokenizer != 'char':
        tokenizer = load_tokenizer(tokenizer_meta(args.tokenizer, ['char'], args.eot))
    elif any(format == 'blocks' for _, format in files):
        raise ValueError('blocks hold ids, not characters: name the tokenizer that made them')
    pack_files(args.out, files, tokenizer, name_source(args.input), args)
    print_next(args.out, ['config/quickstart.py'])


def name_source(paths):
    """Say in words which files a dataset is made of. What is not UTF-8 in a name becomes U+FFFD."""
    names = [os.path.basename(os.path.normpath(path)) for path in paths]
    names = [os.fsencode(name).decode('utf-8', 'replace') for name in names]
    return names[0] if len(names) == 1 else f'{len(names)} inputs, {names[0]} to {names[-1]}'


def mix_datasets(argv):
    """Mix datasets of one tokenizer into one dataset, with these shares of its tokens."""
    parser = Parser(mix_datasets.__doc__, 'python -m corpus.pack mix')
    parser.add_argument('datasets', metavar='A:0.6,B:0.4', help='as in the setting dataset')
    add_options(parser, ['out', 'shard_tokens'])
    parser.add_argument('--tokens', type=int,
                        help='for training, at least; a source that ends begins again')
    parser.add_argument('--block_size', type=int, default=1024,
                        help='the shares hold within 1%% in any 1000 windows of this many tokens; '
                        'documents longer than two windows are cut (default: %(default)s)')
    args = parser.parse_args(argv)
    splits, weights = mix.open_splits(args.datasets, args.out)
    n_tokens = {'train': args.tokens, 'val': None}
    documents = {name: mix.mixed_documents(splits[name], weights, 2 * args.block_size, n_tokens[name])
                 for name in splits}
    first, names = splits['train'][0], [split.folder.name for split in splits['train']]
    shares = ', '.join(f'{name} {weight:.4g}' for name, weight in zip(names, weights, strict=True))
    masked = any(split.mask is not None for name in splits for split in splits[name])
    write_dataset(args.out, load_tokenizer(first.tokenizer), documents, f'mixed: {shares}', args.shard_tokens,
                  masked=masked, eot_in_rows=True)
    print_next(args.out, ['config/quickstart.py'])


def inspect(argv):
    """Show the contents of a dataset, and check that it is whole."""
    parser = Parser(inspect.__doc__, 'python -m corpus.pack inspect')
    parser.add_argument('folder', type=Path, metavar='DIR')
    parser.add_argument('--windows', type=int, default=3,
                        help='pieces of text to show of each split (default: %(default)s)')
    args = parser.parse_args(argv)
    mix.show_dataset(args.folder, args.windows)


def main():
    commands = {'build': build, 'mix': mix_datasets, 'inspect': inspect}
    command = sys.argv[1] if len(sys.argv) > 1 else '--help'
    if command in ('-h', '--help'):
        print(__doc__.strip() + '\n\nbuild, mix or inspect with --help lists their options.')
    elif command in commands:
        commands[command](sys.argv[2:])
    else:
        raise ValueError(f'{command}: accepted are build, mix, inspect')


# -----------------------------------------------------------------------------
# corpora on the Hugging Face hub


def prepare_parquet(folder, doc, repo, revision, hub_folder):
    """Run the prepare script in this folder, with this docstring, of a corpus in Parquet."""
    parser = Parser(doc)
    add_options(parser, ['input', 'out', *PACKING], input=None, out=folder, val_fraction=0.0005,
                shard_tokens=100_000_000)
    parser.set_defaults(field='text', clean=False, min_chars=1, sample=1.0, errors='strict', encoding='utf-8')
    args = parser.parse_args()
    if args.input:
        files, sizes, source = readers.find_files(args.input, 'parquet'), None, f'{repo}, from local files'
    else:
        size_of = hub_files(repo, revision, hub_folder)
        files, sizes = [(path, 'parquet') for path in size_of], list(size_of.values())
        source = f'{repo}, revision {revision}, {hub_folder}'
    pack_files(args.out, files, load_tokenizer(GPT2_META), source, args, sizes=sizes)
    print_next(args.out, [])


def hub_files(repo, revision, folder):
    """Return {hf://...: bytes} of the Parquet files in a folder on the hub, or on its mirror HF_ENDPOINT."""
    from huggingface_hub import HfFileSystem
    files, reason = {}, 'no .parquet file there'
    try:
        for file in HfFileSystem().ls(f'datasets/{repo}@{revision}/{folder}', detail=True):
            if file['name'].endswith('.parquet'):
                files[f'hf://{file["name"]}'] = file['size']
    except Exception as error:  # the hub's client and the network below it raise their own
        reason = ' '.join(str(error).split())[:300] or type(error).__name__
    if not files:
        raise OSError(f'{repo} is out of reach ({reason}): bring the files {folder}/*.parquet of its '
                      f'revision {revision[:12]} here by other means, and name their folder with --input')
    return dict(sorted(files.items()))


if __name__ == '__main__':
    with one_line_errors():
        main()
