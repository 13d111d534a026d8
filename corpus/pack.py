"""Turn any corpus into the token files that training reads.

    python -m corpus.pack build --input corpus.jsonl.gz news/ --tokenizer=gpt2 --out=data/mine
    python -m corpus.pack build --input zhwiki.xml.bz2 --tokenizer=data/tokenizers/zh --clean --out=data/zh
    python -m corpus.pack mix zhwiki:0.6,news:0.4 --out=data/mixed
    python -m corpus.pack inspect data/mixed

The hash of a document decides whether it is for validation, so that it stays there when documents are added.
The same command continues a killed run. The files do not depend on the number of threads and kills.
"""
import json
import os
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder
from corpus import mix, readers
from corpus.encode import Encoder, split_by_hash
from corpus.options import OPTIONS, Parser, print_next, read_files, run_command
from corpus.writer import Piece, digest_of, writing
from files import one_line_errors
from tokens.tokenizer import CharTokenizer, load_tokenizer, tokenizer_meta

SAVE_EVERY_S = 10  # at most this much work is lost when a run is killed


def write_dataset(folder, tokenizer, splits, source, shard_tokens=None, *, masked=False, eot_in_rows=False):
    """Pack the documents of a script, replacing any dataset in the folder.

    splits        {'train': iterable of documents, 'val': ...}: texts, between which end-of-text stands, rows
                  of ids, or pairs (ids, mask)
    source        the origin, in words
    """
    documents = (readers.Document(text, f'{split} document {n}', split=split)
                 for split, texts in splits.items() for n, text in enumerate(texts))
    encoder = Encoder(tokenizer, eot_in_rows=eot_in_rows)
    return pack(folder, lambda start: documents, encoder, source, splits=tuple(splits),
                shard_tokens=shard_tokens, masked=masked)


def write_texts(folder, texts, tokenizer, source, val_fraction=0.1):
    """Pack texts with their last characters for validation, as nanoGPT does."""
    n_chars = sum(map(len, texts))
    n_train = int(n_chars * (1 - val_fraction))
    splits = {'train': part_of(texts, 0, n_train), 'val': part_of(texts, n_train, n_chars)}
    write_dataset(folder, tokenizer, splits, source)


def part_of(texts, start, end):
    """Yield the characters from start to end of all texts in sequence, text by text."""
    for text in texts:
        yield text[max(start, 0):max(end, 0)]
        start, end = start - len(text), end - len(text)


def make_tokenizer(name, texts, eot=''):
    """Load a tokenizer by its name; 'char' makes one of the characters of some texts."""
    if name != 'char':
        return load_tokenizer(tokenizer_meta(name, ['char'], eot))
    characters = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise ValueError('there is no text in the corpus')
    return CharTokenizer(''.join(sorted(characters)))


def pack(folder, read, encoder, source, *, splits=('train', 'val'), **options) -> dict:
    """Pack the Documents that read(number to skip) yields. The options are those of Writer."""
    with writing(folder, encoder.tokenizer, splits, **options) as writer:
        write_documents(writer, encoder, read(writer.progress.n_read))
        if writer.empty_split() and encoder.val_fraction and writer.progress.documents:
            print(f'{writer.name}: all documents fell to one split: the last one is cut, '
                  'its end is for validation')
            documents = cut_at_end(read(0), writer.progress.last_taken, encoder.val_fraction)
            writer.recipe = None  # which describes other files
            writer.start_over()
            write_documents(writer, encoder, documents)
        if writer.empty_split():
            writer.recipe = None
            raise ValueError(f'there is no text for the {writer.empty_split()} split: '
                             'give more text, or another --val_fraction')
        meta = writer.publish(source)

    n_left_out = writer.progress.n_read - writer.progress.documents
    if n_left_out:
        print(f'{writer.name}: {n_left_out:,} left out: empty, too short, repeated or not in the sample')
    for split, entry in meta['splits'].items():
        print(f'{writer.name}/{split}: {entry["tokens"]:,} tokens ({meta["dtype"]}, vocabulary '
              f'{meta["vocab_size"]:,}), {entry["bytes"]:,} bytes, documents: {entry["documents"]:,}')
    return meta


def write_documents(writer, encoder, documents):
    """Encode and write all documents, and save the progress at intervals."""
    saved_s = time.monotonic()
    with closing(encoder.encode_all(documents)) as batches:
        for batch in batches:
            write_batch(writer, encoder, batch)
            if time.monotonic() - saved_s > SAVE_EVERY_S:
                writer.save()
                saved_s = time.monotonic()
    writer.save()


def write_batch(writer, encoder, batch):
    progress, eot = writer.progress, encoder.tokenizer.eot
    pieces = {split: [] for split in writer.splits}
    for document, piece, value in batch:
        if len(piece.ids) and (not encoder.clean or writer.is_new(value)):
            split = document.split or split_by_hash(value, encoder.val_fraction)
            is_first = not pieces[split] and not progress.splits[split]['tokens']
            if eot is not None and not is_first and (encoder.eot_in_rows or isinstance(document.text, str)):
                pieces[split].append(Piece([eot]))
            pieces[split].append(piece)
            progress.documents += 1
            progress.last_taken = progress.n_read
        progress.n_read += 1
    for split in pieces:
        if pieces[split]:
            writer.append(split, pieces[split])


