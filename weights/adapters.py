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
STEM = 'adapter_model'
PREFIX = 'base_model.model.'  # of all names in an adapter of peft
# settings of peft, and the values that plain LoRA has; null is the first
PLAIN = dict(peft_type=('LORA',), bias=('none',), use_dora=(False,), use_rslora=(False,), rank_pattern=({},),
             alpha_pattern=({},), modules_to_save=(None,),
             init_lora_weights=(True, False, 'gaussian', 'orthogonal'))  # others change the base model


def base_of(folder) -> str | None:
    """Return the base model that an adapter names; None for a folder without one."""
    return read_settings(folder)['base_model_name_or_path'] if (Path(folder) / CONFIG).is_file() else None


def read_settings(folder) -> dict:
    """Return the settings of an adapter. ValueError for one that is not plain LoRA of a model."""
    path = Path(folder) / CONFIG
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f'{path} holds no settings')
    for name, accepted in PLAIN.items():
        if (settings.get(name) or accepted[0]) not in accepted:
            raise ValueError(f'{path}: {name} = {settings[name]!r} is not supported, accepted is '
                             f'{" or ".join(map(repr, accepted))}: let peft merge it')
    base, rank, alpha = (settings.get(name) for name in ('base_model_name_or_path', 'r', 'lora_alpha'))
    if not base or not isinstance(base, str) or (Path(base) / CONFIG).is_file():
        raise ValueError(f'{path}: base_model_name_or_path = {base!r}, accepted is a folder without '
                         f'{CONFIG}, or a model of the hub')
    if type(rank) is not int or type(alpha) not in (int, float) or rank < 1:
        raise ValueError(f'{path}: r = {rank!r} and lora_alpha = {alpha!r}, accepted are numbers')
    return settings


def save(model, folder, base: str) -> list[Path]:
    """Write the adapter beside the layers of a model for peft.PeftModel.from_pretrained(). Return the paths.

    transformers splits some of our matrices: the pieces share A, and each takes its rows of B.
    """
    folder, architecture = Path(folder), architecture_of(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, modules = {}, set()
    for name, layer in model.named_modules():
        if not isinstance(layer, lora.LoRALinear):
            continue
        rank = len(layer.lora_a)
        settings = dict(r=rank, lora_alpha=layer.scale * rank)
        parts = architecture.parts({f'{name}.weight': layer.lora_b.detach()}, model.config)
        for part, lora_b in parts.items():
            part = part.removesuffix('.weight')
            modules.add(part.rpartition('.')[2])
            tensors[f'{PREFIX}{part}.lora_A.weight'] = layer.lora_a.detach()
            tensors[f'{PREFIX}{part}.lora_B.weight'] = lora_b.t() if architecture.transposed else lora_b
    settings |= dict(peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=base, bias='none',
                     target_modules=sorted(modules), fan_in_fan_out=bool(architecture.transposed))
    weights = folder / f'{STEM}.safetensors'
    write_atomically(weights, lambda f: write_safetensors(f, tensors))
    write_json(folder / CONFIG, settings)
    return [weights, folder / CONFIG]


@torch.no_grad()
def merge(model, folder):
    """Add an adapter that peft wrote to the weights of its base model. ValueError if it does not fit them."""
    settings, stored = read_settings(folder), read_folder(folder, STEM)
    architecture, rank = architecture_of(model.config), settings['r']
    for name, weight in architecture.parts(dict(model.named_parameters()), model.config).items():
        name_a, name_b = (f'{PREFIX}{name.removesuffix("weight")}lora_{letter}.weight' for letter in 'AB')
        if name_a not in stored or name_b not in stored:
            continue
        lora_a, lora_b = stored.pop(name_a), stored.pop(name_b)
        weight = weight.t() if architecture.transposed else weight  # (out, in)
        if (lora_a.shape, lora_b.shape) != ((rank, *weight.shape[1:]), (len(weight), rank)):
            raise ValueError(f'{folder}: {name_a} and its lora_B have shapes {lora_a.shape} and '
                             f'{lora_b.shape}: they are not of rank {rank}, or not for its base model')
        delta = lora_b[:].float() @ lora_a[:].float() * (settings['lora_alpha'] / rank)
        weight += delta.to(weight.dtype)
    if stored:
        raise ValueError(f'{folder}: {min(stored)} belongs to no matrix of the base model')
