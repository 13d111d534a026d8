"""Checks of one GPU that bench.py and train.py do not make. Each prints a line of JSON. See launch/gpu.sh.

    python launch/gpu_check.py gradients --n_layer=12
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import devices  # noqa: E402
import distributed  # noqa: E402
from bench import timed  # noqa: E402
from corpus.pack import write_dataset  # noqa: E402
from files import one_line_errors  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from tokens.tokenizer import IdTokenizer  # noqa: E402

VOCAB_SIZE = 50257  # GPT-2's, so that the loss is computed in chunks
SIZES = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024)


def make_data(folder):
    """Write a dataset of random ids, which needs no network."""
    torch.manual_seed(0)
    splits = {split: [torch.randint(VOCAB_SIZE, (n_tokens,)).numpy()]
              for split, n_tokens in (('train', 1 << 21), ('val', 1 << 17))}
    write_dataset(folder, IdTokenizer(VOCAB_SIZE), splits, 'random ids')


def make_model(settings):
    torch.manual_seed(0)
    sizes = {name: getattr(settings, name) for name in SIZES}
    return GPT(GPTConfig(arch=settings.arch, vocab_size=50304, bias=False, **sizes))


def gradients(settings, place):
    """Compare a compiled bfloat16 step with chunks in the loss to an eager float32 step without."""
    norms, losses = [], []
    idx = torch.randint(VOCAB_SIZE, (4, settings.block_size + 1), device=place.device)
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(settings)
        exact = dtype == torch.float32
        model.loss_chunks = 0 if exact else 4
        parallel = 'ddp' if exact else settings.parallel
        distributed.prepare(model, place, parallel=parallel, dtype=dtype)
        loss_of = model.loss
        if not exact and devices.choose_compile('auto', place.device):
            loss_of = distributed.compiled_loss(model)
        with torch.autocast(place.device.type, dtype, enabled=not exact):
            loss = loss_of(idx[:, :-1], idx[:, 1:]) / idx[:, 1:].numel()
        loss.backward()
        distributed.sum_gradients(model)
        losses.append(loss.item())
        norms.append([distributed.whole(p.grad).norm().item() for p in model.parameters()])
    worst = max(abs(a - b) / max(a, 1e-8) for a, b in zip(*norms, strict=True))
    result = dict(losses=losses, least_norm=min(norms[1]), worst_relative_difference_of_norms=worst)
    if min(norms[1]) == 0 or abs(losses[0] - losses[1]) > 0.02 or worst > 0.1:
        raise ValueError(f'the gradients of the compiled step differ from those in float32: {result}')
    return result


def recompiles(settings, place):
    """Count the graphs of training steps followed by generation: one, and one, is right."""
    from torch._dynamo.utils import counters
    model = distributed.prepare(make_model(settings), place)
    model.loss_chunks = 4
    loss_of = distributed.compiled_loss(model)
    idx = torch.randint(VOCAB_SIZE, (4, settings.block_size), device=place.device)
    for _ in range(4):
        loss_of(idx, idx).backward()
    n_training = counters['stats']['unique_graphs']
    model.eval().compile_blocks()
    for n_tokens in (5, 7):
        model.generate(idx[:1, :n_tokens], min(20, settings.block_size - n_tokens), temperature=0)
    return dict(training=n_training, generation=counters['stats']['unique_graphs'] - n_training)


def attention(settings, place):
    """Time causal attention, forward and backward, by each kernel that runs here."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    shape = 16, settings.n_head, settings.block_size, settings.n_embd // settings.n_head
    qkv = torch.randn(3, *shape, device=place.device, dtype=torch.bfloat16, requires_grad=True)

    def step(i):
        torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True).sum().backward()

    median_ms = {}
    for backend in SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION:
        try:
            with sdpa_kernel(backend):
                times_s = [dt_s for _, dt_s in timed(map(step, range(20)), place.device)]
            median_ms[backend.name] = median(times_s[10:]) * 1000
        except RuntimeError as error:
            median_ms[backend.name] = str(error).splitlines()[0][:80]
    return dict(ms=median_ms)


def visits(settings, place):
    """Time each new token of a first generation, and of a second of the same lengths."""
    model = make_model(settings).to(place.device, torch.bfloat16).eval()
    idx = torch.randint(VOCAB_SIZE, (1, 4), device=place.device)
    median_ms = []
    for _ in range(2):
        tokens = model.stream(idx, min(100, settings.block_size - 4), temperature=0)
        times_s = [dt_s for _, dt_s in timed(tokens, place.device)]
        median_ms.append(median(times_s[1:]) * 1000)
    return dict(first_ms=median_ms[0], second_ms=median_ms[1])


CHECKS = dict(gradients=gradients, recompiles=recompiles, attention=attention, visits=visits)

if __name__ == '__main__':
    with one_line_errors():
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
        parser.add_argument('check', choices=['data', *CHECKS])
        parser.add_argument('folder', nargs='?', help='for data: where to write it')
        parser.add_argument('--device', default='auto')
        parser.add_argument('--arch', default='gpt2')
        parser.add_argument('--parallel', default='ddp')
        for name, size in SIZES.items():
            parser.add_argument(f'--{name}', type=int, default=size)
        settings, _ = parser.parse_known_args()  # other flags are for train.py and bench.py
        result = dict(check=settings.check, torch=torch.__version__)
        if settings.check == 'data':
            make_data(settings.folder)
        else:
            place = distributed.start(settings.device)
            result['device'] = devices.device_name(place.device)
            result.update(CHECKS[settings.check](settings, place))
            distributed.stop()
        print(json.dumps(result))
