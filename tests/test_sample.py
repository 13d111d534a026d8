"""sample.py end to end on tiny checkpoints of random weights."""

import json
import pickle

import pytest
import torch
from conftest import TINY, read_checkpoint, sentences, train_here

import checkpoint
import sample
from configurator import configure
from corpus.pack import write_dataset
from corpus.train_tokenizer import save_tokenizer, train_bpe
from model import GPT, GPTConfig
from tokens.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer, tokenizer_meta
from weights import load

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
    checkpoint.save(tmp_path, state)
    return tmp_path


def run(monkeypatch, capsys, *flags):
    settings = dict(vars(sample))
    configure(settings, ['--device=cpu', '--dtype=float32', *flags])
    for name, value in settings.items():
        monkeypatch.setattr(sample, name, value, raising=False)
    capsys.readouterr()
    sample.main()
    return capsys.readouterr().out.split('char tokenizer\n')[1].split('\n---------------\n')[:-1]


def test_several_samples_same_seed_same_text(monkeypatch, capsys, out_dir):
    flags = f'--out_dir={out_dir}', '--start=ab', '--num_samples=3', '--max_new_tokens=30', '--seed=1'
    texts = run(monkeypatch, capsys, *flags)
    assert len(texts) == 3 and all(len(text) == 32 and text.startswith('ab') for text in texts) and len(set(texts)) == 3
    assert texts == run(monkeypatch, capsys, *flags)
    assert texts != run(monkeypatch, capsys, *flags, '--seed=2')


def test_padding_is_never_drawn_and_greedy_repeats(monkeypatch, capsys, out_dir):
    hot = run(monkeypatch, capsys, f'--out_dir={out_dir}', '--num_samples=20', '--temperature=9', '--top_k=None', '--max_new_tokens=40')
    assert set(''.join(hot)) <= set(CHARS)  # decoding an id of padding would have raised
    greedy = run(monkeypatch, capsys, f'--out_dir={out_dir}', '--start=a', '--num_samples=2', '--temperature=0', '--max_new_tokens=40')
    assert greedy[0] == greedy[1] and len(greedy[0]) == 41


def test_prompt_from_file_and_what_the_tokenizer_does_not_know(monkeypatch, capsys, out_dir, tmp_path):
    prompt = tmp_path / 'prompt.txt'
    prompt.write_text('a €', encoding='utf-8')
    assert run(monkeypatch, capsys, f'--out_dir={out_dir}', f'--start=FILE:{prompt}', '--num_samples=1')[0].startswith('a €')
    with pytest.raises(ValueError, match=r"character 'z' \(U\+007A\) at position 1 is not among the 11 characters"):
        run(monkeypatch, capsys, f'--out_dir={out_dir}', '--start=az')


class Words:
    """A tokenizer of bytes, whose id 0 ends a document."""
    eot = 0

    def decode_bytes(self, ids):
        return bytes(ids)

    def decode(self, ids):
        return bytes(ids).decode()


def test_samples_stop_at_end_of_text_and_characters_arrive_whole(monkeypatch):
    monkeypatch.setattr(sample, 'num_samples', 2)
    first, second = '€uro'.encode() + b'\0xx', b'ab\0yyyyyy'[:9]
    drawn, seen = list(zip(first, second)), []
    def stream():
        for ids in drawn:
            seen.append(ids)
            yield torch.tensor(ids)
    pieces = list(sample.write_out(stream(), Words(), 'p:'))
    assert ''.join(pieces) == 'p:€uro\n---------------\np:ab\n---------------\n'
    assert '€' in pieces and len(seen) == 7, 'the euro sign in one piece; nothing drawn once both samples ended'


def test_best_is_taken_where_the_run_asked_for_it(out_dir):
    state, path = load.find_checkpoint(out_dir)
    assert path.name == 'ckpt.pt'
    state['config'] = dict(always_save_checkpoint=False)
    checkpoint.save(out_dir, state, best=True)
    assert load.find_checkpoint(out_dir)[1].name == 'best.pt'


