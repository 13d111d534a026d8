"""AdamW in nanoGPT's groups, or Muon for matrices beside AdamW; their learning rates; steps to skip.

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


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of configure_optimizers(); train.py explains them."""

    optimizer: Literal['adamw', 'muon'] = 'adamw'
    learning_rate: float = 6e-4
    matrix_lr: float = 0.02
    embedding_lr: float | None = None
    head_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    decay_groups: Literal['matrices', 'all'] = 'matrices'
    normuon: bool = False


def configure_optimizers(model, settings: OptimizerSettings, dtype=torch.float32, factors=None) -> list:
    """Make the optimizers of a model with GPT-2's parameter names.

    dtype    of the matrix products in training; Muon orthogonalizes in bfloat16 too, else in float32
    factors  of the peak rates, {parameter name: factor}; a name that is missing has 1.0
    returns  optimizers, whose groups have a 'kind' and a 'peak_lr' (lr at scale 1)
    """
    groups = {}
    for name, p in model.named_parameters():  # a tied weight appears once
        if not p.requires_grad:
            continue
        kind, options = kind_and_options(name, p, settings, model.config)
        factor = (factors or {}).get(name, 1.0)
        if (kind, factor) not in groups:
            lr = options['lr'] * factor
            groups[kind, factor] = dict(options, params=[], kind=kind, lr=lr, peak_lr=lr)
        groups[kind, factor]['params'].append(p)
    for_adamw = [group for group in groups.values() if 'n_matrices' not in group]
    for_muon = [group for group in groups.values() if 'n_matrices' in group]

    optimizers = []
    if for_adamw:  # a LoRA adapter has matrices alone
        optimizers.append(torch.optim.AdamW(for_adamw, betas=settings.betas, fused=True))
    if for_muon:
        ns_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizers.append(Muon(for_muon, ns_dtype=ns_dtype))
    for optimizer in optimizers:
        optimizer.register_load_state_dict_pre_hook(keep_settings)
    return optimizers


def kind_and_options(name, p, settings, config):
    """Return the kind of a parameter, and the options of its group. Only Muon's have n_matrices.

    decay_groups='matrices': AdamW decays matrices and embeddings, as in nanoGPT. With muon only Muon decays,
    because the decay is lr * weight_decay and embeddings have large rates.
    """
    lr, decay, rest_decay = settings.learning_rate, settings.weight_decay, 0.0
    if settings.decay_groups == 'all':
        rest_decay = decay
    if settings.optimizer == 'adamw':
        if p.dim() >= 2:
            return 'decay', dict(lr=lr, weight_decay=decay)
        return 'no_decay', dict(lr=lr, weight_decay=rest_decay)
    if p.dim() < 2:
        return 'vector', dict(lr=lr, weight_decay=rest_decay)
    if 'transformer.h.' not in name:
        kind, own_lr = 'embedding', settings.embedding_lr
        if 'lm_head.' in name:
            kind, own_lr = 'head', settings.head_lr
        if own_lr is not None:
            lr = own_lr
        return kind, dict(lr=lr, weight_decay=rest_decay)
    kind, n_matrices = 'matrix', 1
    if name.endswith('attn.c_attn.weight'):
        kind, n_matrices = 'qkv', config.n_head // config.n_kv_head + 2  # of n_kv_head heads each
    elif name.endswith('mlp.c_fc.weight') and config.arch == 'llama':
        kind, n_matrices = 'gate', 2
    return kind, dict(lr=settings.matrix_lr, weight_decay=decay, normuon=settings.normuon,
                      n_matrices=n_matrices)


def keep_settings(optimizer, state_dict):
    """Replace the settings in a state dict by the optimizer's own, so that a resumed run can change them."""
    groups = [{**own, 'params': stored['params']}
              for own, stored in zip(optimizer.param_groups, state_dict['param_groups'], strict=True)]
    return {**state_dict, 'param_groups': groups}


# -----------------------------------------------------------------------------
# Muon

BATCH_BYTES = 1 << 30  # of updates that Muon orthogonalizes at a time
VARIANCE_BETA = 0.9  # of even_out()


