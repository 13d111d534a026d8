"""One run that writes a dataset: encode its documents, write them in order, save the progress, publish.

Until all is written it lies in .packing below the dataset's folder, with progress.json: how many documents
were read and how much of each file that makes. What a killed run wrote beyond that is written again.
"""
import hashlib
import json
import shutil
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from corpus.encode import Record, encode_in_order, in_batches
from corpus.writer import Seen, SplitFiles, Unusable, clear, packing_folder, publish
from files import read_json, write_json
from tokens.dataset import id_dtype

SAVE_EVERY_S = 10  # at most this much work is lost when a run is killed


@dataclass
class Job:
    """A dataset to write.

    read          function: number of documents to pass over -> iterator over the Records after them
    source        in words, the text and its origin
    shard_tokens  tokens of a shard; None: one file per split
    masked        whether to write .mask files
    max_docs      take only this many documents; None: all
    n_threads     threads that encode; the files do not depend on it
    recipe        plain values that the documents depend on; a run with the same is continued. None: none is
    n_bytes       of the corpus on disk, for the remaining time; None: unknown
    """

    read: Callable
    source: str
    splits: tuple = ('train', 'val')
    shard_tokens: int | None = None
    masked: bool = False
    max_docs: int | None = None
    n_threads: int = 1
    recipe: dict | None = None
    n_bytes: int | None = None


@dataclass
class Progress:
    """How far a run is. Saved in progress.json when the files are as `splits` describes them."""

    recipe: dict | None = None
    n_records: int = 0  # read so far
    n_read: int = 0  # bytes of the corpus on disk read so far
    documents: int = 0  # written so far
    last_taken: int = 0  # number of the last record that was written
    left_out: dict = field(default_factory=dict)  # reason -> number of documents
    splits: dict = field(default_factory=dict)  # name -> its entry in meta.json


def pack(folder, encoder, job) -> dict:
    """Pack a corpus into a dataset folder; continue a run that was killed. Returns the dict in meta.json.

    An error leaves the old dataset as it is. With a recipe, the same call continues.
    """
    folder, resumable = Path(folder), job.recipe is not None
    with packing_folder(folder) as work:
        try:
            run = Run(work, encoder, job)
            run.write(job.read(run.progress.n_records))
            if run.empty_split() and encoder.val_fraction and run.progress.documents:
                run.cut_last_document()
            if run.empty_split():
                resumable = False
                raise ValueError(f'there is no text for the {run.empty_split()} split: '
                                 'give more text, or another --val_fraction')
            tokenizer = encoder.tokenizer
            meta = {'format': 1, 'dtype': run.dtype.name, 'vocab_size': tokenizer.vocab_size,
                    'tokenizer': tokenizer.meta(), 'source': job.source, 'splits': run.progress.splits}
            publish(work, folder, meta, job.masked)
            resumable = False
        except (OSError, sqlite3.OperationalError) as error:
            if isinstance(error, OSError) and (error.errno is None or error.filename):
                raise  # its message says where
            again = 'make room and run this again' + (', it continues' if resumable else '')
            reason = getattr(error, 'strerror', None) or error
            raise OSError(f'{folder} cannot be written ({reason}): {again}') from error
        finally:
            if not resumable:
                shutil.rmtree(work, ignore_errors=True)
    report(folder.resolve().name, meta, run.progress.left_out)
    return meta


def report(name, meta, left_out):
    if left_out:
        reasons = [f'{n:,} {reason}' for reason, n in left_out.items() if n]
        print(f'{name}: left out: {", ".join(reasons) or "nothing"}')
    kind = f'{meta["dtype"]}, vocabulary {meta["vocab_size"]:,}'
    for split, entry in meta['splits'].items():
        print(f'{name}/{split}: {entry["tokens"]:,} tokens ({kind}), {entry["bytes"]:,} bytes, '
              f'documents: {entry["documents"]:,}')


# -----------------------------------------------------------------------------
# one run