@pytest.mark.parametrize('flag, text', [
    ('--temperature=-1', '--temperature=-1.0: accepted is 0 (greedy) or more'),
    ('--top_p=0', '--top_p=0.0: accepted is above 0 up to 1, or None'),
    ('--num_samples=0', '--num_samples=0: accepted is 1 or more'),
    ('--out_dir=nowhere', 'nowhere has no checkpoint: train one with python train.py --out_dir=nowhere, or name another --out_dir'),
])
def test_errors(monkeypatch, capsys, flag, text):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run(monkeypatch, capsys, flag)
    assert str(error.value) == text


# -----------------------------------------------------------------------------
# other models


def printed(monkeypatch, capsys, *flags):
    settings = dict(vars(sample))
    configure(settings, ['--device=cpu', *flags])
    for name, value in settings.items():
        monkeypatch.setattr(sample, name, value, raising=False)
    capsys.readouterr()
    sample.main()
    return capsys.readouterr().out


@pytest.mark.parametrize('name', ['exported', 'exported.npz'])
def test_export_writes_what_init_from_reads(monkeypatch, capsys, out_dir, tmp_path, name):
    target = tmp_path / name
    flags = '--start=a', '--num_samples=2', '--max_new_tokens=40', '--temperature=0.9'
    texts = run(monkeypatch, capsys, f'--out_dir={out_dir}', *flags)
    # dtype=auto may be bfloat16, but what is exported is what was trained
    lines = printed(monkeypatch, capsys, f'--out_dir={out_dir}', f'--export={target}').splitlines()
    files = [target] if name.endswith('.npz') else sorted(target.iterdir())
    assert sorted(lines[2:-1]) == [f'{file}: {file.stat().st_size:,} bytes' for file in files]
    assert f'--init_from={target}' in lines[-1]
    monkeypatch.setattr(sample, 'export', '')
    assert run(monkeypatch, capsys, f'--init_from={target}', *flags) == texts


def test_a_model_without_tokenizer_or_with_anothers(monkeypatch, capsys, out_dir, tmp_path):
    GPT(GPTConfig(block_size=16, vocab_size=16, n_layer=1, n_head=1, n_embd=2)).save_pretrained(tmp_path / 'x')
    for tokenizer, text in ((None, f"{tmp_path / 'x'} has a vocabulary of 16, its tokenizer 50257 tokens: one belongs to another model"),
                            (CharTokenizer(CHARS + 'ijklmnop'), f"{tmp_path / 'x'} has a vocabulary of 16, its tokenizer 19 tokens: one belongs to another model")):
        if tokenizer:
            (tmp_path / 'x/tokenizer.json').write_text(json.dumps(tokenizer.tokenizer_json()), encoding='utf-8')
        else:
            monkeypatch.setattr(sample, 'load_tokenizer', lambda meta: Gpt2Stub())
        with pytest.raises(ValueError) as error:
            printed(monkeypatch, capsys, f"--init_from={tmp_path / 'x'}")
        assert str(error.value) == text
        monkeypatch.undo()


class Gpt2Stub(Words):
    vocab_size = 50257

    def encode(self, text, allowed_special=()):
        return [198]


