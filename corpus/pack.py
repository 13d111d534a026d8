"""Any corpus to the token files that training reads.

    python -m corpus.pack build --input corpus.jsonl.gz news/ --tokenizer gpt2 --out data/mine
    python -m corpus.pack build --input zhwiki.xml.bz2 --field title,text --tokenizer data/tokenizers/zh --clean --out data/zhwiki
    python -m corpus.pack mix zhwiki:0.6,news:0.4 --out data/mixed
    python -m corpus.pack inspect data/mixed

build reads what corpus/readers.py lists, tokenizes on all cores and writes train.bin (or train_000000.bin and so on with
--shard_tokens), train.idx, the same for val, and meta.json last. The hash of each document decides whether it is for validation, so that it
stays where it is when documents are added. Documents stream through: memory holds a few megabytes of them a core, however large
the corpus. A run that was killed is continued by the same command. The files are the same byte for byte, however many
workers there were and however often it was killed.

    from corpus.pack import write_dataset
    write_dataset('data/mine', tokenizer, {'train': ['one document', 'another'], 'val': ['a third']}, source='my notes')

does so with documents and splits that a script has at hand. A script that packs on several cores needs an
`if __name__ == '__main__'`, since each worker imports it.

Until all is written it lies in .packing below the dataset's folder. With it lies progress.json: how far the corpus was read and
how much of each file that makes. What a killed run wrote past that is cut off, and written again.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter, deque, namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder
from corpus import old_readers as formats
from corpus.old_readers import Block, find_files
from files import one_line_errors
from tokens.dataset import id_dtype, read_meta
from tokens.tokenizer import GPT2_META, CharTokenizer, load_tokenizer, tokenizer_meta

# -----------------------------------------------------------------------------
# encoding: documents to ids, on all cores

def in_batches(blocks):
    """Lists of blocks that a worker is given at a time: one of about 1 MiB, or small text files together."""
    batch, size = [], 0
    for block in blocks:
        batch.append(block)
        size += block.size + 1000
        if block.format != 'text' or size > formats.BLOCK_BYTES // 2:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def given(documents, name=''):
    """Blocks of documents that a script has at hand: texts, rows of ids, or pairs (ids, mask)."""
    place = 0
    for data, size, after, _, _ in formats.grouped(documents, len, 0):
        yield Block(f'{name} document'.strip(), 'given', data, size, (0, place, 0), (0, after, 0), 0)
        place = after


def hash_of(data, purpose=b''):
    """64 bits of a document."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=purpose).digest(), 'big')


def split_by_hash(text, val_fraction):
    """'train' or 'val'. The text alone decides: not its place, nor what else there is; and equal texts are never in both."""
    return 'val' if hash_of(text.encode('utf-8', 'surrogatepass')) < val_fraction * 2 ** 64 else 'train'


CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]')  # all but tab and line feed, and the byte order mark


def cleaned(text):
    """NFC, line ends as line feeds, no control characters, no white space around."""
    text = text.replace('\r\n', '\n').replace('\r', '\n')
    return unicodedata.normalize('NFC', CONTROL.sub('', text)).strip()


# what becomes of a batch of documents: all ids in a row, the eot before a text among them; of each document its length, whether eot
# stands before it, its bytes and its hash; mask (None: all are targets); Counter of what was left out, and why
Encoded = namedtuple('Encoded', 'ids lengths leads n_bytes hashes mask left_out')


class Encoder:
    """Blocks of documents to ids.

    val_fraction   share of the documents for validation, by split_by_hash; None: the splits are given
    fields, errors   as in corpus.readers.blocks
    clean          normalize texts (see cleaned); pack_documents then takes each text once
    min_chars      leave shorter texts out
    sample         share of the texts to keep; the hash of each decides
    eot_in_rows    put eot between rows of ids, too
    """

    def __init__(self, tokenizer, val_fraction=None, fields=('text',), errors='strict', clean=False, min_chars=1, sample=1.0,
                 eot_in_rows=False):
        self.tokenizer, self.val_fraction, self.fields, self.errors = tokenizer, val_fraction, fields, errors
        self.clean, self.min_chars, self.sample, self.eot_in_rows = clean, min_chars, sample, eot_in_rows
        self.options = dict(val_fraction=val_fraction, fields=list(fields), clean=clean, min_chars=min_chars, sample=sample)
        self.dtype = id_dtype(tokenizer.vocab_size)
        self.token_bytes = tokenizer.token_bytes()

    def __call__(self, blocks):
        """Encoded of all documents of some blocks."""
        eot, found, left_out = [] if self.tokenizer.eot is None else [self.tokenizer.eot], [], Counter()
        for block in blocks:
            documents = block.data if block.format == 'given' else formats.parse(block, self.fields, self.errors)
            for n, document in enumerate(documents, block.begin[1]):
                if isinstance(document, str):
                    document = self.chosen(document, left_out)
                    ids, data, mask = self.tokenizer.encode_array(document), document.encode('utf-8', 'surrogatepass'), None
                    lead, n_bytes = eot, len(data)
                else:
                    ids, mask = document if isinstance(document, tuple) else (document, None)
                    ids = checked_row(ids, self.tokenizer, f'{block.path} {n}' if block.format == 'given' else f'{block.path}, row {n}')
                    lead, n_bytes, data = eot if self.eot_in_rows else [], int(self.token_bytes[ids].sum()), ids.tobytes()
                if len(ids):
                    found.append((lead, ids, mask, n_bytes, hash_of(data)))
        if not found:
            return Encoded(*[np.zeros(0, np.int64)] * 5, None, left_out)
        leads, rows, masks, n_bytes, hashes = zip(*found)
        ids = np.concatenate([piece for pair in zip(leads, rows) for piece in pair if len(piece)], dtype=self.dtype, casting='unsafe')
        mask = None if all(mask is None for mask in masks) else np.concatenate([
            piece for lead, row, mask in zip(leads, rows, masks)
            for piece in (np.ones(len(lead)), np.ones(len(row)) if mask is None else mask)], dtype=np.uint8, casting='unsafe')
        return Encoded(ids, np.array([len(row) for row in rows]), np.array([len(lead) for lead in leads]), np.array(n_bytes),
                       np.array(hashes, dtype=np.uint64), mask, left_out)

    def chosen(self, text, left_out):
        """The text to encode; '' where it is left out."""
        if self.clean:
            text = cleaned(text)
        if len(text) < self.min_chars:
            left_out['too short'] += bool(text)
        elif self.sample < 1 and hash_of(text.encode('utf-8', 'surrogatepass'), b'sample') >= self.sample * 2 ** 64:
            left_out['not in the sample'] += 1
        else:
            return text
        return ''


