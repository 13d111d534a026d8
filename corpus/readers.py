"""Read a corpus document by document, whatever its format, in bounded memory.

All formats but Parquet, Arrow and blocks may be compressed: .gz, .bz2, .zst. Text is UTF-8 unless another
encoding is named; UTF-16 is recognized by its byte order mark. Every line end is read as a line feed.
"""

import codecs
import csv
import functools
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from corpus.blocks import TOKENS, Row, check_blocks, read_rows
from corpus.columns import read_arrow, read_parquet
from corpus.jsonfile import read_json_records
from corpus.textfile import MAX_RECORD_CHARS, TextFile, check_fields, naming, with_line_feeds
from corpus.wiki import plain_text, read_pages
from files import print0, read_json

ERRORS = ('strict', 'replace', 'replace_all')
PART_CHARS = 1 << 20  # a longer text file is cut into documents of this length
# the last match is the ending; parts of a Wikipedia dump are named ...xml-p1p41242.bz2
ENDING = re.compile(r'(token_float32\.npy|\.(?!(?:gz|bz2|zst)$)\w+)?(?:-p\d+p\d+)?(\.gz|\.bz2|\.zst)?$')


# -----------------------------------------------------------------------------
# files


class File(NamedTuple):
    path: str
    format: str


def find_files(inputs, format: str = 'auto') -> list[File]:
    """Find the files of a corpus in the order of their names. 'auto' takes the format from each name.

    inputs   files, folders, and addresses hf://... of Parquet files
    """
    paths = []
    for path in map(os.fspath, inputs):
        if os.path.isdir(path):
            paths += files_below(path, format)
        elif path.startswith('hf://') or os.path.exists(path):
            paths.append(path)
        else:
            raise FileNotFoundError(f'{path}: no such file or folder')
    return [File(path, format_of(path, format)) for path in paths]


def ending_of(path):
    return ENDING.search(os.path.basename(path).lower())[1] or ''


def format_of(path, format):
    if format == 'auto':
        format = FORMAT_OF_ENDING.get(ending_of(path))
    if format is None:
        raise ValueError(f'{path}: its ending does not tell its format: name it with --format, '
                         f'one of {", ".join(FORMATS)}')
    if format in ('parquet', 'arrow') and ENDING.search(path.lower())[2]:
        raise ValueError(f'{path}: Parquet and Arrow have their own compression: unpack this file')
    return format


def files_below(folder, format):
    """List the files of a format in a folder. Of a named format, all files if none has its ending."""
    paths = list(walk(folder))
    endings = FORMAT_OF_ENDING
    if format != 'auto':
        endings = FORMATS[format].endings
    wanted = [path for path in paths if ending_of(path) in endings]
    if not wanted and format not in ('auto', 'arrow', 'blocks'):
        wanted = paths
    if not wanted:
        raise ValueError(f'{folder}: nothing to read in this folder: '
                         f'{", ".join(endings)} files are looked for')
    others = Counter(ending_of(path) or 'no ending' for path in set(paths).difference(wanted))
    if others:
        counts = ', '.join(f'{ending} ({n})' for ending, n in sorted(others.items()))
        print0(f'{folder}: files of other endings are not read: {counts}')
    return wanted


def walk(folder, above=()):
    """Yield every file below a folder. Links are followed, except to a folder above."""
    above = (*above, os.path.realpath(folder))
    names = sorted(os.listdir(folder))
    if 'dataset_dict.json' in names:
        if 'train' not in names:
            splits = [name for name in names if name != 'dataset_dict.json']
            raise ValueError(f'{folder} has no split train: name the folder of one of {", ".join(splits)}')
        yield from walk(os.path.join(folder, 'train'))
    elif 'state.json' in names and 'dataset_info.json' in names:
        with naming(folder):
            for shard in read_json(os.path.join(folder, 'state.json'))['_data_files']:
                yield os.path.join(folder, shard['filename'])
    elif TOKENS in names:  # one file stands for a folder of blocks
        yield os.path.join(folder, TOKENS)
    else:
        for path in [os.path.join(folder, name) for name in names if not name.startswith('.')]:
            if os.path.isfile(path):
                yield path
            elif os.path.isdir(path) and os.path.realpath(path) not in above:
                yield from walk(path, above)


