"""Samples from fixed prompts during a training run."""

import torch

from files import as_utf8
from kernels import IGNORE
from training.scoring import spread_windows

N_TOKENS = 100


def read_prompts(generate_prompts: str, tokenizer, loader) -> list[list[int]]:
    """Return prompts as ids: the lines of generate_prompts, or 16 tokens of each of four windows.

    Of a conversation everything before the first target is taken.
    """
    if generate_prompts:
        return [tokenizer.encode(line) for line in as_utf8(generate_prompts).splitlines() if line]
    prompts = []
    batch = loader.windows(spread_windows(loader, 4))
    for x, y in zip(batch.x, batch.y, strict=True):
        n_tokens, first_target = 16, int((y != IGNORE).int().argmax())
        if first_target:
            n_tokens = first_target + 1
        prompts.append(x[:n_tokens].tolist())
    return prompts


def generate(model, tokenizer, prompts, seed: int, place, autocast) -> list[tuple[str, str]]:
    """Return each prompt and its continuation by N_TOKENS or to the end of its document."""
    samples = []
    torch.manual_seed(seed)  # all ranks draw the same
    model.eval()
    for prompt in prompts:
        idx = torch.tensor([prompt], device=place.device)
        with autocast, torch.compiler.set_stance('force_eager'):  # each length would be compiled anew
            row = model.generate(idx, N_TOKENS, temperature=0.8, top_k=200,
                                 vocab_size=tokenizer.vocab_size)[0]
        ids = row[len(prompt):].tolist()
        if tokenizer.eot in ids:
            ids = ids[:ids.index(tokenizer.eot)]
        samples.append((tokenizer.decode(prompt), tokenizer.decode(ids)))
    model.train()
    return samples
