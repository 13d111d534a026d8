"""Low-rank adapters (arXiv:2106.09685): train two thin matrices beside each frozen one."""

import zlib

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import nearest


class LoRALinear(nn.Linear):
    """y = x W' + b + scale x A' B': W and b are frozen, A (rank, in) and B (out, rank) trained."""

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add(model, rank: int, alpha: float, targets: str):
    """Freeze a model, and put an adapter beside each Linear of its blocks whose name is in targets.

    targets  the last parts of names, separated by commas: c_attn, c_proj, c_fc
    """
    if alpha <= 0:
        raise ValueError(f'lora_alpha={alpha}: accepted is a number above 0')
    linears = {}
    for name, module in model.transformer.h.named_modules():
        if isinstance(module, nn.Linear):
            linears.setdefault(name.rpartition('.')[2], []).append(module)
    model.requires_grad_(False)
    for target in map(str.strip, targets.split(',')):
        if target not in linears:
            raise ValueError(f'lora_targets={targets}: no layer is named {target}, accepted are '
                             f'{", ".join(sorted(linears))}{nearest(target, linears, ", did you mean {}?")}')
        for linear in linears[target]:
            linear.__class__, linear.scale = LoRALinear, alpha / rank
            device = linear.weight.device
            linear.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
            linear.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
            nn.init.kaiming_uniform_(linear.lora_a, a=5 ** 0.5)  # as in peft


@torch.no_grad()
def merge(model):
    """Add the adapters to the weights they stand beside. The model is then a plain one."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.weight += module.scale * (module.lora_b @ module.lora_a).to(module.weight.dtype)
            module.__class__ = nn.Linear
            del module.lora_a, module.lora_b
    return model.requires_grad_(True)


def is_adapter(model) -> bool:
    """Whether a model is an adapter beside a frozen base, in training or in its checkpoints."""
    return any('.lora_' in name for name, _ in model.named_parameters())


def trained_weights(model) -> dict:
    """Return the weights of a checkpoint by name: those of the adapter alone if there is one, else all."""
    weights = model.state_dict(keep_vars=True)
    if is_adapter(model):
        weights = {name: weight for name, weight in weights.items() if '.lora_' in name}
    return weights


def checksum(model) -> int:
    """Return a number that tells one base model from another, in float32 or loaded in bfloat16."""
    crc = zlib.crc32(repr(sorted((vars(model.config) | {'dropout': 0.0}).items())).encode())
    for weight in model.parameters():
        crc = zlib.crc32(weight.detach().cpu().bfloat16().view(torch.int16).numpy(), crc)
    return crc
