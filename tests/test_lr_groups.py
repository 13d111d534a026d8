"""lr_groups: factors of the learning rate by parameter name, frozen parameters, resume, several ranks."""

import pytest
import torch
from conftest import TINY, differences, read_checkpoint, train_here
from ranks import start_ranks, wait

import optim
from model import GPT, GPTConfig
from optim import OptimizerSettings
from training.groups import LrGroups
from weights.begin import build_model, find_start

SEED_SYSTEM = '--lr_groups=mlp:1,attn:0.1,*:0'


def new(**settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, bias=True) | settings))


def step(model, optimizers):
    ids = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(1))
    model(ids[:, :-1], ids[:, 1:])[1].backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_frozen_parameters_do_not_move_and_have_no_state_or_gradient(optimizer):
    model = new()
    before = {name: p.clone() for name, p in model.named_parameters()}
    groups = LrGroups(model, 'mlp:1,attn:0.1,*:0')
    optimizers = optim.configure_optimizers(model, OptimizerSettings(optimizer, learning_rate=0.1), factors=groups.factors)
    step(model, optimizers)
    with_state = {p for each in optimizers for p in each.state}
    for name, p in model.named_parameters():
        trains = '.mlp.' in name or '.attn.' in name
        assert trains == (p in with_state) == (p.grad is not None) == (not torch.equal(p, before[name])), name


def test_adamw_with_factors_steps_as_torch_does_with_own_groups():
    model, reference = new(), new()
    groups = LrGroups(model, 'h.0.mlp:0.5,wte:2')
    ours = optim.configure_optimizers(model, OptimizerSettings(learning_rate=0.01), factors=groups.factors)
    named = {}
    for name, p in reference.named_parameters():
        factor = 0.5 if 'h.0.mlp' in name else 2.0 if 'wte' in name else 1.0
        named.setdefault((factor, p.dim() >= 2), []).append(p)
    theirs = torch.optim.AdamW([dict(params=params, lr=0.01 * factor, weight_decay=0.1 * decays) for (factor, decays), params in named.items()],
                               betas=(0.9, 0.95), fused=True)
    for _ in range(3):
        step(model, ours)
        step(reference, [theirs])
    assert not differences(dict(model.state_dict()), dict(reference.state_dict()))


def test_muon_takes_a_step_of_the_factor():
    moves = []
    for lr_groups in ('', 'attn:0.25'):
        model = new()
        start = model.transformer.h[0].attn.c_attn.weight.clone()
        groups = LrGroups(model, lr_groups)
        step(model, optim.configure_optimizers(model, OptimizerSettings('muon', weight_decay=0.0), factors=groups.factors))
        moves.append(model.transformer.h[0].attn.c_attn.weight - start)
    torch.testing.assert_close(moves[1], moves[0] * 0.25, rtol=1e-3, atol=1e-6)


def test_the_first_pattern_decides_and_parts_of_names_are_whole():
    model = new(n_layer=12)
    factors = LrGroups(model, 'h.1.mlp.c_fc:3,h.[1-2]:2,*.bias:0.5').factors
    assert factors['transformer.h.1.mlp.c_fc.bias'] == 3 and factors['transformer.h.2.ln_1.bias'] == 2
    assert factors['transformer.h.10.ln_1.bias'] == 0.5 and factors['transformer.h.11.mlp.c_fc.weight'] == 1
    assert LrGroups(new(), 'mlp:1,mlp:0').factors['transformer.h.0.mlp.c_fc.weight'] == 1, 'the same pattern twice'


@pytest.mark.parametrize('lr_groups, message', [
    ('mpl:1', r'no parameter is named mpl, did you mean mlp\?'),
    ('h.7:1', 'no parameter is named h.7'),
    ('mlp', "'mlp' is no PATTERN:FACTOR"),
    ('mlp:-1', "'mlp:-1' is no PATTERN:FACTOR"),
    ('mlp:nan', "'mlp:nan' is no PATTERN:FACTOR"),
    ('*:0', 'freezes every parameter'),
])
def test_mistakes_are_one_line(lr_groups, message):
    with pytest.raises(ValueError, match=message):
        LrGroups(new(), lr_groups)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_run_prints_its_groups_and_resumes_exactly(tiny, tmp_path, optimizer):
    flags = [*TINY, f'--dataset={tiny}', f'--optimizer={optimizer}', '--checkpoint_interval=5']
    code, stdout, stderr, _ = train_here(*flags, SEED_SYSTEM, out_dir=tmp_path / 'whole')
    assert code == 0, stderr
    assert 'learning rates: * frozen: ' in stdout and 'attn x 0.1: 2,048 parameters in 4 tensors' in stdout, stdout
    assert train_here(*flags, SEED_SYSTEM, '--max_iters=10', out_dir=tmp_path / 'parts')[0] == 0
    assert train_here('--init_from=resume', '--max_iters=20', '--device=cpu', out_dir=tmp_path / 'parts')[0] == 0
    whole, parts = read_checkpoint(tmp_path / 'whole' / 'ckpt.pt'), read_checkpoint(tmp_path / 'parts' / 'ckpt.pt')
    assert parts['config']['lr_groups'] == 'mlp:1,attn:0.1,*:0'
    assert not differences(whole['model'], parts['model']) and not differences(whole['optimizer'], parts['optimizer'])
    assert 'transformer.wte.weight' in parts['model'] and 'transformer.wte.weight' not in parts['optimizer']['state']
    start = find_start(out_dir=tmp_path / 'parts')
    assert build_model(start).transformer.wte.weight.shape == whole['model']['transformer.wte.weight'].shape


def test_fsdp_on_two_ranks_freezes_and_scales_alike(tiny, tmp_path):
    flags = [*TINY, f'--dataset={tiny}', '--max_iters=6', '--lr_groups=h.0:0,wte:0,wpe:0,mlp:0.5']
    assert train_here(*flags, out_dir=tmp_path / 'one')[0] == 0
    log = tmp_path / 'log.txt'
    assert wait(start_ranks(*flags, '--parallel=fsdp', out_dir=tmp_path / 'two', n_ranks=2, log=log)) == [0, 0], log.read_text()
    one, two = read_checkpoint(tmp_path / 'one' / 'ckpt.pt'), read_checkpoint(tmp_path / 'two' / 'ckpt.pt')
    assert one['model'].keys() == two['model'].keys() and one['optimizer']['state'].keys() == two['optimizer']['state'].keys()
    assert not any('.h.0.' in name for name in two['optimizer']['state'])
    for name, weight in one['model'].items():
        torch.testing.assert_close(weight, two['model'][name], rtol=1e-4, atol=1e-5)