def cut_at_end(documents, number, val_fraction):
    """Yield the documents up to this number for training, but the end of the last one for validation."""
    for n, document in enumerate(documents):
        text = document.text
        if n < number or not isinstance(text, str):
            yield document._replace(split='train')
            continue
        wanted = min(int(len(text) * (1 - val_fraction)), len(text) - 1)
        cut = text.rfind('\n', 0, wanted) + 1 or text.find('\n', wanted, len(text) - 1) + 1 or len(text)
        yield document._replace(text=text[:cut], split='train')
        yield document._replace(text=text[cut:], split='val')
        return


# -----------------------------------------------------------------------------
# files of a corpus


def pack_files(args, source):
    """Pack the files that args.input names, with the options of build."""
    files = readers.find_files(args.input, args.format)
    has_blocks = any(format == 'blocks' for _, format in files)
    encoder = Encoder(None, args.val_fraction, args.clean, args.min_chars, args.sample,
                      n_threads=args.workers)
    read = partial(read_files, files, args, max_docs=args.max_docs)
    if has_blocks and args.tokenizer == 'char':
        raise ValueError('blocks hold ids, not characters: name the tokenizer that made them')
    texts = (encoder.choose(document.text) for document in read(0))
    encoder.tokenizer = make_tokenizer(args.tokenizer, texts, args.eot)
    names = []
    for path, format in files:
        name = os.path.basename(path)
        if format == 'blocks':  # all blocks have the same file names
            name = os.path.basename(os.path.dirname(os.path.abspath(path)))
        names.append([name, format, readers.n_bytes_of(path)])
    recipe = {**vars(args), 'source': source, 'files': digest_of(json.dumps(names)),
              'tokenizer': encoder.tokenizer.meta()}
    for name in ('input', 'out', 'errors', 'workers'):
        del recipe[name]
    pack(args.out, read, encoder, source, shard_tokens=args.shard_tokens, masked=has_blocks, recipe=recipe)


def name_source(paths):
    """Name the files of a dataset. Bytes of a name that are not UTF-8 become U+FFFD."""
    names = [os.path.basename(os.path.normpath(path)) for path in paths]
    names = [os.fsencode(name).decode('utf-8', 'replace') for name in names]
    if len(names) == 1:
        return names[0]
    return f'{len(names)} inputs, {names[0]} to {names[-1]}'


def prepare_parquet(folder, doc, repo, revision, hub_folder):
    """Run the prepare script of a corpus in Parquet."""
    args = Parser(doc, None, OPTIONS, input=None, format='parquet', out=folder, tokenizer='gpt2',
                  val_fraction=0.0005, shard_tokens=100_000_000).parse_args()
    source = f'{repo}, from local files'
    if not args.input:
        args.input = hub_files(repo, revision, hub_folder)
        source = f'{repo}, revision {revision}, {hub_folder}'
    pack_files(args, source)
    print_next(args.out, [])


def hub_files(repo, revision, folder):
    """List the Parquet files in a folder on the hub, or on its mirror HF_ENDPOINT, as hf://..."""
    from huggingface_hub import HfFileSystem
    try:
        paths = HfFileSystem().ls(f'datasets/{repo}@{revision}/{folder}', detail=False)
    except Exception as error:  # the hub's client and the network below it raise their own
        reason = ' '.join(str(error).split())[:300] or type(error).__name__
        raise OSError(f'{repo} is out of reach ({reason}): bring the files {folder}/*.parquet of its '
                      f'revision {revision[:12]} here by other means, and name their folder with --input'
                      ) from None
    return sorted(f'hf://{path}' for path in paths if path.endswith('.parquet'))


# -----------------------------------------------------------------------------
# commands


def build(argv):
    """Pack the files of a corpus into a dataset."""
    args = Parser(build.__doc__, 'python -m corpus.pack build', OPTIONS).parse_args(argv)
    pack_files(args, name_source(args.input))
    print_next(args.out, ['config/quickstart.py'])


def mix_datasets(argv):
    """Mix datasets of one tokenizer into one, with these shares of its tokens, until one of them ends.

    Documents longer than two windows of 1024 tokens are cut, so that the shares hold throughout.
    """
    from tqdm import tqdm
    parser = Parser(mix_datasets.__doc__, 'python -m corpus.pack mix', ['out', 'shard_tokens'])
    parser.add_argument('datasets', metavar='A:0.6,B:0.4', help='as in the setting dataset')
    args = parser.parse_args(argv)
    sources, weights = mix.open_sources(args.datasets, args.out)
    documents = {}
    for name, splits in sources.items():
        documents[name] = tqdm(mix.mixed_documents(splits, weights), name, unit=' documents', disable=None)
    train = sources['train']
    shares = [f'{split.folder.name} {weight:.4g}' for split, weight in zip(train, weights, strict=True)]
    masked = any(split.mask is not None for splits in sources.values() for split in splits)
    write_dataset(args.out, load_tokenizer(train[0].tokenizer_meta), documents, f'mixed: {", ".join(shares)}',
                  args.shard_tokens, masked=masked, eot_in_rows=True)
    print_next(args.out, ['config/quickstart.py'])


def main():
    run_command(__doc__, {'build': build, 'mix': mix_datasets, 'inspect': mix.inspect})


if __name__ == '__main__':
    with one_line_errors():
        main()
