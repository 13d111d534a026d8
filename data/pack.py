"""Documents to the token files that training reads.

    from data.pack import write_dataset
    write_dataset('data/mine', tokenizer, {'train': ['one document', 'another'], 'val': ['a third']}, source='my notes')

writes data/mine/train.bin, train.idx, val.bin, val.idx and, last, meta.json, and prints what they hold. Documents stream through:
memory holds one at a time.
"""
import json
import os
import re
import shutil
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np

# -----------------------------------------------------------------------------
# reading

def read_text(path):
    """The text of a UTF-8 file, line ends as they are. Raises ValueError naming file and line where it is not UTF-8."""
    data = Path(path).read_bytes()
    try:
        return data.decode('utf-8-sig')  # a byte order mark is not text
    except UnicodeDecodeError as error:
        line = error.object.count(b'\n', 0, error.start) + 1
        raise ValueError(f'{path}, line {line}: not UTF-8 ({error.reason}): convert the file to UTF-8') from None

# -----------------------------------------------------------------------------
# writing

def write_dataset(folder, tokenizer, splits, source, shard_tokens=None):
    """Pack documents into a dataset folder, replacing the dataset that was there.

    tokenizer     of data.tokenizer
    splits        {'train': iterable of documents, 'val': iterable of documents}. A document is a text, and the tokenizer's
                  eot, if it has one, is put between texts; or it is a row of ids, which is written as it stands
    source        in words, what the text is and where it is from
    shard_tokens  cut into train_000000.bin, train_000001.bin ... of so many tokens; None: one train.bin
    returns       the dict in meta.json (data.tokenizer.read_meta says its shape)
    raises        ValueError for an id outside the vocabulary or a split without tokens; the old dataset then stays
    """
    folder = Path(folder)
    work = folder / '.packing'
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    work.mkdir(parents=True)
    dtype = 'uint16' if tokenizer.vocab_size <= 65536 else 'uint32'
    try:
        entries = {name: write_split(work, name, documents, tokenizer, dtype, shard_tokens)
                   for name, documents in splits.items()}
        meta = {'format': 1, 'dtype': dtype, 'vocab_size': tokenizer.vocab_size, 'tokenizer': tokenizer.meta(),
                'source': source, 'splits': entries}
        publish(work, folder, meta)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for name, split in entries.items():
        print(f'{folder.resolve().name}/{name}: {split["tokens"]:,} tokens ({dtype}, vocabulary {tokenizer.vocab_size:,}), '
              f'{split["bytes"]:,} bytes, documents: {split["documents"]:,}')
    return meta


def write_split(work, name, documents, tokenizer, dtype, shard_tokens):
    """Write the .bin and .idx files of one split into the folder work; returns the split's entry in meta.json."""
    from tqdm import tqdm
    assert name in ('train', 'val'), name
    n_tokens = n_bytes = n_documents = 0
    token_bytes = tokenizer.token_bytes()
    bar = tqdm(desc=name, unit=' tokens', unit_scale=True, disable=None)
    with bar, open(work / f'{name}.idx', 'wb') as idx, closing(Shards(work, name, dtype, shard_tokens)) as shards:
        for document in documents:
            ids = document_ids(document, tokenizer, f'{name} document {n_documents}')
            if len(ids) == 0:
                continue
            if n_tokens and tokenizer.eot is not None and isinstance(document, str):
                shards.write(np.array([tokenizer.eot]))
                n_tokens += 1
            idx.write(np.array([n_tokens, len(ids)], dtype='<i8').tobytes())  # offset, length
            shards.write(ids)
            n_tokens += len(ids)
            n_bytes += int(token_bytes[ids].sum())
            n_documents += 1
            bar.update(len(ids))
        sync(idx)
    if n_tokens == 0:
        raise ValueError(f'there is no text for the {name} split: give more text, or another val_fraction')
    return {'tokens': n_tokens, 'bytes': n_bytes, 'documents': n_documents, 'shards': shards.entries}


def document_ids(document, tokenizer, where):
    """(n,) ids of a document, all of them in the vocabulary."""
    ids = tokenizer.encode_array(document) if isinstance(document, str) else np.asarray(document)
    if ids.size == 0:
        return np.zeros(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in 'iu':
        raise ValueError(f'{where} has shape {ids.shape} and dtype {ids.dtype}: a row of integer token ids is needed')
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        position = int(np.argmax((ids < 0) | (ids >= tokenizer.vocab_size)))
        raise ValueError(f'{where} holds token id {ids[position]} at position {position}, '
                         f'outside the vocabulary of {tokenizer.vocab_size} tokens')
    return ids


class Shards:
    """The .bin files of one split, each full before the next begins."""
    def __init__(self, folder, name, dtype, shard_tokens):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.dtype = np.dtype(dtype).newbyteorder('<')
        self.entries = []  # for meta.json
        self.file = None

    def write(self, ids):
        while len(ids):  # a document may run on into the next shard
            if self.file is None:
                file = f'{self.name}_{len(self.entries):06d}.bin' if self.shard_tokens else f'{self.name}.bin'
                self.entries.append({'file': file, 'tokens': 0, 'crc32': 0})
                self.file = open(self.folder / file, 'wb')
            entry = self.entries[-1]
            room = self.shard_tokens - entry['tokens'] if self.shard_tokens else len(ids)
            data = ids[:room].astype(self.dtype).tobytes()
            self.file.write(data)
            entry['tokens'] += len(ids[:room])
            entry['crc32'] = zlib.crc32(data, entry['crc32'])
            ids = ids[room:]
            if entry['tokens'] == self.shard_tokens:
                self.close()

    def close(self):
        if self.file is not None:
            sync(self.file)
            self.file.close()
            self.file = None

# -----------------------------------------------------------------------------
# publishing

STALE = re.compile(r'(train|val)(_\d+)?\.(bin|mask|idx)|meta\.pkl')


def publish(work, folder, meta):
    """Put the new files in place of the old. At no moment does the folder pass for a dataset that it is not: until the
    last step its meta.json says so, and read_meta refuses it."""
    write_json(work / 'meta.json', {'format': 1, 'unfinished': True}, folder)
    for path in folder.iterdir():
        if STALE.fullmatch(path.name):
            path.unlink()
    for path in work.iterdir():
        os.replace(path, folder / path.name)
    sync_folder(folder)
    write_json(work / 'meta.json', meta, folder)


def write_json(path, value, folder):
    """Write the file, then move it into folder."""
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=1)
        sync(file)
    os.replace(path, folder / path.name)
    sync_folder(folder)


def sync(file):
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder):
    """Make renames in a folder survive a power cut. Windows has no way to ask for it."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
