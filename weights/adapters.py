"""LoRA adapters of the peft package: adapter_config.json and adapter_model.safetensors, in and out.

    adapters.save(model, 'adapter', base='Qwen/Qwen3-0.6B')    # for peft.PeftModel.from_pretrained()
    adapters.merge(model, 'adapter')                           # an adapter of peft's, into its base model
"""

from pathlib import Path

import torch

from files import read_json, write_atomically, write_json
from weights import lora
from weights.architectures import architecture_of
from weights.formats import read_folder, write_safetensors

CONFIG = 'adapter_config.json'
PREFIX = 'base_model.model.'  # of all names in an adapter of peft
# settings of peft, and the value that plain LoRA has
PLAIN = dict(peft_type='LORA', bias='none', use_dora=False, use_rslora=False, rank_pattern={},
             alpha_pattern={}, modules_to_save=None)


def base_of(folder) -> str | None:
    """Return the base model that a folder of peft names; None if it holds no adapter."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return None
    settings = read_json(path)
    base = settings.get('base_model_name_or_path') if isinstance(settings, dict) else None
    if not base or not isinstance(base, str) or Path(base).resolve() == Path(folder).resolve():
        raise ValueError(f'{path}: base_model_name_or_path = {base!r}, '
                         'accepted is a folder or a model of the hub')
    return base


def save(model, folder, base: str) -> list[Path]:
    """Write the adapters of a model for peft.PeftModel.from_pretrained(). Return the paths.

    transformers splits some of our matrices: the pieces share A, and each takes its rows of B.
    """
    folder, architecture = Path(folder), architecture_of(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, modules = {}, set()
    for name, module in model.named_modules():
        if not isinstance(module, lora.LoRALinear):
            continue
        parts = architecture.parts({f'{name}.weight': module.lora_b.detach()}, model.config)
        for part, lora_b in parts.items():
            part = part.removesuffix('.weight')
            modules.add(part.rpartition('.')[2])
            tensors[f'{PREFIX}{part}.lora_A.weight'] = module.lora_a.detach()
            tensors[f'{PREFIX}{part}.lora_B.weight'] = lora_b.t() if architecture.transposed else lora_b
        rank, alpha = len(module.lora_a), module.scale * len(module.lora_a)
    settings = dict(peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=base, r=rank,
                    lora_alpha=alpha, target_modules=sorted(modules), bias='none',
                    fan_in_fan_out=bool(architecture.transposed))
    write_atomically(folder / 'adapter_model.safetensors', lambda f: write_safetensors(f, tensors))
    write_json(folder / CONFIG, settings)
    return [folder / 'adapter_model.safetensors', folder / CONFIG]


@torch.no_grad()
def merge(model, folder):
    """Add an adapter that peft wrote to the weights of its base model.

    raises  ValueError for a kind of adapter that is not plain LoRA, or names that the model lacks
    """
    path = Path(folder) / CONFIG
    settings = read_json(path)
    for name, accepted in PLAIN.items():
        if (settings.get(name) or accepted) != accepted:
            raise ValueError(f'{path}: {name} = {settings[name]!r} is not supported, '
                             f'accepted is {accepted!r}')
    if settings.get('init_lora_weights', True) not in (True, False, 'gaussian', 'orthogonal'):
        raise ValueError(f'{path}: init_lora_weights = {settings["init_lora_weights"]!r} changes the base '
                         'model, which is not supported: let peft merge it')
    rank, alpha = settings.get('r'), settings.get('lora_alpha')
    if type(rank) is not int or type(alpha) not in (int, float) or rank < 1:
        raise ValueError(f'{path}: r = {rank!r} and lora_alpha = {alpha!r}, accepted are numbers')
    architecture, adapter = architecture_of(model.config), read_folder(folder, 'adapter_model')
    weights = architecture.parts(dict(model.named_parameters()), model.config)
    for name in [name for name in adapter if name.endswith('.lora_A.weight')]:
        target = name.removeprefix(PREFIX).replace('.lora_A.weight', '.weight')
        a, b = adapter.pop(name), adapter.pop(name.replace('.lora_A.', '.lora_B.'), None)
        are_matrices = b is not None and len(a.shape) == len(b.shape) == 2
        if not are_matrices or not a.shape[0] == b.shape[1] == rank:
            raise ValueError(f'{folder}: {name} and its lora_B are not of rank {rank}')
        lora_a, lora_b = a[:], b[:]
        delta = lora_b.float() @ lora_a.float() * (alpha / rank)
        if architecture.transposed:
            delta = delta.t()
        if target not in weights or weights[target].shape != delta.shape:
            raise ValueError(f'{folder}: {target} is no weight of its base model, or has another shape')
        weights[target] += delta.to(weights[target].dtype)
    if adapter:
        raise ValueError(f'{folder}: {sorted(adapter)[0]} is neither lora_A nor lora_B')