def checked_row(ids, tokenizer, where):
    """(n,) ids as an array, all of them in the vocabulary."""
    ids = np.asarray(ids)
    if ids.size == 0:
        return np.zeros(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in 'iu':
        raise ValueError(f'{where} has shape {ids.shape} and dtype {ids.dtype}: a row of integer token ids is needed')
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        position = int(np.argmax((ids < 0) | (ids >= tokenizer.vocab_size)))
        raise ValueError(f'{where} holds token id {ids[position]} at position {position}, '
                         f'outside the vocabulary of {tokenizer.vocab_size} tokens')
    return ids.astype(np.int64)


def encode_in_order(encoder, batches, workers):
    """(last block, Encoded) of every batch, in order, with at most two batches a worker under way."""
    if workers == 1:
        for batch in batches:
            yield batch[-1], encoder(batch)
        return
    # not by fork, which copies whatever lock another thread may hold
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), start_worker,
                               (encoder.tokenizer.meta(), {**encoder.options, 'errors': encoder.errors}))
    under_way = deque()
    try:
        for batch in batches:
            under_way.append((batch[-1]._replace(data=None), pool.submit(encode, batch)))
            if len(under_way) > 2 * workers:
                last, encoded = under_way.popleft()
                yield last, encoded.result()
        for last, encoded in under_way:
            yield last, encoded.result()
    except BrokenProcessPool:
        raise OSError(f'one of {workers} workers was killed, for want of memory perhaps: run this again, it continues, '
                      'with fewer --workers if need be') from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(tokenizer_meta, options):
    """In a new worker, before its first batch. It makes its own tokenizer: to send one along would hang, by a flaw in Python,
    where a worker dies while it starts."""
    global worker_encoder
    worker_encoder = Encoder(Characters() if tokenizer_meta is None else load_tokenizer(tokenizer_meta), **options)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one says what is to be said

    def end_with_parent():  # a worker whose parent was killed would wait for work for ever
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def encode(batch):
    return worker_encoder(batch)


def n_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


class Characters:
    """Stands for a tokenizer where it is first to be found out which characters there are: a document's ids are its code points, each once."""
    vocab_size, eot = sys.maxunicode + 1, None

    def encode_array(self, text):
        return np.array(sorted(map(ord, set(text))))

    def token_bytes(self):
        return np.zeros(self.vocab_size, dtype=np.int8)

    def meta(self):
        return None


class Seen:
    """The hashes of the documents taken so far, on disk: memory holds 64 MB of them, however many there are.

    n_documents   of an earlier run, to forget what it saw after its progress was saved
    """

    def __init__(self, path, n_documents=0):
        self.database = sqlite3.connect(path)  # '' is a file of its own that goes with it
        for pragma in ('cache_size=-64000', 'synchronous=off', 'locking_mode=exclusive'):
            self.database.execute(f'pragma {pragma}')
        self.database.execute('create table if not exists seen (hash integer primary key, document integer)')
        self.database.execute('delete from seen where document >= ?', (n_documents,))
        self.database.commit()

    def is_new(self, hashes, n_documents):
        """(n,) bool: which of the documents are there for the first time; n_documents were taken before them."""
        new = np.zeros(len(hashes), dtype=bool)
        for i, value in enumerate(hashes.view(np.int64).tolist()):
            new[i] = self.database.execute('insert or ignore into seen values (?, ?)', (value, n_documents)).rowcount
            n_documents += int(new[i])
        return new


