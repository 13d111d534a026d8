"""Turn any corpus into the token files that training reads.

    python -m corpus.pack build --input corpus.jsonl.gz news/ --tokenizer=gpt2 --out=data/mine
    python -m corpus.pack build --input zhwiki.xml.bz2 --tokenizer=data/tokenizers/zh --clean --out=data/zh
    python -m corpus.pack mix zhwiki:0.6,news:0.4 --out=data/mixed
    python -m corpus.pack inspect data/mixed

build reads every format of corpus/readers.py and writes train.bin (train_000000.bin and so on if
--shard_tokens is given), train.idx, the same for val, and meta.json. The hash of a document decides whether
it is for validation, so that it stays there when documents are added. Memory stays below 500 MB, however
large the corpus is. The same command continues a run that was killed. The files are the same byte for byte
for any number of threads and after any number of kills.
"""
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder
from corpus import mix, readers
from corpus.encode import Encoder, Record, hash_of, split_of_hash
from corpus.options import BUILDING, READING, Parser, count, print_next, run_command
from corpus.writer import Piece, writing
from files import one_line_errors
from tokens.tokenizer import CharTokenizer, load_tokenizer, tokenizer_meta

SAVE_EVERY_S = 10  # at most this much work is lost when a run is killed
LOG_EVERY_S = 60  # progress in a log file; a terminal shows a bar


@dataclass
class Corpus:
    """Documents to pack."""

    read: Callable  # number of records to pass over -> iterator over the Records after them
    source: str  # in words, the text and its origin
    recipe: dict | None = None  # plain values that the files depend on; None: a killed run is not continued
    n_bytes: int | None = None  # on disk, for the remaining time


def write_dataset(folder, tokenizer, splits, source, shard_tokens=None, *, masked=False, eot_in_rows=False):
    """Pack documents that a script has at hand, replacing the dataset that was there.

    splits        {'train': iterable of documents, 'val': iterable of documents}. A document is a text, with
                  end-of-text between two texts if the tokenizer has one, or a row of ids, written as it is
    source        in words, the text and its origin
    shard_tokens  cut into train_000000.bin, train_000001.bin ... of this many tokens; None: one train.bin
    masked        write .mask files; documents may be pairs (ids, mask), mask is 1 where a token is a target
    eot_in_rows   put end-of-text between rows of ids as well
    returns       the dict in meta.json
    """
    records = (Record(document, f'{split} document {n}', split=split)
               for split, documents in splits.items() for n, document in enumerate(documents))
    encoder = Encoder(tokenizer, eot_in_rows=eot_in_rows)
    return pack(folder, Corpus(lambda start: records, source), encoder, splits=tuple(splits),
                shard_tokens=shard_tokens, masked=masked)


def pack(folder, corpus, encoder, *, splits=('train', 'val'), shard_tokens=None, masked=False) -> dict:
    """Pack a corpus into a dataset folder. With a recipe, the same call continues a run that was killed."""
    layout = dict(shard_tokens=shard_tokens, masked=masked, unique=encoder.clean, recipe=corpus.recipe)
    with writing(folder, encoder.tokenizer, splits, **layout) as writer:
        write_records(writer, corpus, encoder, corpus.read(writer.progress.n_records))
        if writer.empty_split() and encoder.val_fraction and writer.progress.documents:
            print(f'{writer.name}: all documents fell to one split: the last one is cut, '
                  'its end is for validation')
            records = cut_at_end(corpus.read(0), writer.progress.last_taken, encoder.val_fraction)
            writer.recipe = None  # which describes other files
            writer.start_over()
            write_records(writer, corpus, replace(encoder, max_docs=None), records)
        if writer.empty_split():
            writer.recipe = None
            raise ValueError(f'there is no text for the {writer.empty_split()} split: '
                             'give more text, or another --val_fraction')
        meta = writer.publish(corpus.source)

    reasons = [f'{n:,} {reason}' for reason, n in writer.progress.left_out.items()]
    if reasons:
        print(f'{writer.name}: left out: {", ".join(reasons)}')
    for split, entry in meta['splits'].items():
        print(f'{writer.name}/{split}: {entry["tokens"]:,} tokens ({meta["dtype"]}, vocabulary '
              f'{meta["vocab_size"]:,}), {entry["bytes"]:,} bytes, documents: {entry["documents"]:,}')
    return meta