def test_a_checkpoint_of_another_trainer(monkeypatch, capsys, tmp_path):
    torch.manual_seed(0)
    model, path = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=16, activation='gelu')), tmp_path / 'x.pt'
    weights = {'module.' + k: v for k, v in model.state_dict().items()}
    torch.save({'model_state_dict': weights, 'note': torch.ones(1)}, path)
    monkeypatch.setattr(load, 'nanogpt_tokenizer', lambda state: CharTokenizer(CHARS).meta())
    with pytest.raises(ValueError, match='does not say its number of heads, and weights do not show it: give --n_head'):
        run(monkeypatch, capsys, f'--checkpoint_path={path}')
    flags = f'--checkpoint_path={path}', '--n_head=2', '--start=ab', '--num_samples=1', '--max_new_tokens=9', '--temperature=0'
    text = run(monkeypatch, capsys, *flags)[0]
    ids = model.eval().generate(torch.tensor([CharTokenizer(CHARS).encode('ab')]), 9, temperature=0)[0]
    assert text == CharTokenizer(CHARS).decode(ids)
    del weights['module.transformer.h.1.ln_1.bias']  # zero in a new model as in this one
    torch.save({'model_state_dict': weights}, path)
    with pytest.raises(ValueError, match=r'1 weights missing \(transformer.h.1.ln_1.bias\), 0 unexpected \(\); --strict=False'):
        run(monkeypatch, capsys, *flags)
    out = printed(monkeypatch, capsys, *flags, '--strict=False', '--dtype=float32')
    assert '1 weights missing, left as a new model has them: transformer.h.1.ln_1.bias\n' in out and out.endswith(f'{text}\n---------------\n')


def test_a_nanogpt_checkpoint_takes_the_tokenizer_of_its_dataset(monkeypatch, tmp_path):
    folder = tmp_path / 'prepared'
    monkeypatch.chdir(tmp_path)
    write_dataset(folder, CharTokenizer('abc'), {'train': ['abcabc'], 'val': ['abc']}, 'made here')
    assert load.nanogpt_tokenizer(dict(config=dict(dataset='prepared'))) == {'kind': 'char', 'chars': 'abc'}
    for elsewhere in (str(folder), './prepared', '../' + tmp_path.name, '..', 'nowhere'):  # nanoGPT's are names; a checkpoint opens no other folder
        assert load.nanogpt_tokenizer(dict(config=dict(dataset=elsewhere)))['kind'] == 'gpt2'
    (folder / 'meta.json').unlink()
    (folder / 'meta.pkl').write_bytes(pickle.dumps(dict(vocab_size=2, itos={0: 'x', 1: 'y'}, stoi={'x': 0, 'y': 1})))
    assert load.nanogpt_tokenizer(dict(config=dict(dataset='prepared'))) == {'kind': 'char', 'chars': 'xy'}


def test_a_prompt_file_may_begin_with_a_byte_order_mark_and_must_be_utf8(monkeypatch, capsys, out_dir, tmp_path):
    prompt = tmp_path / 'prompt.txt'
    prompt.write_bytes(b'\xef\xbb\xbfab')
    assert run(monkeypatch, capsys, f'--out_dir={out_dir}', f'--start=FILE:{prompt}', '--num_samples=1', '--temperature=1e-40')[0].startswith('ab')
    prompt.write_bytes(b'a\nb\xff')
    with pytest.raises(ValueError, match=r'prompt.txt, line 2: not UTF-8'):
        run(monkeypatch, capsys, f'--out_dir={out_dir}', f'--start=FILE:{prompt}')


@pytest.mark.parametrize('kind', ['byte', 'bpe'])
def test_a_tokenizer_goes_with_the_model_from_the_dataset_to_transformers(monkeypatch, capsys, tmp_path, kind):
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
    out = printed(monkeypatch, capsys, f'--out_dir={tmp_path / "out"}', *flags)
    assert f'{kind} tokenizer\n天地玄' in out
    printed(monkeypatch, capsys, f'--out_dir={tmp_path / "out"}', f'--export={tmp_path / "exported"}')
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / 'exported')
    ids = tokenizer.encode(text + '<|user|>', allowed_special=tokenizer.special)
    assert there.encode(text + '<|user|>') == ids and there.eos_token_id == tokenizer.eot and there.pad_token_id == tokenizer.special['<|pad|>']
    assert printed(monkeypatch, capsys, f'--init_from={tmp_path / "exported"}', '--export=', *flags).endswith(out.split('tokenizer\n')[1])
