"""training/scoring.py: against the plain way to compute the same, for any batch size."""

import contextlib
import math

import numpy as np
import pytest
import torch
from conftest import CHARS, pack_chars, sentences

import distributed
from corpus.pack import write_dataset
from model import GPT, GPTConfig
from tokens.loader import Loader
from tokens.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer
from training import scoring
from training.scoring import Interrupted, Row, score_rows, spread_windows, text_loss

HERE = dict(place=distributed.Place(0, 0, 1, torch.device('cpu')), autocast=contextlib.nullcontext())


def score(model, rows, batch_tokens=512, **options):
    return score_rows(model, [Row(*row) for row in rows], 'test', batch_tokens=batch_tokens, **HERE, **options)


def pack(folder, tokenizer, text):
    write_dataset(folder, tokenizer, {'train': [text], 'val': [text]}, 'a test')
    return folder


def measure(model, tokenizer, folder, batch_size=4, **options):
    loader = Loader(folder, 'val', block_size=32, batch_size=batch_size, order='sequential')
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    return text_loss(model, loader, spread_windows(loader, 0), token_bytes=token_bytes, **HERE, **options)


# -----------------------------------------------------------------------------
# rows


def test_scores_are_those_of_one_row_at_a_time_in_any_batch(small):
    draw = np.random.default_rng(0)
    rows = [(draw.integers(len(CHARS), size=n), int(draw.integers(1, n))) for n in draw.integers(2, 60, size=40)]
    best = GPT.generate(small, torch.tensor([[1, 2]]), 5, temperature=0)[0].numpy()
    rows.append((best, 2))
    plain = []
    for ids, start in rows:
        kept = ids[-33:]  # block_size tokens, and the one after them
        logp = small(torch.tensor(kept[None, :-1]), torch.tensor(kept[None, 1:]))[0][0].log_softmax(-1)
        n = min(len(ids) - start, len(kept) - 1)
        targets = torch.tensor(kept[-n:])
        plain.append([logp[-n:].gather(1, targets[:, None]).sum().item(), bool((logp[-n:].argmax(-1) == targets).all()), n])
    for batch_tokens in (1, 100, 10**6):
        assert np.abs(np.array(score(small, rows, batch_tokens)) - np.array(plain)).max() < 1e-4
    assert plain[-1][1] and not plain[0][1]


def test_training_mode_survives_scoring(small):
    small.train()
    score(small, [([1, 2, 3], 1)])
    with pytest.raises(Interrupted):
        score(small, [([1, 2, 3], 1)], stop=lambda: 'SIGTERM')
    assert small.training
    small.eval()


# -----------------------------------------------------------------------------
# text


def test_bits_per_byte_compare_between_tokenizers(tmp_path):
    text = sentences(3000, 5).replace('cat', 'café')
    for tokenizer in (CharTokenizer(''.join(sorted(set(text)))), GPT2Tokenizer(), ByteTokenizer(), BPETokenizer('t h\nth e\nĠ the\nÃ ©')):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=32, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8))
        torch.nn.init.zeros_(model.lm_head.weight)  # all tokens are equally likely
        loss = measure(model, tokenizer, pack(tmp_path / tokenizer.kind, tokenizer, text))
        ids = tokenizer.encode(text)
        n_first = len(tokenizer.decode_bytes(ids[:1]))
        assert loss.n_bytes == len(text.encode('utf-8')) - n_first, 'each byte but those of the first token, once'
        assert loss.bits_per_byte == pytest.approx((len(ids) - 1) * math.log2(tokenizer.vocab_size) / loss.n_bytes)
        assert loss.nats_per_target == pytest.approx(math.log(tokenizer.vocab_size))


def test_bits_per_byte_are_the_same_at_any_batch_size_and_count_no_special_token(tmp_path, small):
    tokenizer = CharTokenizer(CHARS)
    folder = pack(tmp_path / 'x', tokenizer, sentences(2000, 5))
    one, other = measure(small, tokenizer, folder, 1), measure(small, tokenizer, folder, 7)
    assert one.bits_per_byte == pytest.approx(other.bits_per_byte, rel=1e-6) and one[2:] == other[2:] == (1999, 1999)

    class Marked(CharTokenizer):  # as if line breaks were a special token
        def token_bytes(self):
            return np.where(np.arange(self.vocab_size) == 0, 0, super().token_bytes())
    loss = measure(small, Marked(CHARS), folder)
    x = torch.tensor(tokenizer.encode(sentences(2000, 5)))
    nats = []
    for i in range(0, 1999, 32):
        logits, _ = small(x[None, i:min(i + 32, 1999)], x[None, i + 1:i + 33])
        nats.append(torch.nn.functional.cross_entropy(logits[0], x[i + 1:i + 33], reduction='none'))
    counted = x[1:] != 0
    assert loss.n_targets == 1999 and loss.n_bytes == counted.sum()
    assert loss.bits_per_byte == pytest.approx(torch.cat(nats)[counted].double().sum().item() / math.log(2) / loss.n_bytes, rel=1e-5)


# -----------------------------------------------------------------------------
# both


def test_scores_and_losses_are_taken_under_inference_mode_by_the_plain_model(tmp_path, small):
    seen = []
    hook = small.transformer.h[0].register_forward_pre_hook(
        lambda *_: seen.append((torch.is_inference_mode_enabled(), torch.compiler.is_compiling())))
    compiled = []
    small.compile(backend=lambda graph, _: compiled.append(graph) or graph)
    score(small, [([1, 2, 3], 1)])
    measure(small, CharTokenizer(CHARS), pack_chars(tmp_path / 'x', sentences(100, 5), sentences(100, 5), CHARS), batch_size=10)
    small._compiled_call_impl = None
    hook.remove()
    assert seen == [(True, False)] * 2 and not compiled


def test_a_long_evaluation_shows_progress_and_ends_between_two_batches(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setattr(scoring, 'PROGRESS_S', 0)
    folder = pack(tmp_path / 'x', CharTokenizer(CHARS), sentences(2000, 5))
    measure(small, CharTokenizer(CHARS), folder, batch_size=30)
    score(small, [([1, 2, 3], 1)] * 3, batch_tokens=1)
    printed = capsys.readouterr().out
    assert 'evaluating the loss: 1 of 3 batches, about 0:0' in printed and 'evaluating test: 1 of 3 batches' in printed

    calls = []
    with pytest.raises(Interrupted):
        measure(small, CharTokenizer(CHARS), folder, batch_size=30, stop=lambda: calls.append(0) or len(calls) == 2)
    assert len(calls) == 2
