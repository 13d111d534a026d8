"""The model of transformers that a GPT is, recorded under our names and in our layouts.

    names = names_of(model)         # {our module: [their modules]}
    theirs = reference_of(model)    # by way of an export
    for name, tensor in in_our_layout(shapes, model.config, dict(theirs.named_parameters())): ...
"""

import tempfile
from collections.abc import Iterator

import torch

from weights.architectures import architecture_of

NORMS = {'ln_1': ['input_layernorm'], 'ln_2': ['post_attention_layernorm']}  # of nanochat, without weights


def reference_of(model):
    """Return the model of transformers that a GPT is, in float32 with plain attention."""
    import transformers
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        reference = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation='eager')
    return reference.eval()


def names_of(model) -> dict[str, list[str]]:
    """Return {our module: their modules}. Several = our output is split among them.

    nanochat calls one norm before the blocks and after them, so there ln_f is left out: it is h.00.in and
    lm_head.in.
    """
    architecture = architecture_of(model.config)
    outside = {module(ours): [module(name) for name in names]
               for ours, names in architecture.outside.items() if 'wpe' not in ours}
    inside = {module(ours): [module(name) for name in names] for ours, names in architecture.inside.items()}
    if model.config.arch == 'modern':
        inside |= NORMS
    names = outside | {'lm_head': ['lm_head']}
    for i in range(model.config.n_layer):
        block = architecture.block.format(i)
        names[f'transformer.h.{i}'] = [block.removesuffix('.')]
        for ours, parts in inside.items():
            names[f'transformer.h.{i}.{ours}'] = [block + part for part in parts]
    return names


def module(weight):
    return weight.rpartition('.')[0]


def in_our_layout(shapes: dict, config, tensors: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight, or gradient, of transformers' model as ours: transposed and joined where it must be.

    shapes   of our weights by name
    tensors  by their names
    """
    architecture = architecture_of(config)
    for name, shape in shapes.items():
        ours = torch.zeros(shape)
        for part, rows in architecture.parts({name: ours}, config).items():
            rows.copy_(tensors[part].detach())
        yield name, ours
