"""Read conversations from JSON, JSONL, CSV, Parquet and Arrow files in the layouts of common datasets.

The fields of a record tell its layout:

    messages or conversations           list of {"role": ..., "content": ...} or {"from": ..., "value": ...}
    instruction, question, prompt, query
                                        a question, alone or with
        response, output, completion,
        answer or answers               its answer; of several the first that is not empty
        context, input                  the passage that it is about
        system, history                 earlier turns: a text; a list of messages or [question, answer]
    prompt, completion                  also as two lists of messages
    question, evidences                 WebQA: {id: {"answer": [text], "evidence": text}}
    question, documents, answers        DuReader 2.0: [{"paragraphs": [text], "is_selected": ...}]
    paragraphs                          SQuAD: [{"context", "qas": [{"question", "answers": [{"text"}]}]}]
    context_text, qas                   CMRC 2018: [{"query_text", "answers": [text]}]

A line of a .txt file is a question. Content in a field that the layout does not use is an error.
"""

import json
from typing import NamedTuple

from corpus.readers import File, find_files, read_records

QUESTION = ('instruction', 'question', 'prompt', 'query')
ANSWER = ('response', 'output', 'completion', 'answer', 'answers')
CONTEXT = ('context', 'input')
SYSTEM = ('system', 'system_prompt', 'system_message')
MESSAGES = ('messages', 'conversations', 'conversation')
# Content that no template expresses. Fields that are in none of these tuples are notes about the record.
UNSUPPORTED = ('tools', 'functions', 'tool_calls', 'function_call', 'chosen', 'rejected', 'reasoning',
               'reasoning_content', 'thinking', 'images')
