"""Read the records of a JSON file that may be longer than memory.

ijson parses. It reads half a surrogate pair, such as "\\ud83d" alone, as a question mark.
"""

import ijson

from corpus.textfile import MAX_RECORD_CHARS, TextFile, too_long

MAX_DEPTH = 200
RECORD_LISTS = ('messages', 'conversations', 'paragraphs')  # lists of objects within one record


class JsonEvents:
    """Iterate over the events of ijson in a TextFile.

    raises   ValueError where values are nested too deep, or `pending` characters were read since it was reset
    """

    def __init__(self, file):
        self.file, self.pending = file, 0

    def read(self, size):
        text = self.file.read(size)
        self.pending += len(text)
        if self.pending > MAX_RECORD_CHARS:
            raise too_long(f'{self.file.path}: a record')
        return text.encode('utf-8')

    def __iter__(self):
        depth = 0
        for event, value in ijson.basic_parse(self, multiple_values=True, use_float=True):
            depth += step(event)
            if depth > MAX_DEPTH:
                raise ValueError(f'nested more than {MAX_DEPTH} deep')
            yield event, value


def read_json_records(path, reading):
    """Yield (record, where) of every record of a file."""
    n_records = 0
    try:
        layout, list_key = find_layout(path, reading.encoding, reading.errors, reading.fields or ())
        with reading.open(path) as file:
            events = JsonEvents(file)
            for record in read_values(iter(events), layout, list_key):
                n_records, events.pending = n_records + 1, 0
                yield record, f'{path}, record {n_records}'
    except (ValueError, ijson.JSONError) as error:
        if str(error).startswith(path):
            raise
        reason = str(error).partition('\n')[0].strip()
        raise ValueError(f'{path}, record {n_records + 1}: not JSON: {reason}') from None


def step(event):
    return event.startswith('start') - event.startswith('end')


def find_layout(path, encoding, errors, fields):
    """Tell how a JSON file holds its records, from its first value.

    fields   fields of a record that may hold lists
    returns  ('values', None) for an object of objects; ('list', key) for {"data": [...]} and {"key": [...]};
             ('sequence', None) for an array, and for one record after another
    """
    depth, key, kinds = 0, None, []
    with TextFile(path, encoding, errors) as file:
        events = JsonEvents(file)
        for event, value in events:
            events.pending = 0
            if depth == 0 and event != 'start_map':
                break
            if depth == 1 and event == 'map_key':
                key = value
            elif depth == 1 and event != 'end_map':
                kinds.append(event)
                if (key, event) == ('data', 'start_array'):
                    return 'list', key
            depth += step(event)
            if depth == 0 or len(kinds) == 2 and depth == 1:
                break
    if kinds and set(kinds) == {'start_map'}:
        return 'values', None
    if kinds == ['start_array'] and key not in (*RECORD_LISTS, *fields):
        return 'list', key
    return 'sequence', None


def read_values(events, layout, list_key):
    """Yield the records of a JSON file of this layout, from an iterator over its events."""
    for event, value in events:
        if event == 'start_array':
            yield from elements(events)
        elif event == 'start_map' and layout == 'values':
            yield from members_of(events)
        elif event == 'start_map' and layout == 'list':
            yield from list_of(events, list_key)
        else:
            yield build(event, value, events)


def elements(events):
    for event, value in events:
        if event == 'end_array':
            return
        yield build(event, value, events)


def members_of(events):
    for event, key in events:
        if event == 'end_map':
            return
        member = build(*next(events), events)
        if not isinstance(member, dict):
            raise ValueError(f'{key!r:.40} is not an object, as the values before it are: '
                             'if each line is a record, use --format=jsonl')
        yield member


def list_of(events, list_key):
    for event, key in events:
        if event == 'end_map':
            return
        event, value = next(events)
        if key == list_key and event == 'start_array':
            yield from elements(events)
        else:
            build(event, value, events)


def build(event, value, events):
    """Build the value that begins with an event."""
    builder = ijson.ObjectBuilder()
    builder.event(event, value)
    depth = step(event)
    while depth:
        event, value = next(events)
        depth += step(event)
        builder.event(event, value)
    return builder.value
