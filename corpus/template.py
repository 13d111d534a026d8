"""Write a conversation as tokens: the template of training, sample.py and transformers' apply_chat_template.

Style 'chat' opens a turn with its role token, such as <|user|>, or with a line such as '### User:' if the
tokenizer has none; 'alpaca' with a line such as '### Instruction:'; 'chatml' is that of Qwen and SmolLM.
"""

import json
import re
from bisect import bisect_left, bisect_right
from typing import NamedTuple

import numpy as np

STYLES = {
    'chat': {'system': '### System:\n', 'user': '### User:\n', 'context': '',
             'assistant': '### Assistant:\n'},
    'alpaca': {'system': '', 'user': '### Instruction:\n', 'context': '### Context:\n',
               'assistant': '### Response:\n'},
    'chatml': {'system': '<|im_start|>system\n', 'user': '<|im_start|>user\n',
               'context': '<|im_start|>user\n', 'assistant': '<|im_start|>assistant\n'},
}
TURN_END = '<|im_end|>'  # of chatml
SPECIAL = re.compile(r'(<\|(?:im_start|im_end|system|user|assistant)\|>)')
ROLE_TOKENS = {role: f'<|{role}|>' for role in ('system', 'user', 'assistant')}
GAP = '\n\n'  # after each turn that is not an answer, where roles are not tokens
JINJA = r"""
{%- for message in messages -%}
{%- set text = message['content'] | replace('\r\n', '\n') | replace('\r', '\n') -%}
{{- marks[message['role']] + (text | trim) -}}
{{- end if message['role'] == 'assistant' else gap -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- marks['assistant'] -}}{%- endif -%}"""
SENTENCE_END = re.compile(r'[。！？；!?\n]+[”’」』")]*|\.(?=\s)')


class Fitted(NamedTuple):
    """A conversation as tokens, and the parts of it that did not fit."""
    ids: np.ndarray  # (n,) int64
    mask: np.ndarray  # (n,) uint8, 1 where a token is a target
    n_left_out: int  # turns
    n_cut: int  # turns that lost a part of their text
    evidence: bool | None = None  # whether the passage still holds its answer; None where it never did


def check_tokenizer(tokenizer):
    if tokenizer.eot is None:
        raise ValueError(f'a {tokenizer.kind} tokenizer has no end-of-text token, so no answer could end: '
                         'conversations need gpt2, byte, or a trained tokenizer')


