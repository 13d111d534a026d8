"""Documents to the token files that training reads.

    from data.pack import pack_documents, write_dataset
    write_dataset('data/mine', tokenizer, {'train': ['one document', 'another'], 'val': ['a third']}, source='my notes')
    pack_documents('data/web', tokenizer, lambda start: iter(texts[start:]), source='the web', shard_tokens=10**8)

Both write train.bin (or train_000000.bin and so on) and train.idx, the same for val, and meta.json last; then they print what
these hold. Documents stream through: memory holds a few batches of them. write_dataset takes the splits as they are
given, in this process. pack_documents is for a corpus: it splits by hash, tokenizes on all cores and continues where a killed
run stopped. Its files are the same byte for byte, however many workers there were and however often it was killed. A script
that calls it needs an `if __name__ == '__main__'`, since each worker imports the script.

Until all is written it lies in .packing below the dataset's folder. With it lies progress.json: how many documents were read and
how much of each file they make. What a killed run wrote past that is cut off, and written again.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from data.tokenizer import GPT2Tokenizer, load_tokenizer

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


def find_files(inputs, suffix):
    """The files named, and those ending in suffix below the folders named, in a fixed order."""
    paths = []
    for path in map(Path, inputs):
        found = sorted(path.rglob(f'*{suffix}')) if path.is_dir() else [path]
        if not found:
            raise ValueError(f'{path}: no {suffix} file in this folder')
        paths += found
    return paths


def parquet_texts(paths, start=0, column='text'):
    """The texts in one column of Parquet files, file after file. Rows before number `start` are not read, where a file's own
    numbers show where they end; a row without text is an empty text."""
    for path in paths:
        with opened_parquet(path) as parquet:
            have = parquet.schema_arrow.names
            if column not in have or 'string' not in str(parquet.schema_arrow.field(column).type):
                raise ValueError(f'{path} has no column {column!r} with text, only {", ".join(have)}')
            n_rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            groups = list(range(parquet.num_row_groups))
            while groups and start >= n_rows[groups[0]]:
                start -= n_rows[groups.pop(0)]
            for rows in parquet.iter_batches(batch_size=256, row_groups=groups, columns=[column]) if groups else ():
                texts = rows.column(0).to_pylist()[start:]
                start = max(start - rows.num_rows, 0)
                yield from (text or '' for text in texts)


def count_rows(paths):
    """Rows of Parquet files, as the files themselves say. Finds a file that is none before the first hour of work, too."""
    n_rows = 0
    for path in paths:
        with opened_parquet(path) as parquet:
            n_rows += parquet.metadata.num_rows
    return n_rows


@contextmanager
def opened_parquet(path):
    """A Parquet file on disk, or on the Hugging Face hub where its name begins with hf://. What breaks in there is one line."""
    import pyarrow.parquet
    try:
        if str(path).startswith('hf://'):
            from huggingface_hub import HfFileSystem
            file = HfFileSystem().open(path, block_size=32 << 20)  # bytes that one request asks for
        else:
            file = open(path, 'rb')
        with file:  # the buffer keeps a row group of any size from being read as a whole
            yield pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # pyarrow, the file system of the hub and its client each raise their own
        if str(error).startswith(str(path)):
            raise  # it is one of ours
        raise OSError(f'{path} could not be read ({one_line(error)}): put that right and run this again, it continues') from error


def hub_files(repo, revision, folder):
    """The names hf://... of the Parquet files in a folder of a dataset on the Hugging Face hub, or on the mirror at HF_ENDPOINT."""
    from huggingface_hub import HfFileSystem
    try:
        found = HfFileSystem().ls(f'datasets/{repo}@{revision}/{folder}', detail=False)
        paths = [f'hf://{path}' for path in sorted(found) if path.endswith('.parquet')]
        why = 'no .parquet file there'
    except Exception as error:  # whatever the hub's client and the network below it raise
        paths, why = [], one_line(error)
    if not paths:
        raise OSError(f'{repo} is out of reach ({why}): bring the files {folder}/*.parquet of its revision {revision[:12]} here '
                      'by other means, and name their folder with --input')
    return paths


def one_line(error):
    return ' '.join(str(error).split())[:300] or type(error).__name__

# -----------------------------------------------------------------------------
# encoding: documents to ids, on all cores

