"""optim.py against nanoGPT's rules, torch's own scheduler, and Muon written out plainly."""

import io
import math

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import optim
from model import GPT, GPTConfig
from optim import (
    Muon,
    OptimizerSettings,
    Schedule,
    StepJudge,
    lr_scale,
    muon_momentum,
    orthogonalize,
    set_lr,
    step_unless,
)


def configure_optimizers(model, dtype=torch.float32, **settings):
    return optim.configure_optimizers(model, OptimizerSettings(**settings), dtype)


def tiny(arch, seed=0):
    """A model none of whose weights are zero, so that every gradient is not."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(arch=arch, block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def train_step(model, optimizers, seed):
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(seed))
    model(tokens[:, :-1], tokens[:, 1:])[1].backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def names_in(model, group):
    names = {p: name for name, p in model.named_parameters()}
    return [names[p] for p in group['params']]


# -----------------------------------------------------------------------------
# parameter groups


def test_adamw_groups_are_nanogpts():
    model = tiny('gpt2')
    (adamw,) = configure_optimizers(model, optimizer='adamw', learning_rate=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    decayed, rest = adamw.param_groups
    matrices = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
    vectors = ('ln_1.weight', 'ln_1.bias', 'attn.c_attn.bias', 'attn.c_proj.bias',
               'ln_2.weight', 'ln_2.bias', 'mlp.c_fc.bias', 'mlp.c_proj.bias')
    blocks = ('transformer.h.0.', 'transformer.h.1.')
    assert names_in(model, decayed) == ['transformer.wte.weight', 'transformer.wpe.weight'] + [b + m for b in blocks for m in matrices]
    assert names_in(model, rest) == [b + v for b in blocks for v in vectors] + ['transformer.ln_f.weight', 'transformer.ln_f.bias']
    assert (decayed['weight_decay'], rest['weight_decay']) == (0.1, 0.0)
    for group in adamw.param_groups:
        assert (group['lr'], group['peak_lr'], group['betas'], group['eps']) == (6e-4, 6e-4, (0.9, 0.95), 1e-8)


MUON = dict(optimizer='muon', learning_rate=1e-3, matrix_lr=0.02, embedding_lr=0.3, head_lr=0.004, weight_decay=0.1)


@pytest.mark.parametrize('arch, kinds', [
    ('gpt2', {'embedding': 0.3, 'vector': 1e-3, 'qkv': 0.02, 'matrix': 0.02}),  # the head is the embedding
    ('modern', {'embedding': 0.3, 'head': 0.004, 'qkv': 0.02, 'matrix': 0.02}),  # there are no vectors
])
@pytest.mark.parametrize('prefixed', [False, True])
def test_muon_takes_the_blocks_matrices_and_adamw_the_rest(arch, kinds, prefixed):
    model = tiny(arch)
    if prefixed:  # as under a wrapper
        config, model = model.config, torch.nn.ModuleDict({'module': model})
        model.config = config
    adamw, muon = configure_optimizers(model, **MUON)
    groups = adamw.param_groups + muon.param_groups
    assert {group['kind']: group['peak_lr'] for group in groups} == kinds
    found = {name: group['kind'] for group in groups for name in names_in(model, group)}
    assert sum(len(group['params']) for group in groups) == len(found) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        expected = ('vector' if p.dim() < 2 else 'qkv' if 'c_attn' in name else 'matrix' if '.h.' in name
                    else 'head' if 'lm_head' in name else 'embedding')
        assert found[name] == expected, name
    assert all(group['kind'] in ('qkv', 'matrix') for group in muon.param_groups)


def test_unset_embedding_and_head_rates_are_the_learning_rate():
    adamw, _ = configure_optimizers(tiny('modern'), optimizer='muon', learning_rate=1e-3)
    assert {group['kind']: group['lr'] for group in adamw.param_groups} == {'embedding': 1e-3, 'head': 1e-3}


def test_decay_groups():
    def decayed(**settings):
        model = tiny('gpt2')
        optimizers = configure_optimizers(model, learning_rate=1e-3, weight_decay=0.1, **settings)
        return {name for o in optimizers for group in o.param_groups if group['weight_decay'] == 0.1 for name in names_in(model, group)}

    every = {name for name, _ in tiny('gpt2').named_parameters()}
    blocks = {name for name in every if '.h.' in name and name.endswith('.weight') and 'ln_' not in name}
    assert decayed(optimizer='adamw', decay_groups='matrices') == blocks | {'transformer.wte.weight', 'transformer.wpe.weight'}
    assert decayed(optimizer='muon', decay_groups='matrices') == blocks
    assert decayed(optimizer='adamw', decay_groups='all') == decayed(optimizer='muon', decay_groups='all') == every


def test_frozen_parameters_are_in_no_group():
    model = tiny('gpt2')
    model.transformer.wte.weight.requires_grad_(False)
    (adamw,) = configure_optimizers(model, learning_rate=1e-3)
    assert not any(p is model.transformer.wte.weight for group in adamw.param_groups for p in group['params'])


def test_adamw_is_fused():
    (chosen,) = configure_optimizers(tiny('gpt2'), learning_rate=1e-3)
    assert chosen.param_groups[0]['fused']


# -----------------------------------------------------------------------------
# Muon


def plain_orthogonalize(G):
    """One matrix, the formula as its author gives it."""
    X = G / (G.norm() + 1e-7)
    if G.size(0) > G.size(1):
        X = X.T
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if G.size(0) > G.size(1) else X


def plain_even_out(update, mean_squares):
    """NorMuon of one matrix: rows, or the columns of a wide one, are divided by what they were before on average."""
    if update.size(0) < update.size(1):
        return plain_even_out(update.T, mean_squares).T
    mean_squares.copy_(0.9 * mean_squares + 0.1 * (update ** 2).mean(dim=1))
    scaled = update / mean_squares.sqrt()[:, None]
    return scaled * update.norm() / scaled.norm()


def plain_muon(p, grad, buffer, mean_squares, lr, momentum, weight_decay, n_matrices):
    buffer = momentum * buffer + (1 - momentum) * grad
    update = (1 - momentum) * grad + momentum * buffer
    rows = p.size(0) // n_matrices
    p = p - lr * weight_decay * p
    for i in range(n_matrices):
        part = slice(i * rows, (i + 1) * rows)
        step = plain_orthogonalize(update[part])
        if mean_squares is not None:
            step = plain_even_out(step, mean_squares[i])
        p[part] = p[part] - lr * max(1, rows / p.size(1)) ** 0.5 * step
    return p, buffer


SHAPES = {(24, 8): 3, (8, 8): 1, (32, 8): 1, (8, 32): 1}  # -> n_matrices: c_attn, attn.c_proj, c_fc, mlp.c_proj


@pytest.mark.parametrize('normuon', [False, True])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_muon_equals_the_plain_formula(dtype, tolerance, normuon):
    torch.manual_seed(0)
    weights = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES for _ in range(2)]
    params = [w.clone().to(torch.float64 if dtype is torch.float64 else torch.float32).requires_grad_() for w in weights]
    buffers = [torch.zeros_like(w) for w in weights]
    mean_squares = [torch.zeros(SHAPES[tuple(w.shape)], max(w.size(0) // SHAPES[tuple(w.shape)], w.size(1)), dtype=torch.float64) for w in weights]
    muon = Muon([dict(params=params[2 * i:2 * i + 2], n_matrices=n) for i, n in enumerate(SHAPES.values())],
                weight_decay=0.1, ns_dtype=dtype, normuon=normuon)
    for step in range(4):
        lr, momentum = 0.02 * (step + 1), 0.85 + 0.02 * step
        for group in muon.param_groups:
            group.update(lr=lr, momentum=momentum)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, dtype=torch.float64)
            p.grad = grad.to(p.dtype)
            weights[i], buffers[i] = plain_muon(weights[i], grad, buffers[i], mean_squares[i] if normuon else None, lr, momentum, 0.1, SHAPES[tuple(p.shape)])
        muon.step()
    for p, w in zip(params, weights):
        torch.testing.assert_close(p.double(), w, rtol=0, atol=tolerance)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(32, 128), (128, 32), (32, 32)])
def test_orthogonalize_brings_singular_values_near_one(shape, dtype):
    torch.manual_seed(0)
    values = torch.logspace(-1.5, 0, 32)
    U, _, Vh = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    G = U * values @ Vh * 1e-4  # gradients are small
    O = orthogonalize(G, dtype=dtype)
    assert O.dtype == G.dtype and O.shape == G.shape
    found = torch.linalg.svdvals(O)
    assert found.min() > 0.66 and found.max() < 1.22
    kept = U.mT @ O @ Vh.mT  # diagonal where the singular vectors have stayed
    assert (kept - torch.diag_embed(kept.diagonal(dim1=1, dim2=2))).abs().max() < (1e-4 if dtype is torch.float32 else 0.1)


def test_orthogonalize_leaves_zero_at_zero():
    G = torch.zeros(2, 4, 8)
    G[1] = torch.randn(4, 8)
    assert torch.equal(orthogonalize(G)[0], G[0])


def test_q_k_and_v_are_orthogonalised_each_by_itself():
    def update(scale_of_k):
        model = tiny('modern')
        muon = configure_optimizers(model, **MUON)[1]
        p = model.transformer.h[0].attn.c_attn.weight
        before = p.detach().clone()
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        p.grad[8:16] = p.grad[8:16].flip(0) * scale_of_k
        muon.step()
        return (p.detach() - before).split(8)

    (q1, k1, v1), (q2, k2, v2) = update(1.0), update(-100.0)
    assert torch.equal(q1, q2) and torch.equal(v1, v2) and not torch.equal(k1, k2)


def test_muon_skips_parameters_without_gradient():
    a, b = (torch.ones(4, 4).requires_grad_() for _ in range(2))
    muon = Muon([a, b], weight_decay=0.1)
    a.square().sum().backward()
    muon.step()
    assert torch.equal(b, torch.ones(4, 4)) and b not in muon.state and not torch.equal(a, torch.ones(4, 4))


@pytest.mark.parametrize('dtype, expected', [(torch.float32, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_muon_orthogonalises_in_bfloat16_only_where_training_multiplies_in_it(dtype, expected):
    assert configure_optimizers(tiny('modern'), **MUON, dtype=dtype)[1].ns_dtype == expected


# -----------------------------------------------------------------------------
# steps that are not taken


def judged(judge, grad_norm, loss):
    return judge.judge(torch.tensor(grad_norm), torch.tensor(loss)).item()


def test_what_is_not_finite_is_skipped_and_counted():
    judge = StepJudge('cpu')
    verdicts = [judged(judge, *now) for now in ((1.0, 2.0), (math.nan, 2.0), (1.0, math.inf), (1e9, 2.0), (math.inf, math.nan))]
    assert verdicts == [0.0, 1.0, 1.0, 0.0, 1.0]
    assert judge.state()[:3] == [3, 1, 2]  # the big norm is no spike while skip_spikes is off, and ends the row
    assert (judge.skipped, judge.skipped_in_a_row, judge.taken) == (3, 1, 2)
    assert judge.state()[3:] == pytest.approx([0.05 * 1e9 + 0.05 * 0.95, 0.05 * 2 + 0.05 * 0.95 * 2])


def test_a_spike_is_what_is_above_a_multiple_of_the_running_mean():
    judge = StepJudge('cpu', skip_spikes=3.0)
    for i in range(20):
        assert judged(judge, 100.0 if i == 0 else 1.0, 2.0) == 0.0  # too early to tell
    mean = (1 + 99 * 0.05 * 0.95 ** 19 / (1 - 0.95 ** 20))
    before = judge.state()
    assert judged(judge, 3.01 * mean, 2.0) == 1.0 and judged(judge, 1.0, 6.01) == 1.0
    assert judge.state() == [2, 2, *before[2:]]  # a spike does not raise the mean
    judge = StepJudge('cpu', 3.0, judge.state())  # as a resumed run has it
    assert judged(judge, 2.99 * mean, 5.9) == 0.0


def test_the_smoothed_loss_is_the_running_mean():
    judge = StepJudge('cpu')
    assert math.isnan(judge.smoothed_loss)
    for loss in (3.0, 1.0):
        judged(judge, 1.0, loss)
    assert judge.smoothed_loss.item() == pytest.approx((0.95 * 3 + 1) / 1.95)


def test_a_step_not_taken_changes_neither_weights_nor_moments():
    model, reference = tiny('gpt2'), tiny('gpt2')
    ours, theirs = (configure_optimizers(m, **MUON) for m in (model, reference))
    for seed in range(3):
        train_step(reference, theirs, seed)
    for seed, skip in ((0, 0.0), (7, 1.0), (1, 0.0), (8, 1.0), (9, 1.0), (2, 0.0)):
        tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(seed))
        (model(tokens[:, :-1], tokens[:, 1:])[1] * (math.nan if skip else 1.0)).backward()
        for each in ours:
            step_unless(each, torch.tensor(skip))
            each.zero_grad(set_to_none=True)
    for p, q in zip(model.parameters(), reference.parameters()):
        assert torch.equal(p, q)
    for each, other in zip(ours, theirs):
        for p, q in zip(each.state.values(), other.state.values(), strict=True):
            assert p.keys() == q.keys() and all(torch.equal(p[key], q[key]) for key in p)
        assert not hasattr(each, 'found_inf')


# -----------------------------------------------------------------------------
# state


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
BOTH = [dict(optimizer='adamw', learning_rate=1e-2), MUON]


@pytest.mark.parametrize('settings', BOTH, ids=['adamw', 'muon'])
@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_state_survives_a_checkpoint_bit_for_bit(settings, arch):
    model = tiny(arch)
    optimizers = configure_optimizers(model, **settings)
    for seed in range(3):
        train_step(model, optimizers, seed)
    file = io.BytesIO()
    torch.save((model.state_dict(), get_optimizer_state_dict(model, optimizers, options=FULL)), file)
    for seed in range(3, 5):
        train_step(model, optimizers, seed)

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = tiny(arch, seed=1)
    resumed.load_state_dict(weights)
    again = configure_optimizers(resumed, **settings)
    set_optimizer_state_dict(resumed, again, state, options=FULL)
    for seed in range(3, 5):
        train_step(resumed, again, seed)
    for (name, p), q in zip(model.named_parameters(), resumed.parameters()):
        assert torch.equal(p, q), name


@pytest.mark.parametrize('settings', BOTH, ids=['adamw', 'muon'])
def test_asking_for_the_state_before_the_first_step_moves_no_weight(settings):
    model = tiny('modern')
    before = [p.detach().clone() for p in model.parameters()]
    optimizers = configure_optimizers(model, **settings)
    get_optimizer_state_dict(model, optimizers, options=FULL)  # torch takes a step with zero gradients to learn what the state is
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    momentum = [state['momentum_buffer'] for o in optimizers for state in o.state.values() if 'momentum_buffer' in state]
    assert len(momentum) == (8 if settings is MUON else 0) and not any(m.any() for m in momentum)


@pytest.mark.parametrize('settings', BOTH, ids=['adamw', 'muon'])
@pytest.mark.parametrize('distributed', [False, True])
def test_loading_restores_state_and_leaves_settings(settings, distributed):
    """Else a resumed run would take its learning rate from the checkpoint, whatever the command line says."""
    model = tiny('modern')
    optimizers = configure_optimizers(model, **settings)
    train_step(model, optimizers, 0)
    changed = dict(learning_rate=5e-5, matrix_lr=0.01, head_lr=0.1, weight_decay=0.7, betas=(0.8, 0.9), decay_groups='all')
    again = configure_optimizers(model, **{**settings, **changed})
    as_set = [{k: v for k, v in group.items() if k != 'params'} for new in again for group in new.param_groups]
    if distributed:
        set_optimizer_state_dict(model, again, get_optimizer_state_dict(model, optimizers, options=FULL), options=FULL)
    else:
        for new, old in zip(again, optimizers):
            new.load_state_dict(old.state_dict())
    assert [{k: v for k, v in group.items() if k != 'params'} for new in again for group in new.param_groups] == as_set
    for new, old in zip(again, optimizers):
        for p, state in old.state.items():
            assert state.keys() == new.state[p].keys() and all(torch.equal(state[k], new.state[p][k]) for k in state)


def test_the_state_of_a_plain_torch_adamw_loads():
    """nanoGPT's checkpoints hold such a one: no kind, no peak_lr."""
    model = tiny('gpt2')
    plain = torch.optim.AdamW([{'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': 0.1},
                               {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.0}], lr=1e-2, betas=(0.9, 0.95))
    train_step(model, [plain], 0)
    (ours,) = configure_optimizers(model, learning_rate=1e-3)
    ours.load_state_dict(plain.state_dict())
    set_lr([ours], 0.5)
    train_step(model, [ours], 1)
    assert ours.param_groups[0]['lr'] == 5e-4
    assert {state['step'].item() for state in ours.state.values()} == {2.0} and len(ours.state) == len(list(model.parameters()))