def orthogonalize(G, steps=5, dtype=None):
    """Bring the singular values of each matrix of G (K, R, C) near 1 (0.68 to 1.20). Zero stays zero.

    source  quintic Newton-Schulz iteration, arXiv:2409.20325; coefficients, steepest at zero, from
            https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = G.size(1) > G.size(2)
    X = (G / (torch.linalg.matrix_norm(G, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):  # X <- aX + bAX + cA^2X, with the Gram matrix A of the smaller side
        A = X.mT @ X if is_tall else X @ X.mT
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)  # bA + cA^2
        X = torch.baddbmm(X, X, P, beta=a) if is_tall else torch.baddbmm(X, P, X, beta=a)
    return X.to(G.dtype)


def even_out(matrices, variances):
    """Divide each row of matrices (K, R, C) by its running root mean square, and keep the matrix's norm.

    variances  the running mean squares: (K, R, 1) of rows, or (K, 1, C) of columns if C > R
    returns    the new matrices and variances
    source     NorMuon, arXiv:2510.05491
    """
    dim = -1
    if variances.size(-1) > 1:
        dim = -2
    now = matrices.square().mean(dim, keepdim=True)
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

    n_matrices  stacked in each parameter and orthogonalized separately: 3 in the fused Q, K, V
    ns_dtype    to orthogonalize in; None = the parameters'. In bfloat16 the last bit of a gradient can change
                a step by 1e-2 of its size, so runs on different numbers of ranks differ by as much
    normuon     even_out() the updates
    source      arXiv:2502.16982 (decoupled weight decay)
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, n_matrices=1, ns_dtype=None,
                 normuon=False):
        self.ns_dtype = ns_dtype
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      n_matrices=n_matrices, normuon=normuon))

    @torch.no_grad()
    def step(self, closure=None):
        # multiply matrices of one shape together, also across groups
        batches = defaultdict(list)
        for group in self.param_groups:
            settings = group['lr'], group['momentum'], group['weight_decay'], group['normuon']
            for p in group['params']:
                if p.grad is not None:
                    shape = p.size(0) // group['n_matrices'], p.size(1)
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
                if normuon:  # a mean square per row or column: even_out()
                    size = p.size(0) // R, R, 1
                    if C > R:
                        size = p.size(0) // R, 1, C
                    self.state[p]['variances'] = torch.zeros(size, dtype=p.dtype, device=p.device)
        # local tensors of FSDP's shards: DTensor lacked _foreach_lerp up to torch 2.12
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
            if skip is not None:
                new = torch.where(skip > 0, old, new)
            old.copy_(new)

    def gather(self, shard, p):
        """Return the whole tensor of a shard like p's. FSDP's come in ns_dtype."""
        if not isinstance(p, DTensor):
            return shard
        return DTensor.from_local(shard.to(self.ns_dtype), p.device_mesh, p.placements,
                                  shape=p.shape, stride=p.stride()).full_tensor()

    def orthogonalize_shares(self, matrices):
        """Orthogonalize matrices (K, R, C), of which each rank does a share."""
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
    """Return this rank's shard of a tensor like p."""
    if not isinstance(p, DTensor):
        return whole
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()


# -----------------------------------------------------------------------------
# skipped steps

SMOOTHING = 0.95
MIN_TAKEN = 20  # steps taken before spikes are judged: a running mean of fewer is noise


class StepJudge:
    """Decide whether to skip a step, as the setting skip_spikes says, and count.

    The numbers are 0-d tensors on the device, so that the host need not wait for them. norm_sum and loss_sum
    are exponential moving averages over the steps taken, before bias correction.
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
        """The running mean of the loss; NaN before the first step taken."""
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
    """Call optimizer.step(), without effect if skip is 1. The host does not wait to learn it."""
    optimizer.found_inf = skip  # the name by which torch's GradScaler recognizes fused kernels
    optimizer.step()
    del optimizer.found_inf


# -----------------------------------------------------------------------------
# schedules: pure functions of the iteration


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule: linear warm-up, then the curve of its kind. train.py explains the fields.

    source  arXiv:1608.03983 (restarts), arXiv:2404.06395 (wsd)
    """

    kind: Literal['cosine', 'wsd', 'cosine_restarts', 'constant']
    warmup_iters: int
    max_iters: int
    lr_decay_iters: int = 0
    min_lr_ratio: float = 0.0  # of the peak
    decay_fraction: float = 0.4
    restart_iters: int = 1000
    restart_mult: int = 1


def lr_scale(it: int, schedule: Schedule) -> float:
    """Return the factor, 0 to 1, of every peak learning rate at iteration `it`."""
    since_warmup = it - schedule.warmup_iters
    if since_warmup < 0:
        return (it + 1) / (schedule.warmup_iters + 1)
    height = 1.0
    if schedule.kind == 'cosine':
        height, end = 0.0, schedule.lr_decay_iters
        if it < end:
            height = half_cosine(since_warmup / (end - schedule.warmup_iters))
    elif schedule.kind == 'wsd':
        decay_iters = schedule.decay_fraction * schedule.max_iters
        remaining = max(schedule.max_iters - it, 0)
        if remaining < decay_iters:
            height = remaining / decay_iters
    elif schedule.kind == 'cosine_restarts':
        length = schedule.restart_iters
        if schedule.restart_mult == 1:  # the loop would count every earlier period
            since_warmup %= length
        while since_warmup >= length:
            since_warmup, length = since_warmup - length, length * schedule.restart_mult
        height = half_cosine(since_warmup / length)
    return height + (1 - height) * schedule.min_lr_ratio


def half_cosine(x):
    return 0.5 * (1.0 + math.cos(math.pi * x))


def muon_momentum(it: int, warmup_iters: int = 300) -> float:
    """Return Muon's momentum, which rises linearly, as in KellerJordan/modded-nanogpt."""
    if it >= warmup_iters:
        return 0.95
    x = it / warmup_iters
    return (1 - x) * 0.85 + x * 0.95


def set_lr(optimizers, scale: float, momentum: float | None = None):
    """Set every learning rate to scale times its peak, and Muon's momentum if one is given."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = group['peak_lr'] * scale
            if momentum is not None and 'momentum' in group:
                group['momentum'] = momentum
