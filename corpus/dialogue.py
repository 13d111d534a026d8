"""Read conversations from JSON, JSONL, CSV, Parquet and Arrow files in the layouts of common datasets.

A record is a list of messages {"role": ..., "content": ...} or {"from": ..., "value": ...}, an object with
such a list, or an object with a question and optionally an answer, a context (the passage that the question
is about), a system text and a history. The nested questions of SQuAD, CMRC 2018, WebQA and DuReader 2.0 are
read. A line of a .txt file is a question. The first of several answers is used. Content in a field that the
layout does not use is an error.
"""

import json
import re
from itertools import chain
from typing import NamedTuple

from corpus.readers import File, find_files, read_records
from corpus.textfile import with_line_feeds

FIELDS = {
    'messages': ('messages', 'conversations', 'conversation'),
    'question': ('instruction', 'question', 'prompt', 'query', 'query_text', '问题'),
    'answer': ('response', 'output', 'completion', 'answer', 'answers', '答案'),
    'context': ('context', 'input', 'evidence', 'context_text', 'documents'),
    'system': ('system', 'system_prompt', 'system_message'),
    'history': ('history',),
    'nested': ('paragraphs', 'qas', 'evidences'),
    # content that no template expresses; a field that is not in this table is a note about the record
    'not supported': ('tools', 'functions', 'tool_calls', 'function_call', 'chosen', 'rejected', 'reasoning',
                      'reasoning_content', 'thinking', 'images'),
}
ROLES = {
    **dict.fromkeys(('system', 'developer'), 'system'),
    **dict.fromkeys(('user', 'human'), 'user'),
    **dict.fromkeys(('assistant', 'gpt', 'chatgpt', 'bot', 'model'), 'assistant'),
    **dict.fromkeys(('context', 'tool', 'function', 'function_response', 'observation', 'ipython'),
                    'context'),
}


class Conversation(NamedTuple):
    where: str
    turns: list  # (role, text) of system, user, context and assistant; a missing answer is empty
    key: str  # conversations with the same key belong in the same split


class Passage(str):
    """The text of a context turn."""
    answer_start = -1  # offset of the answer; -1: the data do not tell


def read_conversations(paths, *, question='', answer='', encoding='utf-8'):
    """Yield every Conversation in some files. question and answer name columns in place of FIELDS."""
    columns = {use: name for use, name in (('question', question), ('answer', answer)) if name}
    fields = {**FIELDS, **{use: (name,) for use, name in columns.items()}}
    files = [File(path, {'text': 'lines'}.get(format, format)) for path, format in find_files(paths)]
    for record, where in read_records(files, encoding=encoding):
        if record == '':  # a blank line of a .txt file
            continue
        if isinstance(record, str):
            record = {'prompt': record}
        if isinstance(record, list):
            record = {'messages': record}
        try:
            check_record(record, columns)
            conversations = [turns_of(each, fields) for each in flat_records(record)] or [[]]
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from None
        except (KeyError, TypeError, AttributeError) as error:  # the inner fields do not fit the layout
            raise ValueError(f'{where}: {type(error).__name__} {error} in a nested field: '
                             'python -m corpus.conversations build --help lists the layouts') from None
        first = dict(reversed(conversations[0]))  # the first turn of each role
        key = first.get('context', first.get('user', ''))
        for turns in conversations:
            yield Conversation(where, turns, key)


def answered(turns):
    """Cut a conversation before an empty answer, and after its last answer; [] if there is none."""
    if ('assistant', '') in turns:
        turns = turns[:turns.index(('assistant', ''))]
    while turns and turns[-1][0] != 'assistant':
        turns = turns[:-1]
    return turns


# -----------------------------------------------------------------------------
# layouts


def check_record(record, columns):
    if not isinstance(record, dict):
        raise ValueError(f'a {type(record).__name__}, where an object with fields is needed')
    for use, name in columns.items():
        if name not in record:
            raise ValueError(f'--{use}={name}: its fields are {", ".join(record)}')


def flat_records(record):
    """Return a record for each nested question, with the fields around it."""
    name = next((name for name in FIELDS['nested'] if name in record), None)
    if name is None:
        return [record]
    outer, flat = {field: value for field, value in record.items() if field != name}, []
    inner_records = record[name]
    if isinstance(inner_records, dict):
        inner_records = inner_records.values()
    for inner in inner_records:
        for field in chain(*FIELDS.values()):
            if outer.get(field) and field in inner:
                raise ValueError(f'its field {field!r} has content outside and inside of its {name}')
        flat += flat_records({**outer, **inner})
    return flat


