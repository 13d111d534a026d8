"""Read the records of a JSON file that may be longer than memory.

ijson parses. It reads half a surrogate pair, such as "\\ud83d" alone, as a question mark.
"""

import re

from corpus.textfile import TextFile

TOO_DEEP = re.compile(r'(?:[\[{]\s*(?:"[^"]*"\s*:\s*)?){200}')  # ijson keeps the path of every value above
RECORD_LISTS = ('messages', 'conversations', 'paragraphs')  # lists of objects within one record


class Source:
    """A TextFile as ijson reads it."""

    def __init__(self, file):
        self.file = file

    def read(self, n_chars):
        text = self.file.read(n_chars)
        if TOO_DEEP.search(text):
            raise ValueError('nested more than 200 deep')
        return text.encode('utf-8')


def read_json_records(path, reading):
    """Yield (record, where) of every record of a file."""
    import ijson
    number = 0
    try:
        prefix = find_prefix(path, reading)
        with reading.open(path) as file:
            if prefix is None:
                records = (value for _, value in ijson.kvitems(Source(file), '', use_float=True))
            else:
                records = ijson.items(Source(file), prefix, multiple_values=not prefix, use_float=True)
            for record in records:
                if prefix is None and not isinstance(record, dict):
                    raise ValueError(f'{record!r:.40} is not an object, as the values before it are')
                number += 1
                yield record, f'{path}, record {number}'
    except (ValueError, ijson.JSONError) as error:
        if str(error).startswith(path):
            raise
        reason = str(error).partition('\n')[0].strip()
        raise ValueError(f'{path}, record {number + 1}: not JSON: {reason} '
                         '(if each line is a record, use --format=jsonl)') from None


def find_prefix(path, reading):
    """Tell from the beginning of a file where its records are, as a prefix of ijson.

    returns  'item' for an array, 'key.item' for {"key": [...]}, '' for one record after another, and None for
             an object of objects
    """
    import ijson
    key, kinds = None, {}  # kinds: the first event of each value in the outer object
    with TextFile(path, reading.encoding, reading.errors) as file:
        for prefix, event, value in ijson.parse(Source(file), multiple_values=True):
            file.n_pending = 0
            if event == 'map_key' and not prefix:
                key = value
            elif event == 'end_map' and not prefix or len(kinds) == 2:
                break
            elif not prefix and event != 'start_map':
                return {'start_array': 'item'}.get(event, '')
            elif prefix == key:
                kinds.setdefault(key, event)
                if kinds.get('data') == 'start_array':
                    return 'data.item'
    events = list(kinds.values())
    if set(events) == {'start_map'}:
        return None
    if events == ['start_array'] and key not in (*RECORD_LISTS, *(reading.fields or ())):
        return f'{key}.item'
    return ''
