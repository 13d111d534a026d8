"""sample.py end to end on tiny checkpoints of random weights."""

import io
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    pack_chars,
    read_checkpoint,
    run_here,
    sentences,
    train_here,
)

import checkpoint
from checkpoint import CheckpointFolder
from corpus.pack import write_dataset
from corpus.train_tokenizer import save_tokenizer, train_bpe
from model import GPT, GPTConfig
from tokens.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer, tokenizer_meta
from weights import begin, torchfile

CHARS = '\n abcdefgh€'


@pytest.fixture
def out_dir(tmp_path):
    """An out_dir whose model has 16 ids for 11 characters: the last five are padding, and the likeliest of all."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=16, n_layer=2, n_head=2, n_embd=16, arch='modern'))
    torch.nn.init.normal_(model.lm_head.weight)
    tokenizer = CharTokenizer(CHARS)
    state = dict(model=model.state_dict(), optimizer={}, model_args=vars(model.config), iter_num=7, config={}, tokenizer=tokenizer.meta(),
                 vocab_size=len(CHARS), format=checkpoint.FORMAT)
    CheckpointFolder(tmp_path).save(state)
    return tmp_path


def sample(*flags):
    """All that sample.py prints. Raises ValueError with the line that it ends with."""
    code, stdout, stderr = run_here('sample.py', '--device=cpu', *flags)
    if code:
        assert code == 2 and stderr.count('\n') == 1 and stderr.endswith('\n'), stderr
        raise ValueError(stderr[:-1])
    return stdout


def run(*flags):
    """The samples, each with its prompt."""
    return sample('--dtype=float32', *flags).split('char tokenizer\n')[1].split('\n---------------\n')[:-1]


def test_several_samples_same_seed_same_text(out_dir):
    flags = f'--out_dir={out_dir}', '--start=ab', '--num_samples=3', '--max_new_tokens=30', '--seed=1'
    texts = run(*flags)
    assert len(texts) == 3 and all(len(text) == 32 and text.startswith('ab') for text in texts) and len(set(texts)) == 3
    assert texts == run(*flags)
    assert texts != run(*flags, '--seed=2')


def test_padding_is_never_drawn_and_greedy_repeats(out_dir):
    hot = run(f'--out_dir={out_dir}', '--num_samples=20', '--temperature=9', '--top_k=None', '--max_new_tokens=40')
    assert set(''.join(hot)) <= set(CHARS)  # decoding an id of padding would have raised
    greedy = run(f'--out_dir={out_dir}', '--start=a', '--num_samples=2', '--temperature=0', '--max_new_tokens=40')
    assert greedy[0] == greedy[1] and len(greedy[0]) == 41


def test_prompt_from_file_and_what_the_tokenizer_does_not_know(monkeypatch, out_dir, tmp_path):
    prompt = tmp_path / 'prompt.txt'
    prompt.write_text('a €', encoding='utf-8')
    assert run(f'--out_dir={out_dir}', f'--start=FILE:{prompt}', '--num_samples=1')[0].startswith('a €')
    with pytest.raises(ValueError, match=r"character 'z' \(U\+007A\) at position 1 is not among the 11 characters"):
        run(f'--out_dir={out_dir}', '--start=az')


def byte_model(folder):
    """An out_dir whose model knows bytes."""
    tokenizer, model = ByteTokenizer(), GPT(GPTConfig(block_size=16, vocab_size=320, n_layer=1, n_head=1, n_embd=2))
    CheckpointFolder(folder).save(dict(model=model.state_dict(), optimizer={}, model_args=vars(model.config), iter_num=7, config={},
                                 tokenizer=tokenizer.meta(), vocab_size=tokenizer.vocab_size, format=checkpoint.FORMAT))
    return folder


def play(monkeypatch, *texts):
    """Make every model draw these bytes, 0 for end of text. Returns the list of those drawn so far."""
    drawn = []

    def stream(model, idx, max_new_tokens, **settings):
        for ids in zip(*texts):
            drawn.append(ids)
            yield torch.tensor([i or ByteTokenizer().eot for i in ids])
    monkeypatch.setattr(GPT, 'stream', stream)
    return drawn


def test_samples_stop_at_end_of_text_and_characters_arrive_whole(monkeypatch, tmp_path):
    drawn, pieces = play(monkeypatch, '€uro'.encode() + b'\0xx', b'ab\0yyyyyy'), []

    class Stream(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return super().write(text)
    monkeypatch.setattr(io, 'StringIO', Stream)
    out = sample(f'--out_dir={byte_model(tmp_path)}', '--num_samples=2', '--start=p:')
    assert out.endswith('byte tokenizer\np:€uro\n---------------\np:ab\n---------------\n')
    assert '€' in pieces and len(drawn) == 7, 'the euro sign in one piece; nothing drawn once both samples ended'


def test_control_characters_are_printed_escaped(monkeypatch, tmp_path):
    play(monkeypatch, b'a\x1b[2J\t\r\n\0', b'b\x07\0......')
    out = sample(f'--out_dir={byte_model(tmp_path)}', '--num_samples=2', '--start=\x1b]0;p')
    assert out.endswith('\n\\x1b]0;pa\\x1b[2J\t\\x0d\n\n---------------\n\\x1b]0;pb\\x07\n---------------\n')


def test_line_ends_of_a_prompt_are_read_as_in_a_corpus(out_dir, tmp_path):
    (tmp_path / 'crlf.txt').write_bytes(b'a\r\nb')
    for start in ('a\r\nb', f'FILE:{tmp_path / "crlf.txt"}'):
        assert run(f'--out_dir={out_dir}', f'--start={start}', '--num_samples=1')[0].startswith('a\nb')


def test_a_model_of_text_without_line_breaks_starts_with_its_first_character(tmp_path):
    pack_chars(tmp_path / 'set', 'the cat sat ' * 40, 'the cat ' * 20)
    code, _, err, _ = train_here(*TINY, f'--dataset={tmp_path / "set"}', '--max_iters=2', out_dir=tmp_path / 'out')
    assert code == 0, err
    *_, said, _, text, _ = sample(f'--out_dir={tmp_path / "out"}', '--num_samples=1').splitlines()
    assert said == "the vocabulary has no line break, so this starts with ' '" and text.startswith(' ')
    with pytest.raises(ValueError, match=r"character '\\n' .* is not among the 7 characters"):
        sample(f'--out_dir={tmp_path / "out"}', '--start=\n')


def test_a_chinese_prompt_where_the_locale_is_not_utf8_and_a_closed_stdout(tmp_path):
    flags = sys.executable, ROOT / 'sample.py', '--device=cpu', f'--out_dir={byte_model(tmp_path)}', '--num_samples=1', '--max_new_tokens=1'
    ascii_only = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([*flags, '--start=天地'], env=ascii_only, capture_output=True)
    assert done.returncode == 0 and rb'\u5929\u5730' in done.stdout.splitlines()[-2], done.stderr
    done = subprocess.run(['sh', '-c', 'exec "$@" >&-', '-', *flags], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b'')


def test_best_is_taken_where_the_run_asked_for_it(out_dir):
    assert begin.find_start(out_dir=out_dir).path.endswith('ckpt.pt')
    state = checkpoint.load(out_dir / 'ckpt.pt')
    state['config'] = dict(always_save_checkpoint=False)
    CheckpointFolder(out_dir, out_dir / 'ckpt.pt').save(state, is_best=True)
    assert begin.find_start(out_dir=out_dir).path.endswith('best.pt')


def test_a_checkpoint_is_read_once(monkeypatch, out_dir):
    """The first rank read and checksummed it twice: to choose it, and to load it."""
    reads, read = [], torchfile.read
    monkeypatch.setattr(torchfile, 'read', lambda path: reads.append(path) or read(path))
    assert begin.find_start(out_dir=out_dir).progress.iter_num == 7
    assert begin.find_run(out_dir, '', auto_resume=False).resumed_from == str(out_dir / 'ckpt.pt')
    assert reads == [out_dir / 'ckpt.pt'] * 2


def test_a_damaged_checkpoint_is_refused_and_stays_where_it_is(out_dir):
    damaged = bytearray((out_dir / 'ckpt.pt').read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (out_dir / 'ckpt.pt').write_bytes(damaged)
    before = sorted(path.name for path in out_dir.iterdir())
    with pytest.raises(ValueError, match='no readable checkpoint'):
        run(f'--out_dir={out_dir}')
    assert sorted(path.name for path in out_dir.iterdir()) == before


@pytest.mark.parametrize('flag, text', [
    ('--temperature=-1', '--temperature=-1.0: accepted is 0 (greedy) or more'),
    ('--top_p=0', '--top_p=0.0: accepted is above 0 up to 1, or None'),
    ('--num_samples=0', '--num_samples=0: accepted is 1 or more'),
    ('--out_dir=nowhere', 'nowhere has no checkpoint: train one with python train.py --out_dir=nowhere, or name another --out_dir'),
])
def test_errors(flag, text):
    with pytest.raises(ValueError) as error:
        run(flag)
    assert str(error.value) == text


# -----------------------------------------------------------------------------
# other models


@pytest.mark.parametrize('name', ['exported', 'exported.npz'])
def test_export_writes_what_init_from_reads(out_dir, tmp_path, name):
    target = tmp_path / name
    flags = '--start=a', '--num_samples=2', '--max_new_tokens=40', '--temperature=0.9'
    texts = run(f'--out_dir={out_dir}', *flags)
    # dtype=auto may be bfloat16, but what is exported is what was trained
    lines = sample(f'--out_dir={out_dir}', f'--export={target}').splitlines()
    files = [target] if name.endswith('.npz') else sorted(target.iterdir())
    assert sorted(line for line in lines if line.endswith(' bytes')) == [f'{file}: {file.stat().st_size:,} bytes' for file in files]
    assert f'--init_from={target}' in lines[-1]
    assert run(f'--init_from={target}', *flags) == texts


def test_a_model_without_tokenizer_or_with_anothers(monkeypatch, out_dir, tmp_path):
    GPT(GPTConfig(block_size=16, vocab_size=16, n_layer=1, n_head=1, n_embd=2)).save_pretrained(tmp_path / 'x')
    for tokenizer, text in ((None, f"{tmp_path / 'x'} has a vocabulary of 16, its tokenizer 50257 tokens: one belongs to another model"),
                            (CharTokenizer(CHARS + 'ijklmnop'), f"{tmp_path / 'x'} has a vocabulary of 16, its tokenizer 19 tokens: one belongs to another model")):
        if tokenizer:
            (tmp_path / 'x/tokenizer.json').write_text(json.dumps(tokenizer.tokenizer_json()), encoding='utf-8')
        else:
            monkeypatch.setattr(begin, 'load_tokenizer', lambda meta: Gpt2Stub())
        with pytest.raises(ValueError) as error:
            sample(f"--init_from={tmp_path / 'x'}")
        assert str(error.value) == text
        monkeypatch.undo()


class Gpt2Stub:
    kind, vocab_size, eot, bos, prefix = 'gpt2', 50257, 50256, 50256, []

    def encode(self, text, allowed_special=()):
        return [198]


def test_a_checkpoint_of_another_trainer(monkeypatch, tmp_path):
    torch.manual_seed(0)
    model, path = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=16, activation='gelu')), tmp_path / 'x.pt'
    weights = {'module.' + k: v for k, v in model.state_dict().items()}
    torch.save({'model_state_dict': weights, 'note': torch.ones(1)}, path)
    monkeypatch.setattr(begin, 'nanogpt_tokenizer', lambda dataset: CharTokenizer(CHARS).meta())
    with pytest.raises(ValueError, match='does not say its number of heads, and weights do not show it: give --n_head'):
        run(f'--checkpoint_path={path}')
    flags = f'--checkpoint_path={path}', '--n_head=2', '--start=ab', '--num_samples=1', '--max_new_tokens=9', '--temperature=0'
    text = run(*flags)[0]
    ids = model.eval().generate(torch.tensor([CharTokenizer(CHARS).encode('ab')]), 9, temperature=0)[0]
    assert text == CharTokenizer(CHARS).decode(ids)
    del weights['module.transformer.h.1.ln_1.bias']  # zero in a new model as in this one
    torch.save({'model_state_dict': weights}, path)
    with pytest.raises(ValueError, match=r'1 weights missing \(transformer.h.1.ln_1.bias\), 0 unexpected \(\); --strict=False'):
        run(*flags)
    out = sample(*flags, '--strict=False', '--dtype=float32')
    assert '1 weights missing, left as a new model has them: transformer.h.1.ln_1.bias\n' in out and out.endswith(f'{text}\n---------------\n')


def test_a_nanogpt_checkpoint_takes_the_tokenizer_of_its_dataset(monkeypatch, tmp_path):
    folder = tmp_path / 'prepared'
    monkeypatch.chdir(tmp_path)
    write_dataset(folder, CharTokenizer('abc'), {'train': ['abcabc'], 'val': ['abc']}, 'made here')
    assert begin.nanogpt_tokenizer('prepared') == {'kind': 'char', 'chars': 'abc'}
    for elsewhere in (str(folder), './prepared', '../' + tmp_path.name, '..', 'nowhere'):  # nanoGPT's are names; a checkpoint opens no other folder
        assert begin.nanogpt_tokenizer(elsewhere)['kind'] == 'gpt2'
    (folder / 'meta.json').unlink()
    (folder / 'meta.pkl').write_bytes(pickle.dumps(dict(vocab_size=2, itos={0: 'x', 1: 'y'}, stoi={'x': 0, 'y': 1})))
    assert begin.nanogpt_tokenizer('prepared') == {'kind': 'char', 'chars': 'xy'}


def test_a_prompt_file_may_begin_with_a_byte_order_mark_and_must_be_utf8(out_dir, tmp_path):
    prompt = tmp_path / 'prompt.txt'
    prompt.write_bytes(b'\xef\xbb\xbfab')
    assert run(f'--out_dir={out_dir}', f'--start=FILE:{prompt}', '--num_samples=1', '--temperature=1e-40')[0].startswith('ab')
    prompt.write_bytes(b'a\nb\xff')
    with pytest.raises(ValueError, match=r'prompt.txt, line 2: not UTF-8'):
        run(f'--out_dir={out_dir}', f'--start=FILE:{prompt}')


@pytest.mark.parametrize('kind', ['byte', 'bpe'])
def test_a_tokenizer_goes_with_the_model_from_the_dataset_to_transformers(tmp_path, kind):
    transformers, text = pytest.importorskip('transformers'), sentences(8000, 1) + '天地玄黄，宇宙洪荒。' * 99
    tokenizer = train_bpe([text], 300) if kind == 'bpe' else ByteTokenizer()
    save_tokenizer(tokenizer, tmp_path / 'tokenizer')
    tokenizer = load_tokenizer(tokenizer_meta(str(tmp_path / 'tokenizer')))
    write_dataset(tmp_path / 'set', tokenizer, {'train': [text, text], 'val': [text[:999]]}, 'a test')
    code, _, err, metrics = train_here(*TINY, f'--dataset={tmp_path / "set"}', out_dir=tmp_path / 'out')
    assert code == 0, err
    assert metrics[-1]['val_bpb'] < metrics[0]['val_bpb'] < 9 and read_checkpoint(tmp_path / 'out/ckpt.pt')['tokenizer'] == tokenizer.meta()

    for path in sorted((tmp_path / 'tokenizer').iterdir()):
        path.unlink()  # the checkpoint holds all there is to know
    flags = '--start=天地<|endoftext|>玄', '--num_samples=2', '--max_new_tokens=5', '--temperature=0'
    out = sample(f'--out_dir={tmp_path / "out"}', *flags)
    assert f'{kind} tokenizer\n天地玄' in out
    sample(f'--out_dir={tmp_path / "out"}', f'--export={tmp_path / "exported"}')
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / 'exported')
    ids = tokenizer.encode(text + '<|user|>', allowed_special=tokenizer.special)
    assert there.encode(text + '<|user|>') == ids and there.eos_token_id == tokenizer.eot and there.pad_token_id == tokenizer.special['<|pad|>']
    assert sample(f'--init_from={tmp_path / "exported"}', *flags).endswith(out.split('tokenizer\n')[1])
