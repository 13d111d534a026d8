"""LoRA: adapters in training, in checkpoints, merged, and as peft reads and writes them."""

import io
import json
import sys

import pytest
import torch
from conftest import TINY, read_checkpoint, run_here, train_here
from test_llama import make

from model import GPT, GPTConfig
from weights import adapters, lora

SHAPELESS = [flag for flag in TINY if not flag.startswith('--n_')]
LORA = ['--lora_rank=4', '--lora_alpha=8', '--learning_rate=0.01', '--dtype=float32']


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp('base')
    make('qwen3').save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def run(base, tiny, tmp_path_factory):
    """out_dir of three steps."""
    out_dir = tmp_path_factory.mktemp('lora') / 'out'
    code, _, stderr, _ = train_here(*SHAPELESS, *LORA, f'--dataset={tiny}', f'--init_from={base}', '--max_iters=3', out_dir=out_dir)
    assert code == 0, stderr
    return out_dir


@pytest.fixture
def adapted(run, base):
    """The base model with the adapter of the run beside it."""
    state = read_checkpoint(run / 'ckpt.pt')
    model = GPT.from_pretrained(base, block_size=16).eval()
    lora.add(model, 4, 8.0, 'c_attn,c_proj,c_fc')
    model.load_state_dict(state['model'], strict=False)
    return model


def test_the_checkpoint_holds_the_adapter_alone(run, base):
    state = read_checkpoint(run / 'ckpt.pt')
    assert len(state['model']) == 3 * 4 * 2 and all('.lora_' in name for name in state['model'])
    assert state['optimizer']['state'].keys() == state['model'].keys()
    assert state['lora']['base'] == str(base) and any(tensor.any() for name, tensor in state['model'].items() if name.endswith('lora_b'))


@pytest.mark.parametrize('targets', ['c_attn,c_proj,c_fc', 'c_fc'])
def test_flops_of_frozen_weights_equal_torchs_counter(targets):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model = GPT(GPTConfig(arch='llama', block_size=37, vocab_size=83, n_layer=3, n_head=3, n_kv_head=1, n_embd=42))
    whole = model.flops_per_token(37)
    lora.add(model, 4, 8.0, targets)
    idx = torch.randint(83, (2, 37))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss_sum(idx, idx).backward()
    # before the first adapter nothing needs a gradient: its inputs do not, and the layers before it are not run backward
    first = model.transformer.h[0].attn.c_attn
    unused = 2 * first.weight.numel()
    if targets == 'c_fc':
        first = model.transformer.h[0].mlp.c_fc
        unused += 2 * (model.transformer.h[0].attn.c_proj.weight.numel() + first.weight.numel()) + 8 * 3 * 14 * 37
    unused += 2 * first.lora_a.numel()
    assert counter.get_total_flops() == (model.flops_per_token(37) - unused) * 2 * 37
    assert model.flops_per_token(37) < whole


def test_a_new_adapter_changes_nothing_and_merging_nothing(adapted, base):
    idx = torch.randint(131, (2, 16))
    plain, fresh = GPT.from_pretrained(base, block_size=16).eval(), GPT.from_pretrained(base, block_size=16).eval()
    lora.add(fresh, 4, 8.0, 'c_fc')
    assert torch.equal(fresh(idx, idx)[0], plain(idx, idx)[0])
    before = adapted(idx, idx)[0]
    assert (before - plain(idx, idx)[0]).abs().max() > 0.01
    torch.testing.assert_close(lora.merge(adapted)(idx, idx)[0], before, atol=1e-4, rtol=0)
    assert adapted.state_dict().keys() == plain.state_dict().keys()


