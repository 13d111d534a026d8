"""The transformers model that equals a GPT: its modules and weights under our names and in our layouts."""

import tempfile
from collections.abc import Iterator

import torch

from weights.architectures import architecture_of


def reference_of(model):
    """Return the transformers model that equals a GPT, in float32 with plain attention."""
    import transformers
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reference = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation='eager')
    return reference.eval()


def names_of(model) -> dict[str, list[str]]:
    """Return {our module: their modules}. Several = our output is split among them."""
    architecture, config = architecture_of(model.config), model.config
    names = {'lm_head': ['lm_head']} | modules(architecture.outside)
    names.pop('transformer.wpe', None)  # ours is not called
    if config.arch == 'modern':  # nanochat calls one norm before the blocks and after them
        del names['transformer.ln_f']
    for i in range(config.n_layer):
        block = architecture.block.format(i)
        names[f'transformer.h.{i}'] = [block.removesuffix('.')]
        for ours, theirs in modules(architecture.inside).items():
            names[f'transformer.h.{i}.{ours}'] = [block + name for name in theirs]
    present = dict(model.named_modules())
    return {ours: theirs for ours, theirs in names.items() if ours in present}


def modules(weights):
    """Turn a table of names of weights into one of their modules."""
    return {ours.rpartition('.')[0]: [name.rpartition('.')[0] for name in theirs]
            for ours, theirs in weights.items()}


def in_our_layout(config, ours: dict, tensors: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight or gradient of transformers' model, in the shapes of ours, {our name: weight}."""
    architecture = architecture_of(config)
    for name, weight in ours.items():
        whole = torch.zeros(weight.shape)
        for part, rows in architecture.parts({name: whole}, config).items():
            rows.copy_(tensors[part].detach())
        yield name, whole