def kept_documents(encoder, blocks, workers, progress, seen=None, max_docs=None):
    """(last block, Encoded, (n,) bool which of its documents are taken) of every batch; progress counts along."""
    left = Counter(progress['left_out'])
    for last, encoded in encode_in_order(encoder, in_batches(blocks), workers):
        keep = np.ones(len(encoded.lengths), dtype=bool)
        if seen is not None:
            keep = seen.is_new(encoded.hashes, progress['documents'])
            encoded.left_out['there before'] += len(keep) - int(keep.sum())
        if max_docs is not None:
            keep &= np.cumsum(keep) <= max_docs - progress['documents']
        left += encoded.left_out
        progress.update(documents=progress['documents'] + int(keep.sum()), position=last.after, left_out=dict(left))
        yield last, encoded, keep
        if progress['documents'] == max_docs:
            return


def selected(encoded, keep):
    """What SplitFiles.write takes, of some of the documents."""
    spans = encoded.lengths + encoded.leads
    tokens = slice(None) if keep.all() else np.repeat(keep, spans)
    lengths = encoded.lengths[keep]
    return (encoded.ids[tokens], np.cumsum(spans[keep]) - lengths, lengths, int(encoded.n_bytes[keep].sum()),
            None if encoded.mask is None else encoded.mask[tokens])

# -----------------------------------------------------------------------------
# packing

IDX_DTYPE = np.dtype('<i8')
SAVE_EVERY_S = 10  # that much work is lost when a run is killed


def write_dataset(folder, tokenizer, splits, source, shard_tokens=None, masked=False, eot_in_rows=False):
    """Pack documents into a dataset folder, replacing the dataset that was there.

    tokenizer     of tokens.tokenizer
    splits        {'train': iterable of documents, 'val': iterable of documents}. A document is a text, and the tokenizer's
                  eot, if it has one, is put between texts; or it is a row of ids, which is written as it stands
    source        in words, what the text is and where it is from
    shard_tokens  cut into train_000000.bin, train_000001.bin ... of so many tokens; None: one train.bin
    masked        write .mask files; documents may be pairs (ids, mask), mask is 1 where a token is a target
    eot_in_rows   put eot between rows of ids, too
    returns       the dict in meta.json (tokens.dataset.read_meta says its shape)
    raises        ValueError for an id outside the vocabulary or a split without tokens; the old dataset then stays
    """
    blocks = (block for name, documents in splits.items() for block in given(documents, name))
    return pack(folder, Encoder(tokenizer, eot_in_rows=eot_in_rows), list(splits), lambda start: blocks, source, shard_tokens, masked=masked)


def pack_documents(folder, encoder, blocks, source, shard_tokens=None, max_docs=None, workers=None, recipe=None, sizes=None, masked=False):
    """Pack a corpus into a dataset folder, on all cores; continue if an earlier run was killed.

    blocks        function: where a block begins -> iterator over the blocks from there on, at every call the same
    max_docs      take only so many documents; None: all
    workers       processes that tokenize, 1: this one; None: one a core. The files do not depend on it
    recipe        dict of plain values that the documents depend on. With another one than the killed run had, nothing is continued
    sizes         bytes on disk of each file, for the time left; None: unknown
    raises        ValueError, OSError; what was done up to then is kept, and continued by the same call
    the rest      as in write_dataset
    """
    recipe = {'source': source, **(recipe or {}), **encoder.options, 'tokenizer': encoder.tokenizer.meta(), 'shard_tokens': shard_tokens,
              'max_docs': max_docs}
    return pack(folder, encoder, ['train', 'val'], blocks, source, shard_tokens, workers or n_cores(), recipe, max_docs, sizes, masked)


def pack(folder, encoder, names, blocks, source, shard_tokens, workers=1, recipe=None, max_docs=None, sizes=None, masked=False):
    """What both of them do; with recipe=None no progress is kept."""
    assert {'train'} <= set(names) <= {'train', 'val'}, names
    folder, work = Path(folder), Path(folder) / '.packing'
    work.mkdir(parents=True, exist_ok=True)
    with only_run(folder):
        keep = recipe is not None
        try:
            progress = read_progress(work, recipe)
            if 'meta' not in progress:
                splits = write_splits(work, encoder, names, blocks, shard_tokens, workers, progress, max_docs, sizes, masked)
                empty = [name for name, split in splits.items() if split['tokens'] == 0]
                if empty:
                    keep = False  # there is nothing to continue
                    raise ValueError(f'there is no text for the {empty[0]} split: give more text, or another --val_fraction')
                progress['meta'] = {'format': 1, 'dtype': encoder.dtype.name, 'vocab_size': encoder.tokenizer.vocab_size,
                                    'tokenizer': encoder.tokenizer.meta(), 'source': source, 'splits': splits}
                if keep:
                    write_json(work / 'progress.json', progress)
            meta = progress['meta']
            publish(work, folder, meta, masked)
            keep = False
        except (OSError, sqlite3.OperationalError) as error:
            if isinstance(error, OSError) and (error.errno is None or error.filename):
                raise  # it says where
            again = 'make room and run this again' + (', it continues' if keep else '')
            raise OSError(f'{folder} cannot be written ({getattr(error, "strerror", None) or error}): {again}') from error
        finally:
            if not keep:
                shutil.rmtree(work, ignore_errors=True)
    if progress['left_out']:
        print(f'{folder.resolve().name}: left out: {", ".join(f"{n:,} {why}" for why, n in progress["left_out"].items() if n) or "nothing"}')
    for name, split in meta['splits'].items():
        print(f'{folder.resolve().name}/{name}: {split["tokens"]:,} tokens ({meta["dtype"]}, vocabulary {meta["vocab_size"]:,}), '
              f'{split["bytes"]:,} bytes, documents: {split["documents"]:,}')
    return meta