BATCH_CHARS = 1 << 20  # what a worker is given at a time, or one document if that is longer


def in_batches(documents, first=0):
    """(number of its first document, list of documents) of one batch after the other."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document) + 100  # what Python spends on one, however short
        if size > BATCH_CHARS:
            yield first, batch
            first, batch, size = first + len(batch), [], 0
    if batch:
        yield first, batch


def split_by_hash(text, val_fraction):
    """'train' or 'val'. The text alone decides: not its place, nor what else there is; and equal texts are never in both."""
    digest = hashlib.blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=8).digest()
    return 'val' if int.from_bytes(digest, 'big') < val_fraction * 2 ** 64 else 'train'


class Encoder:
    """A batch of documents to the ids that go into the files."""

    def __init__(self, tokenizer, val_fraction=None):
        self.tokenizer, self.val_fraction = tokenizer, val_fraction
        self.dtype = np.dtype('<u2' if tokenizer.vocab_size <= 65536 else '<u4')
        self.token_bytes = tokenizer.token_bytes()

    def __call__(self, split, first, documents):
        """
        split      name of the documents' split; None: the hash of each decides
        first      number of the first document
        documents  list of texts, or of rows of ids
        returns    {split: (ids, offsets, lengths, bytes)}: eot stands before each text, and offsets say where the documents are
        """
        nothing, eot = np.zeros(0, dtype=np.int64), self.tokenizer.eot
        before_text = nothing if eot is None else np.array([eot])
        found = {}
        for n, document in enumerate(documents, first):
            ids = document_ids(document, self.tokenizer, f'{split} document {n}' if split else f'document {n}')
            if len(ids):
                name = split or split_by_hash(document, self.val_fraction)
                found.setdefault(name, []).append((before_text if isinstance(document, str) else nothing, ids))
        return {name: self.joined(pairs) for name, pairs in found.items()}

    def joined(self, pairs):
        lengths = np.array([len(ids) for _, ids in pairs])
        offsets = np.cumsum([len(before) + len(ids) for before, ids in pairs]) - lengths
        ids = np.concatenate([piece for pair in pairs for piece in pair])
        return ids.astype(self.dtype), offsets, lengths, int(self.token_bytes[ids].sum())


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


def encode_in_order(encoder, batches, workers):
    """(number of documents, what encoder makes of them) of every batch, in order, with at most two batches a worker under way."""
    if workers == 1:
        for batch in batches:
            yield len(batch[-1]), encoder(*batch)
        return
    # not by fork, which copies whatever lock another thread may hold
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), start_worker,
                               (encoder.tokenizer.meta(), encoder.val_fraction))
    under_way = deque()
    try:
        for batch in batches:
            under_way.append((len(batch[-1]), pool.submit(encode, *batch)))
            if len(under_way) > 2 * workers:
                n_documents, encoded = under_way.popleft()
                yield n_documents, encoded.result()
        for n_documents, encoded in under_way:
            yield n_documents, encoded.result()
    except BrokenProcessPool:
        raise OSError(f'one of {workers} workers was killed, for want of memory perhaps: run this again, it continues, '
                      'with fewer --workers if need be') from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(tokenizer_meta, val_fraction):
    """In a new worker, before its first batch. It makes its own tokenizer: to send one along would hang, by a flaw in Python,
    where a worker dies while it starts."""
    global worker_encoder
    worker_encoder = Encoder(load_tokenizer(tokenizer_meta), val_fraction)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one says what is to be said

    def end_with_parent():  # a worker whose parent was killed would wait for work for ever
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def encode(*batch):
    return worker_encoder(*batch)


def n_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()

# -----------------------------------------------------------------------------
# packing

IDX_DTYPE = np.dtype('<i8')
SAVE_EVERY_S = 10  # that much work is lost when a run is killed


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
    batches = ((name, *batch) for name, documents in splits.items() for batch in in_batches(documents))
    return pack(folder, Encoder(tokenizer), list(splits), lambda start: batches, source, shard_tokens)


def pack_documents(folder, tokenizer, texts, source, val_fraction=0.0005, shard_tokens=None, max_docs=None, workers=None,
                   recipe=None, total=None):
    """Pack a corpus into a dataset folder, on all cores; continue if an earlier run was killed.

    texts         function: number -> iterator over the texts from that number on, at every call the same
    val_fraction  share of the texts that is for validation; split_by_hash says which
    max_docs      take only so many texts; None: all
    workers       processes that tokenize, 1: this one; None: one a core. The files do not depend on it
    recipe        dict of plain values that the texts depend on. With another one than the killed run had, nothing is continued
    total         number of texts, for the progress bar; None: unknown
    raises        ValueError, OSError; what was done up to then is kept, and continued by the same call
    the rest      as in write_dataset
    """
    def batches(start):
        chosen = texts(start) if max_docs is None else islice(texts(start), max_docs - start)
        return ((None, *batch) for batch in in_batches(chosen, start))

    recipe = {'source': source, **(recipe or {}), 'tokenizer': tokenizer.meta(), 'val_fraction': val_fraction,
              'shard_tokens': shard_tokens, 'max_docs': max_docs}
    total = max_docs if total is None else min(total, max_docs or total)
    return pack(folder, Encoder(tokenizer, val_fraction), ['train', 'val'], batches, source, shard_tokens,
                workers or n_cores(), recipe, total)


def pack(folder, encoder, names, batches, source, shard_tokens, workers=1, recipe=None, total=None):
    """What both of them do. batches(start) gives (split or None, number of the first document, documents) of each batch;
    with recipe=None no progress is kept."""
    assert {'train'} <= set(names) <= {'train', 'val'}, names
    folder, work = Path(folder), Path(folder) / '.packing'
    work.mkdir(parents=True, exist_ok=True)
    with only_run(folder):
        keep = recipe is not None
        try:
            progress = read_progress(work, recipe)
            if 'meta' not in progress:
                splits = write_splits(work, encoder, names, batches, shard_tokens, workers, progress, total)
                empty = [name for name, split in splits.items() if split['tokens'] == 0]
                if empty:
                    keep = False  # there is nothing to continue
                    raise ValueError(f'there is no text for the {empty[0]} split: give more text, or another val_fraction')
                progress['meta'] = {'format': 1, 'dtype': encoder.dtype.name, 'vocab_size': encoder.tokenizer.vocab_size,
                                    'tokenizer': encoder.tokenizer.meta(), 'source': source, 'splits': splits}
                if keep:
                    write_json(work / 'progress.json', progress)
            meta = progress['meta']
            publish(work, folder, meta)
            keep = False
        finally:
            if not keep:
                shutil.rmtree(work, ignore_errors=True)
    for name, split in meta['splits'].items():
        print(f'{folder.resolve().name}/{name}: {split["tokens"]:,} tokens ({meta["dtype"]}, vocabulary {meta["vocab_size"]:,}), '
              f'{split["bytes"]:,} bytes, documents: {split["documents"]:,}')
    return meta


def write_splits(work, encoder, names, batches, shard_tokens, workers, progress, total):
    """Write the .bin and .idx files of all splits, from where progress stands; returns the splits' entries in meta.json."""
    from tqdm import tqdm
    name, start, began = work.parent.resolve().name, progress['documents'], time.monotonic()
    files = {split: SplitFiles(work, split, encoder.dtype, shard_tokens, progress['splits'].get(split)) for split in names}
    if start:
        print(f'{name}: continuing after {start:,} documents', flush=True)

    def count_tokens():
        return sum(split.entry['tokens'] for split in files.values())
    n_shards, n_before, saved = len(files['train'].entry['shards']), count_tokens(), began
    bar = tqdm(desc=name, initial=start, total=total, unit=' documents', unit_scale=True, disable=None)
    batches_done = encode_in_order(encoder, batches(start), workers)
    try:
        for n_documents, encoded in batches_done:
            for split, part in encoded.items():
                files[split].write(*part)
            progress['documents'] += n_documents
            now, n_tokens, done = time.monotonic(), count_tokens(), progress['documents']
            rate = f'{n_tokens / 1e6:,.1f}M tokens, {(n_tokens - n_before) / (now - began) / 1e6:.2f}M a second'
            bar.set_postfix_str(rate, refresh=False)
            bar.update(n_documents)
            if len(files['train'].entry['shards']) > n_shards > 0:  # for the log of a job, which has no bar
                eta_s = (total - done) * (now - began) / (done - start) if total else 0
                left = f', {eta_s // 3600:.0f} h {eta_s % 3600 // 60:02.0f} min left' if total else ''
                bar.write(f'{name}: {n_shards} shards, {done:,} documents, {rate}{left}')
                sys.stdout.flush()
            n_shards = len(files['train'].entry['shards'])
            if progress['recipe'] is not None and now - saved > SAVE_EVERY_S:
                progress['splits'] = {split: file.synced() for split, file in files.items()}
                write_json(work / 'progress.json', progress)
                saved = now
    finally:
        bar.close()
        batches_done.close()  # ends the workers
        for file in files.values():
            file.close()
    return {split: file.entry for split, file in files.items()}


