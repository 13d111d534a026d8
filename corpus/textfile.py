"""Open a text file for reading: decompress it, decode it, and turn every line end into a line feed."""

import bz2
import codecs
import contextlib
import gzip
import io
import os
import re

from files import print0

MAX_RECORD_CHARS = 64 << 20  # a longer record means that the file has another format
# The order matters: GB 18030 decodes most of Big5 to rare characters, and its common part GB 2312 does not.
USUAL_ENCODINGS = {'utf-8': 'utf-8', 'utf-16': 'utf-16', 'gb2312': 'gb18030', 'big5': 'big5',
                   'gb18030': 'gb18030'}


@contextlib.contextmanager
def naming(path):
    """Name the file in whatever breaks while it is read."""
    try:
        yield
    except FileNotFoundError:
        raise
    except ImportError as error:
        raise OSError(f'{path} needs a package that is not installed: pip install {error.name}') from None
    except Exception as error:  # the codecs, pyarrow and the hub's client each raise their own
        if str(error).startswith(str(path)):
            raise
        reason = ' '.join(str(error).split())[:300] or type(error).__name__
        raise OSError(f'{path} could not be read ({reason}): repair it and run this again') from error


def open_bytes(path):
    """Open a file. Returns (stream of decompressed bytes, file on disk, whose tell() measures progress)."""
    raw = open(path, 'rb')
    ending = os.path.splitext(path)[1].lower()
    if ending == '.gz':
        return gzip.open(raw), raw
    if ending == '.bz2':
        return bz2.open(raw), raw
    if ending == '.zst':
        import pyarrow
        return io.BufferedReader(pyarrow.input_stream(raw, compression='zstd'), 1 << 20), raw
    return raw, raw


class TextFile:
    """A decoded file. Every line end is a line feed, and a byte order mark at the beginning is dropped.

    encoding   'utf-8' also reads UTF-16 that begins with its byte order mark
    errors     'strict' raises ValueError with the line and, if there is one, the encoding that fits the file;
               'replace' puts U+FFFD for what does not decode, says at the end how often, and refuses more
               than 1% of the characters; 'replace_all' takes any number
    """

    def __init__(self, path, encoding='utf-8', errors='strict'):
        self.path, self.encoding, self.errors = os.fspath(path), encoding, errors
        self.n_chars = self.n_replaced = 0
        stream, self.raw = open_bytes(path)
        if encoding == 'utf-8' and stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            self.encoding = 'utf-16'
        self.text = io.TextIOWrapper(stream, self.encoding, 'strict' if errors == 'strict' else 'replace')

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.text.close()
        self.raw.close()

    def read(self, n_chars=-1):
        return self.counted(self.text.read, n_chars)

    def lines(self):
        """Yield every line, with its line feed."""
        number = 1
        while line := self.counted(self.text.readline, MAX_RECORD_CHARS + 1):
            if len(line) > MAX_RECORD_CHARS:
                raise too_long(f'{self.path}, line {number}: a line')
            yield line
            number += 1

    def counted(self, read, n_chars):
        try:
            text = read(n_chars)
        except UnicodeError as error:
            reason = getattr(error, 'reason', error)
            raise ValueError(wrong_encoding(self.path, self.encoding, reason)) from None
        if self.n_chars == 0:
            text = text.removeprefix('\ufeff')
        self.n_chars += len(text)
        if self.errors != 'strict':
            self.n_replaced += text.count('\ufffd')
        if self.n_replaced and not text:
            self.report_replaced()
        return text

    def report_replaced(self):
        share = self.n_replaced / self.n_chars
        if self.errors == 'replace' and share > 0.01:
            remedy = fitting_encoding(self.path) or 'if they may be lost, use --errors=replace_all'
            raise ValueError(f'{self.path}: {share:.1%} of its characters are not {self.encoding}, and '
                             f'--errors=replace takes up to 1%: {remedy}')
        print0(f'{self.path}: {self.n_replaced:,} of {self.n_chars:,} characters became U+FFFD, '
               f'because they are not {self.encoding}')


def too_long(record):
    return ValueError(f'{record} of more than {MAX_RECORD_CHARS >> 20} Mi characters: is the --format right?')


def check_fields(fields, names, where):
    """Raise ValueError if a field to take is not among the names of a record."""
    for field in fields or ():
        if field not in names:
            shown = ', '.join(list(names)[:20]) or 'none at all'
            raise ValueError(f'{where}: no field {field!r} with text, only {shown}: '
                             'name the field to take with --field')


def fitting_encoding(path):
    """Return advice that names the usual encoding of a file; None if none fits all of it."""
    for usual, name in USUAL_ENCODINGS.items():
        if first_wrong_line(path, usual) is None:
            return f'it is {name}: convert it to UTF-8, or use --encoding={name}'
    return None


def wrong_encoding(path, encoding, reason):
    """Say where a file stops being text in this encoding, and which encoding fits all of it."""
    remedy = fitting_encoding(path) or ('convert the file to UTF-8, name its encoding with --encoding, '
                                        'or let corpus.pack --errors=replace put U+FFFD in its place')
    line = first_wrong_line(path, encoding)
    return f'{path}, line {line}: not {encoding.upper()} ({reason}): {remedy}'


def first_wrong_line(path, encoding):
    """Return the number of the first line with bytes outside an encoding; None if all of them decode."""
    stream, raw = open_bytes(path)
    number = 1
    with raw, io.TextIOWrapper(stream, encoding, errors='surrogateescape') as text:
        try:
            while part := text.readline(1 << 20):
                if re.search('[\udc80-\udcff]', part):
                    return number
                number += part.endswith('\n')
        except UnicodeError:  # UTF-16 without its byte order mark, or cut short
            return number
    return None