def test_resuming_is_exact(run, base, tiny, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    flags = [*SHAPELESS, *LORA, f'--dataset={tiny}', '--lr_decay_iters=6']
    for out_dir, more in ((whole, [f'--init_from={base}', '--max_iters=6']), (parts, [f'--init_from={base}', '--max_iters=3']),
                          (parts, ['--init_from=resume', '--max_iters=6'])):
        code, _, stderr, _ = train_here(*flags, *more, out_dir=out_dir)
        assert code == 0, stderr
    a, b = (read_checkpoint(path / 'ckpt.pt')['model'] for path in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_base_is_refused(run, base, tmp_path, monkeypatch):
    with torch.no_grad():
        model = GPT.from_pretrained(base)
        model.transformer.h[0].attn.c_attn.weight += 1
    model.save_pretrained(tmp_path / 'other')
    state = read_checkpoint(run / 'ckpt.pt')
    state['lora']['base'] = str(tmp_path / 'other')
    torch.save(state, tmp_path / 'ckpt.pt')
    code, _, stderr = run_here('sample.py', f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=1', '--device=cpu')
    assert code == 2 and stderr.endswith(f'{tmp_path / "other"} is not the model that the adapter was trained beside: put that one there\n')


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'qwen3'])
def test_peft_reads_our_adapter_and_we_read_its(kind, tmp_path):
    peft = pytest.importorskip('peft')
    import transformers
    torch.manual_seed(0)
    if kind == 'gpt2':
        model = GPT(GPTConfig(vocab_size=131, block_size=32, n_layer=2, n_head=2, n_embd=16)).eval()
        model.save_pretrained(tmp_path / 'base')
    else:
        make(kind).save_pretrained(tmp_path / 'base')
        model = GPT.from_pretrained(tmp_path / 'base').eval()
    idx = torch.randint(131, (2, 16))
    lora.add(model, 4, 8.0, 'c_attn,c_proj,c_fc')
    for name, p in model.named_parameters():
        if name.endswith('lora_b'):
            p.data.normal_(std=0.1)
    adapters.save(model, tmp_path / 'ours', str(tmp_path / 'base'))
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base'), tmp_path / 'ours').eval()
    torch.testing.assert_close(theirs(idx).logits, model(idx, idx)[0], atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / 'theirs')
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / 'theirs').eval()(idx, idx)[0], model(idx, idx)[0], atol=1e-4, rtol=0)