def write_splits(work, encoder, names, blocks, shard_tokens, workers, progress, max_docs, sizes, masked):
    """Write the files of all splits, from where progress stands; returns the splits' entries in meta.json."""
    name, began = work.parent.resolve().name, time.monotonic()
    files = {split: SplitFiles(work, split, encoder.dtype, shard_tokens, masked, progress['splits'].get(split)) for split in names}
    seen = Seen(work / 'seen.sqlite', progress['documents']) if encoder.clean else None
    if progress['documents']:
        print(f'{name}: continuing after {progress["documents"]:,} documents', flush=True)

    def count_tokens():
        return sum(split.entry['tokens'] for split in files.values())
    n_shards, n_before, saved = len(files['train'].entry['shards']), count_tokens(), began
    bar, update_bar = progress_bar(name, progress, max_docs, sizes)
    batches_done = kept_documents(encoder, blocks(tuple(progress['position'])), workers, progress, seen, max_docs)
    try:
        for last, encoded, keep in batches_done:
            of_split = {'val': encoded.hashes < encoder.val_fraction * 2 ** 64} if encoder.val_fraction is not None else {
                'val': np.full(len(keep), last.path.startswith('val '))}
            of_split['train'] = ~of_split['val']
            for split in names:
                if (keep & of_split[split]).any():
                    files[split].write(*selected(encoded, keep & of_split[split]))
            now, n_tokens = time.monotonic(), count_tokens()
            rate = (f'{progress["documents"]:,} documents, {n_tokens / 1e6:,.1f}M tokens, '
                    f'{(n_tokens - n_before) / (now - began) / 1e6:.2f}M a second')
            update_bar(last, rate, and_print=len(files['train'].entry['shards']) > n_shards > 0)
            n_shards = len(files['train'].entry['shards'])
            if progress['recipe'] is not None and now - saved > SAVE_EVERY_S:
                if seen is not None:
                    seen.database.commit()
                progress['splits'] = {split: file.synced() for split, file in files.items()}
                write_json(work / 'progress.json', progress)
                saved = now
    finally:
        bar.close()
        batches_done.close()  # ends the workers
        for file in files.values():
            file.close()
        if seen is not None:
            seen.database.close()
    return {split: file.entry for split, file in files.items()}


def progress_bar(name, progress, max_docs, sizes):
    """A bar of the bytes on disk that were read, or of the documents where it is their number that is known.

    returns   tqdm, and a function: (last block, rate in words, whether to print a line too) -> None
    """
    from tqdm import tqdm
    of_bytes, began = sizes is not None and max_docs is None, time.monotonic()
    before = np.cumsum([0, *(sizes or [])])

    def done(position, n_read):
        return int(before[position[0]]) + n_read if of_bytes else progress['documents']
    first, total = done(progress['position'], 0), int(before[-1]) if of_bytes else max_docs
    bar = tqdm(desc=name, initial=first, total=total, unit='B' if of_bytes else ' documents', unit_scale=True, disable=None)

    def update(last, rate, and_print=False):
        n = done(last.after, last.n_read)
        bar.set_postfix_str(rate, refresh=False)
        bar.update(n - bar.n)
        if and_print:  # for the log of a job, which has no bar
            eta_s = (total - n) * (time.monotonic() - began) / (n - first) if total and n > first else None
            bar.write(f'{name}: {rate}' + ('' if eta_s is None else f', {eta_s // 3600:.0f} h {eta_s % 3600 // 60:02.0f} min left'))
            sys.stdout.flush()
    return bar, update


