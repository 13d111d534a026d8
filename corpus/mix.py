"""Mix the documents of several datasets, and show the contents of one."""
import sys
from pathlib import Path

import numpy as np

from files import printable
from tokens.dataset import Split, dataset_folders, read_meta
from tokens.tokenizer import load_tokenizer


def open_splits(datasets, out):
    """Open the datasets of a mixture such as 'zhwiki:0.6,news:0.4' that is to be written to the folder `out`.

    returns  ({'train': [Split, ...], 'val': ...}, their weights)
    """
    folders, weights = dataset_folders(datasets)
    splits = {'train': [Split(folder, 'train') for folder in folders]}
    first = splits['train'][0]
    for split in splits['train']:
        if split.tokenizer != first.tokenizer:
            raise ValueError(f'{split.folder} and {first.folder} were packed with different tokenizers: '
                             'pack them with one')
        if split.folder.resolve() == Path(out).resolve():
            raise ValueError(f'--out={out} is one of the datasets to mix: name another folder')
        if split.meta.get('row_tokens'):
            raise ValueError(f'{split.folder} was packed in rows, which a mixed file would cut: '
                             f'mix it in training, --dataset={datasets}')
    if any('val' in split.meta['splits'] for split in splits['train']):
        splits['val'] = [Split(folder, 'val') for folder in folders]
    return splits, weights


def mixed_documents(splits, weights, max_tokens, n_tokens=None):
    """Yield (ids, mask) of documents of several splits, always from the one furthest behind its share.

    max_tokens   longer documents are cut into documents of this many, so that shares hold throughout the file
    n_tokens     stop after this many; a source that ends begins again. None: stop when one source ends
    """
    from tqdm import tqdm
    eot = load_tokenizer(splits[0].tokenizer).eot
    weights = np.array(weights)
    sources = [documents_of(split, max_tokens, eot) for split in splits]
    taken, passes = np.zeros(len(splits), dtype=np.int64), [1] * len(splits)
    total = n_tokens or int(min([split.n_tokens for split in splits] / weights))
    with tqdm(desc=splits[0].split, total=total, unit=' tokens', unit_scale=True, disable=None) as bar:
        while n_tokens is None or taken.sum() < n_tokens:
            k = int(np.argmax(weights * taken.sum() - taken))
            document = next(sources[k], None)
            if document is None:
                if n_tokens is None:
                    return
                passes[k] += 1
                print(f'{splits[k].folder.name}: reading it again, pass {passes[k]}', file=sys.stderr)
                sources[k] = documents_of(splits[k], max_tokens, eot)
                document = next(sources[k])
            taken[k] += len(document[0]) + (eot is not None)
            bar.update(len(document[0]))
            yield document


def documents_of(split, max_tokens, eot):
    """Yield (ids, mask) of a split's documents, without end-of-text; of equal parts if it has no .idx."""
    documents = [(0, split.n_tokens)]
    if split.index.exists():
        documents = zip(*split.documents(), strict=True)
    for offset, length in documents:
        for begin in range(int(offset), int(offset + length), max_tokens):
            end = min(begin + max_tokens, int(offset + length))
            ids = np.concatenate([shard.tokens[max(begin - shard.first, 0):end - shard.first]
                                  for shard in split.shards
                                  if shard.first < end and begin < shard.first + shard.n_tokens])
            if eot is not None and ids[-1] == eot:
                ids, end = ids[:-1], end - 1
            if len(ids):
                yield ids, None if split.mask is None else np.array(split.mask[begin:end])


# -----------------------------------------------------------------------------
# inspect

ORIGINS = {
    'meta.json': '',
    'meta.pkl': ', according to meta.pkl',
    'none': ", by nanoGPT's rules because meta.json is absent",
}


def show_dataset(folder, n_windows):
    meta = read_meta(folder)
    tokenizer = load_tokenizer(meta['tokenizer'])
    print(f'{folder}: {meta["dtype"]}, {meta["tokenizer"]["kind"]} tokenizer of {meta["vocab_size"]:,} tokens'
          f'{ORIGINS[meta["origin"]]}; source: {printable(meta["source"] or "unknown")}')
    for name in meta['splits']:
        split = Split(folder, name)
        print(f'\n{name}: {summary(split, tokenizer)}')
        for n in range(n_windows):
            shard = split.shards[n * len(split.shards) // n_windows]
            start = max(shard.n_tokens - 64, 0) * (n % 7 + 1) // 8
            text = tokenizer.decode(shard.tokens[start:start + 64])
            print(f'{shard.path.name}, tokens {start:,} on: {text!r}')
        split.verify()
        n_known = sum(crc is not None for crc in split.checksums)
        verified = f'{n_known} of {len(split.shards)} shards verified' if n_known else 'none are known'
        print(f'checksums: {verified}')


def summary(split, tokenizer):
    counts = count_ids(split)
    n_bytes = int(counts @ tokenizer.token_bytes())
    documents = 'documents unknown'
    if split.index.exists():
        documents = f'{len(split.documents()[0]):,} documents'
    elif tokenizer.eot is not None:
        documents = f'{counts[tokenizer.eot] + 1:,} documents by their ends'
    targets = ''
    if split.mask is not None:
        targets = f', {np.count_nonzero(split.mask) / max(split.n_tokens, 1):.1%} of them targets'
    bytes_per_token = n_bytes / max(split.n_tokens, 1)
    return (f'{documents}, {split.n_tokens:,} tokens{targets}, {n_bytes:,} bytes, '
            f'{bytes_per_token:.3f} bytes per token, {np.count_nonzero(counts):,} different tokens, '
            f'shards: {len(split.shards)}')


def count_ids(split):
    """Count each id, (V,) int64. Raises ValueError that names shard and offset of a foreign id."""
    counts = np.zeros(split.vocab_size, dtype=np.int64)
    for shard in split.shards:
        for start in range(0, shard.n_tokens, 1 << 20):
            ids = shard.tokens[start:start + (1 << 20)]
            if ids.max() >= split.vocab_size:
                at = int(np.argmax(ids >= split.vocab_size))
                where = f'{shard.path} offset {start + at}'
                raise ValueError(f'{where}: id {ids[at]} is beyond the vocabulary of {split.vocab_size}: '
                                 'the shard was altered or belongs to another tokenizer, prepare it again')
            counts += np.bincount(ids, minlength=split.vocab_size)
    return counts