def test_sample_exports_the_adapter_or_the_merged_model(run, base, adapted, tmp_path):
    for name, more in (('merged', []), ('adapter', ['--adapter=True'])):
        code, _, stderr = run_here('sample.py', f'--out_dir={run}', f'--export={tmp_path / name}', *more, '--device=cpu')
        assert code == 0, stderr
    assert json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())['base_model_name_or_path'] == str(base)
    idx = torch.randint(131, (2, 16))
    for name in ('merged', 'adapter'):
        torch.testing.assert_close(GPT.from_pretrained(tmp_path / name, block_size=16).eval()(idx, idx)[0], adapted(idx, idx)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', ['x.npz', 'x.gguf'])
def test_an_adapter_is_exported_to_a_folder_alone(name, run, tmp_path):
    code, _, stderr = run_here('sample.py', f'--out_dir={run}', f'--export={tmp_path / name}', '--adapter=True', '--device=cpu')
    assert (code, stderr) == (2, 'adapter=True: needs --export=FOLDER, and a run with lora_rank\n')
    assert not list(tmp_path.iterdir())


def test_a_damaged_description_of_the_adapter_is_one_line(run, tmp_path):
    state = read_checkpoint(run / 'ckpt.pt')
    torch.save(state | dict(lora=state['lora'] | dict(lora_rank='4')), tmp_path / 'x.pt')
    code, _, stderr = run_here('sample.py', f'--checkpoint_path={tmp_path / "x.pt"}')
    assert code == 2 and f'{tmp_path / "x.pt"}: its adapter is ' in stderr and stderr.count('\n') == 1


@pytest.mark.parametrize('flags, text', [
    (['--lora_rank=4'], 'lora_rank=4: an adapter needs a base model, name it by --init_from'),
    (['--lora_rank=4', '--lora_targets=q_proj', '--init_from=BASE'], 'lora_targets=q_proj: no layer is named q_proj, accepted are c_attn, c_fc, c_proj, did you mean c_proj?'),
    (['--lora_rank=4', '--lora_alpha=0', '--init_from=BASE'], 'lora_alpha=0.0: accepted is a number above 0'),
    (['--lora_rank=4', '--parallel=fsdp', '--init_from=BASE'], 'lora_rank=4 is for --parallel=ddp: leave --parallel=fsdp out'),
])
def test_wrong_settings(flags, text, base, tiny, tmp_path):
    flags = [flag.replace('BASE', str(base)) for flag in flags]
    code, _, stderr, _ = train_here(*SHAPELESS, f'--dataset={tiny}', *flags, '--max_iters=1', out_dir=tmp_path / 'out')
    assert code == 2 and stderr.splitlines()[-1] == text


def test_the_recipe_for_qwen3(tmp_path, monkeypatch):
    """A folder with its own tokenizer: dialogues packed in its template, tuned, chatted with, exported, and read by transformers."""
    transformers = pytest.importorskip('transformers')
    from test_conversations import qwen
    folder = tmp_path / 'Qwen3-0.6B'
    tokenizer = qwen(folder)
    make('qwen3', vocab_size=448, max_position_embeddings=128).save_pretrained(folder)
    talk = [{'messages': [{'role': 'user', 'content': f'What is {n}?'}, {'role': 'assistant', 'content': f'{n}.'}]} for n in '一二三四五六七八九十']
    (tmp_path / 'dialogues.jsonl').write_text('\n'.join(map(json.dumps, talk)))
    monkeypatch.setattr(sys, 'path', list(sys.path))  # which the command changes
    code, _, stderr = run_here('corpus/conversations.py', 'build', '--input', tmp_path / 'dialogues.jsonl', '--out', tmp_path / 'data',
                               '--tokenizer', folder, '--style', 'chatml', '--block_size', '32', '--val_fraction', '0.3')
    assert code == 0, stderr
    flags = [f'--dataset={tmp_path / "data"}', f'--init_from={folder}', '--block_size=32', '--batch_size=2', '--gradient_accumulation_steps=1',
             '--max_iters=2', '--eval_iters=1', '--device=cpu', '--report=False']
    for rank, name in ((4, 'lora'), (0, 'full')):
        code, _, stderr, _ = train_here('config/finetune_qwen3.py', *flags, f'--lora_rank={rank}', out_dir=tmp_path / name)
        assert code == 0, stderr
    for source in (f'--out_dir={tmp_path / "lora"}', f'--init_from={folder}'):
        monkeypatch.setattr(sys, 'stdin', io.StringIO('What is 一?\n'))
        code, stdout, stderr = run_here('sample.py', '--chat', '--device=cpu', '--temperature=0', '--max_new_tokens=5', source)
        assert code == 0 and stdout, stderr
    code, _, stderr = run_here('sample.py', f'--out_dir={tmp_path / "full"}', f'--export={tmp_path / "exported"}', '--device=cpu')
    assert code == 0, stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'exported')
    assert type(theirs).__name__ == 'Qwen3ForCausalLM'
    asked = [{'role': 'user', 'content': 'What is 一?'}]
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / 'exported').apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    text = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, suppress_tokens=None)
    ours = GPT.from_pretrained(tmp_path / 'exported')
    assert torch.equal(ours.generate(torch.tensor([ids]), 12, temperature=0)[:, :text.size(1)], text)


def test_the_recipe_for_a_small_llama(tiny, tmp_path):
    flags = [f'--dataset={tiny}', '--n_layer=2', '--n_embd=48', '--block_size=16', '--batch_size=2', '--max_iters=2', '--eval_iters=1', '--device=cpu']
    code, _, stderr, _ = train_here('config/train_llama_small.py', *flags, out_dir=tmp_path / 'out')
    assert code == 0, stderr
    args = read_checkpoint(tmp_path / 'out' / 'ckpt.pt')['model_args']
    assert (args['arch'], args['n_kv_head'], args['tied'], args['n_hidden']) == ('llama', 2, True, 1024)


