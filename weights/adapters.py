"""LoRA adapters of the peft package: adapter_config.json and adapter_model.safetensors, in and out."""

from pathlib import Path

import torch

from files import one_line, write_atomically, write_json
from weights import lora
from weights.architectures import architecture_of, need
from weights.formats import read_folder, read_settings, write_safetensors

CONFIG, STEM = 'adapter_config.json', 'adapter_model'
PREFIX = 'base_model.model.'  # of all names
# settings of peft that change the result but neither names nor shapes of tensors, and their values in plain
# LoRA; null is the first
PLAIN = dict(peft_type=['LORA'], alpha_pattern=[{}], use_rslora=[False],
             init_lora_weights=[True, False, 'gaussian', 'orthogonal'])  # others change the base model
PLAIN |= dict.fromkeys(('layer_replication', 'alora_invocation_tokens', 'arrow_config'), [None])


def base_of(folder) -> str | None:
    """Return the base model that an adapter names; None for a folder without one."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return None
    base = read_settings(path).get('base_model_name_or_path')
    if not base or not isinstance(base, str) or (Path(base) / CONFIG).is_file():
        raise ValueError(f'{path}: base_model_name_or_path = {base!r}, accepted is a folder without '
                         f'{CONFIG}, or a model of the hub')
    return base


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
            if architecture.transposed:
                lora_b = lora_b.t()
            tensors[f'{PREFIX}{part}.lora_A.weight'] = layer.lora_a.detach()
            tensors[f'{PREFIX}{part}.lora_B.weight'] = lora_b
    settings |= dict(peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=base, bias='none',
                     target_modules=sorted(modules), fan_in_fan_out=bool(architecture.transposed))
    weights = folder / f'{STEM}.safetensors'
    write_atomically(weights, lambda f: write_safetensors(f, tensors))
    write_json(folder / CONFIG, settings)
    return [weights, folder / CONFIG]


@torch.no_grad()
def merge(model, folder):
    """Add an adapter that peft wrote to the weights of its base model. ValueError if it does not fit them."""
    path, stored = Path(folder) / CONFIG, read_folder(folder, STEM)
    settings, architecture = read_settings(path), architecture_of(model.config)
    rank, alpha = settings.get('r'), settings.get('lora_alpha')
    with one_line(path):
        for name, accepted in PLAIN.items():
            need(name, settings.get(name) or accepted[0], accepted)
        if type(rank) is not int or type(alpha) not in (int, float) or rank < 1:
            raise ValueError(f'r = {rank!r} and lora_alpha = {alpha!r}, accepted are numbers')
    for name, weight in architecture.parts(dict(model.named_parameters()), model.config).items():
        name_a, name_b = (f'{PREFIX}{name.removesuffix("weight")}lora_{letter}.weight' for letter in 'AB')
        if name_a not in stored or name_b not in stored:
            continue
        lora_a, lora_b = stored.pop(name_a), stored.pop(name_b)
        if architecture.transposed:
            weight = weight.t()  # (out, in)
        if (lora_a.shape, lora_b.shape) != ((rank, *weight.shape[1:]), (len(weight), rank)):
            raise ValueError(f'{folder}: {name_a} and its lora_B have shapes {lora_a.shape} and '
                             f'{lora_b.shape}: they are not of rank {rank}, or not for its base model')
        weight += (lora_b[:].float() @ lora_a[:].float() * (alpha / rank)).to(weight.dtype)
    if stored:
        raise ValueError(f'{folder}: {min(stored)} belongs to no matrix of the base model')
