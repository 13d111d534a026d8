"""Optimizers and learning-rate schedules: AdamW in nanoGPT's groups, or Muon for the matrices and AdamW for the rest.

    optimizers = configure_optimizers(model, optimizer='muon', learning_rate=3e-3, matrix_lr=0.02)
    set_lr(optimizers, lr_scale(iter_num, schedule='wsd', warmup_iters=20, max_iters=900), muon_momentum(iter_num))
    for optimizer in optimizers:
        optimizer.step()

Sizes: K matrices of one shape (out, in).
"""

import math
from collections import defaultdict

import torch

from distributed import part_of, share_out, whole

# -----------------------------------------------------------------------------
# parameter groups


def configure_optimizers(model, *, optimizer='adamw', learning_rate, matrix_lr=0.02, embedding_lr=None, head_lr=None,
                         betas=(0.9, 0.95), weight_decay=0.1, decay_groups='matrices', dtype=torch.float32, fused=None):
    """The optimizers of a model that has GPT-2's parameter names; each step takes all of them.

    optimizer     'adamw': [AdamW], every parameter at learning_rate, in nanoGPT's groups and order
                  'muon': [AdamW, Muon], the blocks' matrices by Muon at matrix_lr, the rest by AdamW
    embedding_lr  with muon, of wpe and wte, which may be the head too; None = learning_rate
    head_lr       with muon, of an untied lm_head; None = learning_rate
    decay_groups  'all': weight decay on every parameter. 'matrices': with adamw on all of two dimensions, embeddings included,
                  as in nanoGPT; with muon on Muon's only, since decay goes by lr * weight_decay and embedding rates are large
    dtype         of training's matrix products; Muon orthogonalises in bfloat16 where that is it, else in float32
    fused         AdamW's kernel; None = fused where the device has one
    returns       list of torch.optim.Optimizer; their groups carry 'kind' (what they hold) and 'peak_lr' (lr at scale 1).
                  load_state_dict restores the state and leaves these settings alone: a resumed run obeys its own
    """
    check('optimizer', optimizer, ('adamw', 'muon'))
    check('decay_groups', decay_groups, ('matrices', 'all'))
    rest_decay = weight_decay if decay_groups == 'all' else 0.0
    if optimizer == 'adamw':
        settings = {
            'decay': dict(lr=learning_rate, weight_decay=weight_decay),
            'no_decay': dict(lr=learning_rate, weight_decay=rest_decay),
        }
    else:
        settings = {
            'embedding': dict(lr=learning_rate if embedding_lr is None else embedding_lr, weight_decay=rest_decay),
            'head': dict(lr=learning_rate if head_lr is None else head_lr, weight_decay=rest_decay),
            'vector': dict(lr=learning_rate, weight_decay=rest_decay),
            'qkv': dict(lr=matrix_lr, weight_decay=weight_decay, parts=3),
            'matrix': dict(lr=matrix_lr, weight_decay=weight_decay, parts=1),
        }
    groups = {kind: dict(params=[], kind=kind, peak_lr=group['lr'], **group) for kind, group in settings.items()}
    for name, p in model.named_parameters():  # a tied weight comes once
        if p.requires_grad:
            kind = ('decay' if p.dim() >= 2 else 'no_decay') if optimizer == 'adamw' else muon_kind(name, p)
            groups[kind]['params'].append(p)
    # an empty group beside a second optimizer is refused by torch.distributed.checkpoint
    for_adamw = [group for group in groups.values() if group['params'] and 'parts' not in group]
    for_muon = [group for group in groups.values() if group['params'] and 'parts' in group]

    if fused is None:
        fused = has_fused_adamw(for_adamw[0]['params'][0].device)
    optimizers = [torch.optim.AdamW(for_adamw, betas=betas, eps=1e-8, fused=fused)]
    if for_muon:
        optimizers.append(Muon(for_muon, ns_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32))
    for each in optimizers:
        each.register_load_state_dict_pre_hook(keep_settings)
    return optimizers


def check(name, value, accepted):
    if value not in accepted:
        raise ValueError(f'{name}={value} is unknown: accepted are {", ".join(accepted)}')