class SplitFiles:
    """The files of one split: the .bin files, each full before the next begins, and the .idx.

    entry   what meta.json says of the split; of an entry that was saved with the files in sync, the files are continued
    """

    def __init__(self, work, name, dtype, shard_tokens, entry=None):
        self.work, self.name, self.dtype, self.shard_tokens = work, name, dtype, shard_tokens
        self.entry = entry or {'tokens': 0, 'bytes': 0, 'documents': 0, 'shards': []}
        self.idx = self.continued(f'{name}.idx', self.entry['documents'] * IDX_DTYPE.itemsize * 2)
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

    def write(self, ids, offsets, lengths, n_bytes):
        """ids, and where in them the documents are. A document may run on into the next shard."""
        if self.entry['tokens'] == 0:  # there is nothing that eot would part the first document from
            ids, offsets = ids[offsets[0]:], offsets - offsets[0]
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
        sync(self.idx)
        if self.bin is not None:
            sync(self.bin)
        return self.entry

    def close(self):
        close(self.idx)
        if self.bin is not None:
            close(self.bin)

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
    return {'recipe': recipe, 'documents': 0, 'splits': {}}


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


def publish(work, folder, meta):
    """Put the new files in place of the old. At no moment does the folder pass for a dataset that it is not: until the
    last step its meta.json says so, and read_meta refuses it. Killed in the middle, it can be done again."""
    write_json(folder / 'meta.json', {'format': 1, 'unfinished': True}, work)
    new = [f'{name}.idx' for name in meta['splits']]
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
        json.dump(value, file, indent=1)
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
# the prepare scripts of corpora in Parquet

