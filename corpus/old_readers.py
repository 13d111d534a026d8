"""Corpora on disk, document by document, whatever their format; never more than a few megabytes of them at a time.

    from corpus.readers import documents
    for text, position in documents(['wiki.xml.bz2', 'notes/'], fields=['title', 'text']):
        ...                                         # documents(..., start=position) goes on behind this text

    format       files                    what is a document
    text         .txt                     a file; of one above 1 MiB, each part of up to 1 MiB, cut at a blank line or line end
    paragraphs   .txt, if named           what stands between blank lines
    lines        .txt, if named           a line
    jsonl        .jsonl .ndjson           a line: an object whose fields are taken, or a string
    json         .json                    an element of the array, a value of an object of objects, or each object in a row
    csv, tsv     .csv .tsv                a row; the first row names the fields
    parquet      .parquet                 a row
    arrow        folders of datasets.save_to_disk, .arrow     a row; of a DatasetDict its split train
    wiki         .xml                     an article of a MediaWiki dump, as plain text
    blocks       <main>/<block>/{token,label}_float32.npy     a row of ids, with loss_mask.npy where it is there

Each file but Parquet, Arrow and blocks may be compressed: .gz, .bz2, .zst. format='auto' goes by these endings; with a format named, a folder without a file
of its endings is read whole. Files are read in the order of their names.

Reading is in two steps, so that the second can be spread over processes: blocks() reads and cuts, parse() makes the documents of a
block. A position is (file number, place in the file, lines before it, documents after that place), all of them whole numbers.
"""
import bz2
import codecs
import csv
import gzip
import io
import json
import os
import re
from collections import namedtuple
from contextlib import contextmanager
from xml.parsers import expat

import numpy as np

TEXT_ENDINGS = ('.txt',)
ENDINGS = {'text': TEXT_ENDINGS, 'paragraphs': TEXT_ENDINGS, 'lines': TEXT_ENDINGS, 'jsonl': ('.jsonl', '.ndjson'), 'json': ('.json',),
           'csv': ('.csv',), 'tsv': ('.tsv',), 'parquet': ('.parquet',), 'arrow': ('.arrow',), 'wiki': ('.xml',), 'blocks': ()}
FORMATS = tuple(ENDINGS)
OF_ENDING = {ending: format for format in reversed(FORMATS) for ending in ENDINGS[format]}  # .txt is text
COMPRESSED = re.compile(r'\.(gz|bz2|zst)$', re.IGNORECASE)
BLOCK_BYTES = 1 << 20
MAX_RECORD_BYTES = 64 << 20  # a document that is longer is taken for a file of another format

# -----------------------------------------------------------------------------
# files

def find_files(inputs, format='auto'):
    """The files of a corpus, in the order of their names.

    inputs   files and folders
    returns  [(path, format), ...]; a folder of blocks counts as one
    raises   FileNotFoundError, ValueError where nothing is found or no format can be told
    """
    if format != 'auto' and format not in ENDINGS:
        raise ValueError(f'format {format!r} is none of auto, {", ".join(FORMATS)}')
    found = []
    for path in map(os.fspath, inputs):
        if os.path.isdir(path):
            here = list(walk(path, format))
            if not here and format not in ('auto', 'arrow', 'blocks'):
                here = list(walk(path, format, any_ending=True))
            if not here:
                endings = ENDINGS[format] if format != 'auto' else OF_ENDING
                raise ValueError(f'{path}: nothing to read in this folder: {", ".join(endings) or "token_float32.npy"} files are looked for')
            found += here
        elif path.startswith('hf://') or os.path.exists(path):
            of = format_of(path) if format == 'auto' else format
            if of is None:
                raise ValueError(f'{path}: the ending does not tell the format: name it with --format, one of {", ".join(FORMATS)}')
            found.append((path, of))
        else:
            raise FileNotFoundError(f'{path}: there is no such file or folder')
    for path, of in found:
        if of in ('parquet', 'arrow') and COMPRESSED.search(path):
            raise ValueError(f'{path}: Parquet and Arrow files are compressed within, if at all: unpack it')
    return found