class SplitFiles:
    """The files of one split: the .bin files, each full before the next begins, and the .idx.

    entry   what meta.json says of the split; of an entry that was saved with the files in sync, the files are continued
    """

    def __init__(self, work, name, dtype, shard_tokens, masked=False, entry=None):
        self.work, self.name, self.dtype, self.shard_tokens = work, name, dtype, shard_tokens
        self.entry = entry or {'tokens': 0, 'bytes': 0, 'documents': 0, 'shards': []}
        self.idx = self.continued(f'{name}.idx', self.entry['documents'] * IDX_DTYPE.itemsize * 2)
        self.mask = self.continued(f'{name}.mask', self.entry['tokens']) if masked else None
        shard = self.entry['shards'][-1] if self.entry['shards'] else None
        full = shard is None or shard['tokens'] == shard_tokens
        self.bin = None if full else self.continued(shard['file'], shard['tokens'] * dtype.itemsize)

    def continued(self, name, size):
        """A file of the folder, open to be written from size on."""
        file = open(self.work / name, 'r+b' if size else 'wb')
        if file.seek(0, os.SEEK_END) < size:
            raise OSError(f'{file.name} is shorter than {size} bytes, which were there already: delete {self.work} to start over')
        file.truncate(size)
        file.seek(size)
        return file

    def write(self, ids, offsets, lengths, n_bytes, mask=None):
        """ids, and where in them the documents are. A document may run on into the next shard."""
        assert mask is None or self.mask is not None
        if self.entry['tokens'] == 0:  # there is nothing that eot would part the first document from
            ids, offsets, mask = ids[offsets[0]:], offsets - offsets[0], None if mask is None else mask[offsets[0]:]
        if self.mask is not None:
            self.mask.write((np.ones(len(ids), dtype=np.uint8) if mask is None else mask).tobytes())
        self.idx.write(np.stack([offsets + self.entry['tokens'], lengths], axis=1).astype(IDX_DTYPE).tobytes())
        self.entry['tokens'] += len(ids)
        self.entry['bytes'] += n_bytes
        self.entry['documents'] += len(offsets)
        while len(ids):
            if self.bin is None:
                file = f'{self.name}_{len(self.entry["shards"]):06d}.bin' if self.shard_tokens else f'{self.name}.bin'
                self.entry['shards'].append({'file': file, 'tokens': 0, 'crc32': 0})
                self.bin = self.continued(file, 0)
            shard = self.entry['shards'][-1]
            here = ids[:self.shard_tokens - shard['tokens']] if self.shard_tokens else ids
            data = here.tobytes()
            self.bin.write(data)
            shard['crc32'] = zlib.crc32(data, shard['crc32'])
            shard['tokens'] += len(here)
            ids = ids[len(here):]
            if shard['tokens'] == self.shard_tokens:
                close(self.bin)
                self.bin = None

    def synced(self):
        """entry, when the files hold all that it says."""
        for file in self.open_files():
            sync(file)
        return self.entry

    def open_files(self):
        return [file for file in (self.idx, self.mask, self.bin) if file is not None]

    def close(self):
        for file in self.open_files():
            close(file)

# -----------------------------------------------------------------------------
# a run that was killed

def read_progress(work, recipe):
    """Where an unfinished run of this recipe stands, or the beginning, with nothing of an earlier run left."""
    path = work / 'progress.json'
    if recipe is not None and path.exists():
        recipe, progress = json.loads(json.dumps(recipe)), json.loads(path.read_text(encoding='utf-8'))
        had = progress['recipe']
        other = [f'{key} {short(had.get(key))} instead of {short(recipe.get(key))}' for key in {**had, **recipe}
                 if had.get(key) != recipe.get(key)]
        if not other:
            return progress
        raise ValueError(f'{work} holds an unfinished run with {" and ".join(other)}: continue it with the same, '
                         'or delete that folder to start over')
    for left in work.iterdir():
        left.unlink()
    return beginning(recipe)


def beginning(recipe=None):
    return {'recipe': recipe, 'position': (0, 0, 0), 'documents': 0, 'left_out': {}, 'splits': {}}


def short(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f'{text[:60]}...'


@contextmanager
def only_run(folder):
    """A second run into the same folder, while this one lasts, ends with one line."""
    try:
        import fcntl
    except ImportError:  # Windows has no lock that a killed run lets go of by itself
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f'{folder}: another run is packing into this folder: wait for it, or stop it') from None
    except OSError:  # a file system without locks, as some clusters have
        pass
    try:
        yield
    finally:
        os.close(descriptor)

# -----------------------------------------------------------------------------
# publishing

STALE = re.compile(r'(train|val)(_\d+)?\.(bin|mask|idx)|meta\.pkl')


def publish(work, folder, meta, masked):
    """Put the new files in place of the old. At no moment does the folder pass for a dataset that it is not: until the
    last step its meta.json says so, and read_meta refuses it. Killed in the middle, it can be done again."""
    write_json(folder / 'meta.json', {'format': 1, 'unfinished': True}, work)
    new = [f'{name}{suffix}' for name in meta['splits'] for suffix in ('.idx', '.mask')[:1 + masked]]
    new += [shard['file'] for split in meta['splits'].values() for shard in split['shards']]
    for file in new:
        if (work / file).exists():
            os.replace(work / file, folder / file)
    for path in folder.iterdir():
        if STALE.fullmatch(path.name) and path.name not in new:
            path.unlink()
    sync_folder(folder)
    write_json(folder / 'meta.json', meta, work)