class Run:
    """A dataset while it is written: its files in the folder `work`, and the progress."""

    def __init__(self, work, encoder, job):
        self.work, self.encoder, self.job = work, encoder, job
        self.name, self.dtype = work.parent.resolve().name, id_dtype(encoder.tokenizer.vocab_size)
        self.recipe = None
        if job.recipe is not None:
            settings = {'shard_tokens': job.shard_tokens, 'max_docs': job.max_docs}
            recipe = {'source': job.source, **job.recipe, **encoder.recipe(), **settings}
            self.recipe = json.loads(json.dumps(recipe))
        try:
            self.progress = read_progress(work / 'progress.json', self.recipe)
            check_recipe(self.progress.recipe, self.recipe, work)
            self.open_files()
        except Unusable as error:
            print(f'{self.name}: the unfinished run cannot be continued ({error}): starting over', flush=True)
            self.start_over(self.recipe)
        if self.progress.documents:
            print(f'{self.name}: continuing after {self.progress.documents:,} documents', flush=True)

    def start_over(self, recipe):
        clear(self.work)
        self.progress = Progress(recipe)
        self.open_files()

    def open_files(self):
        if not self.progress.splits:
            clear(self.work)
        options = dict(shard_tokens=self.job.shard_tokens, masked=self.job.masked)
        self.files, self.seen = {}, None
        for name in self.job.splits:
            entry = self.progress.splits.get(name)
            self.files[name] = SplitFiles(self.work, name, self.dtype, entry=entry, **options)
        if self.encoder.clean:
            self.seen = Seen(self.work / 'seen.sqlite', self.progress.documents)

    def write(self, records):
        """Write the documents of all records, and save the progress now and then."""
        meter = Meter(self.name, self.job, self.progress)
        eot, saved_s = self.encoder.tokenizer.eot, time.monotonic()
        batches = taken(self.encoder, records, self.progress, self.seen, self.job)
        try:
            for documents in batches:
                for name, files in self.files.items():
                    files.write_documents([document for document in documents if document.split == name], eot)
                entries = [files.entry for files in self.files.values()]
                meter.update(sum(entry['tokens'] for entry in entries), len(entries[0]['shards']))
                if time.monotonic() - saved_s > SAVE_EVERY_S:
                    self.save()
                    saved_s = time.monotonic()
            self.save()
        finally:
            batches.close()  # ends the threads
            meter.bar.close()
            for files in self.files.values():
                files.sync(close=True)
            if self.seen is not None:
                self.seen.database.close()

    def save(self):
        self.progress.splits = {name: files.entry for name, files in self.files.items()}
        if self.progress.recipe is None:
            return
        if self.seen is not None:
            self.seen.database.commit()
        for files in self.files.values():
            files.sync()
        values = asdict(self.progress)
        write_json(self.work / 'progress.json', {**values, 'sha256': digest_of(values)})

    def cut_last_document(self):
        """Write a corpus of few documents anew, with the end of the last one for validation."""
        records = with_cut(self.job.read(0), self.progress.last_taken, self.encoder.val_fraction)
        print(f'{self.name}: all documents fell to one split: the last one is cut, its end is for validation')
        self.start_over(recipe=None)
        self.write(records)

    def empty_split(self):
        """Return the name of a split without tokens, or None."""
        return next((name for name, files in self.files.items() if not files.entry['tokens']), None)


def taken(encoder, records, progress, seen, job):
    """Yield lists of the documents to write, encoded; progress counts along.

    seen  to take each document only once; None: take all
    """
    if progress.documents == job.max_docs:
        return
    for batch in encode_in_order(encoder, in_batches(records), job.n_threads):
        documents, left_out = [], Counter(progress.left_out) + batch.left_out
        for document in batch.documents:
            if progress.documents == job.max_docs:
                break
            if seen is not None and not seen.add(document.hash, progress.documents):
                left_out['there before'] += 1
                continue
            documents.append(document)
            progress.documents += 1
            progress.last_taken = progress.n_records + document.number
        progress.left_out = dict(left_out)
        progress.n_records += batch.n_records
        progress.n_read = batch.n_read
        yield documents
        if progress.documents == job.max_docs:
            return


def with_cut(records, number, val_fraction):
    """Yield all records for training, and the end of the text with this number for validation."""
    for n, record in enumerate(records):
        if n != number or not isinstance(record.text, str):
            yield Record(*record)._replace(split='train')
            continue
        text = record.text
        wanted = min(int(len(text) * (1 - val_fraction)), len(text) - 1)
        cut = text.rfind('\n', 0, wanted) + 1 or text.find('\n', wanted, len(text) - 1) + 1
        yield Record(text[:cut or len(text)], split='train')
        yield Record(text[cut or len(text):], split='val')


class Meter:
    """The progress as a bar on a terminal, and as a line per shard for the log of a job."""

    def __init__(self, name, job, progress):
        from tqdm import tqdm
        self.name, self.progress, self.began_s, self.n_shards = name, progress, time.monotonic(), 1
        self.of_bytes = job.n_bytes is not None and job.max_docs is None
        total, unit = (job.n_bytes, 'B') if self.of_bytes else (job.max_docs, ' documents')
        self.options = dict(total=total, unit=unit, unit_scale=True)
        self.bar = tqdm(desc=name, initial=self.done(), disable=None, **self.options)

    def done(self):
        return self.progress.n_read if self.of_bytes else self.progress.documents

    def update(self, n_tokens, n_shards):
        text = f'{self.progress.documents:,} documents, {n_tokens / 1e6:,.1f}M tokens'
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(self.done() - self.bar.n)
        if n_shards > self.n_shards:
            self.n_shards = n_shards
            elapsed_s = time.monotonic() - self.began_s
            self.bar.write(self.bar.format_meter(self.done(), elapsed=elapsed_s, prefix=self.name, ncols=0,
                                                 postfix=text, **self.options))
            sys.stdout.flush()


# -----------------------------------------------------------------------------
# a run that was killed


def read_progress(path, recipe):
    if recipe is None or not path.exists():
        return Progress(recipe)
    try:
        values = read_json(path)
        if values.pop('sha256') == digest_of(values):
            return Progress(**values)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise Unusable(f'{path.name} was altered or cut short')


def digest_of(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_recipe(old, new, work):
    """Raise ValueError for an unfinished run with other settings."""
    if new is None or old == new:
        return
    changed = [f'{key} {shortened(old.get(key))} instead of {shortened(new.get(key))}'
               for key in {**old, **new} if old.get(key) != new.get(key)]
    raise ValueError(f'{work} holds an unfinished run with {" and ".join(changed)}: '
                     'continue it with the same, or delete that folder to start over')


def shortened(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f'{text[:60]}...'