CONTENT = (*QUESTION, *ANSWER, *CONTEXT, *SYSTEM, *MESSAGES, *UNSUPPORTED, 'history', 'evidences',
           'documents', 'paragraphs', 'qas', 'context_text')
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

    question, answer   the names of these columns, where they are none that a layout has
    raises             ValueError that names file and record
    """
    files = find_files(paths)
    files = [File(path, 'lines' if format == 'text' else format) for path, format in files]
    for record, where in read_records(files, encoding=encoding):
        if record == '':  # a blank line of a .txt file
            continue
        try:
            conversations = turns_of(renamed(record, question, answer))
        except (KeyError, TypeError, AttributeError) as error:  # the inner fields do not fit the layout
            fields = ', '.join(sorted(record))
            raise ValueError(f'{where}: {type(error).__name__} {error} in its fields {fields}, '
                             'which python -m corpus.conversations build --help explains') from None
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from None
        first = {role: text for role, text in reversed(conversations[0])} if conversations else {}
        key = first.get('context', first.get('user', ''))
        for turns in conversations or [[]]:
            yield Conversation(where, turns, key)


def renamed(record, question, answer):
    """Call the named columns question and answer."""
    names = {name: field for name, field in ((question, 'question'), (answer, 'answer')) if name}
    for name, field in names.items():
        if name not in record:
            raise ValueError(f'--{field}={name}: its fields are {", ".join(record)}')
    return {names.get(name, name): value for name, value in record.items()} if names else record


def answered(turns):
    """Cut a conversation after its last answer, or before an empty one; [] if there is none."""
    n_turns = turns.index(('assistant', '')) if ('assistant', '') in turns else len(turns)
    while n_turns and turns[n_turns - 1][0] != 'assistant':
        n_turns -= 1
    return turns[:n_turns]


# -----------------------------------------------------------------------------
# layouts


def turns_of(record):
    """Return the list of conversations in a record. An answer that is missing is an empty text.

    raises   ValueError for an unknown layout, or content that the layout does not use
    """
    if isinstance(record, str):
        record = {'prompt': record}
    if isinstance(record, list):
        record = {'messages': record}
    if not isinstance(record, dict):
        raise ValueError(f'a {type(record).__name__}, where an object with fields is needed')
    for fields, read in LAYOUTS.items():
        if set(fields) <= set(record):
            conversations = read(record)
            check_unused(record, set(fields), conversations)
            return conversations

    names = set(record)
    record = {field: value for field, value in record.items() if value not in (None, '', [], {})}
    messages = [field for field in MESSAGES if field in names]
    used = {*messages[:1], *SYSTEM}
    conversation = beginning(record)
    if messages:
        conversation += messages_of(record.get(messages[0], []), messages[0])
    elif isinstance(record.get('prompt'), list):
        used |= {'prompt', 'completion'}
        conversation += messages_of(record['prompt'], 'prompt')
        conversation += messages_of(record.get('completion', []), 'completion')
    elif names & set(QUESTION):
        used |= {*QUESTION, *ANSWER, *CONTEXT}
        conversation += exchange_of(record)
    else:
        shown = ', '.join(sorted(names)) or 'none'
        raise ValueError(f'its fields are {shown}: needed are messages or conversations, '
                         f'or a question ({", ".join(QUESTION)}) with an answer ({", ".join(ANSWER)}); '
                         '--question= and --answer= name other columns')
    check_unused(record, {'history', *used}, [conversation])
    return [conversation]


def check_unused(record, used, conversations):
    """Raise ValueError for a field with content that is not in the conversations."""
    text = '\n'.join(text for turns in conversations for _, text in turns)
    for field in CONTENT:
        if record.get(field) and field not in used and clean(str(record[field])) not in text:
            layout = ', '.join(sorted(used & set(record)))
            raise ValueError(f'its field {field!r} has content that the layout of {layout} does not use: '
                             'remove the field, or write the conversation as messages')


def only(record, fields, name):
    """The value of the one of these fields that a record has; None if it has none."""
    values = {field: record[field] for field in fields if field in record}
    if len(values) > 1:
        raise ValueError(f'its fields {" and ".join(values)} both hold the {name}: keep one of them')
    return next(iter(values.values()), None)


def exchange_of(record):
    contexts = [text_of(record[field], field) for field in CONTEXT if field in record]
    context = contexts[0] if len(contexts) == 1 else '\n\n'.join(map(clean, contexts))
    return exchange(only(record, QUESTION, 'question'), only(record, ANSWER, 'answer'), context)


def beginning(record):
    """The turns before the question: system, then history, as messages or as pairs."""
    turns = [('system', clean(text_of(record[field], field))) for field in SYSTEM if field in record]
    history = record.get('history', [])
    for item in history if isinstance(history, list) else [history]:
        if isinstance(item, dict):
            turns += messages_of([item], 'history')
        elif isinstance(item, list) and len(item) == 2:
            turns += exchange(*item)
        else:
            raise ValueError('its history is not a list of [question, answer], nor of messages')
    return turns


def exchange(question, answers, context=None):
    """The turns of a question, its passage and its answer: of several answers the first that is not empty.

    answers   a text, a list of texts or of {"text", "answer_start"}, or {"text": [], "answer_start": []}
    """
    starts = None
    if isinstance(answers, dict) and 'text' in answers:
        starts, answers = answers.get('answer_start'), answers['text']
    answers = answers if isinstance(answers, list) else [answers]
    if not isinstance(starts, list) or len(starts) != len(answers):
        starts = [None] * len(answers)
    best, start = '', None
    for item, item_start in zip(answers, starts, strict=True):
        if isinstance(item, dict):
            item, item_start = item['text'], item.get('answer_start')
        text = clean(text_of(item, 'answer'))
        if text not in ('', 'no_answer') and not best:
            best, start = text, item_start
    turns = [('user', clean(text_of(question, 'question')))]
    text = passage(text_of(context, 'context'), best, start)
    if text:
        turns.append(('context', text))
    return [*turns, ('assistant', best)]


def passage(context, answer, start):
    """The Passage of a context, with the offset of its answer after cleaning."""
    result = Passage(clean(context))
    if answer and isinstance(start, int):
        before = context[:start].replace('\r\n', '\n').lstrip()
        if result.startswith(answer, len(before)):
            result.answer_start = len(before)
    return result


def messages_of(messages, name):
    """The turns of a list of messages."""
    turns = []
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or not {'role', 'from'} & set(message):
            raise ValueError(f'its {name} are not a list of {{"role": ..., "content": ...}}')
        role = message.get('role') or message.get('from')
        if role not in ROLES:
            raise ValueError(f'the role {role!r} is none of {", ".join(ROLES)}')
        lost = [field for field in UNSUPPORTED if message.get(field)]
        if lost:
            raise ValueError(f'a message of {role} has {lost[0]!r}, which no template here can express: '
                             'write it into its content, or remove it')
        content = message.get('content') if message.get('content') is not None else message.get('value')
        turns.append((ROLES[role], clean(text_of(content, 'content'))))
    return turns


def text_of(value, name):
    """A text, or the texts of a list of parts such as [{"type": "text", "text": ...}]."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get('type', 'text') != 'text' or not isinstance(part.get('text'), str):
                shown = json.dumps(part, default=str)[:60]
                raise ValueError(f'its {name} has a part that is not text: {shown}')
        return ''.join(part['text'] for part in value)
    if not isinstance(value, str | None):
        raise ValueError(f'its {name} is a {type(value).__name__}, where a text is needed')
    return value or ''


def clean(text):
    """Line ends as line feeds, and no white space around, which would be learned as part of an answer."""
    return text.replace('\r\n', '\n').replace('\r', '\n').strip()


def read_webqa(record):
    return [exchange(record['question'], evidence['answer'], evidence['evidence'])
            for evidence in record['evidences'].values()]


def read_dureader(record):
    """The passage is the paragraph that a person marked as the one with the answer, if there is one."""
    selected = [document for document in record['documents'] if document.get('is_selected')]
    marked = [document for document in selected if document.get('paragraphs')]
    context = None
    if marked:
        paragraphs = marked[0]['paragraphs']
        context = paragraphs[min(marked[0].get('most_related_para', 0), len(paragraphs) - 1)]
    return [exchange(record['question'], record.get('answers'), context)]


def read_squad(record):
    return [exchange(qa['question'], qa['answers'], paragraph['context'])
            for paragraph in record['paragraphs'] for qa in paragraph['qas']]


def read_cmrc(record):
    return [exchange(qa['query_text'], qa['answers'], record['context_text']) for qa in record['qas']]


LAYOUTS = {
    ('question', 'evidences'): read_webqa,
    ('question', 'documents', 'answers'): read_dureader,
    ('paragraphs',): read_squad,
    ('context_text', 'qas'): read_cmrc,
}
