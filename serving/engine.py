"""Generate for many requests at once. Requests join and leave between the steps of one loop.

    engine = Engine(model, tokenizer, max_batch=32, max_queue=64)
    engine.submit([Sequence(ids, sampling, tokenizer, print, stop, stop_ids)])
    engine.run()    # prints a Piece a step; start() does so in a thread

A step takes in prompts, in a thread at most one, so that a burst of prompts does not stall the running
answers. Then it draws one token for each answer in one forward pass.
R running sequences, N new ones, T length of the longest new prompt, V vocabulary
"""

import codecs
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

import kernels
from chat import Sampling
from files import print0, printable
from serving.cache import RowCache


class Token(NamedTuple):
    id: int
    offset: int  # characters of the answer before it
    logprob: float | None  # by the model, before temperature, top_k and top_p
    top: list  # [(id, logprob)] of the most likely tokens


class Piece(NamedTuple):
    text: str
    tokens: list[Token]
    finish_reason: str | None = None  # of the last piece: stop, length, or error


@dataclass(eq=False)
class Sequence:
    """One answer while it grows."""
    ids: list[int]  # of the prompt
    sampling: Sampling
    tokenizer: object
    emit: Callable  # called with each Piece, in the thread that runs the engine
    stop: list[str]  # the answer ends before any of these texts
    stop_ids: set[int]  # and before these tokens
    n_logprobs: int | None = None  # alternatives to report for each token; None = no log probabilities
    is_over: bool = False  # set from any thread: the engine forgets the sequence before its next step

    def __post_init__(self):
        self.text, self.tokens = '', []  # of the answer
        self.n_emitted, self.n_tokens_emitted = 0, 0  # characters and tokens of them
        self.n_tokens = 0  # drawn, with those of a stop text
        self.last, self.generator, self.finish_reason = None, None, None
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')  # a character may span several tokens

    def push(self, token_id: int, logprob: float | None = None, top: list = ()):
        """Add a drawn token, and emit the text that no stop text can take back."""
        self.last = token_id
        if token_id in self.stop_ids:
            return self.finish('stop')
        self.n_tokens += 1
        self.tokens.append(Token(token_id, len(self.text), logprob, top))
        self.text += self.decoder.decode(self.tokenizer.decode_bytes([token_id]))
        cuts = [self.text.find(stop, self.n_emitted) for stop in self.stop]
        cuts = [cut for cut in cuts if cut >= 0]
        if cuts:
            self.text = self.text[:min(cuts)]
            self.tokens = [token for token in self.tokens if token.offset < len(self.text)]
            self.decoder.reset()
            return self.finish('stop')
        if self.n_tokens >= self.sampling.max_new_tokens:
            return self.finish('length')
        end = self.certain_end()
        if end > self.n_emitted:
            self.emit_until(end)

    def certain_end(self):
        """Return the first character that may begin a stop text, or the end."""
        for start in range(self.n_emitted, len(self.text)):
            if any(stop.startswith(self.text[start:]) for stop in self.stop):
                return start
        return len(self.text)

    def finish(self, reason):
        self.text += self.decoder.decode(b'', final=True)
        self.finish_reason, self.is_over = reason, True
        self.emit_until(len(self.text))

    def emit_until(self, end):
        tokens = self.tokens[self.n_tokens_emitted:]
        if self.finish_reason is None:
            tokens = [token for token in tokens if token.offset < end]
        piece = Piece(self.text[self.n_emitted:end], tokens, self.finish_reason)
        self.n_emitted = end
        self.n_tokens_emitted += len(tokens)
        self.emit(piece)