class Template:
    """The text around the turns of a conversation, in one of the STYLES and for one tokenizer."""

    def __init__(self, tokenizer, style):
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.marks, self.gap = STYLES[style], GAP  # marks open a turn of a role, the gap ends it
        self.end, self.end_id = '', tokenizer.eot  # of an answer: text after its end token, and that token
        if style == 'chat' and set(ROLE_TOKENS.values()) <= set(tokenizer.special):
            self.marks, self.gap = {**ROLE_TOKENS, 'context': GAP}, ''
        if style == 'chatml':
            if TURN_END not in tokenizer.special:
                raise ValueError(f'style=chatml: the tokenizer has no {TURN_END}: use --style=chat')
            self.gap, self.end, self.end_id = f'{TURN_END}\n', '\n', tokenizer.special[TURN_END]

    def jinja(self) -> str:
        """Return the chat_template of tokenizer_config.json, which gives the ids of training."""
        end = next(name for name, i in self.tokenizer.special.items() if i == self.end_id) + self.end
        marks = {**self.marks, 'developer': self.marks['system'], 'tool': self.marks['context']}
        settings = {'marks': marks, 'gap': self.gap, 'end': end}
        lines = [f'{{%- set {name} = {json.dumps(value)} -%}}' for name, value in settings.items()]
        return '\n'.join([*lines, JINJA])

    def encode(self, turns) -> tuple[list, list]:
        """Write turns as (ids, mask). A last answer of None is only opened.

        The text between two special tokens is encoded as a whole, as transformers does, but no token reaches
        from a prompt into its answer.
        """
        tokenizer, ids, mask = self.tokenizer, [], []
        text = ''  # the part of the prompt that is not encoded yet
        for role, content in turns:
            pieces = pieces_of(self.marks[role])
            if role != 'assistant':
                pieces += [(content, False), *pieces_of(self.gap)]
            for piece, is_special in pieces:
                if is_special:
                    ids += [*tokenizer.encode(text), tokenizer.special[piece]]
                    text = ''
                else:
                    text += piece
            if role != 'assistant':
                continue
            prompt = tokenizer.encode(text)
            ids += prompt
            mask += [0] * (len(ids) - len(mask))
            if content is not None:
                answer = tokenizer.encode(text + content)
                if answer[:len(prompt)] == prompt:
                    answer = answer[len(prompt):]
                else:
                    answer = tokenizer.encode(content)
                ids += [*answer, self.end_id]
                mask += [1] * (len(answer) + 1)
            text = self.end
        if content is not None:
            ids += tokenizer.encode(text)
        return ids, mask + [0] * (len(ids) - len(mask))

    def fit(self, turns, size) -> Fitted | None:
        """Write turns in at most `size` tokens, cut if needed; None if the last answer alone is too long.

        Without an answer at their end, they are a prompt.
        """
        turns = list(turns)
        if turns[-1][0] != 'assistant':
            turns.append(('assistant', None))
        kept = turns
        ids, mask = self.encode(kept)
        if len(ids) > size:
            kept = self.cut(kept, size)
            ids, mask = self.encode(kept)
        if len(ids) > size:
            return None
        whole = set(turns)
        n_cut = sum(turn not in whole for turn in kept)
        ids, mask = np.array(ids, dtype=np.int64), np.array(mask, dtype=np.uint8)
        return Fitted(ids, mask, len(turns) - len(kept), n_cut, has_evidence(turns, kept))

    def cut(self, turns, size):
        """Shorten turns until they fit.

        They lose the last passage, except for the sentences around its answer; then the oldest exchanges, but
        not the system turns; then the beginning of the last question.
        """
        i = last_of('context', turns)
        if i is not None:
            turns = self.shorten(turns, i, size, parts_of(turns[i][1], answer_span(turns, i)))
        turns = self.drop_oldest(turns, size)
        i = last_of('user', turns)
        if i is not None:
            turns = self.shorten(turns, i, size, parts_of(turns[i][1], None))
        return turns

    def drop_oldest(self, turns, size):
        """Drop the oldest exchanges until the turns fit, all but the last one if need be."""
        first = next(i for i, (role, _) in enumerate(turns) if role != 'system')
        ends = [i + 1 for i, (role, _) in enumerate(turns) if role == 'assistant']
        ends = [first, *ends[:-1]]
        # the tokens left fall along ends, and bisect needs rising values: hence both minus signs
        n_too_long = bisect_left(ends, -size, key=lambda end: -self.n_tokens(turns[:first] + turns[end:]))
        return turns[:first] + turns[ends[min(n_too_long, len(ends) - 1)]:]

    def shorten(self, turns, i, size, parts):
        """Cut the text of turn i to the widest of its parts with which all turns fit, or to nothing."""
        n_fitting = bisect_right(parts, size, key=lambda part: self.n_tokens(with_part(turns, i, part)))
        return with_part(turns, i, [(0, 0), *parts][n_fitting])

    def n_tokens(self, turns):
        return len(self.encode(turns)[0])


def pieces_of(text):
    """Split a text of the template into (piece, whether it is a special token)."""
    return [(piece, i % 2 == 1) for i, piece in enumerate(SPECIAL.split(text))]


def with_part(turns, i, part):
    role, text = turns[i]
    return [*turns[:i], (role, text[slice(*part)].strip()), *turns[i + 1:]]


def last_of(role, turns):
    return max((i for i, turn in enumerate(turns) if turn[0] == role), default=None)


def answer_span(turns, i):
    """Return (begin, end) of the answer to context turn i in its passage; None if it is not there."""
    passage = turns[i][1]
    answer = next(text for role, text in turns[i:] if role == 'assistant')
    if not answer or answer not in passage:
        return None
    begin = getattr(passage, 'answer_start', -1)  # which the data may tell
    if begin < 0:
        begin = passage.find(answer)
    return begin, begin + len(answer)


def has_evidence(turns, kept):
    """Tell whether the last passage still holds its answer in the turns kept; None if it never did."""
    i = last_of('context', turns)
    span = i is not None and answer_span(turns, i)
    if not span:
        return None
    answer = turns[i][1][slice(*span)]
    return any(answer in text for role, text in kept if role == 'context')


def parts_of(text, span):
    """List parts (begin, end) of a text, each within the next.

    span   lies in all of them: they widen by characters up to its sentence, then by sentences; None: the
           parts are ends of the text
    """
    if span is None:
        return [(begin, len(text)) for begin in range(len(text), -1, -1)]
    borders = sorted({0, len(text), *(match.end() for match in SENTENCE_END.finditer(text))})
    begin, end = borders[bisect_right(borders, span[0]) - 1], borders[bisect_left(borders, span[1])]
    return [*widened(span, range(begin, end + 1)), *widened((begin, end), borders)]


def widened(span, borders):
    """List the parts that begin and end at the borders around a span, step by step, in turn on both sides."""
    before = borders[:borders.index(span[0]) + 1][::-1]
    after = borders[borders.index(span[1]):]
    steps = range(2 * max(len(before), len(after)))
    return [(before[min(n // 2, len(before) - 1)], after[min((n + 1) // 2, len(after) - 1)]) for n in steps]
