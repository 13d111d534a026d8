"""Read conversations from JSON, JSONL, CSV, Parquet and Arrow files in the layouts of common datasets.

A record is a list of messages {"role": ..., "content": ...} or {"from": ..., "value": ...}, or an object
with these fields:

    messages, conversations         a list of messages
    instruction, question, prompt, query
                                    a question, alone or with
    response, output, completion, answer, answers
                                    its answer; of several the first that is not empty
    context, input                  the passage that it is about
    system, history                 earlier turns: a text; messages or pairs [question, answer]
    prompt, completion              also as two lists of messages
    paragraphs, qas, evidences      the nested questions of SQuAD, CMRC 2018 and WebQA
    documents                       DuReader 2.0's; the passage is the paragraph marked as most related

A line of a .txt file is a question. Content in a field that the layout does not use is an error.
"""

import json
from typing import NamedTuple

from corpus.readers import File, find_files, read_records

USE_OF_FIELD = {
    **dict.fromkeys(('messages', 'conversations', 'conversation'), 'messages'),
    **dict.fromkeys(('system', 'system_prompt', 'system_message'), 'system'),
    'history': 'history',
    **dict.fromkeys(('instruction', 'question', 'prompt', 'query', 'query_text'), 'question'),
    **dict.fromkeys(('context', 'input', 'evidence', 'context_text', 'documents'), 'context'),
    **dict.fromkeys(('response', 'output', 'completion', 'answer', 'answers'), 'answer'),
    **dict.fromkeys(('paragraphs', 'qas', 'evidences'), 'nested'),
    # content that no template expresses; a field that is not in this table is a note about the record
    **dict.fromkeys(('tools', 'functions', 'tool_calls', 'function_call', 'chosen', 'rejected', 'reasoning',
                     'reasoning_content', 'thinking', 'images'), 'unsupported'),
}
ROLES = {
    **dict.fromkeys(('system', 'developer'), 'system'),
    **dict.fromkeys(('user', 'human'), 'user'),
    **dict.fromkeys(('assistant', 'gpt', 'chatgpt', 'bot', 'model'), 'assistant'),
    **dict.fromkeys(('context', 'tool', 'function', 'function_response', 'observation', 'ipython'),
                    'context'),
}


class Conversation(NamedTuple):
    """turns is a list of (role, text) of system, user, context and assistant. A missing answer is empty.

    Conversations with the same key belong in the same split.
    """
    where: str
    turns: list
    key: str


class Passage(str):
    """The text of a context turn. answer_start is the offset of the answer, -1 if the data do not tell."""
    answer_start = -1


def read_conversations(paths, *, question='', answer='', encoding='utf-8'):
    """Yield every Conversation in some files and folders.

    question, answer   the names of these columns, if they are not in the table above
    raises             ValueError that names file and record
    """
    files = [File(path, 'lines' if format == 'text' else format) for path, format in find_files(paths)]
    for record, where in read_records(files, encoding=encoding):
        if record == '':  # a blank line of a .txt file
            continue
        try:
            conversations = conversations_of(record, question, answer)
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from None
        except (KeyError, TypeError, AttributeError) as error:  # the inner fields do not fit the layout
            raise ValueError(f'{where}: {type(error).__name__} {error} in a nested field: '
                             'python -m corpus.conversations build --help lists the layouts') from None
        first = dict(reversed(conversations[0]))  # the first turn of each role
        key = first.get('context', first.get('user', ''))
        for turns in conversations:
            yield Conversation(where, turns, key)


def conversations_of(record, question, answer):
    """Return the conversations of a record as lists of turns; one without turns if it asks nothing."""
    if isinstance(record, str):
        record = {'prompt': record}
    if isinstance(record, list):
        record = {'messages': record}
    if not isinstance(record, dict):
        raise ValueError(f'a {type(record).__name__}, where an object with fields is needed')
    use_of_field = dict(USE_OF_FIELD)
    for use, field in (('question', question), ('answer', answer)):
        if field:
            use_of_field[field] = use
            if field not in record:
                raise ValueError(f'--{use}={field}: its fields are {", ".join(record)}')
    return [turns_of(each, use_of_field) for each in flat_records(record)] or [[]]


def flat_records(record):
    """Yield a record for each nested question, with the fields around it."""
    nested = [field for field in record if USE_OF_FIELD.get(field) == 'nested']
    if not nested:
        yield record
        return
    outer = {field: value for field, value in record.items() if field != nested[0]}
    inner = record[nested[0]]
    for each in inner.values() if isinstance(inner, dict) else inner:
        yield from flat_records({**outer, **each})


