"""Read the records of a JSON file that may be longer than memory.

ijson parses. It reads half a surrogate pair, such as "\\ud83d" alone, as a question mark.
"""

import re

from corpus.textfile import MAX_RECORD_CHARS, TextFile, too_long

TOO_DEEP = re.compile(r'(?:[\[{]\s*(?:"[^"]*"\s*:\s*)?){200}')  # ijson keeps the path of every value above
RECORD_LISTS = ('messages', 'conversations', 'paragraphs')  # lists of objects within one record


class Source:
    """A TextFile as ijson reads it. It counts the characters since n_pending was last set to 0."""

    def __init__(self, file):
        self.file, self.n_pending = file, 0

    def read(self, n_chars):
        text = self.file.read(n_chars)
        self.n_pending += len(text)
        if self.n_pending > MAX_RECORD_CHARS:
            raise too_long(f'{self.file.path}: a record')
        if TOO_DEEP.search(text):
            raise ValueError('nested more than 200 deep')
        return text.encode('utf-8')


def read_json_records(path, reading):
    """Yield (record, where) of every record of a file."""
    import ijson
    n_records = 0
    try:
        prefix = find_prefix(path, reading)
        with reading.open(path) as file:
            source = Source(file)
            if prefix is None:
                records = (record for _, record in ijson.kvitems(source, '', use_float=True))
            else:
                records = ijson.items(source, prefix, multiple_values=not prefix, use_float=True)
            for record in records:
                if prefix is None and not isinstance(record, dict):
                    raise ValueError(f'{record!r:.40} is not an object, as the values before it are')
                n_records, source.n_pending = n_records + 1, 0
                yield record, f'{path}, record {n_records}'
    except (ValueError, ijson.JSONError) as error:
        if str(error).startswith(path):
            raise
        reason = str(error).partition('\n')[0].strip()
        raise ValueError(f'{path}, record {n_records + 1}: not JSON: {reason} '
                         '(if each line is a record, use --format=jsonl)') from None


def find_prefix(path, reading):
    """Tell from the first value of a file where its records are, as a prefix of ijson.

    returns  'item' for an array, 'key.item' for {"key": [...]}, '' for one record after another, and None for
             an object of objects
    """
    import ijson
    depth, key, kinds = 0, None, []
    with TextFile(path, reading.encoding, reading.errors) as file:
        source = Source(file)
        for event, value in ijson.basic_parse(source, multiple_values=True):
            source.n_pending = 0
            if depth == 0 and event != 'start_map':
                return 'item' if event == 'start_array' else ''
            if depth == 1 and event == 'map_key':
                key = value
            elif depth == 1 and event != 'end_map':
                kinds.append(event)
                if (key, event) == ('data', 'start_array'):
                    return 'data.item'
            depth += event.startswith('start') - event.startswith('end')
            if depth == 0 or len(kinds) == 2 and depth == 1:
                break
    if kinds and set(kinds) == {'start_map'}:
        return None
    if kinds == ['start_array'] and key not in (*RECORD_LISTS, *(reading.fields or ())):
        return f'{key}.item'
    return ''
