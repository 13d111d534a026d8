"""Writes on from a prompt with a trained model. Settings are the names below, see --help.

    python sample.py --out_dir=out-quickstart
    python sample.py --out_dir=out-quickstart --start="ROMEO:" --num_samples=2 --max_new_tokens=200 --temperature=0.8 --top_k=200
    python sample.py --out_dir=out-quickstart --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?" --num_samples=5 --max_new_tokens=100
    python sample.py --out_dir=out-quickstart --export=exported      # for transformers; or --export=weights.npz, for NumPy

All samples are drawn in one batch, the first is shown as it is drawn, and each ends where the model ends its document.
"""

import codecs
from typing import Literal

import torch

import distributed
from configurator import configure, one_line_errors
from data.formats import read_text
from data.tokenizer import load_tokenizer
from load import build_model, find_model, find_tokenizer

# -----------------------------------------------------------------------------
# what to sample from
init_from = 'resume'  # out_dir's checkpoint; or gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder in transformers' format, an .npz file
out_dir = 'out'
checkpoint_path = ''  # this file instead of the one in out_dir; may be another trainer's
n_head: int | None = None  # of a checkpoint_path that does not say it
strict = True  # False: checkpoint_path may lack weights or have others, which are listed
export = ''  # write the model to this folder for transformers, or to this .npz file, and sample nothing
# what to write
start = '\n'  # the prompt, or FILE:prompt.txt; may hold <|endoftext|>
num_samples = 10
max_new_tokens = 500
# how to draw
temperature = 0.8  # below 1 is more careful, above 1 more daring, 0 always takes the most likely token
top_k: int | None = 200  # draw among so many most likely tokens; 0 or None = all
top_p: float | None = None  # draw among the fewest tokens that hold this probability; None = all
seed = 1337
# system
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
compile: bool | Literal['auto'] = 'auto'  # auto = eager: it pays for long batches only
quantize: Literal['none', 'int8'] = 'none'  # int8 = a byte a weight, on the CPU: a single sample comes faster, 10 do not
# -----------------------------------------------------------------------------


def main():
    check_settings()
    place = distributed.choose_device(device)
    precision = torch.float32 if export and dtype == 'auto' else distributed.choose_dtype(dtype, place)  # exported as it was trained
    state, path = find_model(init_from, out_dir, checkpoint_path, n_head)
    tokenizer = load_tokenizer(find_tokenizer(state, path))
    prompt = read_prompt(tokenizer)  # before the model is built: a wrong one shows at once
    model = build_model(state, path, tokenizer, precision, strict).to(place, precision)
    if export:
        return write_export(model, tokenizer)
    if compile is True and quantize == 'none' and distributed.choose_compile(True, place):
        model.compile(dynamic=True)
    else:
        model.pack(None if quantize == 'none' else quantize)

    torch.manual_seed(seed)
    prompts = torch.tensor(prompt, device=place).repeat(num_samples, 1)  # (num_samples, T)
    drawn = model.stream(prompts, max_new_tokens, temperature, top_k, top_p, vocab_size=tokenizer.vocab_size)
    for text in write_out(drawn, tokenizer, start_text(tokenizer, prompt)):
        print(text, end='', flush=True)


def write_export(model, tokenizer):
    for file in model.save_pretrained(export, tokenizer):
        print(f'{file}: {file.stat().st_size:,} bytes')
    if export.endswith('.npz'):
        print(f"read it with numpy.load('{export}'), or here with --init_from={export}")
    else:
        print(f"read it with AutoModelForCausalLM.from_pretrained('{export}') and AutoTokenizer.from_pretrained('{export}'), or here with --init_from={export}")


def write_out(drawn, tokenizer, prompt):
    """Yields the text to print: the first sample piece by piece as it is drawn, then the others, with nanoGPT's rule after each."""
    rows, ended = [[] for _ in range(num_samples)], [False] * num_samples
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # a character may come in several tokens
    yield prompt
    for ids in drawn:
        for i, token in enumerate(ids.tolist()):
            ended[i] |= token == tokenizer.eot
            if not ended[i]:
                rows[i].append(token)
                if i == 0:
                    yield decoder.decode(tokenizer.decode_bytes([token]))
        if all(ended):
            break
    yield decoder.decode(b'', final=True) + '\n---------------\n'
    for row in rows[1:]:
        yield prompt + tokenizer.decode(row) + '\n---------------\n'


# -----------------------------------------------------------------------------


def check_settings():
    for name, fits, accepted in (('num_samples', num_samples >= 1, '1 or more'), ('max_new_tokens', max_new_tokens >= 0, '0 or more'),
                                 ('temperature', temperature >= 0, '0 (greedy) or more'), ('top_k', (top_k or 0) >= 0, '0 or more, or None'),
                                 ('top_p', top_p is None or 0 < top_p <= 1, 'above 0 up to 1, or None'),
                                 ('seed', 0 <= seed < 2**63, '0 or more, below 2**63')):
        if not fits:
            raise ValueError(f'--{name}={globals()[name]}: accepted is {accepted}')


def read_prompt(tokenizer):
    """The ids of the prompt; an empty one is the end of the document before, or a line break where the tokenizer marks no ends."""
    text = read_text(start[len('FILE:'):]) if start.startswith('FILE:') else start
    if not text:
        return [tokenizer.eot] if tokenizer.eot is not None else tokenizer.encode('\n')
    return tokenizer.encode(text, allowed_special={'<|endoftext|>'})


def start_text(tokenizer, prompt):
    return tokenizer.decode([i for i in prompt if i != tokenizer.eot])


if __name__ == '__main__':
    with one_line_errors():
        configure(globals())
        main()