def n_bytes_of(path) -> int:
    """Count the bytes of a file on disk or on the hub."""
    if str(path).startswith('hf://'):
        from huggingface_hub import HfFileSystem
        return HfFileSystem().size(path)
    return os.path.getsize(path)


def read_text(path, encoding: str = 'utf-8') -> str:
    """Read a whole text file."""
    with naming(path), TextFile(path, encoding) as file:
        return file.read()


# -----------------------------------------------------------------------------
# documents


class Document(NamedTuple):
    """A text, or a Row of ids and mask in the format blocks. n_read counts the bytes read of all files."""
    text: str | Row
    where: str
    n_read: int = 0
    split: str | None = None  # 'train' or 'val' of a dataset; None: its hash decides


@dataclass
class Reading:
    """How to read, and what is read. The readers of all formats have one, and yield (record, where)."""
    fields: tuple | None = None  # None: whole records
    errors: str = 'strict'
    encoding: str = 'utf-8'
    to_skip: int = 0  # documents still to skip
    file: Any = None  # tell() measures progress
    n_read: int = 0  # bytes of this file, where there is no such file

    def __post_init__(self):
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f'--encoding={self.encoding}: unknown encoding, '
                             'examples are utf-8, gb18030, big5, utf-16') from None

    def open(self, path):
        self.file = TextFile(path, self.encoding, self.errors)
        return self.file

    def records(self, path, format):
        for record in FORMATS[format].read(path, self):
            if isinstance(self.file, TextFile):
                self.file.n_pending = 0
            yield record


def read_documents(files: list[File], *, fields=('text',), errors: str = 'strict', encoding: str = 'utf-8',
                   start: int = 0):
    """Yield a Document for every document of some files, always in the same order. Some are empty.

    fields   the fields that make a document, joined by line feeds
    errors   as in TextFile
    start    skip this many documents
    """
    reading = Reading(tuple(fields), errors, encoding, start)
    blocks = [path for path, format in files if format == 'blocks']
    for path in blocks:
        with naming(path):
            check_blocks(path, blocks[0])
    n_before = 0  # bytes of the files before this one
    for path, format in files:
        text_of = FORMATS[format].text_of or (lambda record, *_: record)
        reading.file, reading.n_read = None, 0
        with naming(path):
            for record, where in reading.records(path, format):
                if reading.to_skip:
                    reading.to_skip -= 1
                    continue
                n_read = n_before + (reading.file.tell() if reading.file else reading.n_read)
                yield Document(text_of(record, where, reading.fields), where, n_read)
        n_before += n_bytes_of(path)


def read_records(files: list[File], *, encoding: str = 'utf-8'):
    """Yield (record, where) of every record, with all of its fields. Formats of text alone have none."""
    reading = Reading(encoding=encoding)
    for path, format in files:
        if FORMATS[format].text_of is not text_of_record:
            raise ValueError(f'{path}: records with fields are needed, which {format} does not have')
        with naming(path):
            yield from reading.records(path, format)


# -----------------------------------------------------------------------------
# text formats


def read_parts(path, reading):
    """Read a file as one text, or cut it at blank lines or line ends if it is long."""
    with reading.open(path) as file:
        line, text = 1, ''
        while more := file.read(PART_CHARS - len(text)):
            text += more
            if len(text) == PART_CHARS:
                end = text.rfind('\n\n') + 2
                if end == 1:
                    end = text.rfind('\n') + 1 or len(text)
                yield text[:end], f'{path}, line {line}'
                line += text.count('\n', 0, end)
                text = text[end:]
        if text:
            yield text, f'{path}, line {line}'


