"""Read a corpus document by document, whatever its format. Memory stays bounded, however large the files are.

    files = find_files(['zhwiki.xml.bz2', 'notes/'])
    for document in read_documents(files, fields=('title', 'text')):
        ...                                     # document.text, document.where

    format      files                           one document
    text        .txt                            a file; of a long one, whole lines of up to 1 Mi characters
    paragraphs  .txt, if named                  the lines between two blank lines
    lines       .txt, if named                  a line
    jsonl       .jsonl .ndjson                  a line: an object whose fields are taken, or a string
    json        .json                           an element of an array or of the list in {"data": [...]},
                                                a value of an object of objects, or each of several objects
    csv, tsv    .csv .tsv                       a row; the first row names the fields
    parquet     .parquet                        a row
    arrow       datasets.save_to_disk, .arrow   a row; of a DatasetDict, a row of its split train
    wiki        .xml                            an article of a MediaWiki dump, as plain text (corpus/wiki.py)
    blocks      folders of token_float32.npy    a row of ids with its mask (corpus/blocks.py)

All but Parquet, Arrow and blocks may be compressed: .gz, .bz2, .zst. Text is UTF-8 unless another encoding is
named; UTF-16 is recognized by its byte order mark. LF, CRLF and CR all end a line and are read as LF. Files
are read in the order of their names.
"""

import codecs
import csv
import functools
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from corpus.blocks import Row, check_blocks, read_rows
from corpus.columns import read_arrow, read_parquet
from corpus.jsonfile import read_json_records
from corpus.textfile import MAX_RECORD_CHARS, TextFile, check_fields, naming, too_long
from corpus.wiki import plain_text, read_pages
from files import json_lines, print0, read_json

COMPRESSED = re.compile(r'\.(gz|bz2|zst)$', re.IGNORECASE)
ERRORS = ('strict', 'replace', 'replace_all')
PART_CHARS = 1 << 20  # a longer text file is cut into documents of this length


# -----------------------------------------------------------------------------
# files


class File(NamedTuple):
    path: str
    format: str


def find_files(inputs, format: str = 'auto') -> list[File]:
    """Find the files of a corpus, in the order of their names.

    inputs   files, folders, and addresses hf://... of Parquet files
    format   'auto' takes the format from each name
    raises   FileNotFoundError, ValueError if there is nothing to read
    """
    entries = []
    for path in map(os.fspath, inputs):
        if os.path.isdir(path):
            entries += files_below(path, format)
        elif path.startswith('hf://') or os.path.exists(path):
            entries.append((path, ending_of(path)))
        else:
            raise FileNotFoundError(f'{path}: no such file or folder')
    files = []
    for path, ending in entries:
        kind = FORMAT_OF_ENDING.get(ending) if format == 'auto' else format
        if kind is None:
            raise ValueError(f'{path}: its ending does not tell its format: name it with --format, '
                             f'one of {", ".join(FORMATS)}')
        if kind in ('parquet', 'arrow') and COMPRESSED.search(path):
            raise ValueError(f'{path}: Parquet and Arrow have their own compression: unpack this file')
        files.append(File(path, kind))
    return files


def ending_of(path):
    """Return the ending that tells the format. Parts of a Wikipedia dump are named ...xml-p1p41242.bz2."""
    name = COMPRESSED.sub('', os.path.basename(path)).lower()
    return os.path.splitext(re.sub(r'(\.xml)-p\d+p\d+$', r'\1', name))[1]


def files_below(folder, format):
    """List (path, ending) in a folder. A named format that has no file with its ending takes every file."""
    entries = list(walk(folder))
    endings = FORMAT_OF_ENDING if format == 'auto' else FORMATS[format].endings
    wanted = [(path, ending) for path, ending in entries if ending in endings]
    if not wanted and entries and format not in ('auto', 'arrow', 'blocks'):
        return entries
    if not wanted:
        raise ValueError(f'{folder}: nothing to read in this folder: '
                         f'{", ".join(endings)} files are looked for')
    others = Counter(ending or 'no ending' for _, ending in entries if ending not in endings)
    if others:
        counts = ', '.join(f'{ending} ({n})' for ending, n in sorted(others.items()))
        print0(f'{folder}: files of other endings are not read: {counts}')
    return wanted


def walk(folder, above=()):
    """Yield (path, ending) of every file below a folder. Links are followed, except to a folder above."""
    above = (*above, os.path.realpath(folder))
    names = sorted(os.listdir(folder))
    if 'dataset_dict.json' in names:
        if 'train' not in names:
            raise ValueError(f'{folder} has no split train: name the folder of one of its splits: '
                             f'{", ".join(name for name in names if name != "dataset_dict.json")}')
        yield from walk(os.path.join(folder, 'train'))
    elif 'state.json' in names and 'dataset_info.json' in names:
        with naming(folder):
            for shard in read_json(os.path.join(folder, 'state.json'))['_data_files']:
                yield os.path.join(folder, shard['filename']), '.arrow'
    elif 'token_float32.npy' in names:
        yield folder, 'token_float32.npy'
    else:
        for name in names:
            path = os.path.join(folder, name)
            if name.startswith('.'):
                continue
            if os.path.isdir(path) and os.path.realpath(path) not in above:
                yield from walk(path, above)
            elif os.path.isfile(path):
                yield path, ending_of(name)


def n_bytes_of(path) -> int:
    """Count the bytes of a file on disk or on the hub, or of the arrays in a folder of blocks."""
    if str(path).startswith('hf://'):
        from huggingface_hub import HfFileSystem
        return HfFileSystem().size(path)
    if os.path.isdir(path):
        return sum(entry.stat().st_size for entry in os.scandir(path) if entry.name.endswith('.npy'))
    return os.path.getsize(path)