def turns_of(record, fields):
    """Return the turns of a record. Raises ValueError for content that no turn can hold."""
    if isinstance(record.get('prompt'), list) and not record.get('messages'):  # two lists, as in TRL
        messages = [*record['prompt'], *(record.get('completion') or [])]
        record = {**record, 'messages': messages, 'prompt': '', 'completion': ''}
    filled = {}  # the fields that have content, by their use
    for use, names in fields.items():
        filled[use] = [name for name in names if record.get(name) not in (None, '', [], {})]
    used = ['system', 'history', 'messages']
    if record.keys().isdisjoint(fields['messages']):
        used = ['system', 'history', 'question', 'context', 'answer']
        if record.keys().isdisjoint(fields['question']):
            shown = ', '.join(sorted(record)) or 'none'
            needed = ', '.join((*FIELDS['messages'], *FIELDS['question']))
            raise ValueError(f'its fields are {shown}: needed is one of {needed}; '
                             '--question= and --answer= name other columns')
    for use in used:
        if len(filled[use]) > 1 and use not in ('system', 'context'):
            raise ValueError(f'its fields {" and ".join(filled[use])} both hold the {use}: keep one of them')

    content = {use: record[filled[use][0]] for use in used if filled[use]}
    turns = [('system', text_of(record[name], name)) for name in filled['system']]
    for use in ('history', 'messages'):
        turns += messages_of(content.get(use, []), use)
    if 'question' in used:
        contexts = [text_of(record[name], name) for name in filled['context']]
        turns += exchange(content.get('question'), '\n\n'.join(contexts), content.get('answer'))

    text = '\n'.join(text for _, text in turns)
    for name in [name for use in filled if use not in used for name in filled[use]]:
        if clean(str(record[name])) not in text:
            layout = ', '.join(name for use in used for name in filled[use])
            raise ValueError(f'its field {name!r} has content that the layout of {layout} does not use: '
                             'remove the field, or write the conversation as messages')
    return turns


def messages_of(messages, name):
    """Return the turns of a list of messages or of pairs [question, answer]."""
    turns = []
    if not isinstance(messages, list):
        messages = [messages]
    for message in messages:
        if isinstance(message, list) and len(message) == 2:
            turns += [('user', text_of(message[0], name)), ('assistant', text_of(message[1], name))]
            continue
        if not isinstance(message, dict) or not {'role', 'from'} & set(message):
            raise ValueError(f'its {name} is not a list of [question, answer], '
                             'nor of {"role": ..., "content": ...}')
        role = message.get('role') or message.get('from')
        if role not in ROLES:
            raise ValueError(f'the role {role!r} is none of {", ".join(ROLES)}')
        for field in FIELDS['not supported']:
            if message.get(field):
                raise ValueError(f'a message of {role} has {field!r}, which no template here can express: '
                                 'write it into its content, or remove it')
        content = message.get('content')
        if content is None:
            content = message.get('value')
        turns.append((ROLES[role], text_of(content, 'content')))
    return turns


def exchange(question, context, answers):
    """Return the turns of a question with its passage and its first answer that is not empty.

    answers   a text, a list of texts or of {"text", "answer_start"}, or an object of two such lists
    """
    if isinstance(answers, dict):
        starts = answers.get('answer_start') or [None] * len(answers['text'])
        pairs = zip(answers['text'], starts, strict=False)
        answers = [{'text': text, 'answer_start': start} for text, start in pairs]
    if not isinstance(answers, list):
        answers = [answers]
    text, start = '', None
    for answer in answers:
        if not isinstance(answer, dict):
            answer = {'text': answer}
        text, start = text_of(answer['text'], 'answer'), answer.get('answer_start')
        if text == 'no_answer':
            text = ''
        if text:
            break

    passage = Passage(context)
    if isinstance(start, int):  # before white space was removed, which moves the answer a little
        occurrences = [match.start() for match in re.finditer(re.escape(text), passage)]
        passage.answer_start = min(occurrences, key=lambda i: abs(i - start), default=-1)
    turns = [('user', text_of(question, 'question')), ('context', passage), ('assistant', text)]
    return [turn for turn in turns if turn != ('context', '')]


def text_of(value, name):
    """Return the text of a field, which may be a list of parts, or DuReader's documents with paragraphs."""
    if name == 'documents':
        marked = [each for each in value if each.get('is_selected') and each.get('paragraphs')]
        if not marked:
            return ''
        paragraphs = marked[0]['paragraphs']
        value = paragraphs[min(marked[0].get('most_related_para', 0), len(paragraphs) - 1)]
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get('type', 'text') != 'text' or not isinstance(part.get('text'), str):
                shown = json.dumps(part, default=str)[:60]
                raise ValueError(f'its {name} has a part that is not text: {shown}')
        value = ''.join(part['text'] for part in value)
    if not isinstance(value, str | None):
        raise ValueError(f'its {name} is a {type(value).__name__}, where a text is needed')
    return clean(value or '')


def clean(text):
    """Remove white space around a text, which would be learned as part of an answer."""
    return with_line_feeds(text).strip()