def write_records(writer, corpus, encoder, records):
    """Encode and write all records, and save the progress now and then."""
    from tqdm import tqdm
    progress, saved_s = writer.progress, time.monotonic()
    if progress.documents == encoder.max_docs:
        return
    every_s = 0.1 if sys.stderr.isatty() else LOG_EVERY_S
    bar = tqdm(desc=writer.name, total=corpus.n_bytes, initial=progress.n_read, unit='B', unit_scale=True,
               mininterval=every_s, delay=every_s)
    with bar, closing(encoder.encode_all(records)) as batches:
        for batch in batches:
            for split, pieces in take(writer, encoder, batch).items():
                if pieces:
                    writer.append(split, pieces)
            n_tokens = sum(entry['tokens'] for entry in progress.splits.values())
            bar.set_postfix_str(f'{progress.documents:,} documents, {n_tokens:,} tokens', refresh=False)
            bar.update(progress.n_read - bar.n)
            if progress.documents == encoder.max_docs:
                break
            if time.monotonic() - saved_s > SAVE_EVERY_S:
                writer.save()
                saved_s = time.monotonic()
    writer.save()


def take(writer, encoder, batch):
    """Choose the documents of a batch to write, {split: Pieces}. The progress counts along."""
    progress, eot = writer.progress, encoder.tokenizer.eot
    taken = {split: [] for split in writer.splits}
    for record, piece, value, reason in batch:
        is_document = piece is not None and len(piece.ids)
        if is_document and encoder.clean and not writer.is_new(value):
            reason = 'there before'
        if reason:
            progress.left_out[reason] = progress.left_out.get(reason, 0) + 1
        elif is_document:
            split = record.split or split_of_hash(value, encoder.val_fraction)
            takes_eot = eot is not None and (encoder.eot_in_rows or isinstance(record.text, str))
            if takes_eot and (taken[split] or progress.splits[split]['tokens']):
                taken[split].append(Piece([eot]))
            taken[split].append(piece)
            progress.documents += 1
            progress.last_taken = progress.n_records
        progress.n_records += 1
        progress.n_read = record.n_read
        if progress.documents == encoder.max_docs:
            break
    return taken


def cut_at_end(records, number, val_fraction):
    """Yield the records up to this number for training, but the end of the last one for validation."""
    for n, record in enumerate(records):
        text = record.text
        if n < number or not isinstance(text, str):
            yield record._replace(split='train')
            continue
        wanted = min(int(len(text) * (1 - val_fraction)), len(text) - 1)
        cut = text.rfind('\n', 0, wanted) + 1 or text.find('\n', wanted, len(text) - 1) + 1 or len(text)
        yield record._replace(text=text[:cut], split='train')
        yield record._replace(text=text[cut:], split='val')
        return


# -----------------------------------------------------------------------------
# files of a corpus


def pack_files(args, source):
    """Pack the files that args.input names, with the options of build."""
    files, fields = readers.find_files(args.input, args.format), args.field.split(',')
    tokenizer = None
    if args.tokenizer != 'char':
        tokenizer = load_tokenizer(tokenizer_meta(args.tokenizer, ['char'], args.eot))

    sizes = [readers.n_bytes_of(path) for path, _ in files]
    names = hashlib.sha256()
    for (path, _), size in zip(files, sizes, strict=True):
        names.update(b'%d %b\0' % (size, os.fsencode(os.path.basename(path))))
    formats = sorted({format for _, format in files})
    recipe = {'source': source, 'files': [len(files), sum(sizes), names.hexdigest()], 'format': formats,
              'fields': fields}
    for name in ('encoding', 'val_fraction', 'clean', 'min_chars', 'sample', 'max_docs', 'shard_tokens'):
        recipe[name] = getattr(args, name)

    def read(start):
        documents = readers.read_documents(files, fields=fields, errors=args.errors, encoding=args.encoding,
                                           start=start)
        return (Record(*document) for document in documents)

    corpus = Corpus(read, source, recipe, sum(sizes))
    encoder = Encoder(tokenizer, args.val_fraction, args.clean, args.min_chars, args.sample, args.max_docs,
                      n_threads=args.workers)
    if tokenizer is None:
        if 'blocks' in formats:
            raise ValueError('blocks hold ids, not characters: name the tokenizer that made them')
        characters, n_records = find_characters(corpus, encoder)
        encoder.tokenizer = CharTokenizer(characters)
        # the records after these may hold other characters
        corpus.read = lambda start: itertools.islice(read(start), max(n_records - start, 0))
    recipe['tokenizer'] = encoder.tokenizer.meta()
    pack(args.out, corpus, encoder, shard_tokens=args.shard_tokens, masked='blocks' in formats)


