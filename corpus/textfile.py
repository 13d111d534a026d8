"""Read a text file: decompressed, decoded, with a line feed for every line end."""

import bz2
import codecs
import contextlib
import gzip
import io
import os
import re

from files import print0

MAX_RECORD_CHARS = 64 << 20  # a longer record means that the file has another format
TELL_EVERY_CHARS = 1 << 12  # asking for the position costs more than decoding a record
MAX_REPLACED = 0.01  # share of the characters
# The order matters: GB 18030 decodes most of Big5 to rare characters, and its common part GB 2312 does not.
USUAL_ENCODINGS = {'utf-8': 'utf-8', 'utf-16': 'utf-16', 'gb2312': 'gb18030', 'big5': 'big5',
                   'gb18030': 'gb18030'}


@contextlib.contextmanager
def naming(path):
    """Name the file in any error while it is read."""
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
    """Open a file. Returns (stream of decompressed bytes, the file on disk)."""
    file = open(path, 'rb')
    ending = os.path.splitext(path)[1].lower()
    return DECOMPRESS.get(ending, lambda file: file)(file), file


def decompress_zstd(file):
    import pyarrow
    return io.BufferedReader(pyarrow.input_stream(file, compression='zstd'), 1 << 20)


DECOMPRESS = {'.gz': gzip.open, '.bz2': bz2.open, '.zst': decompress_zstd}


class TextFile:
    """A decoded file without its byte order mark. Set n_pending to 0 after each record.

    encoding   'utf-8' also reads UTF-16 that begins with its byte order mark
    errors     'strict' raises ValueError; 'replace' puts up to MAX_REPLACED U+FFFD; 'replace_all' any number
    """

    def __init__(self, path, encoding='utf-8', errors='strict'):
        self.path, self.encoding, self.errors = os.fspath(path), encoding, errors
        self.n_chars = self.n_replaced = self.n_pending = self.n_read = self.next_tell = 0
        stream, self.on_disk = open_bytes(path)
        if encoding == 'utf-8' and stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            self.encoding = 'utf-16'
        self.text = io.TextIOWrapper(stream, self.encoding, errors.removesuffix('_all'))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.text.close()
        self.on_disk.close()

    def tell(self):
        if self.n_chars >= self.next_tell:
            self.n_read, self.next_tell = self.on_disk.tell(), self.n_chars + TELL_EVERY_CHARS
        return self.n_read

    def read(self, n_chars=-1):
        return self.checked(self.text.read, n_chars)

    def lines(self):
        while line := self.checked(self.text.readline, MAX_RECORD_CHARS + 1):
            yield line

    def checked(self, read, n_chars):
        try:
            text = read(n_chars)
        except UnicodeError as error:
            raise wrong_encoding(self.path, self.encoding, error) from None
        if self.n_chars == 0:
            text = text.removeprefix('\ufeff')
        self.n_chars += len(text)
        self.n_pending += len(text)
        if self.n_pending > MAX_RECORD_CHARS and n_chars >= 0:
            raise ValueError(f'{self.path}: a record of more than {MAX_RECORD_CHARS >> 20} Mi characters: '
                             'is the --format right?')
        if self.errors != 'strict':
            self.n_replaced += text.count('\ufffd')
        if self.n_replaced and not text:
            self.report_replaced()
        return text

    def report_replaced(self):
        share = self.n_replaced / self.n_chars
        if self.errors == 'replace' and share > MAX_REPLACED:
            remedy = fitting_encoding(self.path) or 'if they may be lost, use --errors=replace_all'
            raise ValueError(f'{self.path}: {share:.1%} of its characters are not {self.encoding}, and '
                             f'--errors=replace takes up to {MAX_REPLACED:.0%}: {remedy}')
        print0(f'{self.path}: {self.n_replaced:,} of {self.n_chars:,} characters became U+FFFD, '
               f'because they are not {self.encoding}')


def with_line_feeds(text):
    if '\r' not in text:  # the usual case, found 100 times as fast as '\r\n'
        return text
    return text.replace('\r\n', '\n').replace('\r', '\n')


def check_fields(fields, names, where):
    """Raise ValueError if a field to take is not among the names of a record."""
    for field in fields or ():
        if field not in names:
            shown = ', '.join(list(names)[:20]) or 'none at all'
            raise ValueError(f'{where}: no field {field!r} with text, only {shown}: '
                             'name the field to take with --field')


# -----------------------------------------------------------------------------
# advice for a file in another encoding


def wrong_encoding(path, encoding, error):
    """Return the ValueError for bytes outside an encoding."""
    remedy = fitting_encoding(path) or ('convert it to UTF-8, name its encoding with --encoding, '
                                        'or use corpus.pack --errors=replace')
    return ValueError(f'{path}, line {first_wrong_line(path, encoding)}: not {encoding.upper()} '
                      f'({getattr(error, "reason", error)}): {remedy}')


def fitting_encoding(path):
    """Return advice that names the usual encoding of a file; None if none fits all of it."""
    for usual, name in USUAL_ENCODINGS.items():
        if first_wrong_line(path, usual) is None:
            return f'it is {name}: convert it to UTF-8, or use --encoding={name}'
    return None


def first_wrong_line(path, encoding):
    """Return the number of the first line with bytes outside an encoding, or None."""
    stream, file = open_bytes(path)
    line = 1
    with file, io.TextIOWrapper(stream, encoding, errors='surrogateescape') as text:
        try:
            while part := text.readline(1 << 20):
                if re.search('[\udc80-\udcff]', part):
                    return line
                line += part.endswith('\n')
        except UnicodeError:  # UTF-16 without its byte order mark, or cut short
            return line
    return None