def test_muon_trains_an_adapter_and_an_adapter_is_no_start(base, run, tiny, tmp_path):
    """No matrix was left for AdamW, which crashed."""
    flags = [*SHAPELESS, *LORA, f'--dataset={tiny}', '--max_iters=1']
    code, _, stderr, _ = train_here(*flags, '--optimizer=muon', f'--init_from={base}', out_dir=tmp_path / 'a')
    assert code == 0, stderr
    code, _, stderr, _ = train_here(*flags, f'--init_from={run / "ckpt.pt"}', out_dir=tmp_path / 'b')
    assert code == 2 and f'{run / "ckpt.pt"} holds a LoRA adapter alone: resume its run' in stderr


@pytest.mark.parametrize('change, text', [
    (dict(init_lora_weights='pissa'), "init_lora_weights = 'pissa' is not supported"), (dict(r=100), 'are not of rank 100'),
    (dict(alora_invocation_tokens=[1, 2]), 'alora_invocation_tokens = [1, 2] is not supported'), (dict(use_rslora=True), 'use_rslora = True is not supported'),
    (dict(lora_alpha=None), 'r = 4 and lora_alpha = None, accepted are numbers'), (dict(base_model_name_or_path=None), 'base_model_name_or_path = None'),
])
def test_an_adapter_that_would_compute_something_else(change, text, base, tmp_path):
    model = GPT.from_pretrained(base)
    lora.add(model, 4, 8.0, 'c_fc')
    [_, path] = adapters.save(model, tmp_path, str(base))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(tmp_path)
    assert text in str(error.value)


@pytest.mark.parametrize('variant, text', [
    (dict(use_dora=True), 'lora_magnitude_vector belongs to no matrix'), (dict(bias='all'), 'k_proj.bias belongs to no matrix'),
    (dict(modules_to_save=['norm']), 'norm.weight belongs to no matrix'), (dict(rank_pattern={'q_proj': 2}), 'are not of rank 4'),
])
def test_variants_of_lora_are_told_by_their_tensors(variant, text, tmp_path):
    """Settings that need no check of their own."""
    peft = pytest.importorskip('peft')
    theirs = make('qwen2')
    theirs.save_pretrained(tmp_path / 'base')
    theirs.name_or_path = str(tmp_path / 'base')
    peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=['q_proj', 'up_proj'], **variant)).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(tmp_path)
    assert text in str(error.value)


def test_an_adapter_beside_weights_that_do_not_say_their_heads(tiny, tmp_path):
    """--n_head was asked for though it was given."""
    weights = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=8, activation='gelu')).state_dict()
    torch.save({'model_state_dict': weights}, tmp_path / 'x.pt')
    flags = [*SHAPELESS, *LORA, f'--dataset={tiny}', f'--init_from={tmp_path / "x.pt"}', '--n_head=2']
    for more in (['--max_iters=1'], ['--max_iters=2', '--init_from=resume']):
        code, _, stderr, _ = train_here(*flags, *more, out_dir=tmp_path / 'out')
        assert code == 0, stderr
    code, _, stderr = run_here('sample.py', f'--out_dir={tmp_path / "out"}', f'--export={tmp_path / "exported"}', '--device=cpu')
    assert code == 0 and GPT.from_pretrained(tmp_path / 'exported').config.n_head == 2, stderr


def test_a_base_that_differs_anywhere_is_refused(base, tmp_path):
    """Layer 0's queries, keys and values alone were compared."""
    model = GPT.from_pretrained(base)
    before = lora.checksum(model)
    assert lora.checksum(GPT.from_pretrained(base, dtype=torch.bfloat16)) == before
    with torch.no_grad():
        model.transformer.h[2].mlp.c_proj.weight[0, 0] += 1
    assert lora.checksum(model) != before