def prepare_parquet(folder, doc, repo, revision, hub_folder, n_documents):
    """The whole of such a script: its command line, and the corpus packed with GPT-2's tokenizer.

    folder       of the script and, by default, of the dataset
    doc          its docstring, shown by --help
    repo, revision, hub_folder   where the Parquet files are on the Hugging Face hub
    n_documents  how many texts they hold, for the time left
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', nargs='+', metavar='PATH', help='Parquet files, or folders of them, instead of the hub')
    parser.add_argument('--out', type=Path, default=folder, help='dataset folder (default: the folder of this script)')
    parser.add_argument('--max_docs', type=int, help='take only the first so many documents')
    parser.add_argument('--val_fraction', type=float, default=0.0005, help='share of the documents for validation (default: %(default)s)')
    parser.add_argument('--shard_tokens', type=int, default=100_000_000, help='tokens in a .bin file (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=n_cores(), help='processes that tokenize (default: one a core, %(default)s)')
    args = parser.parse_args()
    for name in ('max_docs', 'shard_tokens', 'workers'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f'--{name}={getattr(args, name)} must be 1 or more')
    if not 0 < args.val_fraction < 1:
        raise ValueError(f'--val_fraction={args.val_fraction} must lie between 0 and 1')

    tokenizer = GPT2Tokenizer()
    if args.input:
        paths = find_files(args.input, '.parquet')
        source, recipe = f'{repo}, from local files', {'files': [[path.name, path.stat().st_size] for path in paths]}
        n_documents = count_rows(paths)
    else:
        paths = hub_files(repo, revision, hub_folder)
        source, recipe = f'{repo}, revision {revision}, {hub_folder}', {}
    try:
        pack_documents(args.out, tokenizer, partial(parquet_texts, paths), source, args.val_fraction, args.shard_tokens,
                       args.max_docs, args.workers, recipe, n_documents)
    except KeyboardInterrupt:
        print('interrupted: the same command continues it', file=sys.stderr)
        sys.exit(130)
    print(f'next: python train.py --dataset={os.path.relpath(args.out, folder.parent)}')
