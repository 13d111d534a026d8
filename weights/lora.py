"""Low-rank adapters (arXiv:2106.09685): train two thin matrices beside each frozen one.

    lora.add(model, rank=16, alpha=32, targets='c_attn,c_proj,c_fc')   # before the optimizers are made
    lora.merge(model)                                                  # a plain model again

A checkpoint of such a run holds the adapter alone, and says which base model it belongs to.
"""

import zlib

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import nearest


class LoRALinear(nn.Linear):
    """y = x W' + b + alpha / rank * x A' B': W and b are frozen, A (rank, in) and B (out, rank) trained."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, bias=False, device='meta')
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.lora_a, a=5 ** 0.5)  # as in peft

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add(model, rank: int, alpha: float, targets: str):
    """Freeze a model, and put an adapter beside each Linear of its blocks whose name is in targets.

    targets  names after the last dot, separated by commas: c_attn, c_proj, c_fc
    raises   ValueError for a name that no Linear of a block has
    """
    modules = dict(model.transformer.h.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    known = sorted({name.rpartition('.')[2] for name in linears})
    wanted = [name.strip() for name in targets.split(',')]
    for name in wanted:
        if name not in known:
            near = nearest(name, known, ', did you mean {}?')
            raise ValueError(f'lora_targets={targets}: no layer is named {name}, '
                             f'accepted are {", ".join(known)}{near}')
    model.requires_grad_(False)
    for name, linear in linears.items():
        parent, _, child = name.rpartition('.')
        if child in wanted:
            setattr(modules[parent], child, LoRALinear(linear, rank, alpha))


@torch.no_grad()
def merge(model):
    """Add the adapters to the weights they stand beside. The model is then a plain one."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LoRALinear):
                plain = nn.Linear(child.in_features, child.out_features, bias=False, device='meta')
                plain.weight, plain.bias = child.weight, child.bias
                plain.weight += child.scale * (child.lora_b @ child.lora_a).to(plain.weight.dtype)
                setattr(module, name, plain)
    return model.requires_grad_(True)


def checksum(model) -> int:
    """Return a number that tells one base model from another, in float32 or loaded in bfloat16."""
    crc = zlib.crc32(repr(sorted((vars(model.config) | {'dropout': 0.0}).items())).encode())
    for weight in model.parameters():
        crc = zlib.crc32(weight.detach().cpu().bfloat16().view(torch.int16).numpy(), crc)
    return crc