def muon_kind(name, p):
    if p.dim() < 2:
        return 'vector'
    if 'transformer.h.' in name:
        return 'qkv' if name.endswith('attn.c_attn.weight') else 'matrix'
    if 'lm_head.' in name:
        return 'head'
    assert '.wte.' in name or '.wpe.' in name, f'{name} is neither of a block nor head nor embedding'
    return 'embedding'


def has_fused_adamw(device):
    """Whether AdamW(fused=True) runs there; torch says so only at the first step."""
    probe = torch.zeros(1, device=device, requires_grad=True)
    probe.grad = torch.zeros_like(probe)
    try:
        torch.optim.AdamW([probe], fused=True).step()
    except RuntimeError:
        return False
    return True


def keep_settings(optimizer, state_dict):
    """The state dict with the optimizer's own rates, decay, betas and kernel in place of the stored ones."""
    groups = [{**ours, 'params': stored['params']}
              for ours, stored in zip(optimizer.param_groups, state_dict['param_groups'], strict=True)]
    return {**state_dict, 'param_groups': groups}


# -----------------------------------------------------------------------------
# Muon


def orthogonalize(G, steps=5, dtype=None):
    """Brings the singular values of each matrix near 1 (0.68 .. 1.14) and keeps its singular vectors.

    G        (K, m, n)  K matrices, each by itself; zeros stay zeros
    dtype    to compute in; None = G's
    returns  (K, m, n) in G's dtype
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


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised: for the weight matrices (out, in) between embedding and head.

        buffer <- momentum * buffer + (1 - momentum) * grad
        update  = orthogonalize((1 - momentum) * grad + momentum * buffer)
        p      <- p - lr * weight_decay * p - lr * sqrt(max(1, out / in)) * update

    params    parameters or groups of them; a group's `parts` matrices lie one below the other in each of its parameters
              (the fused Q, K, V: 3) and are orthogonalised each by itself
    ns_dtype  to orthogonalise in; None = that of the parameters. In bfloat16 the last bit of a gradient can turn a direction that the
              gradient hardly has, by 1e-2 of the step: ranks in other numbers then part by so much
    source    https://kellerjordan.github.io/posts/muon/; decoupled decay arXiv:2502.16982

    Where there are several ranks each orthogonalises its share of the matrices. With FSDP the matrices of one shape are gathered for it.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, parts=1, ns_dtype=None):
        self.ns_dtype = ns_dtype
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, parts=parts))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip = getattr(self, 'found_inf', None)
        # matrices of one shape go through one chain of batched products, whatever group they are from
        batches = defaultdict(list)
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is not None:
                    shape = (p.size(0) // group['parts'], p.size(1))
                    batches[shape, group['lr'], group['momentum'], group['weight_decay']].append(p)
        for (shape, lr, momentum, weight_decay), params in batches.items():
            grads = [p.grad for p in params]
            buffers = [self.momentum_buffer(p) for p in params]
            new_buffers = torch._foreach_lerp(buffers, grads, 1 - momentum)
            updates = torch.cat([whole(update) for update in torch._foreach_lerp(grads, new_buffers, momentum)])  # (K * out, in)
            updates = share_out(lambda G: orthogonalize(G, dtype=self.ns_dtype), updates.view(-1, *shape))  # (K, out, in)
            updates = updates.view(-1, shape[1]).split([p.size(0) for p in params])
            new_params = torch._foreach_mul(params, 1 - lr * weight_decay)
            torch._foreach_add_(new_params, [part_of(update, p) for update, p in zip(updates, params)],
                                alpha=-lr * math.sqrt(max(1, shape[0] / shape[1])))
            for old, new in zip([*buffers, *params], [*new_buffers, *new_params]):
                old.copy_(new if skip is None else torch.where(skip > 0, old, new))
        return loss

    def momentum_buffer(self, p):
        state = self.state[p]
        if 'momentum_buffer' not in state:
            state['momentum_buffer'] = torch.zeros_like(p)
        return state['momentum_buffer']


# -----------------------------------------------------------------------------
# steps that are not taken

SMOOTHING = 0.95
JUDGED_AFTER = 20  # steps: a running mean of fewer says little


def new_history(device):
    """What judge() remembers, (5,) float32: steps skipped, how many of them the last in a row, steps taken, and for gradient norms and
    losses of the steps taken a sum in which each weighs 0.95 of the one after it; divided by 1 - 0.95^taken it is a running mean."""
    return torch.zeros(5, device=device)


def judge(history, grad_norm, loss, skip_spikes=0.0):
    """Whether to skip a step, as a 0-d float32 of 0 or 1 that the host need not wait for; history, changed in place, counts it.

    grad_norm, loss  0-d float32, the same on all ranks
    skip_spikes      skip where one of them is above so many times its running mean; 0 = only where one is not finite
    """
    skipped, in_a_row, taken = history[:3]
    now, sums = torch.stack((grad_norm, loss)), history[3:]
    skip = ~now.isfinite().all()
    if skip_spikes:
        skip = skip | ((now > skip_spikes * sums / (1 - SMOOTHING ** taken)).any() & (taken >= JUDGED_AFTER))
    history.copy_(torch.where(skip, torch.cat((torch.stack((skipped + 1, in_a_row + 1, taken)), sums)),
                              torch.cat((torch.stack((skipped, torch.zeros_like(taken), taken + 1)), SMOOTHING * sums + (1 - SMOOTHING) * now))))
    return skip.float()


def step_unless(optimizer, skip):
    """optimizer.step(), which changes nothing where skip is 1; the host knows only where the kernel cannot."""
    if optimizer.defaults.get('fused') is False:
        if not skip:
            optimizer.step()
        return
    optimizer.found_inf = skip  # as torch's GradScaler tells fused kernels
    optimizer.step()
    del optimizer.found_inf


# -----------------------------------------------------------------------------
# schedules: pure functions of the iteration


def lr_scale(it, *, schedule, warmup_iters, max_iters, lr_decay_iters=None, min_lr_ratio=0.0, decay_fraction=0.4,
             restart_iters=1000, restart_mult=1):
    """What every peak learning rate is multiplied by at iteration `it`: 0 .. 1.

    schedule  each warms up first, linearly over warmup_iters; then
              'cosine': half a cosine, down to min_lr_ratio at lr_decay_iters (None = max_iters), as in nanoGPT
              'wsd': 1, and over the last decay_fraction of max_iters linearly down to min_lr_ratio
              'cosine_restarts': half a cosine over restart_iters, then again over restart_mult times as many, and so on
              'constant': 1
    source    arXiv:1608.03983 (restarts), arXiv:2404.06395 (wsd)
    """
    check('schedule', schedule, ('cosine', 'wsd', 'cosine_restarts', 'constant'))
    if it < warmup_iters:
        return (it + 1) / (warmup_iters + 1)
    if schedule == 'cosine':
        end = max_iters if lr_decay_iters is None else lr_decay_iters
        height = half_cosine((it - warmup_iters) / (end - warmup_iters)) if it < end else 0.0
    elif schedule == 'wsd':
        left, decay_iters = max(max_iters - it, 0), decay_fraction * max_iters
        height = left / decay_iters if left < decay_iters else 1.0
    elif schedule == 'cosine_restarts':
        if restart_iters < 1 or restart_mult < 1:
            raise ValueError(f'restart_iters={restart_iters}, restart_mult={restart_mult}: accepted is 1 or more for both')
        since, length = it - warmup_iters, restart_iters
        while since >= length:
            since, length = since - length, length * restart_mult
        height = half_cosine(since / length)
    else:
        height = 1.0
    return height + (1 - height) * min_lr_ratio


def half_cosine(x):
    return 0.5 * (1.0 + math.cos(math.pi * x))


def muon_momentum(it, warmup_iters=300, start=0.85, end=0.95):
    """Muon's momentum at iteration `it`: rises linearly over warmup_iters (https://github.com/KellerJordan/modded-nanogpt)."""
    x = min(it / warmup_iters, 1.0) if warmup_iters else 1.0
    return (1 - x) * start + x * end


def set_lr(optimizers, scale, momentum=None):
    """Sets every group's learning rate to scale times its peak, and Muon's momentum where one is given."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = group['peak_lr'] * scale
            if momentum is not None and 'momentum' in group:
                group['momentum'] = momentum
