"""Optimizers and learning-rate schedules: AdamW in nanoGPT's groups, or Muon for matrices beside AdamW.

    optimizers = configure_optimizers(model, OptimizerSettings('muon', learning_rate=3e-3, matrix_lr=0.02))
    set_lr(optimizers, lr_scale(iter_num, schedule), muon_momentum(iter_num))
    skip = judge.judge(grad_norm, loss)
    for optimizer in optimizers:
        step_unless(optimizer, skip)

Shapes: K matrices of R rows (outputs) and C columns (inputs).
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from distributed import all_gather

# -----------------------------------------------------------------------------
# parameter groups

FUSED_ADAMW = 'cpu', 'cuda', 'mps'  # device types with a fused kernel


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of configure_optimizers()."""

    optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: Muon for the blocks' matrices, AdamW for the rest
    learning_rate: float = 6e-4  # peak, AdamW
    matrix_lr: float = 0.02  # peak, Muon
    embedding_lr: float | None = None  # peak with muon, of wpe and wte; None = learning_rate
    head_lr: float | None = None  # peak with muon, of an untied lm_head; None = learning_rate
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    # matrices: AdamW decays matrices and embeddings, as in nanoGPT. With muon only Muon decays, because the
    # decay is lr * weight_decay and embeddings have large rates. all: decay every parameter
    decay_groups: Literal['matrices', 'all'] = 'matrices'
    normuon: bool = False  # even out the rows of Muon's updates; see even_out()
    fused: bool | None = None  # AdamW's fused kernel; None = where the device has one


def configure_optimizers(model, settings: OptimizerSettings, dtype=torch.float32, factors=None) -> list:
    """Make the optimizers of a model with GPT-2's parameter names.

    dtype    of the matrix products in training; Muon orthogonalizes in bfloat16 too, else in float32
    factors  of the peak rates, {parameter name: factor}; a name that is missing has 1.0
    returns  optimizers, whose groups have a 'kind' and a 'peak_lr' (lr at scale 1). load_state_dict() keeps
             these settings, so a resumed run can change them
    """
    settings_of = group_settings(settings, model.config)
    params = defaultdict(list)
    for name, p in model.named_parameters():  # a tied weight appears once
        if p.requires_grad:
            kind = parameter_kind(name, p, settings.optimizer, model.config.arch)
            params[kind, (factors or {}).get(name, 1.0)].append(p)
    # torch.distributed.checkpoint refuses an empty group beside a second optimizer
    groups = []
    for kind, factor in sorted(params, key=lambda key: (list(settings_of).index(key[0]), -key[1])):
        lr = settings_of[kind]['lr'] * factor
        groups.append(settings_of[kind] | dict(params=params[kind, factor], kind=kind, lr=lr, peak_lr=lr))
    for_adamw = [group for group in groups if 'parts' not in group]
    for_muon = [group for group in groups if 'parts' in group]

    optimizers = []
    if for_adamw:  # a LoRA adapter has matrices alone
        fused = settings.fused
        if fused is None:
            fused = for_adamw[0]['params'][0].device.type in FUSED_ADAMW
        optimizers.append(torch.optim.AdamW(for_adamw, betas=settings.betas, eps=1e-8, fused=fused))
    if for_muon:
        ns_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizers.append(Muon(for_muon, ns_dtype=ns_dtype))
    for optimizer in optimizers:
        optimizer.register_load_state_dict_pre_hook(keep_settings)
    return optimizers


