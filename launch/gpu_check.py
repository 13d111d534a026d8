"""Checks of one GPU that bench.py and train.py do not make. Each prints a line of JSON. See launch/gpu.sh.

    python launch/gpu_check.py gradients --n_layer=12
"""

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import devices  # noqa: E402
import distributed  # noqa: E402
from corpus.pack import write_dataset  # noqa: E402
from files import one_line_errors  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from tokens.tokenizer import IdTokenizer  # noqa: E402

VOCAB_SIZE = 50257  # GPT-2's, so that the loss is computed in chunks


def make_data(folder):
    """Write a dataset of random ids, which needs no network."""
    generator = torch.Generator().manual_seed(0)
    splits = {}
    for split, n_tokens in (('train', 1 << 21), ('val', 1 << 17)):
        splits[split] = [torch.randint(VOCAB_SIZE, (n_tokens,), generator=generator).numpy()]
    write_dataset(folder, IdTokenizer(VOCAB_SIZE), splits, 'random ids')
    return dict(folder=folder)


def settings_of(arguments):
    """Return the flags that matter here as a dict; others, of train.py and bench.py, are ignored."""
    settings = dict(device='auto', arch='gpt2', parallel='ddp')
    settings.update(n_layer=12, n_head=12, n_embd=768, block_size=1024)
    for argument in arguments:
        name, _, value = argument.removeprefix('--').partition('=')
        if name in settings:
            settings[name] = type(settings[name])(value)
    return settings


def make_model(settings, **changes):
    torch.manual_seed(0)
    names = 'arch', 'n_layer', 'n_head', 'n_embd', 'block_size'
    config = GPTConfig(vocab_size=50304, bias=False, **{name: settings[name] for name in names} | changes)
    return GPT(config)


def gradients(settings, place):
    """Compare a compiled bfloat16 step with chunks in the loss to an eager float32 step without."""
    norms, losses = [], []
    idx = torch.randint(VOCAB_SIZE, (4, settings['block_size'] + 1), device=place.device)
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(settings)
        exact = dtype == torch.float32
        model.loss_chunks = 0 if exact else 4
        kind = 'ddp' if exact else settings['parallel']
        distributed.prepare(model, place, parallel=kind, dtype=dtype)
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
    print(json.dumps(result), flush=True)
    if min(norms[1]) == 0 or abs(losses[0] - losses[1]) > 0.02 or worst > 0.1:
        raise ValueError('the gradients of the compiled step differ from those in float32')
    return result


def recompiles(settings, place):
    """Count the graphs of training steps followed by generation: one, and one, is right."""
    from torch._dynamo.utils import counters
    model = distributed.prepare(make_model(settings), place)
    model.loss_chunks = 4
    loss_of = distributed.compiled_loss(model)
    idx = torch.randint(VOCAB_SIZE, (4, settings['block_size']), device=place.device)
    for _ in range(4):
        loss_of(idx, idx).backward()
    graphs_of_training = counters['stats']['unique_graphs']
    model.eval().compile_blocks()
    for n_tokens in (5, 7):
        model.generate(idx[:1, :n_tokens], min(20, settings['block_size'] - n_tokens), temperature=0)
    n_graphs = counters['stats']['unique_graphs']
    return dict(training=graphs_of_training, generation=n_graphs - graphs_of_training)


def attention(settings, place):
    """Time causal attention, forward and backward, by each kernel that runs here."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    H, T, D = settings['n_head'], settings['block_size'], settings['n_embd'] // settings['n_head']
    qkv = torch.randn(3, 16, H, T, D, device=place.device, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = qkv.unbind()
    times_ms = {}
    backends = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    for backend in backends:
        try:
            with sdpa_kernel(backend):
                for _ in range(2):  # the first round warms up
                    devices.synchronize(place.device)
                    begun_s = time.perf_counter()
                    for _ in range(10):
                        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                        y.sum().backward(retain_graph=True)
                    devices.synchronize(place.device)
            times_ms[backend.name] = (time.perf_counter() - begun_s) * 100
        except RuntimeError as error:
            times_ms[backend.name] = str(error).splitlines()[0][:80]
    return dict(ms=times_ms)


@torch.inference_mode()
def visits(settings, place):
    """Time each new token of a first generation, and of a second of the same lengths."""
    model = make_model(settings).to(place.device, torch.bfloat16).eval()
    idx = torch.randint(VOCAB_SIZE, (1, 4), device=place.device)
    medians_ms = []
    for _ in range(2):
        times_s, tokens = [], model.stream(idx, min(100, settings['block_size'] - 4), temperature=0)
        begun_s = time.perf_counter()
        for token in tokens:
            token.item()
            now_s = time.perf_counter()
            times_s.append(now_s - begun_s)
            begun_s = now_s
        medians_ms.append(sorted(times_s[1:])[len(times_s) // 2 - 1] * 1000)
    return dict(first_ms=medians_ms[0], second_ms=medians_ms[1])


def main(name, *arguments):
    if name == 'data':
        return make_data(arguments[0])
    settings = settings_of(arguments)
    place = distributed.start(settings['device'])
    result = globals()[name](settings, place)
    distributed.stop()
    return dict(check=name, device=devices.device_name(place.device), torch=torch.__version__, **result)


if __name__ == '__main__':
    with one_line_errors():
        print(json.dumps(main(*sys.argv[1:])))
