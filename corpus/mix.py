"""Mix the documents of several datasets, and show the contents of one."""
from pathlib import Path

import numpy as np

from corpus.options import Parser
from files import printable
from tokens.dataset import Split, dataset_folders, read_meta
from tokens.tokenizer import load_tokenizer


def open_sources(datasets, out):
    """Return ({'train': Splits, 'val': Splits}, weights) of a mixture such as 'zhwiki:0.6,news:0.4'."""
    folders, weights = dataset_folders(datasets)
    sources = {'train': [Split(folder, 'train') for folder in folders]}
    first = sources['train'][0]
    for split in sources['train']:
        if split.tokenizer_meta != first.tokenizer_meta:
            raise ValueError(f'{split.folder} and {first.folder} were packed with different tokenizers: '
                             'pack them with one')
        if split.folder.resolve() == Path(out).resolve():
            raise ValueError(f'--out={out} is one of the datasets to mix: name another folder')
        if split.meta.get('row_tokens'):
            raise ValueError(f'{split.folder} was packed in rows, which a mixed file would cut: '
                             f'mix it in training, --dataset={datasets}')
    if any('val' in split.meta['splits'] for split in sources['train']):
        sources['val'] = [Split(folder, 'val') for folder in folders]
    return sources, weights


def mixed_documents(splits, weights, max_tokens=2048):
    """Yield (ids, mask) of documents, always from the split furthest behind its share, until one ends.

    Documents are cut to max_tokens, so that the shares hold throughout.
    """
    eot = load_tokenizer(splits[0].tokenizer_meta).eot
    sources = [documents_of(split, max_tokens, eot) for split in splits]
    weights, n_taken = np.array(weights), np.zeros(len(splits), dtype=np.int64)
    while True:
        k = int(np.argmax(weights * n_taken.sum() - n_taken))
        document = next(sources[k], None)
        if document is None:
            return
        yield document
        n_taken[k] += len(document[0]) + (eot is not None)


def documents_of(split, max_tokens, eot):
    """Yield (ids, mask) of a split's documents, without end-of-text. Long ones are cut, and at shard ends."""
    documents = [(0, split.n_tokens)]
    if split.index.exists():
        documents = zip(*split.documents(), strict=True)
    for begin, length in documents:
        end = begin + length
        while begin < end:
            shard, start = split.find(begin)
            ids, mask = shard[start:start + min(max_tokens, end - begin)], None
            n_read = len(ids)
            if eot is not None and ids[-1] == eot:
                ids = ids[:-1]
            if split.mask is not None:
                mask = split.mask[begin:begin + len(ids)]
            if len(ids):
                yield ids, mask
            begin += n_read


def inspect(argv):
    """Show what a dataset holds, with pieces of its text, and check that it is complete."""
    parser = Parser(inspect.__doc__, 'python -m corpus.pack inspect')
    parser.add_argument('folder', type=Path, metavar='DIR')
    folder = parser.parse_args(argv).folder
    meta = read_meta(folder)
    tokenizer = load_tokenizer(meta['tokenizer'])
    print(f'{folder}: {meta["dtype"]}, {meta["tokenizer"]["kind"]} tokenizer of '
          f'{meta["vocab_size"]:,} tokens; source: {printable(meta["source"] or "unknown")}')
    for name, entry in meta['splits'].items():
        split = Split(folder, name)
        print(f'\n{name}: {split.n_tokens:,} tokens, shards: {len(split.shards)}')
        if entry['bytes'] is not None:
            print(f'{entry["documents"]:,} documents, {entry["bytes"]:,} bytes, '
                  f'{entry["bytes"] / split.n_tokens:.3f} bytes per token')
        shard = split.shards[0]
        for start in (0, shard.size // 2):
            text = tokenizer.decode(shard[start:start + 64])
            print(f'{shard.path.name}, tokens {start:,} on: {text!r}')
        if split.index.exists():
            split.documents()  # which checks them
        split.verify()
        n_known = sum(crc is not None for crc in split.checksums)
        print(f'checksums verified: {n_known} of {len(split.shards)} shards')