def find_characters(corpus, encoder):
    """Return the characters of the documents to pack, in order, and the number of records they lie in."""
    from tqdm import tqdm
    characters, n_records, n_taken, seen = set(), 0, 0, set()
    with tqdm(desc='characters', total=corpus.n_bytes, unit='B', unit_scale=True, disable=None) as bar:
        for record in corpus.read(0):
            text = encoder.choose(record.text)[0]
            if encoder.max_docs and encoder.clean:
                value = hash_of(text)
                text = '' if value in seen else text
                seen.add(value)
            characters.update(text)
            bar.update(record.n_read - bar.n)
            n_records += 1
            n_taken += bool(text)
            if n_taken == encoder.max_docs:
                break
    if not characters:
        raise ValueError('there is no text in the corpus')
    return ''.join(sorted(characters)), n_records


def name_source(paths):
    """Say in words which files a dataset is made of. What is not UTF-8 in a name becomes U+FFFD."""
    names = [os.path.basename(os.path.normpath(path)) for path in paths]
    names = [os.fsencode(name).decode('utf-8', 'replace') for name in names]
    return names[0] if len(names) == 1 else f'{len(names)} inputs, {names[0]} to {names[-1]}'


def prepare_parquet(folder, doc, repo, revision, hub_folder):
    """Run the prepare script in this folder, with this docstring, of a corpus in Parquet."""
    parser = Parser(doc, None, [*READING, *BUILDING], input=None, format='parquet', out=folder,
                    tokenizer='gpt2', val_fraction=0.0005, shard_tokens=100_000_000)
    args = parser.parse_args()
    source = f'{repo}, from local files'
    if not args.input:
        args.input = hub_files(repo, revision, hub_folder)
        source = f'{repo}, revision {revision}, {hub_folder}'
    pack_files(args, source)
    print_next(args.out, [])


def hub_files(repo, revision, folder):
    """List the Parquet files in a folder on the hub, or on its mirror HF_ENDPOINT, as hf://..."""
    from huggingface_hub import HfFileSystem
    paths, reason = [], 'no .parquet file there'
    try:
        paths = HfFileSystem().ls(f'datasets/{repo}@{revision}/{folder}', detail=False)
    except Exception as error:  # the hub's client and the network below it raise their own
        reason = ' '.join(str(error).split())[:300] or type(error).__name__
    paths = sorted(f'hf://{path}' for path in paths if path.endswith('.parquet'))
    if not paths:
        raise OSError(f'{repo} is out of reach ({reason}): bring the files {folder}/*.parquet of its '
                      f'revision {revision[:12]} here by other means, and name their folder with --input')
    return paths


# -----------------------------------------------------------------------------
# commands


def build(argv):
    """Pack the files of a corpus into a dataset."""
    doc = f'{build.__doc__}\n\n{readers.__doc__}'
    args = Parser(doc, 'python -m corpus.pack build', [*READING, *BUILDING]).parse_args(argv)
    pack_files(args, name_source(args.input))
    print_next(args.out, ['config/quickstart.py'])


def mix_datasets(argv):
    """Mix datasets of one tokenizer into one, with these shares of its tokens, until one of them ends."""
    parser = Parser(mix_datasets.__doc__, 'python -m corpus.pack mix', ['out', 'shard_tokens'])
    parser.add_argument('datasets', metavar='A:0.6,B:0.4', help='as in the setting dataset')
    parser.add_argument('--block_size', type=count, default=1024,
                        help='the shares hold within 1%% in any 1000 windows of this many tokens; '
                        'documents longer than two windows are cut (default: %(default)s)')
    args = parser.parse_args(argv)
    sources, weights = mix.open_sources(args.datasets, args.out)
    documents = {name: mix.mixed_documents(splits, weights, 2 * args.block_size)
                 for name, splits in sources.items()}
    train = sources['train']
    shares = [f'{split.folder.name} {weight:.4g}' for split, weight in zip(train, weights, strict=True)]
    masked = any(split.mask is not None for splits in sources.values() for split in splits)
    write_dataset(args.out, load_tokenizer(train[0].tokenizer), documents, f'mixed: {", ".join(shares)}',
                  args.shard_tokens, masked=masked, eot_in_rows=True)
    print_next(args.out, ['config/quickstart.py'])


def main():
    run_command(__doc__, {'build': build, 'mix': mix_datasets, 'inspect': mix.inspect})


if __name__ == '__main__':
    with one_line_errors():
        main()
