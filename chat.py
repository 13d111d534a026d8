"""Talk in the terminal with a model that was tuned on conversations. --help lists the settings.

    python chat.py --out_dir=out-dolly
    python chat.py --out_dir=out-dolly --temperature=0 < questions.txt

Each line is a question. The model sees the conversation so far, as far as its context reaches. /reset starts
a new conversation. /save FILE appends this one to a JSONL file that corpus/conversations.py reads. /quit or
the end of input ends the program, Ctrl-C stops an answer. Answers go to stdout, remarks to stderr.
"""

import codecs
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import devices
import distributed
import files
from configurator import configure
from corpus.template import ROLE_TOKENS, STYLES, Fitted, check_tokenizer, encode
from tokens.tokenizer import load_tokenizer
from weights.begin import Start, build_model, find_start

# -----------------------------------------------------------------------------
# the model
init_from = 'resume'  # the checkpoint in out_dir; or a folder in transformers' format, or an .npz file
out_dir = 'out'
checkpoint_path = ''  # this file instead of the checkpoint in out_dir
n_head: int | None = None  # for a checkpoint_path that does not say it
strict = True  # False: checkpoint_path may lack weights or have others, which are listed
style: Literal['auto', 'chat', 'alpaca'] = 'auto'  # prompt template; auto = the one the model was tuned with
# the answers
max_new_tokens = 500
temperature = 0.8  # lower is more predictable, 0 always takes the most likely token
top_k: int | None = 200  # draw among this many most likely tokens; 0 or None = all
top_p: float | None = None  # draw among the fewest tokens with this total probability; None = all
seed = 1337
# system
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
compile: bool | Literal['auto'] = 'auto'  # auto = eager
quantize: Literal['none', 'int8'] = 'none'  # int8 = one byte per weight, on the CPU
# -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. The names are settings of sample.py and chat.py, and arguments of GPT.stream()."""

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

    def stream(self, model, tokenizer, idx, *, stop_ids, limits=None, documents=None) -> Iterator[list]:
        """Continue each row of idx (B, T). Yield the tokens of each step, None for a row that has ended.

        stop_ids   a row ends before the first of these tokens
        limits     the most tokens of each row; None = max_new_tokens
        documents  (B, T), as in GPT.stream()
        """
        limits = limits or [self.max_new_tokens] * len(idx)
        steps = model.stream(idx, max(limits), temperature=self.temperature, top_k=self.top_k,
                             top_p=self.top_p, vocab_size=tokenizer.vocab_size, documents=documents)
        has_ended = [False] * len(limits)
        for n_tokens, ids in enumerate(steps):
            tokens = ids.tolist()
            for row, token in enumerate(tokens):
                if token in stop_ids or n_tokens >= limits[row]:
                    has_ended[row] = True
            if all(has_ended):
                return
            yield [None if ended else token for token, ended in zip(tokens, has_ended, strict=True)]


def check(name, value, is_valid, accepted):
    if not is_valid:
        raise ValueError(f'--{name}={value}: accepted is {accepted}')


