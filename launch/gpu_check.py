"""Checks of one GPU that bench.py and train.py do not make. Each prints a line of JSON. See launch/gpu.sh.

    python launch/gpu_check.py gradients --n_layer=12
"""

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


def data(folder):
    """Write a dataset of random ids, which needs no network."""
    torch.manual_seed(0)
    splits = {split: [torch.randint(VOCAB_SIZE, (n_tokens,)).numpy()]
              for split, n_tokens in (('train', 1 << 21), ('val', 1 << 17))}
    write_dataset(folder, IdTokenizer(VOCAB_SIZE), splits, 'random ids')


def make_model(settings):
    torch.manual_seed(0)
    sizes = {name: int(settings.get(name, size)) for name, size in SIZES.items()}
    return GPT(GPTConfig(arch=settings.get('arch', 'gpt2'), vocab_size=50304, bias=False, **sizes))


def random_ids(model, place, n_rows):
    return torch.randint(VOCAB_SIZE, (n_rows, model.config.block_size), device=place.device)


def gradients(settings, place):
    """Compare a compiled bfloat16 step with chunks in the loss to an eager float32 step without."""
    norms, losses = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(settings)
        exact = dtype == torch.float32
        model.loss_chunks = 0 if exact else 4
        parallel = 'ddp' if exact else settings.get('parallel', 'ddp')
        distributed.prepare(model, place, parallel=parallel, dtype=dtype)
        loss_of = model.loss
        if not exact and devices.choose_compile('auto', place.device):
            loss_of = distributed.compiled_loss(model)
        idx = random_ids(model, place, 4)
        with torch.autocast(place.device.type, dtype, enabled=not exact):
            loss = loss_of(idx, idx) / idx.numel()
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
    idx = random_ids(model, place, 4)
    for _ in range(4):
        loss_of(idx, idx).backward()
    n_training = counters['stats']['unique_graphs']
    model.eval().compile_blocks()
    for n_tokens in (5, 7):
        model.generate(idx[:1, :n_tokens], 20, temperature=0)
    return dict(training=n_training, generation=counters['stats']['unique_graphs'] - n_training)


def attention(settings, place):
    """Time causal attention, forward and backward, by each kernel that runs here."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    config = make_model(settings).config
    shape = 16, config.n_head, config.block_size, config.head_size
    qkv = torch.randn(3, *shape, device=place.device, dtype=torch.bfloat16, requires_grad=True)

    def step(i):
        torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True).sum().backward()

    median_ms = {}
    for backend in SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION:
        try:
            with sdpa_kernel(backend):
                times_ms = [ms for _, ms in timed(map(step, range(20)), place.device)]
            median_ms[backend.name] = median(times_ms[10:])
        except RuntimeError as error:
            median_ms[backend.name] = str(error).splitlines()[0][:80]
    return dict(ms=median_ms)


def visits(settings, place):
    """Time each new token of a first generation, and of a second of the same lengths."""
    model = make_model(settings).to(place.device, torch.bfloat16).eval()
    idx = random_ids(model, place, 1)[:, :4]
    median_ms = []
    for _ in range(2):
        tokens = model.stream(idx, min(100, model.config.block_size - 4), temperature=0)
        times_ms = [ms for _, ms in timed(tokens, place.device)]
        median_ms.append(median(times_ms[1:]))
    return dict(first_ms=median_ms[0], second_ms=median_ms[1])


CHECKS = dict(gradients=gradients, recompiles=recompiles, attention=attention, visits=visits)

if __name__ == '__main__':
    with one_line_errors():
        check, *flags = sys.argv[1:]
        result = dict(check=check, torch=torch.__version__)
        if check == 'data':
            data(*flags)
        else:
            # flags of train.py and bench.py may be among them
            settings = dict(flag.removeprefix('--').partition('=')[::2] for flag in flags)
            place = distributed.start(settings.get('device', 'auto'))
            result.update(CHECKS[check](settings, place), device=devices.device_name(place.device))
            distributed.stop()
        print(json.dumps(result))