class Engine:
    """The model at work on many sequences.

    max_batch  sequences that run at the same time
    max_queue  sequences that wait
    """

    def __init__(self, model, tokenizer, max_batch: int = 32, max_queue: int = 64):
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_queue = max_batch, max_queue
        self.device = model.transformer.wte.weight.device
        self.dtype = model.stream_dtype or model.transformer.wte.weight.dtype
        self.waiting = deque()
        self.running = []  # row r of the cache belongs to running[r]
        self.cache = RowCache(model.config, max_batch, self.device, self.dtype)
        self.prompts = None  # the last ones and what read() returned: the choices of a request share it
        self.is_closed = False
        self.wake = threading.Condition()
        self.thread = threading.Thread(target=self.loop, name='engine', daemon=True)

    def start(self):
        self.thread.start()
        return self

    def run(self):
        """Complete all sequences in the thread of the caller."""
        while self.waiting or self.running:
            self.step(n_prompts=self.max_batch)

    def submit(self, sequences: list[Sequence]) -> bool:
        """Queue the sequences of a request. Return False if there is no room for all of them."""
        with self.wake:
            self.waiting = deque(sequence for sequence in self.waiting if not sequence.is_over)
            n_free = self.max_batch - len(self.running) + self.max_queue - len(self.waiting)
            if len(sequences) > n_free:
                return False
            self.waiting.extend(sequences)
            self.wake.notify()
            return True

    def close(self):
        with self.wake:
            self.is_closed = True
            self.wake.notify()
        self.thread.join()

    def loop(self):
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.is_closed or self.waiting or self.running)
            if self.is_closed:
                return self.fail()
            try:
                self.step()
            except Exception as error:  # out of memory, for example: the server outlives it
                print0(printable(f'the answers in progress are lost: {type(error).__name__}: {error}'))
                self.fail()

    def fail(self):
        """End all sequences with an error."""
        with self.wake:
            sequences = [*self.running, *self.waiting]
            self.running, self.prompts = [], None
            self.waiting.clear()
        self.cache.clear()
        for sequence in sequences:
            if not sequence.is_over:
                sequence.finish('error')

    @torch.inference_mode()
    def step(self, n_prompts: int = 1):
        """Take in up to n_prompts prompts, run the model once for all sequences, and draw."""
        self.leave()
        self.join(n_prompts)
        self.leave()
        if not self.running:
            return
        ids = torch.tensor([[sequence.last] for sequence in self.running], device=self.device)  # (R, 1)
        with kernels.decoding(ids, self.cache):
            logits = self.model(ids, cache=self.cache)[0][:, -1]  # (R, V)
        for row, sequence in enumerate(self.running):
            self.draw(sequence, logits[row:row + 1])

    def leave(self):
        """Free the rows of sequences that are over."""
        for row in reversed(range(len(self.running))):
            if self.running[row].is_over:
                self.cache.remove(row)
                self.running[row] = self.running[-1]
                self.running.pop()

    def join(self, n_prompts):
        """Read the prompts of the next sequences that wait, and draw their first tokens."""
        with self.wake:
            n_free, new = min(n_prompts, self.max_batch - len(self.running)), []
            while self.waiting and len(new) < n_free:
                sequence = self.waiting.popleft()
                if not sequence.is_over:
                    new.append(sequence)
            self.running += new
        if not new:
            return
        prompts = [sequence.ids for sequence in new]
        if self.prompts is None or self.prompts[0] != prompts:
            self.prompts = None  # frees its memory first
            self.prompts = prompts, *self.read(prompts)
        _, cache, logits = self.prompts
        for row, sequence in enumerate(new):
            self.cache.add(cache, row, len(sequence.ids))
            sequence.generator = torch.Generator(self.device).manual_seed(sequence.sampling.seed)
            self.draw(sequence, logits[row:row + 1])

    def read(self, prompts):
        """Return the KVCache of prompts, and the logits of the tokens after them, (N, V).

        They are padded on the right, to which no token attends.
        """
        lengths = [len(ids) for ids in prompts]
        rows = [ids + [0] * (max(lengths) - len(ids)) for ids in prompts]
        idx = torch.tensor(rows, device=self.device)  # (N, T)
        cache = kernels.KVCache(self.model.config, *idx.shape, self.device, self.dtype)
        with kernels.decoding(idx, cache):
            x = self.model.hidden(idx, cache=cache)  # (N, T, C)
            x = torch.stack([row[n - 1] for row, n in zip(x, lengths, strict=True)])  # (N, C)
            return cache, self.model.head(x)

    def draw(self, sequence, logits):
        """Draw the next token of a sequence from its logits (1, V)."""
        if sequence.is_over:
            return
        sampling = sequence.sampling
        logits = logits[:, :self.tokenizer.vocab_size]
        token = kernels.draw(logits, sampling.temperature, sampling.top_k, sampling.top_p,
                             sequence.generator).item()
        logprob, top = None, []
        if sequence.n_logprobs is not None:
            logprobs = logits[0].log_softmax(dim=-1)  # (V,)
            best = logprobs.topk(min(sequence.n_logprobs, len(logprobs)))
            logprob = logprobs[token].item()
            top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        sequence.push(token, logprob, top)