@dataclass
class Answerer:
    """A tuned model that answers conversations. A conversation is a list of turns (role, text)."""

    model: torch.nn.Module
    tokenizer: object
    style: str
    sampling: Sampling

    def fit(self, turns) -> Fitted:
        """Encode a conversation that ends with a question. Leave a quarter of the context for the answer."""
        block_size = self.model.config.block_size
        n_reserved = min(self.sampling.max_new_tokens, max(1, block_size // 4))
        fitted = encode(turns, self.tokenizer, self.style, block_size - n_reserved)
        if fitted is None:
            raise ValueError(f'a context of {block_size} tokens has no room for a prompt '
                             f'in style {self.style}')
        return fitted

    def stream(self, prompts) -> Iterator[list]:
        """Answer several prompts (lists of ids) in one batch. Yields as Sampling.stream() does.

        Shorter prompts are padded on the left. The padding is a document of its own, so no token attends to
        it, and each answer is the one that the prompt gets alone.
        """
        longest = max(len(prompt) for prompt in prompts)
        paddings = [[0] * (longest - len(prompt)) for prompt in prompts]
        rows = [padding + prompt for padding, prompt in zip(paddings, prompts, strict=True)]
        device = next(self.model.parameters()).device
        idx, documents = torch.tensor(rows, device=device), None  # (B, T)
        if any(paddings):
            rows = [padding + [1] * (longest - len(padding)) for padding in paddings]
            documents = torch.tensor(rows, device=device)  # (B, T)
        n_free = [self.model.config.block_size - len(prompt) for prompt in prompts]
        limits = [min(self.sampling.max_new_tokens, n) for n in n_free]
        special = self.tokenizer.special
        stop_ids = {self.tokenizer.eot, *(special[name] for name in ROLE_TOKENS.values() if name in special)}
        return self.sampling.stream(self.model, self.tokenizer, idx, stop_ids=stop_ids, limits=limits,
                                    documents=documents)


def choose_style(style: str, trained: Start, tokenizer) -> str:
    """Return the prompt template: the setting, or for 'auto' the one that the model was tuned with."""
    check_tokenizer(tokenizer)
    chosen = trained.style if style == 'auto' else style
    if chosen not in STYLES:
        raise ValueError(f'{trained.path} was not tuned on conversations: tune it with python train.py '
                         f'config/finetune_dolly.py --init_from={trained.path}, or name the template '
                         'of its prompts, --style=chat or --style=alpaca')
    return chosen


def prepare_decoding(model, device, *, compile, quantize):
    """Compile the model, or pack its weights for fast reading."""
    if compile is True and devices.choose_compile(True, device):
        model.compile_blocks()
    else:
        model.pack(None if quantize == 'none' else quantize)


def check_compile(compile, quantize):
    if compile is True and quantize != 'none':
        raise ValueError(f'--compile=True and --quantize={quantize} do not go together: leave one out')


# -----------------------------------------------------------------------------
# the conversation in the terminal


class Conversation:
    def __init__(self, answerer: Answerer):
        self.answerer = answerer
        self.reset()

    def reset(self):
        self.turns = []
        self.remarks = set()  # each is printed once in a conversation

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
            for tokens in self.answerer.stream([prompt.ids.tolist()]):
                piece = decoder.decode(self.answerer.tokenizer.decode_bytes(tokens))
                answer += piece
                print(files.printable(piece), end='', flush=True)
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
        line = json.dumps({'messages': messages}, ensure_ascii=False) + '\n'
        try:
            content = path.read_bytes() if path.exists() else b''
            if content and not content.endswith(b'\n'):
                content += b'\n'
            files.write_atomically(path, lambda f: f.write(content + line.encode('utf-8')))
            print(f'{path}: {len(self.turns)} turns saved', file=sys.stderr)
        except OSError as error:
            print(f'{path}: {error.strerror}', file=sys.stderr)


def talk(answerer: Answerer):
    """Answer the lines of stdin, typed or from a pipe."""
    if sys.stdin is None or sys.stdout is None:
        raise ValueError('a chat reads stdin and writes to stdout: one of them is closed')
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, arrow keys in input()
        print('/reset starts anew, /save FILE saves the conversation, /quit ends, Ctrl-C stops an answer',
              file=sys.stderr)
    if hasattr(sys.stdin, 'reconfigure'):
        sys.stdin.reconfigure(encoding='utf-8', errors='replace')
    conversation = Conversation(answerer)
    while True:
        try:
            line = input('> ' if is_terminal else '').strip()
        except KeyboardInterrupt:
            print('\n/quit ends', file=sys.stderr)
            continue
        except EOFError:
            return
        command, _, argument = line.partition(' ')
        if command == '/quit':
            return
        if command == '/reset':
            conversation.reset()
        elif command == '/save':
            conversation.save(Path(argument.strip() or 'chat.jsonl'))
        elif command.startswith('/'):
            print(f'{files.printable(command)}: accepted are /reset, /save FILE, /quit', file=sys.stderr)
        elif line:
            conversation.ask(line)


def main():
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    check_compile(compile, quantize)
    place = distributed.start(device)
    precision = devices.choose_dtype(dtype, place.device)
    trained = find_start(init_from, out_dir, checkpoint_path, n_head)
    tokenizer = load_tokenizer(trained.tokenizer)
    template = choose_style(style, trained, tokenizer)
    model = build_model(trained, tokenizer, precision, strict).to(place.device, precision)
    prepare_decoding(model, place.device, compile=compile, quantize=quantize)
    torch.manual_seed(seed)
    talk(Answerer(model, tokenizer, template, sampling))


if __name__ == '__main__':
    with files.one_line_errors():
        configure(globals())
        main()
