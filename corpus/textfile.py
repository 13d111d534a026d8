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


@contextlib.contextmanager
def naming(path):
    """Turn whatever breaks while a file is read into one line that names the file."""
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
        return gzip.GzipFile(fileobj=raw), raw
    if ending == '.bz2':
        return bz2.BZ2File(raw), raw
    if ending == '.zst':
        import pyarrow
        return io.BufferedReader(pyarrow.input_stream(raw, compression='zstd'), 1 << 20), raw
    return raw, raw


class TextFile:
    """A decoded file. Every line end is a line feed, and a byte order mark at the beginning is dropped.

    encoding   'utf-8' also reads UTF-16 that begins with its byte order mark
    errors     'strict' raises ValueError with the line and, if there is one, the encoding that fits the file
               'replace' puts U+FFFD for what does not decode, and raises above 1% of the characters
               'replace_all' puts U+FFFD without a limit
    """

    def __init__(self, path, encoding='utf-8', errors='strict'):
        self.path, self.encoding, self.errors = os.fspath(path), encoding, errors
        self.n_chars = self.n_replaced = 0
        self.n_read = 0  # bytes of the file on disk

    def __enter__(self):
        stream, self.raw = open_bytes(self.path)
        marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        if self.encoding == 'utf-8' and stream.peek(2)[:2] in marks:
            self.encoding = 'utf-16'
        self.text = io.TextIOWrapper(stream, self.encoding, self.errors.removesuffix('_all'), newline=None)
        return self

    def __exit__(self, *_):
        self.text.close()
        self.raw.close()

    def lines(self):
        """Yield every line, without its line end."""
        number, begun = 1, []  # the parts of the line that has not ended
        while chunk := self.read(1 << 16):
            first, *others = chunk.split('\n')
            begun.append(first)
            if others:
                yield ''.join(begun)
                yield from others[:-1]
                begun = others[-1:]
            number += len(others)
            if sum(map(len, begun)) > MAX_RECORD_CHARS:
                raise too_long(f'{self.path}, line {number}: a line')
        if any(begun):
            yield ''.join(begun)

    def read(self, n_chars):
        try:
            text = self.text.read(n_chars)
        except UnicodeError:
            raise ValueError(wrong_encoding(self.path, self.encoding)) from None
        self.n_read = self.raw.tell()
        if self.n_chars == 0:
            text = text.removeprefix('\ufeff')
        self.n_chars += len(text)
        if self.errors != 'strict':
            self.n_replaced += text.count('\ufffd')
            if self.n_chars > 1 << 20:  # a shorter file is checked at its end
                self.check_replaced()
        return text

    def check_replaced(self):
        """Raise ValueError if more was replaced than errors='replace' allows."""
        if self.errors == 'replace' and self.n_replaced > 0.01 * self.n_chars:
            remedy = fitting_encoding(self.path) or 'if they may be lost, use --errors=replace_all'
            raise ValueError(f'{self.path}: {self.n_replaced / self.n_chars:.1%} of its characters are not '
                             f'{self.encoding}, and --errors=replace takes up to 1%: {remedy}')

    def report_replaced(self):
        if self.n_replaced:
            self.check_replaced()
            print0(f'{self.path}: {self.n_replaced:,} of {self.n_chars:,} characters became U+FFFD, '
                   f'because they are not {self.encoding}')


def too_long(what):
    return ValueError(f'{what} of more than {MAX_RECORD_CHARS >> 20} Mi characters: is the --format right?')


def no_field(where, field, names):
    shown = ', '.join(list(names)[:20]) or 'none at all'
    if len(names) > 20:
        shown += f' and {len(names) - 20:,} more'
    return ValueError(f'{where}: no field {field!r} with text, only {shown}: '
                      'name the field to take with --field')


# -----------------------------------------------------------------------------
# the encoding of a file


def wrong_encoding(path, encoding):
    """Say where a file stops being text in this encoding, and which encoding fits it."""
    line, reason = first_error(path, encoding)
    name = encoding.upper() if encoding.startswith('utf') else encoding
    remedy = fitting_encoding(path) or ('convert the file to UTF-8, name its encoding with --encoding, '
                                        'or --errors=replace puts U+FFFD in its place')
    return f'{path}, line {line}: not {name} ({reason}): {remedy}'


def fitting_encoding(path):
    """Name the usual encoding that decodes all of a file; '' if there is none.

    The order matters: GB 18030 decodes most of Big5 to rare characters, and its common part GB 2312 does not.
    """
    usual = {'utf-8': 'utf-8', 'utf-16': 'utf-16', 'gb2312': 'gb18030', 'big5': 'big5', 'gb18030': 'gb18030'}
    for encoding, name in usual.items():
        if first_error(path, encoding) is None:
            return f'it is {name}: convert it to UTF-8, or use --encoding={name}'
    return ''


def first_error(path, encoding):
    """Find (line, reason) of the first bytes of a file that do not decode; None if all do."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    line = 1
    stream, raw = open_bytes(path)
    with raw:
        while True:
            data = stream.read(1 << 20)
            try:
                line += decoder.decode(data, final=not data).count('\n')
            except UnicodeDecodeError as error:
                before = error.object[:error.start].decode(encoding, 'replace')
                return line + len(re.findall('\r\n?|\n', before)), error.reason
            except UnicodeError as error:  # UTF-16 without a byte order mark
                return line, str(error)
            if not data:
                return None
