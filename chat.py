"""Talk in the terminal with a model that was tuned on conversations. The settings are sample.py's.

    python chat.py --out_dir=out-dolly
    python chat.py --out_dir=out-dolly --temperature=0 < questions.txt

Each line is a question. /reset starts a new conversation, /save FILE appends it to a JSONL file that
corpus/conversations.py reads, /quit ends the program, and Ctrl-C stops an answer. Remarks go to stderr.
"""

import codecs
import contextlib
import json
import os
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # as in train.py

import torch

import devices
from corpus.template import ROLE_TOKENS, STYLES, TURN_END, Fitted, Template, check_tokenizer
from files import printable, write_atomically

# -----------------------------------------------------------------------------
# answers of a model


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens: settings of sample.py."""
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int

    def __post_init__(self):
        check('max_new_tokens', self.max_new_tokens, self.max_new_tokens >= 0, '0 or more')
        check('temperature', self.temperature, self.temperature >= 0, '0 (greedy) or more')
        check('top_k', self.top_k, (self.top_k or 0) >= 0, '0 or more, or None')
        check('top_p', self.top_p, self.top_p is None or 0 < self.top_p <= 1, 'above 0 up to 1, or None')
        check('seed', self.seed, 0 <= self.seed < 2**63, '0 or more, below 2**63')

    def stream(self, model, tokenizer, idx, stop_ids) -> Iterator[list]:
        """Continue each row of idx (B, T). Yield the tokens of each step, None for a row that has ended.

        stop_ids  a row ends before the first of these tokens
        """
        steps = model.stream(idx, self.max_new_tokens, temperature=self.temperature, top_k=self.top_k,
                             top_p=self.top_p, vocab_size=tokenizer.vocab_size)
        has_ended = [False] * len(idx)
        for ids in steps:
            tokens = ids.tolist()
            for row, token in enumerate(tokens):
                if has_ended[row] or token in stop_ids:
                    has_ended[row], tokens[row] = True, None
            if all(has_ended):
                return
            yield tokens


def check(name, value, is_valid, accepted):
    if not is_valid:
        raise ValueError(f'--{name}={value}: accepted is {accepted}')


@dataclass
class Answerer:
    """A tuned model that answers conversations: lists of turns (role, text)."""

    model: torch.nn.Module
    tokenizer: object
    style: str
    sampling: Sampling

    def fit(self, turns) -> Fitted:
        """Encode a conversation. Leave up to a quarter of the context for the answer."""
        block_size = self.model.config.block_size
        n_reserved = min(self.sampling.max_new_tokens, max(1, block_size // 4))
        fitted = Template(self.tokenizer, self.style).fit(turns, block_size - n_reserved)
        if fitted is None:
            raise ValueError(f'a context of {block_size} tokens has no room for a prompt '
                             f'in style {self.style}')
        return fitted

    def sampling_after(self, prompt) -> Sampling:
        """Return how to draw an answer that fits into the context after a prompt."""
        n_free = self.model.config.block_size - len(prompt)
        return replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, n_free))

    def stream(self, prompt: list[int]) -> Iterator[int]:
        """Yield the tokens of the answer to a prompt."""
        idx = torch.tensor([prompt], device=next(self.model.parameters()).device)
        sampling = self.sampling_after(prompt)
        for tokens in sampling.stream(self.model, self.tokenizer, idx, stop_ids(self.tokenizer)):
            yield tokens[0]


def stop_ids(tokenizer) -> set:
    """Return the tokens that end an answer."""
    names = {*ROLE_TOKENS.values(), TURN_END}
    return {tokenizer.eot, *(i for name, i in tokenizer.special.items() if name in names)}


def choose_style(style: str, trained) -> str:
    """Return the prompt template: the setting, or for 'auto' the one that the model was tuned with.

    trained  a weights.begin.Start
    """
    check_tokenizer(trained.tokenizer)
    chosen = style
    if style == 'auto':
        chosen = trained.style
        if not chosen and TURN_END in trained.tokenizer.special:
            chosen = 'chatml'
    if chosen not in STYLES:
        raise ValueError(f'{trained.path} was not tuned on conversations: tune it with python train.py '
                         f'config/finetune_dolly.py --init_from={trained.path}, or name the template '
                         'of its prompts, --style=chat or --style=alpaca')
    return chosen


def prepare_decoding(model, device, compile, quantize, n_rows=1):
    """Compile the model, or rearrange its weights for generating n_rows at a time."""
    if compile is True and devices.choose_compile(True, device):
        model.compile_blocks()
        model.static_cache = True
    else:
        model.pack(None if quantize == 'none' else quantize, n_rows)


def json_line(value) -> bytes:
    """Return a line of a JSONL file. Half a surrogate pair becomes JSON's own escape."""
    return (json.dumps(value, ensure_ascii=False) + '\n').encode('utf-8', 'backslashreplace')