def read_paragraphs(path, reading):
    with reading.open(path) as file:
        numbered = enumerate(file.lines(), 1)
        for is_blank, group in itertools.groupby(numbered, key=lambda line: not line[1].strip()):
            if not is_blank:
                numbers, lines = zip(*group, strict=True)
                yield ''.join(lines).rstrip('\n'), f'{path}, line {numbers[0]}'


def read_lines(path, reading):
    with reading.open(path) as file:
        for number, line in enumerate(file.lines(), 1):
            yield line.rstrip('\n'), f'{path}, line {number}'


# -----------------------------------------------------------------------------
# records with fields


def read_jsonl(path, reading):
    with reading.open(path) as file:
        for number, line in enumerate(file.lines(), 1):
            where = f'{path}, line {number}'
            if not line.isspace():
                yield read_json_line(line, where), where


def read_json_line(line, where):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{where}: not JSON ({error})') from None


def read_csv(path, reading, delimiter=','):
    csv.field_size_limit(MAX_RECORD_CHARS)
    with reading.open(path) as file:
        rows = csv.reader(file.lines(), delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
            check_fields(reading.fields, names, path)
            for row in filter(None, rows):
                if len(row) != len(names):
                    raise ValueError(f'{path}, line {rows.line_num}: {len(row)} fields '
                                     f'where the first row names {len(names)}')
                yield dict(zip(names, row, strict=True)), f'{path}, line {rows.line_num}'
        except csv.Error as error:
            raise ValueError(f'{path}, line {rows.line_num}: not a table of values: {error}') from None


def text_of_record(record, where, fields):
    """Join a record's fields by line feeds. A field may be a list of texts, a record a bare string."""
    if isinstance(record, str):
        record, fields = {'': record}, ['']
    if not isinstance(record, dict):
        raise ValueError(f'{where}: an object or a string is needed, not {record!r:.40}')
    check_fields(fields, record, where)
    texts = []
    for field in fields:
        value = record[field]
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            value = '\n'.join(value)
        if not isinstance(value, str | None):
            raise ValueError(f'{where}: field {field!r} holds {value!r:.40}, which is not text')
        texts.append(value)
    return clean('\n'.join(filter(None, texts)))


def clean(text):
    r"""Make every line end a line feed, and half a surrogate pair, such as a lone "\ud83d" in JSON, a '?'."""
    text = with_line_feeds(text)
    try:
        text.encode()  # cheaper than there and back
        return text
    except UnicodeEncodeError:
        return text.encode('utf-8', 'replace').decode('utf-8')


def read_wiki(path, reading):
    check_fields(reading.fields, ('title', 'text'), path)
    with reading.open(path) as file:
        for page in read_pages(file, path):
            yield page, f'{path}, {page.title}'


def text_of_page(page, where, fields):
    text = plain_text(page.wikitext, page.hidden)
    if not text:
        return ''
    return text_of_record({'title': page.title, 'text': text}, where, fields)


class Format(NamedTuple):
    read: Callable  # (path, reading) yields (record, where)
    text_of: Callable | None  # (record, where, fields) returns the text of a record
    endings: list


FORMATS = {
    'text': Format(read_parts, None, ['.txt']),
    'paragraphs': Format(read_paragraphs, None, ['.txt']),
    'lines': Format(read_lines, text_of_record, ['.txt']),
    'jsonl': Format(read_jsonl, text_of_record, ['.jsonl', '.ndjson']),
    'json': Format(read_json_records, text_of_record, ['.json']),
    'csv': Format(read_csv, text_of_record, ['.csv']),
    'tsv': Format(functools.partial(read_csv, delimiter='\t'), text_of_record, ['.tsv']),
    'parquet': Format(read_parquet, text_of_record, ['.parquet']),
    'arrow': Format(read_arrow, text_of_record, ['.arrow']),
    'wiki': Format(read_wiki, text_of_page, ['.xml']),
    'blocks': Format(read_rows, None, [TOKENS]),
}
FORMAT_OF_ENDING = {ending: name for name in reversed(FORMATS) for ending in FORMATS[name].endings}