def group_settings(settings, config):
    """Return {kind: settings of the group}. Only Muon's groups have `parts`.

    The matrix of queries, keys and values is split into parts of n_kv_head heads.
    """
    lr, decay = settings.learning_rate, settings.weight_decay
    rest_decay = decay if settings.decay_groups == 'all' else 0.0
    if settings.optimizer == 'adamw':
        return {'decay': dict(lr=lr, weight_decay=decay), 'no_decay': dict(lr=lr, weight_decay=rest_decay)}
    embedding_lr = lr if settings.embedding_lr is None else settings.embedding_lr
    head_lr = lr if settings.head_lr is None else settings.head_lr
    muon = dict(lr=settings.matrix_lr, weight_decay=decay, normuon=settings.normuon)
    return {
        'embedding': dict(lr=embedding_lr, weight_decay=rest_decay),
        'head': dict(lr=head_lr, weight_decay=rest_decay),
        'vector': dict(lr=lr, weight_decay=rest_decay),
        'qkv': dict(muon, parts=config.n_head // config.n_kv_head + 2),
        'gate': dict(muon, parts=2),
        'matrix': dict(muon, parts=1),
    }


def parameter_kind(name, p, optimizer, arch):
    """Return the key of group_settings() that a parameter belongs to."""
    if optimizer == 'adamw':
        return 'decay' if p.dim() >= 2 else 'no_decay'
    if p.dim() < 2:
        return 'vector'
    if name.endswith('attn.c_attn.weight'):
        return 'qkv'
    if name.endswith('mlp.c_fc.weight') and arch == 'llama':
        return 'gate'
    if 'transformer.h.' in name:
        return 'matrix'
    if 'lm_head.' in name:
        return 'head'
    assert '.wte.' in name or '.wpe.' in name, f'{name} belongs to neither block, head nor embedding'
    return 'embedding'


def keep_settings(optimizer, state_dict):
    """Replace the rates, decay, betas and kernel in a state dict by the optimizer's own."""
    groups = [{**own, 'params': stored['params']}
              for own, stored in zip(optimizer.param_groups, state_dict['param_groups'], strict=True)]
    return {**state_dict, 'param_groups': groups}


# -----------------------------------------------------------------------------
# Muon

BATCH_BYTES = 1 << 30  # of updates that Muon orthogonalizes at a time
VARIANCE_BETA = 0.9  # of even_out()


def orthogonalize(G, steps=5, dtype=None):
    """Bring the singular values of each matrix near 1 (0.68 to 1.20), and keep its singular vectors.

    G        (K, R, C); a zero matrix stays zero
    dtype    to compute in; None = G's
    returns  (K, R, C) in G's dtype
    source   quintic Newton-Schulz iteration, arXiv:2409.20325; coefficients, steepest at zero, from
             https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.size(1) > G.size(2)
    X = (G / (torch.linalg.matrix_norm(G, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):  # X <- aX + bAX + cA^2X, with the Gram matrix A of the smaller side
        A = X.mT @ X if tall else X @ X.mT
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, X, P, beta=a) if tall else torch.baddbmm(X, P, X, beta=a)
    return X.to(G.dtype)


def even_out(matrices, variances):
    """Divide each row by its running root mean square, and keep the norm of the matrix.

    matrices   (K, R, C); if C > R, columns take the place of rows
    variances  (K, R, 1) or (K, 1, C): the running mean squares
    returns    the new matrices and variances
    source     NorMuon, arXiv:2510.05491
    """
    now = matrices.square().mean(-1 if variances.size(-1) == 1 else -2, keepdim=True)
    variances = variances.lerp(now, 1 - VARIANCE_BETA)
    scales = variances.clamp(min=1e-10).rsqrt()
    norms = (now * scales.square()).sum(dim=(-2, -1), keepdim=True).clamp(min=1e-10)
    ratio = now.sum(dim=(-2, -1), keepdim=True) / norms  # (K, 1, 1)
    return matrices * scales * ratio.sqrt(), variances


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum, for the matrices (R, C) between embedding and head.

        buffer <- momentum * buffer + (1 - momentum) * grad
        update  = orthogonalize((1 - momentum) * grad + momentum * buffer)
        p      <- p - lr * weight_decay * p - lr * sqrt(max(1, R / C)) * update

    parts     matrices in each parameter, one below another, orthogonalized separately: 3 in the fused Q, K, V
    ns_dtype  to orthogonalize in; None = the parameters'. In bfloat16 the last bit of a gradient can change a
              step by 1e-2 of its size, so runs on different numbers of ranks differ by as much
    normuon   even_out() the updates, which saved 5% of the tokens to a loss
    source    https://kellerjordan.github.io/posts/muon/; decoupled weight decay arXiv:2502.16982

    Each rank orthogonalizes a share of the matrices. FSDP's shards are gathered first.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, parts=1, ns_dtype=None,
                 normuon=False):
        self.ns_dtype = ns_dtype
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, parts=parts,
                                      normuon=normuon))

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        # multiply matrices of one shape together, also across groups
        batches = defaultdict(list)
        for group in self.param_groups:
            settings = group['lr'], group['momentum'], group['weight_decay'], group['normuon']
            for p in group['params']:
                if p.grad is not None:
                    shape = p.size(0) // group['parts'], p.size(1)
                    batches[shape, settings].append(p)
        for (shape, settings), params in batches.items():
            n_params = max(1, BATCH_BYTES // (4 * max(p.numel() for p in params)))
            for i in range(0, len(params), n_params):
                self.step_batch(params[i:i + n_params], shape, *settings)

    def step_batch(self, params, shape, lr, momentum, weight_decay, normuon):
        """Update parameters that consist of matrices of one shape."""
        R, C = shape
        for p in params:
            if 'momentum_buffer' not in self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                if normuon:
                    size = p.size(0) // R, *((R, 1) if R >= C else (1, C))
                    self.state[p]['variances'] = torch.zeros(size, dtype=p.dtype, device=p.device)
        # of FSDP's shards the local tensors: DTensor lacked _foreach_lerp up to torch 2.12
        weights = [local(p) for p in params]
        grads = [local(p.grad) for p in params]
        buffers = [local(self.state[p]['momentum_buffer']) for p in params]
        new_buffers = torch._foreach_lerp(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, new_buffers, momentum)

        wholes = [self.gather(update, p) for update, p in zip(updates, params, strict=True)]
        matrices = self.orthogonalize_shares(torch.cat(wholes).view(-1, R, C))  # (K, R, C)
        variances, new_variances = [], []
        if normuon:
            variances = [self.state[p]['variances'] for p in params]
            matrices, stacked = even_out(matrices.to(weights[0].dtype), torch.cat(variances))
            new_variances = stacked.split([len(each) for each in variances])
        wholes = matrices.view(-1, C).split([p.size(0) for p in params])
        updates = [own_shard(whole, p).to(p.dtype) for whole, p in zip(wholes, params, strict=True)]
        new_weights = torch._foreach_mul(weights, 1 - lr * weight_decay)
        torch._foreach_add_(new_weights, updates, alpha=-lr * math.sqrt(max(1, R / C)))

        skip = getattr(self, 'found_inf', None)  # see step_unless()
        new_tensors = [*new_buffers, *new_variances, *new_weights]
        for old, new in zip([*buffers, *variances, *weights], new_tensors, strict=True):
            old.copy_(new if skip is None else torch.where(skip > 0, old, new))

    def gather(self, shard, p):
        """Return the whole tensor of which `shard` is this rank's part, as of p. FSDP's come in ns_dtype."""
        if not isinstance(p, DTensor):
            return shard
        return DTensor.from_local(shard.to(self.ns_dtype), p.device_mesh, p.placements,
                                  shape=p.shape, stride=p.stride()).full_tensor()

    def orthogonalize_shares(self, matrices):
        """Orthogonalize matrices (K, R, C) that every rank has: each rank does a share of them."""
        if not dist.is_initialized():
            return orthogonalize(matrices, dtype=self.ns_dtype)
        n_ranks = dist.get_world_size()
        n_own = -(-len(matrices) // n_ranks)
        own = matrices[dist.get_rank() * n_own:][:n_own]  # the last ranks may have fewer
        done = matrices.new_zeros(n_own, *matrices.shape[1:], dtype=self.ns_dtype)
        if len(own):
            done[:len(own)] = orthogonalize(own, dtype=self.ns_dtype)
        result = done.new_empty(n_ranks * n_own, *matrices.shape[1:])
        all_gather(result, done)
        return result[:len(matrices)]


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_shard(whole, p):
    """Return this rank's part of a tensor, as of p."""
    if not isinstance(p, DTensor):
        return whole
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()


# -----------------------------------------------------------------------------
# skipped steps

SMOOTHING = 0.95
MIN_TAKEN = 20  # steps taken before spikes are judged: a running mean of fewer is noise


class StepJudge:
    """Decide whether to skip a step, and count. The numbers are 0-d float32 tensors on the device, so the
    host need not wait for them. To read several, stack them first.

    skip_spikes  skip a step whose gradient norm or loss exceeds this multiple of its running mean; 0 = only a
                 step in which one of them is not finite
    norm_sum, loss_sum  exponential moving averages over the steps taken, before bias correction
    """

    def __init__(self, device, skip_spikes: float = 0.0, state=(0.0, 0.0, 0.0, 0.0, 0.0)):
        self.skip_spikes = skip_spikes
        numbers = torch.tensor(state, dtype=torch.float32, device=device)
        self.skipped, self.skipped_in_a_row, self.taken, self.norm_sum, self.loss_sum = numbers.unbind()

    def state(self) -> list[float]:
        """Return what a checkpoint stores as `history`, and __init__ takes."""
        fields = self.skipped, self.skipped_in_a_row, self.taken, self.norm_sum, self.loss_sum
        return torch.stack(fields).tolist()

    @property
    def smoothed_loss(self):
        """The running mean of the loss over the steps taken; NaN before the first."""
        return self.loss_sum / (1 - SMOOTHING ** self.taken)

    def judge(self, grad_norm, loss):
        """Return 1 to skip the step, else 0. All are 0-d float32, the same on all ranks."""
        now = torch.stack((grad_norm, loss))
        sums = torch.stack((self.norm_sum, self.loss_sum))
        skip = ~now.isfinite().all()
        if self.skip_spikes:
            means = sums / (1 - SMOOTHING ** self.taken)
            skip = skip | ((now > self.skip_spikes * means).any() & (self.taken >= MIN_TAKEN))
        sums = torch.where(skip, sums, SMOOTHING * sums + (1 - SMOOTHING) * now)
        self.norm_sum, self.loss_sum = sums.unbind()
        skip = skip.float()
        self.skipped = self.skipped + skip
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skip
        self.taken = self.taken + 1 - skip
        return skip


def step_unless(optimizer, skip):
    """Call optimizer.step(), without effect if skip is 1. The host waits only with an unfused AdamW."""
    if optimizer.defaults.get('fused') is False:
        if not skip:
            optimizer.step()
        return
    optimizer.found_inf = skip  # the name by which torch's GradScaler recognizes fused kernels
    optimizer.step()
    del optimizer.found_inf


# -----------------------------------------------------------------------------
# schedules: pure functions of the iteration


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule: linear warm-up over warmup_iters, then the curve of its kind.

    source  arXiv:1608.03983 (restarts), arXiv:2404.06395 (wsd)
    """

    kind: Literal['cosine', 'wsd', 'cosine_restarts', 'constant']
    warmup_iters: int
    max_iters: int
    lr_decay_iters: int | None = None  # cosine: reach min_lr_ratio here, as in nanoGPT; None = max_iters
    min_lr_ratio: float = 0.0
    decay_fraction: float = 0.4  # wsd: 1, then linearly to min_lr_ratio over this last part of max_iters
    restart_iters: int = 1000  # cosine_restarts: length of the first half cosine
    restart_mult: int = 1  # cosine_restarts: length of each half cosine relative to the last


def lr_scale(it: int, schedule: Schedule) -> float:
    """Return the factor, 0 to 1, of every peak learning rate at iteration `it`."""
    since_warmup = it - schedule.warmup_iters
    if since_warmup < 0:
        return (it + 1) / (schedule.warmup_iters + 1)
    height = 1.0
    if schedule.kind == 'cosine':
        end = schedule.max_iters if schedule.lr_decay_iters is None else schedule.lr_decay_iters
        height = half_cosine(since_warmup / (end - schedule.warmup_iters)) if it < end else 0.0
    elif schedule.kind == 'wsd':
        decay_iters = schedule.decay_fraction * schedule.max_iters
        remaining = max(schedule.max_iters - it, 0)
        height = remaining / decay_iters if remaining < decay_iters else 1.0
    elif schedule.kind == 'cosine_restarts':
        length = schedule.restart_iters
        while since_warmup >= length:
            since_warmup, length = since_warmup - length, length * schedule.restart_mult
        height = half_cosine(since_warmup / length)
    return height + (1 - height) * schedule.min_lr_ratio


def half_cosine(x):
    return 0.5 * (1.0 + math.cos(math.pi * x))


def muon_momentum(it: int, warmup_iters: int = 300, start: float = 0.85, end: float = 0.95) -> float:
    """Return Muon's momentum at iteration `it`: it rises linearly, as in KellerJordan/modded-nanogpt."""
    x = min(it / warmup_iters, 1.0) if warmup_iters else 1.0
    return (1 - x) * start + x * end


def set_lr(optimizers, scale: float, momentum: float | None = None):
    """Set every group's learning rate to scale times its peak, and Muon's momentum if one is given."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = group['peak_lr'] * scale
            if momentum is not None and 'momentum' in group:
                group['momentum'] = momentum