def turns_of(record, use_of_field):
    """Return the turns of a record. Raises ValueError for content that none of them holds."""
    fields = {use: [] for use in use_of_field.values()}  # those with content
    for field, use in use_of_field.items():
        if record.get(field) not in (None, '', [], {}):
            fields[use].append(field)
    uses = {use_of_field.get(field) for field in record}

    turns = [('system', text_of(record[field], field)) for field in fields['system']]
    for field in fields['history']:
        turns += messages_of(record[field], field)
    used = ['system', 'history', 'messages']
    if 'messages' in uses:
        turns += messages_of(only(record, fields, 'messages') or [], 'messages')
    elif 'question' in uses:
        used = ['system', 'history', 'question', 'context', 'answer']
        question, answers = only(record, fields, 'question'), only(record, fields, 'answer')
        if is_messages(question):
            used.remove('context')
            turns += messages_of(question, 'prompt') + messages_of(answers or [], 'completion')
        else:
            contexts = [context_of(record[field], field) for field in fields['context']]
            turns += exchange(question, contexts, answers)
    else:
        shown = ', '.join(sorted(record)) or 'none'
        raise ValueError(f'its fields are {shown}: needed are messages or conversations, '
                         'or a question (instruction, question, prompt, query) with an answer (response, '
                         'output, completion, answer); --question= and --answer= name other columns')

    text = '\n'.join(text for _, text in turns)
    unused = [field for use, names in fields.items() if use not in used for field in names]
    for field in unused:
        if clean(str(record[field])) not in text:
            layout = ', '.join(field for use in used for field in fields[use])
            raise ValueError(f'its field {field!r} has content that the layout of {layout} does not use: '
                             'remove the field, or write the conversation as messages')
    return turns


def only(record, fields, use):
    """Return the content of the field for this use; None without one."""
    if len(fields[use]) > 1:
        raise ValueError(f'its fields {" and ".join(fields[use])} both hold the {use}: keep one of them')
    return record[fields[use][0]] if fields[use] else None


def is_messages(value):
    return isinstance(value, list) and isinstance(value[0], dict) and bool({'role', 'from'} & set(value[0]))


def messages_of(messages, name):
    """Return the turns of a list of messages or of pairs [question, answer]."""
    turns = []
    for message in messages if isinstance(messages, list) else [messages]:
        if isinstance(message, list) and len(message) == 2:
            turns += [('user', text_of(message[0], name)), ('assistant', text_of(message[1], name))]
            continue
        if not isinstance(message, dict) or not {'role', 'from'} & set(message):
            raise ValueError(f'its {name} is not a list of [question, answer], '
                             'nor of {"role": ..., "content": ...}')
        role = message.get('role') or message.get('from')
        if role not in ROLES:
            raise ValueError(f'the role {role!r} is none of {", ".join(ROLES)}')
        for field, value in message.items():
            if value and USE_OF_FIELD.get(field) == 'unsupported':
                raise ValueError(f'a message of {role} has {field!r}, which no template here can express: '
                                 'write it into its content, or remove it')
        content = message.get('content')
        turns.append((ROLES[role], text_of(message.get('value') if content is None else content, 'content')))
    return turns


def exchange(question, contexts, answers):
    """Return the turns of a question: of several answers the first that is not empty.

    answers   a text, a list of texts or of {"text", "answer_start"}, or {"text": [], "answer_start": []}
    """
    starts = []
    if isinstance(answers, dict):
        starts, answers = answers.get('answer_start') or [], answers['text']
    answers = answers if isinstance(answers, list) else [answers]
    best, start = '', None
    for i, answer in enumerate(answers):
        answer_start = starts[i] if i < len(starts) else None
        if isinstance(answer, dict):
            answer, answer_start = answer['text'], answer.get('answer_start')
        text = text_of(answer, 'answer')
        if text not in ('', 'no_answer') and not best:
            best, start = text, answer_start

    turns = [('user', text_of(question, 'question'))]
    passage = Passage('\n\n'.join(map(clean, contexts)))
    if passage:
        turns.append(('context', passage))
    if best and passage and isinstance(start, int):
        start = len(clean(f'{contexts[0][:start]}|')) - 1  # its offset after cleaning
        if passage.startswith(best, start):
            passage.answer_start = start
    return [*turns, ('assistant', best)]


def context_of(value, field):
    """Return a passage as it stands in the data, where its offsets count."""
    if field != 'documents':
        return raw_text(value, field)
    for document in value:
        if document.get('is_selected') and document.get('paragraphs'):
            paragraphs = document['paragraphs']
            return raw_text(paragraphs[min(document.get('most_related_para', 0), len(paragraphs) - 1)], field)
    return ''


def raw_text(value, name):
    """Return a text, or the texts of a list of parts such as [{"type": "text", "text": ...}]."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get('type', 'text') != 'text' or not isinstance(part.get('text'), str):
                shown = json.dumps(part, default=str)[:60]
                raise ValueError(f'its {name} has a part that is not text: {shown}')
        return ''.join(part['text'] for part in value)
    if not isinstance(value, str | None):
        raise ValueError(f'its {name} is a {type(value).__name__}, where a text is needed')
    return value or ''


def text_of(value, name):
    return clean(raw_text(value, name))


def clean(text):
    """Line ends as line feeds, and no white space around, which would be learned as part of an answer."""
    return text.replace('\r\n', '\n').replace('\r', '\n').strip()


def answered(turns):
    """Cut a conversation after its last answer, or before an empty one; [] if there is none."""
    n_turns = turns.index(('assistant', '')) if ('assistant', '') in turns else len(turns)
    while n_turns and turns[n_turns - 1][0] != 'assistant':
        n_turns -= 1
    return turns[:n_turns]
