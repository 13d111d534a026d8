"""Write a conversation as tokens: the template of training, sample.py and transformers' apply_chat_template.

Style 'chat' opens each turn with its role token, <|user|> or <|assistant|>, or with a line such as '###
User:' if the tokenizer has none. Style 'alpaca' opens it with '### Instruction:', '### Context:' or '###
Response:'. An answer ends with end-of-text. The text before an answer is encoded as a whole, as
transformers does. No token reaches from this prompt into the answer.
"""

import json
import re
from bisect import bisect_left, bisect_right
from typing import NamedTuple

import numpy as np

STYLES = {
    'chat': {
        'system': '### System:\n',
        'user': '### User:\n',
        'context': '',
        'assistant': '### Assistant:\n',
    },
    'alpaca': {
        'system': '',
        'user': '### Instruction:\n',
        'context': '### Context:\n',
        'assistant': '### Response:\n',
    },
}
ROLE_TOKENS = {role: f'<|{role}|>' for role in ('system', 'user', 'assistant')}
GAP = '\n\n'  # after each turn that is not an answer, where roles are not tokens
SENTENCE_END = re.compile(r'[。！？；!?\n]+[”’」』")]*|\.(?=\s)')


class Fitted(NamedTuple):
    """A conversation as tokens, and the parts of it that did not fit."""
    ids: np.ndarray  # (n,) int64
    mask: np.ndarray  # (n,) uint8, 1 where a token is a target
    n_left_out: int  # turns
    n_cut: int  # tokens of the turns that stayed
    evidence: bool | None = None  # whether the passage still holds its answer; None where it never did


def check_tokenizer(tokenizer):
    if tokenizer.eot is None:
        raise ValueError(f'a {tokenizer.kind} tokenizer has no end-of-text token, so no answer could end: '
                         'conversations need gpt2, byte, or a trained tokenizer')


def marks_of(tokenizer, style):
    """Return the mark that opens each turn, by role, and the text after a turn that is not an answer."""
    if style == 'chat' and set(ROLE_TOKENS.values()) <= set(tokenizer.special):
        return {**ROLE_TOKENS, 'context': GAP}, ''
    return STYLES[style], GAP


def chat_template(style: str, tokenizer) -> str:
    """Return the style as a Jinja template for tokenizer_config.json.

    With it, transformers' apply_chat_template gives the ids of training. A message of the role tool or
    context is the passage that the next answer is about.
    """
    check_tokenizer(tokenizer)
    marks, gap = marks_of(tokenizer, style)
    end = next(name for name, i in tokenizer.special.items() if i == tokenizer.eot)
    mark_of = {**marks, 'developer': marks['system'], 'tool': marks['context']}
    return (f'{{%- set marks = {json.dumps(mark_of)} -%}}'
            "{%- for message in messages -%}"
            "{%- set text = message['content'] | replace('\\r\\n', '\\n') | replace('\\r', '\\n') | trim -%}"
            "{{- marks[message['role']] + text -}}"
            f"{{{{- {json.dumps(end)} if message['role'] == 'assistant' else {json.dumps(gap)} -}}}}"
            '{%- endfor -%}'
            f"{{%- if add_generation_prompt -%}}{{{{- {json.dumps(marks['assistant'])} -}}}}{{%- endif -%}}")


def encode_turns(turns, tokenizer, style):
    """Write turns as (ids, mask), two lists. A last answer of None is opened and neither told nor ended."""
    marks, gap = marks_of(tokenizer, style)
    ids, mask, text = [], [], ''  # text is the prompt that is not encoded yet
    for role, content in turns:
        if marks[role] in tokenizer.special:
            ids += [*tokenizer.encode(text), tokenizer.special[marks[role]]]
            text = ''
        else:
            text += marks[role]
        if role != 'assistant':
            text += content + gap
            continue
        prompt = tokenizer.encode(text)
        mask += [0] * (len(ids) + len(prompt) - len(mask))
        ids += prompt
        if content is not None:
            together = tokenizer.encode(text + content)
            clean_cut = together[:len(prompt)] == prompt
            answer = together[len(prompt):] if clean_cut else tokenizer.encode(content)
            ids += [*answer, tokenizer.eot]
            mask += [1] * (len(answer) + 1)
        text = ''
    return ids, mask


