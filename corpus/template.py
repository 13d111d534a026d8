"""Write a conversation as tokens: the template of training, sample.py and transformers' apply_chat_template.

Style 'chat' opens a turn with its role token, such as <|user|>, or with a line such as '### User:' if the
tokenizer has none; 'alpaca' with a line such as '### Instruction:'. An answer ends with end-of-text. Style
'chatml', that of Qwen and SmolLM, puts each turn between <|im_start|> and <|im_end|>. The text between
special tokens is encoded as a whole, as transformers does, but no token reaches from prompt to answer.
"""

import json
import re
from functools import cached_property
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
        """Return the chat_template of tokenizer_config.json, which gives the ids of training.

        A message of the role tool or context is the passage that the next answer is about.
        """
        end = next(name for name, i in self.tokenizer.special.items() if i == self.end_id) + self.end
        marks = {**self.marks, 'developer': self.marks['system'], 'tool': self.marks['context']}
        settings = {'marks': marks, 'gap': self.gap, 'end': end}
        lines = [f'{{%- set {name} = {json.dumps(value)} -%}}' for name, value in settings.items()]
        return '\n'.join([*lines, JINJA])

    def encode(self, turns) -> tuple[list, list]:
        """Write turns as (ids, mask). A last answer of None is opened and neither told nor ended."""
        tokenizer, ids, mask = self.tokenizer, [], []
        text = ''  # the part of the prompt that is not encoded yet
        for role, content in turns:
            for i, part in enumerate(self.split(role, content)):
                if i % 2:  # a special token
                    ids += [*tokenizer.encode(text), tokenizer.special[part]]
                    text = ''
                else:
                    text += part
            if role != 'assistant':
                continue
            prompt = tokenizer.encode(text)
            ids += prompt
            mask += [0] * (len(ids) - len(mask))
            if content is not None:
                together = tokenizer.encode(text + content)
                is_border = together[:len(prompt)] == prompt
                answer = together[len(prompt):] if is_border else tokenizer.encode(content)
                ids += [*answer, self.end_id]
                mask += [1] * (len(answer) + 1)
            text = self.end
        if content is not None:
            ids += tokenizer.encode(text)
        return ids, mask + [0] * (len(ids) - len(mask))

    def split(self, role, content) -> list[str]:
        """Return a turn, except for an answer, as text and the special tokens of the template, in turn."""
        parts = SPECIAL.split(self.marks[role])
        if role != 'assistant':
            before, *after = SPECIAL.split(self.gap)
            parts[-1] += content + before
            parts += after
        return parts

    def fit(self, turns, size) -> Fitted | None:
        """Write turns in at most `size` tokens. Without an answer at their end, they are a prompt.

        A long conversation loses, until it fits: its last passage, except for the sentences around the
        answer; its oldest exchanges, but not the system turns; the beginning of its last question.

        returns  None if the last answer alone is too long
        """
        whole, turns = turns, list(turns)
        if turns[-1][0] != 'assistant':
            turns.append(('assistant', None))
        ids, mask = self.encode(turns)
        last = {role: i - len(turns) for i, (role, _) in enumerate(turns)}  # counted from the end

        # the passage around its answer, which is where the data say, or where it is found first
        n_turns, evidence = len(turns), None
        if 'context' in last:
            i = last['context']
            passage = turns[i][1]
            answer = next(text for role, text in turns[i:] if role == 'assistant') or ''
            begin = getattr(passage, 'answer_start', -1)
            if begin < 0:
                begin = passage.find(answer)
            span = (begin, begin + len(answer)) if answer and begin >= 0 else None
            if len(ids) > size:
                ids, mask = self.shorten(turns, i, len(ids) - size, size, span)
            if span:
                evidence = answer in turns[i][1]

        # the oldest exchanges
        roles = [role for role, _ in turns]
        first = next(i for i, role in enumerate(roles) if role != 'system')
        while len(ids) > size and roles.count('assistant') > 1:
            end = roles.index('assistant') + 1
            del turns[first:end], roles[first:end]
            ids, mask = self.encode(turns)

        # the question
        if len(ids) > size and 'user' in roles:
            ids, mask = self.shorten(turns, last['user'], len(ids) - size, size)
        if len(ids) > size:
            return None
        n_cut = sum(text is not None and (role, text) not in whole for role, text in turns)
        ids, mask = np.array(ids, dtype=np.int64), np.array(mask, dtype=np.uint8)
        return Fitted(ids, mask, n_turns - len(turns), n_cut, evidence)

    def shorten(self, turns, i, n_over, size, span=None):
        """Take n_over tokens or a few more from the text of turn i, until all turns fit or it is empty.

        span     the part of the text to keep; None keeps its end
        returns  (ids, mask) of all turns
        """
        role, text = turns[i]
        n_before = self.count_tokens(text)
        room = n_before[-1]
        while True:
            room -= n_over
            begin, stop = widest_part(text, n_before, room, span)
            turns[i] = (role, text[begin:stop].strip())
            ids, mask = self.encode(turns)
            n_over = len(ids) - size  # the first and last tokens of a part may differ from those of the whole
            if n_over <= 0 or not turns[i][1]:
                return ids, mask

    def count_tokens(self, text):
        """Return the (characters + 1,) number of tokens that end before each character of a text.

        It is exact for tokens that keep the bytes of the text, else an estimate.
        """
        token_ends = np.cumsum(self.token_bytes[self.tokenizer.encode(text)])
        n_bytes = [len(character.encode('utf-8', 'surrogatepass')) for character in text]
        character_ends = np.cumsum([0, *n_bytes])
        token_ends = token_ends * (character_ends[-1] / max(token_ends[-1], 1))
        return np.searchsorted(token_ends, character_ends, side='right')

    @cached_property
    def token_bytes(self):
        return self.tokenizer.token_bytes()


def widest_part(text, n_before, room, span):
    """Find the widest part (begin, stop) of a text that takes at most `room` tokens.

    n_before   (characters + 1,) tokens before each character
    span       lies in this part, with whole sentences around it, or characters if its own sentence is too
               long; None takes the end of the text
    """
    characters, end = np.arange(len(text) + 1), len(text)
    attempts = [(characters, (end, end))]
    if span:
        sentence_ends = {match.end() for match in SENTENCE_END.finditer(text)}
        attempts = [(np.array(sorted({0, *sentence_ends, end})), span), (characters, span), *attempts]
    for borders, (begin, stop) in attempts:
        n_tokens, steps = n_before[borders], np.arange(len(borders))
        first, last = np.searchsorted(borders, begin, side='right') - 1, np.searchsorted(borders, stop)
        if n_tokens[last] - n_tokens[first] > room:
            continue
        for left, right in ((1, 1), (1, 0), (0, 1)):  # widen on both sides, then where only one has more
            firsts = np.maximum(first - left * steps, 0)
            lasts = np.minimum(last + right * steps, steps[-1])
            widest = np.count_nonzero(n_tokens[lasts] - n_tokens[firsts] <= room) - 1
            first, last = firsts[widest], lasts[widest]
        return borders[first], borders[last]
    return 0, 0