def format_of(path):
    """The format that the ending of a name stands for, or None. Parts of a wiki dump are named ...xml-p1p41242.bz2."""
    name = re.sub(r'(\.xml)-p\d+p\d+$', r'\1', COMPRESSED.sub('', os.path.basename(path)).lower())
    return OF_ENDING.get(os.path.splitext(name)[1])


def walk(folder, format, any_ending=False, above=()):
    """(path, format) of what is to be read below a folder. Links are followed, but not to a folder above."""
    above = (*above, os.path.realpath(folder))
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    names = {entry.name for entry in entries}
    if format in ('auto', 'arrow') and 'dataset_dict.json' in names:
        if 'train' not in names:
            raise ValueError(f'{folder} has no split train: name the folder of one of its splits: '
                             f'{", ".join(sorted(names - {"dataset_dict.json"}))}')
        yield from walk(os.path.join(folder, 'train'), format)
    elif format in ('auto', 'arrow') and {'state.json', 'dataset_info.json'} <= names:
        with one_line(folder), open(os.path.join(folder, 'state.json'), encoding='utf-8') as file:
            yield from [(os.path.join(folder, shard['filename']), 'arrow') for shard in json.load(file)['_data_files']]
    elif format in ('auto', 'blocks') and 'token_float32.npy' in names:
        yield os.fspath(folder), 'blocks'
    else:
        for entry in entries:
            if entry.name.startswith('.'):
                continue
            if entry.is_dir():
                if os.path.realpath(entry.path) not in above:
                    yield from walk(entry.path, format, any_ending, above)
            elif entry.is_file() and format == 'auto' and format_of(entry.name):
                yield entry.path, format_of(entry.name)
            elif entry.is_file() and format != 'auto' and (any_ending or format_of(entry.name) == OF_ENDING.get((*ENDINGS[format], '')[0])):
                yield entry.path, format


def n_bytes_of(path):
    """Bytes on disk of a file, or of a folder of blocks."""
    if os.path.isdir(path):
        return sum(entry.stat().st_size for entry in os.scandir(path) if entry.name.endswith('.npy'))
    return os.path.getsize(path)


@contextmanager
def one_line(path):
    """What breaks in a file while it is read is one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except ImportError as error:
        raise OSError(f'{path} needs a package that is not here: pip install {error.name}') from None
    except Exception as error:  # each of the codecs, pyarrow, the file system of the hub and its client raises its own
        if str(error).startswith(str(path)):
            raise  # it is one of ours
        reason = ' '.join(str(error).split())[:300] or type(error).__name__
        raise OSError(f'{path} could not be read ({reason}): put that right and run this again, it continues') from error


@contextmanager
def opened(path):
    """(the bytes of a file, decompressed; the file itself, whose tell() says how much of it was read)"""
    with open(path, 'rb') as raw:
        ending = os.path.splitext(path)[1].lower()
        if ending == '.gz':
            yield gzip.GzipFile(fileobj=raw), raw
        elif ending == '.bz2':
            yield bz2.BZ2File(raw), raw
        elif ending == '.zst':
            import pyarrow
            yield io.BufferedReader(pyarrow.input_stream(raw, compression='zstd'), 1 << 20), raw
        else:
            yield raw, raw


def skip(file, n_bytes):
    """Go forward from the beginning of a file. What is compressed has to be read for that."""
    if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        file.seek(n_bytes)
        return
    while n_bytes > 0 and (data := file.read(min(n_bytes, 1 << 20))):
        n_bytes -= len(data)


def not_utf8(path, line, error, offer=', or --errors=replace puts U+FFFD in its place'):
    return ValueError(f'{path}, line {line}: not UTF-8 ({error.reason}): convert the file to UTF-8{offer}')


def read_text(path):
    """The text of a UTF-8 file, line ends as they are. Raises ValueError naming file and line where it is not UTF-8."""
    with one_line(path), opened(os.fspath(path)) as (file, _):
        data = file.read()
    try:
        return data.decode('utf-8-sig')  # a byte order mark is not text
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.object.count(b'\n', 0, error.start) + 1, error, offer='') from None

# -----------------------------------------------------------------------------
# reading

# path, format, begin: what parse() needs beside the data (bytes, texts, pages or arrays) to make documents of them, and to say where one
# is; size: about so many bytes; begin, after: (file number, place, lines before) where this block begins, and the next; n_read:
# bytes of the file on disk up to here
Block = namedtuple('Block', 'path format data size begin after n_read')


def blocks(files, fields=('text',), errors='strict', start=(0, 0, 0)):
    """The corpus in blocks of about 1 MiB. From where any of them begins, the same ones follow.

    files    as find_files returns them
    fields   those that make a document, one below the other; text files have none, an article has title and text
    errors   'strict': what is not UTF-8 raises; 'replace': U+FFFD stands for it
    start    where a block begins
    raises   ValueError naming file and line, OSError for what cannot be read
    """
    check_shapes([path for path, format in files if format == 'blocks'])
    first, place, line = start
    for number, (path, format) in enumerate(files[first:], first):
        with one_line(path):
            for data, size, next_place, next_line, n_read in READERS[format](path, format, fields, errors, place, line):
                yield Block(path, format, data, size, (number, place, line), (number, next_place, next_line), n_read)
                place, line = next_place, next_line
        place = line = 0


def parse(block, fields=('text',), errors='strict'):
    """The documents of a block: texts, or from the format blocks pairs (ids, mask) as rows_of makes them."""
    if block.format in PARSERS:
        return [document for document in PARSERS[block.format](block, fields, errors) if len(document)]
    return [text for text in block.data if text]


def documents(paths, format='auto', fields=('text',), errors='strict', start=(0, 0, 0, 0)):
    """Every document of a corpus, and the position behind it.

    start    a position that this function gave
    yields   (document, position)
    the rest as in find_files, blocks and parse
    """
    *begin, to_skip = start
    for block in blocks(find_files(paths, format), fields, errors, begin):
        found = parse(block, fields, errors)
        for n, document in enumerate(found[to_skip:], to_skip + 1):
            yield document, (*block.begin, n)
        to_skip = max(to_skip - len(found), 0)


def grouped(records, size_of, place, tell=int):
    """Records in a row -> what a reader yields: (data, size, place behind it, 0, bytes on disk up to here)."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += size_of(record) + 100  # what Python spends on one, however short
        if size > BLOCK_BYTES:
            place += len(batch)
            yield batch, size, place, 0, tell()
            batch, size = [], 0
    if batch:
        yield batch, size, place + len(batch), 0, tell()