def write_json(path, value, work=None):
    """Write a whole file or none; work is the folder, on the same disk, where it is written first."""
    part = (work or path.parent) / f'{path.name}.new'
    with open(part, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        sync(file)
    os.replace(part, path)
    sync_folder(path.parent)


def sync(file):
    file.flush()
    os.fsync(file.fileno())


def close(file):
    sync(file)
    file.close()


def sync_folder(folder):
    """Make renames in a folder survive a power cut. Windows has no way to ask for it."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

# -----------------------------------------------------------------------------
# build

def pack_files(out, files, tokenizer, source, args, recipe=None, sizes=None):
    """Pack the files of a corpus; args holds the options as build's command line names them.

    files      as corpus.readers.find_files returns them
    tokenizer  'char' stands for one token for each character that there is
    sizes      bytes of each file; None: ask the disk
    """
    fields = args.field.split(',')
    options = dict(val_fraction=args.val_fraction, fields=fields, errors=args.errors, clean=args.clean, min_chars=args.min_chars,
                   sample=args.sample)
    sizes = sizes or [formats.n_bytes_of(path) for path, _ in files]
    digest = hashlib.sha256(json.dumps([[os.path.basename(path), size] for (path, _), size in zip(files, sizes)]).encode()).hexdigest()
    recipe = {**(recipe or {}), 'files': [len(files), sum(sizes), digest], 'format': sorted({format for _, format in files})}
    workers = max(1, min(args.workers, sum(sizes) // MIN_BYTES_A_WORKER))

    def read(start):
        return formats.blocks(files, fields, args.errors, start)
    try:
        if tokenizer == 'char':
            tokenizer = CharTokenizer(find_characters(Encoder(Characters(), **options), read, workers, args.max_docs, sizes))
        pack_documents(out, Encoder(tokenizer, **options), read, source, args.shard_tokens, args.max_docs, workers, recipe, sizes,
                       masked='blocks' in recipe['format'])
    except KeyboardInterrupt:
        print('interrupted: the same command continues it', file=sys.stderr)
        sys.exit(130)


MIN_BYTES_A_WORKER = 4 << 20  # a process takes a second to start


def find_characters(encoder, read, workers, max_docs, sizes):
    """Every character of the documents that will be packed, in order."""
    progress, seen = beginning(), Seen('') if encoder.clean else None
    bar, update_bar = progress_bar('characters', progress, max_docs, sizes)
    codes = np.zeros(0, dtype=np.int64)
    with bar:
        for last, encoded, keep in kept_documents(encoder, read((0, 0, 0)), workers, progress, seen, max_docs):
            codes = np.union1d(codes, selected(encoded, keep)[0])
            update_bar(last, f'{len(codes):,} characters')
    if not len(codes):
        raise ValueError('there is no text in the corpus')
    return ''.join(map(chr, codes))


def check_options(args):
    for name in ('max_docs', 'shard_tokens', 'workers', 'min_chars', 'tokens', 'block_size'):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise ValueError(f'--{name}={getattr(args, name)} must be 1 or more')
    if not 0 < getattr(args, 'val_fraction', 0.5) < 1:
        raise ValueError(f'--val_fraction={args.val_fraction} must lie between 0 and 1')
    if not 0 < getattr(args, 'sample', 1) <= 1:
        raise ValueError(f'--sample={args.sample} must be above 0, and at most 1')


def add_packing_options(parser, val_fraction, shard_tokens):
    parser.add_argument('--max_docs', type=int, help='take only the first so many documents')
    parser.add_argument('--val_fraction', type=float, default=val_fraction, help='share of the documents for validation (default: %(default)s)')
    parser.add_argument('--shard_tokens', type=int, default=shard_tokens, help='tokens in a .bin file (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=n_cores(), help='processes that tokenize (default: one a core, %(default)s)')


def add_build_options(parser):
    parser.add_argument('--format', choices=['auto', *formats.FORMATS], default='auto', help='(default: by the ending of each file)')
    parser.add_argument('--field', default='text', help='or several, as in title,text: what a document is made of (default: %(default)s)')
    parser.add_argument('--clean', action='store_true', help='Unicode NFC, no control characters, each text only once')
    parser.add_argument('--min_chars', type=int, default=1, help='leave shorter texts out (default: %(default)s)')
    parser.add_argument('--sample', type=float, default=1.0, metavar='FRACTION', help='take this share of the texts, as their hashes decide')
    parser.add_argument('--errors', choices=['strict', 'replace'], default='strict', help='what is not UTF-8 ends the run, or becomes U+FFFD')
    add_packing_options(parser, 0.01, None)


def build(args):
    """python -m corpus.pack build"""
    check_options(args)
    files = find_files(args.input, args.format)
    if args.tokenizer == 'char':
        tokenizer = 'char'
        if any(format == 'blocks' for _, format in files):
            raise ValueError('blocks hold ids, not characters: name the tokenizer that made them')
    else:
        tokenizer = load_tokenizer(tokenizer_meta(args.tokenizer, also=['char']))
    names = [os.path.basename(os.path.normpath(path)) for path in args.input]
    source = names[0] if len(names) == 1 else f'{len(names)} inputs, {names[0]} to {names[-1]}'
    pack_files(args.out, files, tokenizer, source, args)
    print(f'next: python train.py config/quickstart.py --dataset={dataset_name(args.out)} --out_dir=out-{Path(args.out).resolve().name}')


def dataset_name(out):
    """What train.py's --dataset calls a folder."""
    out = Path(out).resolve()
    return out.name if out.parent == Path(__file__).resolve().parents[1] / 'data' else os.path.relpath(out)

# -----------------------------------------------------------------------------
# mix

def mix(args):
    """python -m corpus.pack mix"""
    from tokens.dataset import Split, dataset_folders
    check_options(args)
    folders, weights = dataset_folders(args.datasets)
    splits = {'train': [Split(folder, 'train') for folder in folders]}
    if any('val' in split.meta['splits'] for split in splits['train']):
        splits['val'] = [Split(folder, 'val') for folder in folders]
    first = splits['train'][0]
    for other in splits['train']:
        if other.tokenizer != first.tokenizer:
            raise ValueError(f'{other.folder} and {first.folder} were packed with different tokenizers: pack them with one')
        if other.folder.resolve() == args.out.resolve():
            raise ValueError(f'--out={args.out} is one of the datasets to mix: name another folder')
        if other.meta.get('row_tokens'):
            raise ValueError(f'{other.folder} was packed in rows, which a mixed file would cut: mix it in training, --dataset={args.datasets}')
    mixed = {name: mixed_documents(sources, weights, 2 * args.block_size, args.tokens if name == 'train' else None)
             for name, sources in splits.items()}
    source = ', '.join(f'{folder.name} {weight:.4g}' for folder, weight in zip(folders, weights))
    masked = any(split.mask is not None for sources in splits.values() for split in sources)
    write_dataset(args.out, load_tokenizer(first.tokenizer), mixed, f'mixed: {source}', args.shard_tokens, masked, eot_in_rows=True)
    print(f'next: python train.py config/quickstart.py --dataset={dataset_name(args.out)} --out_dir=out-{args.out.resolve().name}')


def mixed_documents(splits, weights, most_tokens, n_tokens=None):
    """Documents of several splits in turn, each time one of that which is furthest behind its share of the tokens.

    most_tokens   longer documents are cut into documents of so many: shares hold in every stretch of the file, as far as these allow
    n_tokens      how many are wanted: sources that end before begin again; None: until the first source ends
    yields        (ids, mask)
    """
    from tqdm import tqdm
    eot = load_tokenizer(splits[0].tokenizer).eot
    sources = [pieces(split, most_tokens, eot) for split in splits]
    taken, times = np.zeros(len(splits), dtype=np.int64), [1] * len(splits)
    total = n_tokens or int(min(split.n_tokens / weight for split, weight in zip(splits, weights)))
    with tqdm(desc=splits[0].split, total=total, unit=' tokens', unit_scale=True, disable=None) as bar:
        while n_tokens is None or taken.sum() < n_tokens:
            k = int(np.argmax(np.array(weights) * taken.sum() - taken))
            piece = next(sources[k], None)
            if piece is None:
                if n_tokens is None:
                    return
                times[k] += 1
                sources[k] = pieces(splits[k], most_tokens, eot)
                piece = next(sources[k])
                print(f'{splits[k].folder.name}: reading it for the {times[k]}. time', file=sys.stderr)
            taken[k] += len(piece[0]) + (eot is not None)
            bar.update(len(piece[0]))
            yield piece


def pieces(split, most_tokens, eot):
    """(ids, mask) of the documents of a split, without the eot at their end; where no .idx says what is one, equal parts."""
    if (split.folder / f'{split.split}.idx').exists():
        documents = zip(*split.documents())
    else:
        documents = [(0, split.n_tokens)]
    for offset, length in documents:
        for begin in range(int(offset), int(offset + length), most_tokens):
            end = min(begin + most_tokens, int(offset + length))
            ids = np.concatenate([shard.tokens[max(begin - shard.first, 0):end - shard.first] for shard in split.shards
                                  if shard.first < end and begin < shard.first + shard.n_tokens])
            if eot is not None and ids[-1] == eot:
                ids, end = ids[:-1], end - 1
            if len(ids):
                yield ids, None if split.mask is None else np.array(split.mask[begin:end])

# -----------------------------------------------------------------------------
# inspect

def inspect(args):
    """python -m corpus.pack inspect"""
    from tokens.dataset import Split
    meta = read_meta(args.folder)
    tokenizer = load_tokenizer(meta['tokenizer'])
    says = {'meta.json': '', 'meta.pkl': ', as meta.pkl says', 'none': ", for want of a meta.json by nanoGPT's rules"}[meta['origin']]
    print(f'{args.folder}: {meta["dtype"]}, {meta["tokenizer"]["kind"]} tokenizer of {meta["vocab_size"]:,} tokens{says}; '
          f'source: {meta["source"] or "unknown"}')
    for name in meta['splits']:
        split = Split(args.folder, name)
        counts = count_ids(split)
        n_bytes = int(counts @ tokenizer.token_bytes())
        index = split.beside('.idx', '<i8', (-1, 2))
        documents = f'{len(index):,} documents' if index is not None else (
            'documents unknown' if tokenizer.eot is None else f'{counts[tokenizer.eot] + 1:,} documents by their ends')
        targets = '' if split.mask is None else f', {np.count_nonzero(split.mask) / max(split.n_tokens, 1):.1%} of them targets'
        print(f'\n{name}: {documents}, {split.n_tokens:,} tokens{targets}, {n_bytes:,} bytes, {n_bytes / max(split.n_tokens, 1):.3f} bytes per '
              f'token, {np.count_nonzero(counts):,} different tokens, shards: {len(split.shards)}')
        for n in range(args.windows):
            shard = split.shards[n * len(split.shards) // args.windows]
            start = max(shard.n_tokens - 64, 0) * (n % 7 + 1) // 8
            print(f'{shard.path.name}, tokens {start:,} on: {tokenizer.decode(shard.tokens[start:start + 64])!r}')
        split.verify()
        n_known = sum(crc is not None for crc in split.checksums)
        print(f'checksums: {n_known} of {len(split.shards)} shards verified' if n_known else 'checksums: none are known')


def count_ids(split):
    """(V,) int64: how often each id is there. Raises ValueError naming the place of one that is beyond the vocabulary."""
    counts = np.zeros(split.vocab_size, dtype=np.int64)
    for shard in split.shards:
        for start in range(0, shard.n_tokens, 1 << 20):
            ids = shard.tokens[start:start + (1 << 20)]
            if ids.max() >= split.vocab_size:
                at = int(np.argmax(ids >= split.vocab_size))
                raise ValueError(f'{shard.path} offset {start + at}: token id {ids[at]} is beyond the vocabulary of {split.vocab_size}: '
                                 'the shard was made with another tokenizer or altered, prepare the dataset again')
            counts += np.bincount(ids, minlength=split.vocab_size)
    return counts

# -----------------------------------------------------------------------------
# command lines

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True, metavar='build | mix | inspect')
    add = commands.add_parser('build', help='files to a dataset', description=formats.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add.add_argument('--input', nargs='+', required=True, metavar='PATH', help='files, and folders of them')
    add.add_argument('--tokenizer', required=True, metavar='NAME', help='char, gpt2, byte, or a folder with tokenizer.json')
    add.add_argument('--out', type=Path, required=True, help='dataset folder')
    add_build_options(add)
    add = commands.add_parser('mix', help='datasets to one', description='Datasets of one tokenizer to one dataset, with these shares of its tokens.')
    add.add_argument('datasets', metavar='A:0.6,B:0.4', help='as in the setting dataset')
    add.add_argument('--out', type=Path, required=True, help='dataset folder')
    add.add_argument('--tokens', type=int, help='for training, at least; what ends before begins again (default: until the first one ends)')
    add.add_argument('--block_size', type=int, default=1024, help='shares hold within 1%% in any 1000 windows of so many tokens '
                     '(default: %(default)s); documents longer than two of them are cut')
    add.add_argument('--shard_tokens', type=int, help='tokens in a .bin file (default: all)')
    add = commands.add_parser('inspect', help='what a dataset holds, and whether it is whole')
    add.add_argument('folder', type=Path, metavar='DIR')
    add.add_argument('--windows', type=int, default=3, help='pieces of text to show of each split (default: %(default)s)')
    args = parser.parse_args()
    {'build': build, 'mix': mix, 'inspect': inspect}[args.command](args)


def prepare_parquet(folder, doc, repo, revision, hub_folder):
    """The whole of the prepare script of a corpus in Parquet: its command line, and the corpus packed with GPT-2's tokenizer.

    folder       of the script and, by default, of the dataset
    doc          its docstring, shown by --help
    repo, revision, hub_folder   where the Parquet files are on the Hugging Face hub
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', nargs='+', metavar='PATH', help='Parquet files, or folders of them, instead of the hub')
    parser.add_argument('--out', type=Path, default=folder, help='dataset folder (default: the folder of this script)')
    add_packing_options(parser, 0.0005, 100_000_000)
    parser.set_defaults(field='text', clean=False, min_chars=1, sample=1.0, errors='strict')
    args = parser.parse_args()
    check_options(args)
    tokenizer = load_tokenizer(GPT2_META)
    if args.input:
        files, sizes, source = find_files(args.input, 'parquet'), None, f'{repo}, from local files'
    else:
        found = hub_files(repo, revision, hub_folder)
        files, sizes, source = [(path, 'parquet') for path in found], list(found.values()), f'{repo}, revision {revision}, {hub_folder}'
    pack_files(args.out, files, tokenizer, source, args, sizes=sizes)
    print(f'next: python train.py --dataset={dataset_name(args.out)}')


def hub_files(repo, revision, folder):
    """{name hf://...: bytes} of the Parquet files in a folder of a dataset on the Hugging Face hub, or on the mirror at HF_ENDPOINT."""
    from huggingface_hub import HfFileSystem
    try:
        found = HfFileSystem().ls(f'datasets/{repo}@{revision}/{folder}', detail=True)
        files = {f'hf://{file["name"]}': file['size'] for file in sorted(found, key=lambda file: file['name']) if file['name'].endswith('.parquet')}
        why = 'no .parquet file there'
    except Exception as error:  # whatever the hub's client and the network below it raise
        files, why = {}, ' '.join(str(error).split())[:300] or type(error).__name__
    if not files:
        raise OSError(f'{repo} is out of reach ({why}): bring the files {folder}/*.parquet of its revision {revision[:12]} here '
                      'by other means, and name their folder with --input')
    return files


if __name__ == '__main__':
    with one_line_errors():
        main()
