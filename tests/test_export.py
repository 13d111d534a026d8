"""What an exported folder holds: no padding of the vocabulary, one token that begins and ends documents, a model card."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, pack_chars, read_checkpoint, run_here, train_here
from reference_lm_eval import write_folder
from torch.nn import functional as F

from corpus.pack import write_dataset
from model import GPT, GPTConfig
from tasks.items import encode_pair
from tokens.tokenizer import CharTokenizer, load_tokenizer, tokenizer_meta
from weights import pretrained
from weights.begin import Start
from weights.card import model_card

transformers = pytest.importorskip('transformers')
V = 1100  # characters; training pads them to 1152
CHARS = ''.join(chr(0x4e00 + i) for i in range(V))
EMBEDDING = 'transformer.wte.weight'


def make(arch='gpt2', vocab_size=1152):
    torch.manual_seed(0)
    model = GPT(GPTConfig(arch=arch, vocab_size=vocab_size, block_size=16, n_layer=2, n_head=2, n_embd=16)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


@pytest.mark.parametrize('arch', ['gpt2', 'modern', 'llama'])
def test_an_export_has_no_padding_and_training_puts_it_back(arch, tmp_path):
    model, folder = make(arch), tmp_path / 'x'
    model.save_pretrained(folder, CharTokenizer(CHARS))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert reference.config.vocab_size == V and reference.generation_config.suppress_tokens is None
    ids, targets = torch.randint(V, (4, 16)), torch.randint(V, (4, 16))
    logits = model(ids, targets)[0][:, :, :V]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # the padding is out of the softmax
    torch.testing.assert_close(reference(ids).logits, logits, atol=1e-4, rtol=0)
    plain, to_train = GPT.from_pretrained(folder).eval(), GPT.from_pretrained(folder, vocab_size=1152).eval()
    torch.testing.assert_close(plain(ids, targets)[1], expected)
    assert plain.config.vocab_size == V
    if arch != 'modern':  # which caps its logits
        added = to_train(ids, targets)[1] - expected
        assert 0 < added < math.log(1 + 52 / V)
    to_train.save_pretrained(tmp_path / 'again', CharTokenizer(CHARS))
    assert (folder / 'model.safetensors').read_bytes() == (tmp_path / 'again/model.safetensors').read_bytes()


def test_a_run_that_begins_with_an_export_pads_it_and_samples_no_padding(tmp_path):
    make(vocab_size=V).save_pretrained(tmp_path / 'x', CharTokenizer(CHARS))
    draw = np.random.default_rng(0)
    text = ''.join(CHARS[i] for i in draw.integers(V, size=2000))
    data = pack_chars(tmp_path / 'data', text, text[:400], CHARS)
    flags = [flag for flag in TINY if not flag.startswith('--n_')]
    code, _, stderr, _ = train_here(*flags, f'--dataset={data}', f'--init_from={tmp_path / "x"}', '--max_iters=2', out_dir=tmp_path / 'out')
    assert code == 0, stderr
    assert read_checkpoint(tmp_path / 'out/ckpt.pt')['model'][EMBEDDING].shape == (1152, 16)
    code, _, stderr = run_here('sample.py', '--device=cpu', f'--out_dir={tmp_path / "out"}', f'--export={tmp_path / "again"}')
    assert code == 0, stderr
    assert GPT.from_pretrained(tmp_path / 'again').config.vocab_size == V


def test_rows_that_training_did_not_add_come_back_bit_for_bit(tmp_path):
    """Qwen3 has 151,936 rows for 151,669 tokens."""
    shape = dict(vocab_size=1300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, num_key_value_heads=1, max_position_embeddings=16))
    theirs.save_pretrained(tmp_path / 'theirs')
    GPT.from_pretrained(tmp_path / 'theirs').save_pretrained(tmp_path / 'ours', CharTokenizer(CHARS))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours')
    for (name, p), (other, q) in zip(sorted(theirs.named_parameters()), sorted(back.named_parameters()), strict=True):
        assert name == other and torch.equal(p, q)
    assert back.generation_config.suppress_tokens == list(range(V, 1300))


# -----------------------------------------------------------------------------
# tokenizers from elsewhere


@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
    """A Llama whose tokenizer puts <|begin_of_text|> before each text, and writes it in its chat template."""
    folder = tmp_path_factory.mktemp('foreign') / 'x'
    write_folder(folder, 'llama')
    file = folder / 'tokenizer_config.json'
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(chat_template=template)))
    return folder


def ids_of(folder):
    names = 'config.json', 'generation_config.json'
    return [[json.loads((folder / name).read_text())[f'{role}_token_id'] for role in ('bos', 'eos', 'pad')] for name in names]


def test_a_model_trained_with_a_foreign_tokenizer_is_exported_with_the_bos_of_its_documents(foreign, tmp_path):
    tokenizer = load_tokenizer(tokenizer_meta(str(foreign)))
    write_dataset(tmp_path / 'data', tokenizer, {'train': ['the cat sat. ' * 9] * 20, 'val': ['the cat ' * 40]}, 'a test')
    code, _, stderr, _ = train_here(*TINY, f'--dataset={tmp_path / "data"}', '--max_iters=1', out_dir=tmp_path / 'out')
    assert code == 0, stderr
    code, _, stderr = run_here('sample.py', '--device=cpu', f'--out_dir={tmp_path / "out"}', f'--export={tmp_path / "exported"}')
    assert code == 0, stderr
    eot = tokenizer.eot
    assert ids_of(tmp_path / 'exported') == [[eot, eot, eot]] * 2
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / 'exported')
    assert there.bos_token_id == there.eos_token_id == there.pad_token_id == there.unk_token_id == eot
    assert there('the cat').input_ids == tokenizer.encode('the cat'), 'no BOS that the model never saw'
    elsewhere = transformers.AutoTokenizer.from_pretrained(foreign)
    messages = [dict(role='user', content='the cat')]
    assert there.apply_chat_template(messages, tokenize=False) == elsewhere.apply_chat_template(messages, tokenize=False)


def test_a_model_from_elsewhere_keeps_its_own_bos(foreign, tmp_path):
    tokenizer = load_tokenizer(pretrained.read_tokenizer(str(foreign)))
    assert tokenizer.bos == tokenizer.special['<|begin_of_text|>'] != tokenizer.eot and tokenizer.prefix == [tokenizer.bos]
    ids, start = encode_pair(tokenizer, 'the', ' cat')
    assert ids.tolist() == transformers.AutoTokenizer.from_pretrained(foreign)('the cat').input_ids and start == 2
    assert encode_pair(tokenizer, '', ' cat').ids[0] == tokenizer.bos
    GPT.from_pretrained(foreign).save_pretrained(tmp_path, tokenizer)
    assert ids_of(tmp_path) == ids_of(foreign)
    for name in ('tokenizer.json', 'model.safetensors'):
        assert (tmp_path / name).read_bytes() == (foreign / name).read_bytes()
    code, out, stderr = run_here('sample.py', '--device=cpu', f'--init_from={foreign}', '--start=the', '--num_samples=1', '--max_new_tokens=1')
    assert code == 0 and 'json tokenizer\nthe' in out, stderr


# -----------------------------------------------------------------------------
# the model card


def test_a_readme_that_somebody_wrote_is_kept(tmp_path):
    readme, model = tmp_path / 'README.md', make()
    start = Start('out/ckpt.pt', settings=dict(dataset='../mine/poems:0.5,songs:0.5', learning_rate=6e-5, dropout=0.0), weights={})
    start.progress = SimpleNamespace(iter_num=0, best_val_loss=math.inf)
    card = model_card(start, model, 'x')
    assert '- dataset: `poems:0.5,songs:0.5`\n- learning_rate: `6e-05`\n' in card and 'dropout' not in card and 'validation' not in card
    assert readme in model.save_pretrained(tmp_path, card=card) and readme.read_text() == card
    assert readme in model.save_pretrained(tmp_path, card=card), 'an older card is replaced'
    readme.write_text('mine')
    assert readme not in model.save_pretrained(tmp_path, card=card) and readme.read_text() == 'mine'