def joined(values, fields, where):
    """The text of a record's fields: what is not empty, one below the other. A list of texts is as good as one text."""
    texts = []
    for value, field in zip(values, fields):
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            value = '\n'.join(value)
        if not isinstance(value, str | None):
            raise ValueError(f'{where}: field {field!r} holds {json.dumps(value, default=str)[:40]}, which is no text')
        if value:
            texts.append(value)
    return '\n'.join(texts)


def text_of(record, fields, where):
    """The text of what JSON gave: an object with the fields, or a string."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise ValueError(f'{where}: an object or a string is needed, not {json.dumps(record)[:40]}')
    missing = [field for field in fields if field not in record]
    if missing:
        raise no_field(where, missing[0], record)
    return joined([record[field] for field in fields], fields, where)


def no_field(where, field, have):
    names = [str(name) for name in have]
    shown = ', '.join(names[:20]) + (f' and {len(names) - 20:,} more' if len(names) > 20 else '')
    return ValueError(f'{where}: no field {field!r} with text, only {shown or "none at all"}: '
                      'name the one to take with --field')

# -----------------------------------------------------------------------------
# text, JSONL: bytes cut at line ends

def read_lines(path, format, fields, errors, place, line):
    """place: bytes before, decompressed."""
    with opened(path) as (file, raw):
        skip(file, place)
        data = b''
        while more := file.read(BLOCK_BYTES - len(data) if len(data) < BLOCK_BYTES else BLOCK_BYTES):
            data += more
            end = where_to_cut(data, format) if len(data) >= BLOCK_BYTES else 0
            if end:
                place, line = place + end, line + data.count(b'\n', 0, end)
                yield data[:end], end, place, line, raw.tell()
                data = data[end:]
            elif len(data) > MAX_RECORD_BYTES:
                raise ValueError(f'{path}, line {line + 1}: a document of more than {MAX_RECORD_BYTES >> 20} MiB: is the format {format}?')
        if data:
            yield data, len(data), place + len(data), line + data.count(b'\n'), raw.tell()


def where_to_cut(data, format):
    """Where the last whole document of some bytes ends; 0 where none does."""
    blank_line = max(data.rfind(b'\n\n') + 2, data.rfind(b'\n\r\n') + 3) if format in ('text', 'paragraphs') else 0
    if blank_line > 2 or format == 'paragraphs':
        return blank_line if blank_line > 2 else 0
    end = data.rfind(b'\n') + 1
    if end == 0 and format == 'text':
        end = next(i for i in range(len(data) - 1, 0, -1) if data[i] & 0xC0 != 0x80)  # not in the middle of a character
    return end


def decode(block, errors):
    _, place, line = block.begin
    try:
        return block.data.decode('utf-8' if place else 'utf-8-sig', errors)  # a byte order mark is not text
    except UnicodeDecodeError as error:
        raise not_utf8(block.path, line + error.object.count(b'\n', 0, error.start) + 1, error) from None


def texts_of_file(block, fields, errors):
    return [decode(block, errors)]


def texts_of_paragraphs(block, fields, errors):
    return [text.strip('\r\n') for text in re.split(r'\n(?:[^\S\n]*\n)+', decode(block, errors))]


def texts_of_lines(block, fields, errors):
    return [text.removesuffix('\r') for text in decode(block, errors).split('\n')]


def texts_of_jsonl(block, fields, errors):
    for n, line in enumerate(decode(block, errors).split('\n'), block.begin[2] + 1):
        if line and not line.isspace():
            where = f'{block.path}, line {n}'
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f'{where}: not JSON: {error}') from None
            yield whole_characters(text_of(record, fields, where), where, errors)


def whole_characters(text, where, errors):
    r"""JSON can say half a character, as "\ud83d" without what follows."""
    try:
        text.encode('utf-8')
    except UnicodeEncodeError as error:
        if errors == 'strict':
            raise ValueError(f'{where}: half a surrogate pair (U+{ord(text[error.start]):04X}) is no character: correct it, '
                             'or --errors=replace puts U+FFFD in its place') from None
        return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')
    return text

# -----------------------------------------------------------------------------
# JSON, CSV

def decoded(file, path, errors):
    """The text of a file, in pieces."""
    decoder, line, end = codecs.getincrementaldecoder('utf-8-sig')(errors), 1, False
    while not end:
        data = file.read(BLOCK_BYTES)
        end = not data
        try:
            text = decoder.decode(data, end)
        except UnicodeDecodeError as error:
            raise not_utf8(path, line + error.object.count(b'\n', 0, error.start), error) from None
        line += text.count('\n')
        yield text


class JsonText:
    """JSON that is read piece by piece, value after value. text[at:] is what comes next."""

    def __init__(self, pieces):
        self.pieces, self.text, self.at, self.past, self.ended = pieces, '', 0, 0, False  # past: characters before text
        self.decoder = json.JSONDecoder()

    def read_on(self):
        """Have at least twice as much text ahead, so that a long value is not parsed over and over."""
        parts, wanted = [self.text[self.at:]], 2 * (len(self.text) - self.at) + 1
        while sum(map(len, parts)) < wanted and not self.ended:
            parts.append(next(self.pieces, None))
            self.ended = parts[-1] is None
            parts[-1] = parts[-1] or ''
        self.past += self.at
        self.text, self.at = ''.join(parts), 0

    def peek(self):
        """The character that is next, white space left out; '' at the end."""
        while True:
            self.at = re.compile(r'[ \t\r\n]*').match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at:self.at + 1]
            self.read_on()

    def take(self, expected):
        if self.peek() not in expected or not self.peek():
            raise ValueError(f'{" or ".join(expected)} is expected, not {self.peek() or "the end of the file"}')
        self.at += 1
        return self.text[self.at - 1]

    def value(self):
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # or a number might go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                if self.ended:
                    raise ValueError(error.msg) from None
            if len(self.text) - self.at > MAX_RECORD_BYTES:
                raise ValueError(f'a value of more than {MAX_RECORD_BYTES >> 20} MiB')
            self.read_on()

    def records(self):
        """The elements of an array; the values of an object whose first two are objects; each of several other objects in a row."""
        while first := self.peek():
            if first == '[':
                yield from self.elements()
            elif first == '{':
                yield from self.members()
            else:
                yield self.value()

    def elements(self):
        more = self.take('[') and self.peek() != ']' or not self.take(']')
        while more:
            yield self.value()
            more = self.take(',]') == ','

    def members(self):
        record, of_objects, begin = {}, False, self.past + self.at
        more = self.take('{') and self.peek() != '}' or not self.take('}')
        while more:
            key = self.value()
            self.take(':')
            value = self.value()
            if not of_objects:
                record[key] = value
                if self.past + self.at - begin > MAX_RECORD_BYTES:
                    raise ValueError(f'an object of more than {MAX_RECORD_BYTES >> 20} MiB that is no object of objects')
                if len(record) == 2 and all(isinstance(value, dict) for value in record.values()):
                    of_objects = True
                    yield from record.values()
            elif isinstance(value, dict):
                yield value
            else:
                raise ValueError(f'{key!r:.40} is no object, as those before it are: if each line is a record, use --format=jsonl')
            more = self.take(',}') == ','
        if record and not of_objects:
            only = list(record.values())[0] if len(record) == 1 else None
            yield only if isinstance(only, dict) else record


def read_json(path, format, fields, errors, place, line):
    """place: records before."""
    def texts(pieces):
        n = 0
        try:
            for n, record in enumerate(JsonText(pieces).records(), 1):
                if n > place:
                    where = f'{path}, record {n}'
                    yield whole_characters(text_of(record, fields, where), where, errors)
        except (ValueError, RecursionError) as error:
            raise error if str(error).startswith(path) else ValueError(f'{path}, record {n + 1}: not JSON: {error}') from None
    with opened(path) as (file, raw):
        yield from grouped(texts(decoded(file, path, errors)), len, place, raw.tell)


def read_csv(path, format, fields, errors, place, line):
    """place: rows before, the names not counted."""
    def lines(pieces):
        rest = ''
        for piece in pieces:
            *whole, rest = (rest + piece).split('\n')
            yield from (text + '\n' for text in whole)
            if len(rest) > MAX_RECORD_BYTES:
                raise ValueError(f'{path}: a line of more than {MAX_RECORD_BYTES >> 20} MiB: is the format {format}?')
        if rest:
            yield rest

    def texts(rows):
        names = next(rows, [])
        missing = [field for field in fields if field not in names]
        if missing:
            raise no_field(path, missing[0], names)
        columns = [names.index(field) for field in fields]
        for n, row in enumerate(filter(None, rows)):
            if len(row) != len(names):
                raise ValueError(f'{path}, line {rows.line_num}: {len(row)} fields where the first row names {len(names)}')
            if n >= place:
                yield '\n'.join(row[column] for column in columns if row[column])
    csv.field_size_limit(MAX_RECORD_BYTES)
    with opened(path) as (file, raw):
        rows = csv.reader(lines(decoded(file, path, errors)), 'excel' if format == 'csv' else 'excel-tab', strict=True)
        try:
            yield from grouped(texts(rows), len, place, raw.tell)
        except csv.Error as error:
            raise ValueError(f'{path}, line {rows.line_num}: not {format.upper()}: {error}') from None

# -----------------------------------------------------------------------------
# Parquet and Arrow

def texts_of_rows(batches, fields, path, n_to_skip):
    for batch in batches:
        columns = [batch.column(batch.schema.get_field_index(field)) for field in fields]
        for begin in range(n_to_skip, batch.num_rows, 16):  # as Python's texts they take memory once more
            for row in zip(*(column.slice(begin, 16).to_pylist() for column in columns)):
                yield joined(row, fields, path)
        n_to_skip = max(n_to_skip - batch.num_rows, 0)


def check_columns(schema, fields, path):
    for field in fields:
        if field not in schema.names:
            raise no_field(path, field, schema.names)
        if 'string' not in str(schema.field(field).type):
            raise ValueError(f'{path}: field {field!r} holds {schema.field(field).type}, which is no text')


def read_parquet(path, format, fields, errors, place, line):
    """place: rows before. Row groups before it are not read."""
    import pyarrow.parquet
    if path.startswith('hf://'):
        from huggingface_hub import HfFileSystem
        file = HfFileSystem().open(path, block_size=32 << 20)  # bytes that one request asks for
    else:
        file = open(path, 'rb')
    with file:  # the buffer keeps a row group of any size from being read as a whole
        parquet = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
        check_columns(parquet.schema_arrow, fields, path)
        size, total, done, to_skip = file.seek(0, os.SEEK_END), max(parquet.metadata.num_rows, 1), place, place
        groups = list(range(parquet.num_row_groups))
        while groups and to_skip >= parquet.metadata.row_group(groups[0]).num_rows:
            to_skip -= parquet.metadata.row_group(groups.pop(0)).num_rows
        row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in map(parquet.metadata.row_group, groups)), default=0)
        batch_size = min(max(BLOCK_BYTES // max(row_bytes, 1), 1), 256)  # few of them, where a row is a book
        batches = parquet.iter_batches(batch_size=batch_size, row_groups=groups, columns=list(fields)) if groups else ()
        for data, n_chars, done, _, _ in grouped(texts_of_rows(batches, fields, path, to_skip), len, place):
            yield data, n_chars, done, 0, size * done // total


def read_arrow(path, format, fields, errors, place, line):
    """place: rows before."""
    import pyarrow
    with pyarrow.OSFile(path) as file:  # not mapped, so that memory does not grow with the file
        in_a_row = file.read(6) != b'ARROW1'  # datasets and transformers write the stream format, others the file format
        file.seek(0)
        reader = pyarrow.ipc.open_stream(file) if in_a_row else pyarrow.ipc.open_file(file)
        check_columns(reader.schema, fields, path)
        batches = reader if in_a_row else map(reader.get_batch, range(reader.num_record_batches))
        yield from grouped(texts_of_rows(batches, fields, path, place), len, place, file.tell)

# -----------------------------------------------------------------------------
# Wikipedia

def read_wiki(path, format, fields, errors, place, line):
    """place: articles before. An article is a page of the main namespace that is no redirection."""
    import mwparserfromhell  # noqa: F401 (if it is missing, that is said here, not by a worker)
    unknown = set(fields) - {'title', 'text'}
    if unknown:
        raise no_field(path, min(unknown), ['title', 'text'])
    with opened(path) as (file, raw):
        pages = wiki_pages(decoded(file, path, errors), path)
        for _ in range(place):
            next(pages, None)
        yield from grouped(pages, lambda page: len(page[1]), place, raw.tell)


def wiki_pages(pieces, path):
    """(title, wikitext, names of the namespaces of files and categories) of every article."""
    found, page, hidden, depth, inside = [], {}, [], 0, []

    def start(tag, attributes):
        nonlocal depth
        if depth == 0 and tag != 'mediawiki':
            raise ValueError(f'{path}: its first element is <{tag}>, not the <mediawiki> of a dump of MediaWiki')
        depth += 1
        inside.clear()
        if tag == 'page':
            page.clear()
        elif tag in ('redirect', 'namespace'):
            page[tag] = attributes.get('key', '')

    def end(tag):
        nonlocal depth
        depth -= 1
        if tag == 'namespace' and page['namespace'] in ('6', '14'):
            hidden.append(''.join(inside).lower())
        elif tag in ('title', 'ns', 'text', 'model'):
            page[tag] = ''.join(inside)
        elif tag == 'page' and page.get('ns', '0') == '0' and 'redirect' not in page and page.get('model', 'wikitext') == 'wikitext':
            found.append((page.get('title', ''), page.get('text', ''), tuple(hidden)))

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, inside.append
    try:
        for piece in pieces:
            parser.Parse(piece, False)
            yield from found
            found.clear()
        parser.Parse('', True)
    except expat.ExpatError as error:
        raise ValueError(f'{path}, line {error.lineno}: not XML, or cut short: {expat.ErrorString(error.code)}') from None


def texts_of_wiki(block, fields, errors):
    for title, wikitext, hidden in block.data:
        text = plain_wikitext(wikitext, hidden)
        if text:
            yield whole_characters('\n'.join({'title': title, 'text': text}[field] for field in fields), f'{block.path}, {title}', 'replace')


HIDDEN_LINKS = {'file', 'image', 'media', 'category', '文件', '檔案', '档案', '图像', '圖像', '分类', '分類'}
HIDDEN_TAGS = {'table', 'ref', 'references', 'gallery', 'math', 'chem', 'timeline', 'style', 'templatestyles', 'syntaxhighlight', 'mapframe'}
REDIRECTION = re.compile(r'\s*#\s*(redirect|重定向|重新導向)', re.IGNORECASE)


def plain_wikitext(wikitext, hidden=()):
    """The text of an article: no templates, tables, references, files, categories, comments or markup; a section without text
    of its own or below it loses its heading.

    hidden   further names of namespaces whose links are not text
    """
    import mwparserfromhell
    if REDIRECTION.match(wikitext):
        return ''
    text = plain_nodes(mwparserfromhell.parse(re.sub(r'-\{(.*?)\}-', one_variant, wikitext, flags=re.DOTALL)), HIDDEN_LINKS.union(hidden))
    text = re.sub(r'__[A-Z]+__|[(（][\s,，;；、:：]*[)）]', '', text)  # what a template leaves of '(English: {{lang|en|name}})'
    text = re.sub(r'[^\S\n]*\n[^\S\n]*', '\n', text)
    sections, level_below = re.split(r'^\x02(\d)(.*)\n?', text, flags=re.MULTILINE), 0
    kept = []
    for i in range(len(sections) - 3, 0, -3):
        level, heading, body = int(sections[i]), sections[i + 1].strip(), sections[i + 2].strip()
        if body or level_below > level:
            kept.append(f'{heading}\n{body}' if body else heading)
            level_below = level
    return re.sub(r'\n{3,}', '\n\n', '\n\n'.join([sections[0].strip(), *reversed(kept)])).strip()


def plain_nodes(code, hidden):
    """The text of parsed wikitext; a heading becomes a line that begins with U+0002 and its level."""
    from mwparserfromhell import definitions, nodes
    parts = []
    for node in code.nodes if code is not None else ():
        if isinstance(node, nodes.Text):
            parts.append(node.value)
        elif isinstance(node, nodes.Wikilink):
            prefix, colon, _ = str(node.title).partition(':')
            if not colon or prefix.strip().lower() not in hidden:  # [[:File:x]] is a link to be seen
                parts.append(plain_nodes(node.text, hidden) if node.text is not None else str(node.title).removeprefix(':'))
        elif isinstance(node, nodes.ExternalLink):
            parts.append(plain_nodes(node.title, hidden))
        elif isinstance(node, nodes.Heading):
            parts.append(f'\n\x02{node.level}{plain_nodes(node.title, hidden)}\n')
        elif isinstance(node, nodes.HTMLEntity):
            parts.append(node.normalize() or '')
        elif isinstance(node, nodes.Tag):
            tag = str(node.tag).strip().lower()
            if tag in ('br', 'hr', 'p', 'div'):
                parts.append('\n')
            if tag not in HIDDEN_TAGS and definitions.is_visible(tag):
                parts.append(plain_nodes(node.contents, hidden))
    return ''.join(parts)


def one_variant(match):
    """Chinese Wikipedia writes a word in several ways, -{zh-hans:软件; zh-hant:軟體}-: the simplified one of them, or the only one."""
    flags, bar, content = match[1].rpartition('|')
    if bar and not re.fullmatch(r'[A-Za-z;\s-]*', flags):
        content = match[1]
    if 'H' in flags or 'T' in flags:  # a rule for the page, or its title: nothing to be seen
        return ''
    variants = dict(part.split(':', 1) for part in content.split(';') if re.match(r'\s*zh[\w-]*\s*:', part))
    variants = {name.strip(): text.strip() for name, text in variants.items()}
    return next((variants[name] for name in ('zh-hans', 'zh-cn', 'zh', *variants) if name in variants), content)

# -----------------------------------------------------------------------------
# folders of blocks: token_float32.npy, label_float32.npy and perhaps loss_mask.npy, (rows, T) each

LARGEST_IN_FLOAT32 = 2 ** 24  # whole numbers above it may have been rounded
NOT_A_TARGET = -100


def block_arrays(folder):
    """The arrays of a folder as {file name: array}, mapped, not read."""
    names = [name for name in ('token_float32.npy', 'label_float32.npy', 'loss_mask.npy')
             if name != 'loss_mask.npy' or os.path.exists(os.path.join(folder, name))]
    return {name: np.load(os.path.join(folder, name), mmap_mode='r', allow_pickle=False) for name in names}


def check_shapes(folders):
    """Raises ValueError before the first hour of work where arrays or blocks do not belong together."""
    first = None
    for folder in folders:
        with one_line(folder):
            arrays = block_arrays(folder)
        shapes = {name: array.shape for name, array in arrays.items()}
        if len(set(shapes.values())) > 1 or len(shapes['token_float32.npy']) != 2:
            raise ValueError(f'{folder}: {", ".join(f"{name} is {shape}" for name, shape in shapes.items())}: equal shapes (rows, T) are needed')
        first = first or (folder, shapes['token_float32.npy'][1])
        if shapes['token_float32.npy'][1] != first[1]:
            raise ValueError(f'{folder} has rows of {shapes["token_float32.npy"][1]} tokens, {first[0]} of {first[1]}: pack them one by one')
        wrong = [f'{name} holds {array.dtype}' for name, array in arrays.items() if array.dtype.kind not in 'fiub']
        if wrong:
            raise ValueError(f'{folder}: {wrong[0]}: numbers are needed')


def read_rows(path, format, fields, errors, place, line):
    """place: rows before."""
    n_bytes, (n_rows, T) = n_bytes_of(path), block_arrays(path)['token_float32.npy'].shape
    step = max(1, BLOCK_BYTES // (4 * max(T, 1)))
    for begin in range(place, n_rows, step):
        end = min(begin + step, n_rows)
        data = {name: np.array(array[begin:end]) for name, array in block_arrays(path).items()}  # a map that lives on would hold what was read
        yield data, sum(array.nbytes for array in data.values()), end, 0, n_bytes * end // n_rows


def rows_of(block, fields, errors):
    """[(ids, mask)] of rows: T + 1 ids where the labels are the tokens that follow, so that the windows of T tokens that begin with
    the rows show the same x and y again; T ids where the labels are the tokens themselves. mask is 1 where a token is a target.

    raises   ValueError for what is no token id, or labels that are neither
    """
    tokens, labels, *weights = block.data.values()
    for name, array in block.data.items():
        whole = (array == np.rint(array)) & (abs(array.astype(np.float64)) < LARGEST_IN_FLOAT32)
        if name == 'loss_mask.npy':
            whole = (array == 0) | (array == 1)
        check_rows(whole, block, f'{name} holds {{}}, which is no {"0 or 1" if name == "loss_mask.npy" else "token id that float32 can hold"}', array)
    target = labels != NOT_A_TARGET
    if weights:
        target &= weights[0] != 0
    follow = (labels[:, :-1] == tokens[:, 1:]) | ~target[:, :-1]
    if not follow.all():
        same = (labels == tokens) | ~target
        if not same.all():
            worse = follow if follow.mean() > same[:, :-1].mean() else same
            check_rows(worse, block, 'label {} is neither the token there nor the one that follows', labels)
        return list(zip(tokens.astype(np.int64), target.astype(np.uint8)))
    ids = np.concatenate((tokens, labels[:, -1:]), axis=1).astype(np.int64)
    mask = np.concatenate((np.zeros_like(target[:, :1]), target), axis=1).astype(np.uint8)
    return [(row[:len(row) - (not m[-1])], m[:len(m) - (not m[-1])]) for row, m in zip(ids, mask)]


def check_rows(good, block, what, array):
    if not good.all():
        row, position = np.argwhere(~good)[0].tolist()
        raise ValueError(f'{block.path}, row {block.begin[1] + row}, position {position}: {what.format(array[row, position])}')


READERS = {'text': read_lines, 'paragraphs': read_lines, 'lines': read_lines, 'jsonl': read_lines, 'json': read_json, 'csv': read_csv,
           'tsv': read_csv, 'parquet': read_parquet, 'arrow': read_arrow, 'wiki': read_wiki, 'blocks': read_rows}
PARSERS = {'text': texts_of_file, 'paragraphs': texts_of_paragraphs, 'lines': texts_of_lines, 'jsonl': texts_of_jsonl,
           'wiki': texts_of_wiki, 'blocks': rows_of}