def read_text(path, encoding: str = 'utf-8') -> str:
    """Read a whole text file. Raises ValueError with file and line if it has another encoding."""
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
    """How to read, and how far it got."""
    fields: tuple | None = None  # None: whole records
    errors: str = 'strict'
    encoding: str = 'utf-8'
    to_skip: int = 0  # documents still to pass over
    n_read: int = 0  # bytes of the file that is read
    file: TextFile | None = None  # the file, if it is text

    def __post_init__(self):
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f'--encoding={self.encoding}: unknown encoding, '
                             'examples are utf-8, gb18030, big5, utf-16') from None

    def open(self, path):
        self.file = TextFile(path, self.encoding, self.errors)
        return self.file


def read_documents(files: list[File], *, fields=('text',), errors: str = 'strict', encoding: str = 'utf-8',
                   start: int = 0):
    """Yield a Document for every document of some files, always in the same order. Some are empty.

    files    as find_files returns them
    fields   the fields that make a document, joined by line feeds; an article has title and text
    errors   'strict', 'replace' or 'replace_all', as in TextFile
    start    pass over this many documents; row groups of Parquet among them are not read
    raises   ValueError that names file and line; OSError for a file that cannot be read
    """
    reading = Reading(tuple(fields), errors, encoding, start)
    folders = [path for path, format in files if format == 'blocks']
    for folder in folders:
        with naming(folder):
            check_blocks(folder, folders[0])
    n_before = 0  # bytes of the files before this one
    for path, format in files:
        reading.file, reading.n_read = None, 0
        read, _, text_of = FORMATS[format]
        with naming(path):
            for record, where in read(path, reading):
                if reading.to_skip:
                    reading.to_skip -= 1
                    continue
                if reading.file:
                    reading.n_read = reading.file.raw.tell()
                text = text_of(record, where, reading.fields) if text_of else record
                yield Document(text, where, n_before + reading.n_read)
            if reading.file:
                reading.n_read = os.path.getsize(path)
            n_before += reading.n_read


def read_records(files: list[File], *, encoding: str = 'utf-8'):
    """Yield (record, where) of every record, with all of its fields. Formats of text alone have none."""
    reading = Reading(encoding=encoding)
    for path, format in files:
        read, _, text_of = FORMATS[format]
        if text_of is not text_of_record:
            raise ValueError(f'{path}: records with fields are needed, which {format} does not have')
        with naming(path):
            yield from read(path, reading)


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
            yield text, f'{path}, line {line}' if line > 1 else path


def read_paragraphs(path, reading):
    with reading.open(path) as file:
        lines, n_chars, first = [], 0, 1
        for number, line in enumerate(file.lines(), 1):
            if line.strip():
                lines.append(line)
                n_chars += len(line)
                if n_chars > MAX_RECORD_CHARS:
                    raise too_long(f'{path}, line {first}: a paragraph')
            else:
                yield ''.join(lines).rstrip('\n'), f'{path}, line {first}'
                lines, n_chars, first = [], 0, number + 1
        yield ''.join(lines).rstrip('\n'), f'{path}, line {first}'


def read_lines(path, reading):
    with reading.open(path) as file:
        for number, line in enumerate(file.lines(), 1):
            yield line.rstrip('\n'), f'{path}, line {number}'


# -----------------------------------------------------------------------------
# records with fields


def read_jsonl(path, reading):
    with reading.open(path) as file:
        for number, record in json_lines((line.encode() for line in file.lines()), path):
            yield record, f'{path}, line {number}'


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
    """Join a record's fields by line feeds. A list of texts is as good as a text, and so is a bare string."""
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
    r"""Make every line end a line feed, and half a surrogate pair, as JSON's "\ud83d" alone, a '?'."""
    return text.replace('\r\n', '\n').replace('\r', '\n').encode('utf-8', 'replace').decode('utf-8')


def read_wiki(path, reading):
    check_fields(reading.fields, ('title', 'text'), path)
    with reading.open(path) as file:
        for page in read_pages(file, path):
            yield page, f'{path}, {page.title}'


def text_of_page(page, where, fields):
    values = {'title': page.title, 'text': plain_text(page.wikitext, page.hidden)}
    if not values['text']:
        return ''
    return clean('\n'.join(values[field] for field in fields))


class Format(NamedTuple):
    read: Callable  # (path, reading) yields (record, where)
    endings: list
    text_of: Callable | None = None  # (record, where, fields) returns the text of a record


FORMATS = {
    'text': Format(read_parts, ['.txt']),
    'paragraphs': Format(read_paragraphs, ['.txt']),
    'lines': Format(read_lines, ['.txt'], text_of_record),
    'jsonl': Format(read_jsonl, ['.jsonl', '.ndjson'], text_of_record),
    'json': Format(read_json_records, ['.json'], text_of_record),
    'csv': Format(read_csv, ['.csv'], text_of_record),
    'tsv': Format(functools.partial(read_csv, delimiter='\t'), ['.tsv'], text_of_record),
    'parquet': Format(read_parquet, ['.parquet'], text_of_record),
    'arrow': Format(read_arrow, ['.arrow'], text_of_record),
    'wiki': Format(read_wiki, ['.xml'], text_of_page),
    'blocks': Format(read_rows, ['token_float32.npy']),
}
FORMAT_OF_ENDING = {ending: name for name in reversed(FORMATS) for ending in FORMATS[name].endings}