def encode(turns, tokenizer, style, size):
    """Write turns in at most `size` tokens. Without an answer at their end, they are a prompt.

    A long conversation loses, until it fits: its last passage, except for the sentences around the answer;
    its oldest exchanges, but not the system turns; the beginning of its last question.

    returns   Fitted; None where the last answer alone is too long
    """
    draft = Draft(turns, tokenizer, style, size)
    n_turns, evidence = len(draft.turns), None
    context = draft.last('context')
    if context is not None:
        answer = next(text for role, text in draft.turns[context:] if role == 'assistant')
        span = find_answer(draft.turns[context][1], answer)
        draft.shorten(context, span)
        evidence = answer in draft.turns[context][1] if span else None
    draft.drop_exchanges()
    question = draft.last('user')
    if question is not None:
        draft.shorten(question)
    if draft.is_too_long():
        return None
    ids, mask = np.array(draft.ids, dtype=np.int64), np.array(draft.mask, dtype=np.uint8)
    return Fitted(ids, mask, n_turns - len(draft.turns), draft.n_cut, evidence)


# -----------------------------------------------------------------------------
# shortening


class Draft:
    """Turns that have to fit into `size` tokens, and the tokens they make now."""

    def __init__(self, turns, tokenizer, style, size):
        self.turns, self.tokenizer, self.style, self.size = list(turns), tokenizer, style, size
        if self.turns[-1][0] != 'assistant':
            self.turns.append(('assistant', None))
        self.n_cut = 0  # tokens cut off the turns that stayed
        self.encode()

    def encode(self):
        self.ids, self.mask = encode_turns(self.turns, self.tokenizer, self.style)
        return not self.is_too_long()

    def is_too_long(self):
        return len(self.ids) > self.size

    def last(self, role):
        return max((i for i, turn in enumerate(self.turns) if turn[0] == role), default=None)

    def drop_exchanges(self):
        """Leave out the oldest exchanges, but neither the system turns nor the last answer."""
        first = next(i for i, turn in enumerate(self.turns) if turn[0] != 'system')
        roles = [role for role, _ in self.turns]
        while self.is_too_long() and roles.count('assistant') > 1:
            end = roles.index('assistant') + 1
            del self.turns[first:end], roles[first:end]
            self.encode()

    def shorten(self, i, span=None):
        """Cut the text of turn i until all turns fit, or to nothing.

        span   the part to keep, with as much around it as fits: whole sentences, or characters if the
               sentence is too long; None keeps the end of the text
        """
        if not self.is_too_long():
            return
        n_before, text = len(self.ids), self.turns[i][1]
        characters = range(len(text) + 1)
        sentences = sorted({0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)})
        window = span and (self.widest(i, text, sentences, span) or self.widest(i, text, characters, span))
        window = window or self.widest(i, text, characters, (len(text), len(text))) or (0, 0)
        self.fits(i, text, *window)
        self.n_cut += n_before - len(self.ids)

    def fits(self, i, text, begin, stop):
        self.turns[i] = (self.turns[i][0], text[begin:stop].strip())
        return self.encode()

    def widest(self, i, text, borders, span):
        """Find the widest (begin, stop) on these borders, around a span, that fits; None if none does."""
        first, last = bisect_right(borders, span[0]) - 1, bisect_left(borders, span[1])
        end = len(borders) - 1
        if not self.fits(i, text, borders[first], borders[last]):
            return None
        for left, right in ((1, 1), (1, 0), (0, 1)):  # to both sides, then on where only one has more
            low, high = 0, end  # a binary search for the number of borders
            while low < high:
                n = (low + high + 1) // 2
                begin, stop = borders[max(first - n * left, 0)], borders[min(last + n * right, end)]
                if self.fits(i, text, begin, stop):
                    low = n
                else:
                    high = n - 1
            first, last = max(first - low * left, 0), min(last + low * right, end)
        return borders[first], borders[last]


def find_answer(passage, answer):
    """Find (start, end) of the answer in its passage: where the data say, else where it is first."""
    if not answer:
        return None
    start = getattr(passage, 'answer_start', -1)
    if start < 0:
        start = passage.find(answer)
    return (start, start + len(answer)) if start >= 0 else None