# -----------------------------------------------------------------------------
# schedules


def test_cosine_is_nanogpts_at_every_iteration():
    learning_rate, min_lr, warmup_iters, lr_decay_iters = 6e-4, 6e-5, 7, 40

    def nanogpt(it):
        if it < warmup_iters:
            return learning_rate * (it + 1) / (warmup_iters + 1)
        if it > lr_decay_iters:
            return min_lr
        progress = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
        return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_lr)

    ours = [learning_rate * lr_scale(it, Schedule('cosine', warmup_iters, 60, lr_decay_iters, min_lr / learning_rate)) for it in range(70)]
    assert ours == pytest.approx([nanogpt(it) for it in range(70)], rel=1e-12)


@pytest.mark.parametrize('mult', [1, 2, 3])
def test_cosine_restarts_is_torchs_at_every_iteration(mult):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, T_mult=mult, eta_min=0.1)
    settings = Schedule('cosine_restarts', warmup_iters=3, max_iters=0, min_lr_ratio=0.1, restart_iters=10, restart_mult=mult)
    assert [lr_scale(it, settings) for it in range(3)] == [1 / 4, 2 / 4, 3 / 4]
    for it in range(3, 200):
        assert lr_scale(it, settings) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12), it
        optimizer.step()
        theirs.step()


