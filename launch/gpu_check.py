"""A dataset and a check of the gradients for launch/gpu.sh.

    python launch/gpu_check.py data out-gpu/data
    python launch/gpu_check.py gradients --n_layer=12
"""

import json
import sys
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
SIZES = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024)


def data(folder):
    """Write a dataset of random ids, which needs no network."""
    torch.manual_seed(0)
    splits = {split: [torch.randint(VOCAB_SIZE, (n_tokens,)).numpy()]
              for split, n_tokens in (('train', 1 << 21), ('val', 1 << 17))}
    write_dataset(folder, IdTokenizer(VOCAB_SIZE), splits, 'random ids')


def gradients(settings, place):
    """Compare a compiled bfloat16 step with chunks in the loss to an eager float32 step without."""
    sizes = {name: int(settings.get(name, size)) for name, size in SIZES.items()}
    config = GPTConfig(arch=settings.get('arch', 'gpt2'), vocab_size=50304, bias=False, **sizes)
    norms, losses = [], []
    for dtype, loss_chunks in ((torch.float32, 0), (torch.bfloat16, 4)):
        torch.manual_seed(0)
        model = GPT(config)
        model.loss_chunks = loss_chunks
        if dtype == torch.float32:
            distributed.prepare(model, place)
        else:
            distributed.prepare(model, place, parallel=settings.get('parallel', 'ddp'), dtype=dtype)
        loss_of = model.loss_sum  # FSDP has replaced it
        if dtype != torch.float32 and devices.choose_compile('auto', place.device):
            loss_of = distributed.compiled_loss(model)
        idx = torch.randint(VOCAB_SIZE, (4, config.block_size), device=place.device)
        with torch.autocast(place.device.type, dtype, enabled=dtype != torch.float32):
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


if __name__ == '__main__':
    with one_line_errors():
        check, *flags = sys.argv[1:]
        if check == 'data':
            data(*flags)
        else:
            # flags of train.py and bench.py may be among them
            settings = dict(flag.removeprefix('--').partition('=')[::2] for flag in flags)
            place = distributed.start(settings.get('device', 'auto'))
            result = dict(gradients(settings, place), device=devices.device_name(place.device))
            distributed.stop()
            print(json.dumps(dict(check=check, torch=torch.__version__, **result)))