# -----------------------------------------------------------------------------
# the conversation in the terminal


class Conversation:
    def __init__(self, answerer: Answerer):
        self.answerer, self.turns = answerer, []
        self.remarks = set()  # each is printed once

    def ask(self, question: str):
        """Print the answer while it is drawn. Ctrl-C ends it early."""
        self.turns.append(('user', question))
        prompt = self.answerer.fit(self.turns)
        context = f'the context of {self.answerer.model.config.block_size} tokens'
        if prompt.n_left_out:
            self.remark(f'the oldest turns no longer fit into {context} and are left out')
        if prompt.n_cut:
            self.remark(f'the question is too long for {context}: its beginning is cut off')
        decoder, answer = codecs.getincrementaldecoder('utf-8')(errors='replace'), ''
        try:
            for token in self.answerer.stream(prompt.ids.tolist()):
                piece = decoder.decode(self.answerer.tokenizer.decode_bytes([token]))
                answer += piece
                print(printable(piece), end='', flush=True)
        except KeyboardInterrupt:
            print(' [stopped]', end='')
        print(flush=True)
        self.turns.append(('assistant', answer.strip()))

    def remark(self, text):
        if text not in self.remarks:
            print(f'({text})', file=sys.stderr)
            self.remarks.add(text)

    def save(self, path: Path):
        """Append the conversation to a JSONL file. A file that cannot be written does not end the program."""
        messages = [{'role': role, 'content': text} for role, text in self.turns]
        try:
            lines = path.read_bytes().splitlines() if path.exists() else []
            content = b'\n'.join([*lines, json_line({'messages': messages})])
            write_atomically(path, lambda f: f.write(content))
            print(f'{path}: {len(self.turns)} turns saved', file=sys.stderr)
        except OSError as error:
            print(f'{path}: {error.strerror}', file=sys.stderr)


def talk(answerer: Answerer):
    """Answer the lines of stdin, typed or from a pipe."""
    if sys.stdin is None or sys.stdout is None:
        raise ValueError('a chat reads stdin and writes to stdout: one of them is closed')
    prompt = ''
    if sys.stdin.isatty():
        prompt = '> '
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, arrow keys in input()
        print('/reset starts anew, /save FILE saves the conversation, /quit ends, Ctrl-C stops an answer',
              file=sys.stderr)
    if hasattr(sys.stdin, 'reconfigure'):
        sys.stdin.reconfigure(encoding='utf-8', errors='replace')
    conversation = Conversation(answerer)
    while True:
        try:
            line = input(prompt).strip()
        except KeyboardInterrupt:
            print('\n/quit ends', file=sys.stderr)
            continue
        except EOFError:
            return
        command, _, argument = line.partition(' ')
        if command == '/quit':
            return
        if command == '/reset':
            conversation = Conversation(answerer)
        elif command == '/save':
            conversation.save(Path(argument.strip() or 'chat.jsonl'))
        elif command.startswith('/'):
            print(f'{printable(command)}: accepted are /reset, /save FILE, /quit', file=sys.stderr)
        elif line:
            conversation.ask(line)


if __name__ == '__main__':
    sys.argv.insert(1, '--chat')
    runpy.run_path(str(Path(__file__).with_name('sample.py')), run_name='__main__')