def test_restarts_of_one_length_are_not_counted_one_by_one():
    """A loop over them took 0.15 ms a step after 4,000 of them. Here it would take hours."""
    settings = Schedule('cosine_restarts', warmup_iters=3, max_iters=0, restart_iters=10)
    assert lr_scale(3 + 10**13 + 4, settings) == lr_scale(3 + 4, settings)


@pytest.mark.parametrize('settings, table', [
    (Schedule('wsd', warmup_iters=3, max_iters=12, decay_fraction=1 / 3),
     [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
    (Schedule('wsd', warmup_iters=0, max_iters=4, decay_fraction=0.5, min_lr_ratio=0.5), [1, 1, 1, 0.75, 0.5, 0.5]),
    (Schedule('wsd', warmup_iters=1, max_iters=4, decay_fraction=0.0), [0.5, 1, 1, 1, 1]),
    (Schedule('constant', warmup_iters=3, max_iters=5, min_lr_ratio=0.1), [0.25, 0.5, 0.75, 1, 1, 1, 1]),
    (Schedule('cosine', warmup_iters=1, max_iters=3, lr_decay_iters=3, min_lr_ratio=0.1), [0.5, 1, 0.55, 0.1, 0.1]),
    (Schedule('cosine', warmup_iters=2, max_iters=2, lr_decay_iters=2), [1 / 3, 2 / 3, 0, 0]),
])
def test_schedule_tables(settings, table):
    assert [lr_scale(it, settings) for it in range(len(table))] == pytest.approx(table, abs=1e-15)


@pytest.mark.parametrize('schedule', ['cosine', 'wsd', 'cosine_restarts'])
def test_schedules_reach_one_and_their_minimum_exactly(schedule):
    settings = Schedule(schedule, warmup_iters=10, max_iters=110, lr_decay_iters=110, min_lr_ratio=0.1, restart_iters=50)
    assert lr_scale(10, settings) == 1.0
    assert lr_scale(110, settings) == (1.0 if schedule == 'cosine_restarts' else 0.1)


def test_muons_momentum_warms_up():
    assert [muon_momentum(it) for it in (0, 300, 10_000)] == [0.85, 0.95, 0.95]
    assert muon_momentum(150) == pytest.approx(0.9)
    assert muon_momentum(0, warmup_iters=0) == 0.95


def test_set_lr_scales_each_group_from_its_own_peak():
    adamw, muon = configure_optimizers(tiny('gpt2'), **MUON)
    for scale in (0.5, 0.25):  # not compounded
        set_lr([adamw, muon], scale, momentum=0.9)
    assert {group['kind']: group['lr'] / 0.25 for group in adamw.param_groups + muon.param_groups} == pytest.approx(
        {'embedding': 0.3, 'vector': 1e-3, 'qkv': 0.02, 'matrix': 0.02})
    assert all(group['momentum'] == 0.9 for group in muon.param_groups)
    assert not any('momentum' in group for group in adamw.param_groups)
