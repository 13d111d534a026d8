"""Writes on from a prompt with a trained model. Settings are the names below, see --help.

    python sample.py --out_dir=out-quickstart
    python sample.py --out_dir=out-quickstart --start="ROMEO:" --num_samples=2 --max_new_tokens=200 --temperature=0.8 --top_k=200
    python sample.py --out_dir=out-quickstart --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?" --num_samples=5 --max_new_tokens=100
    python sample.py --out_dir=out-quickstart --export=exported      # for transformers; or --export=weights.npz, for NumPy

All samples are drawn in one batch, the first is shown as it is drawn, and each ends where the model ends its document.
"""

import codecs
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import distributed
import pretrained
from configurator import configure, one_line_errors
from data.loader import dataset_folders
from data.pack import read_text
from data.tokenizer import GPT2_META, load_tokenizer, read_meta, read_meta_pkl
from model import GPT, GPTConfig

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
# -----------------------------------------------------------------------------


def main():
    check_settings()
    place = distributed.choose_device(device)
    precision = torch.float32 if export and dtype == 'auto' else distributed.choose_dtype(dtype, place)  # exported as it was trained
    state, path = find_checkpoint() if init_from == 'resume' else (None, init_from)
    tokenizer = load_tokenizer(find_tokenizer(state))
    prompt = read_prompt(tokenizer)  # before the model is built: a wrong one shows at once
    if state is None:
        model = GPT.from_pretrained(init_from, dtype=precision)
    else:
        model = GPT(GPTConfig(**state['model_args']))
        checkpoint.load_weights(model, state['model'], path, strict)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f'{path} has a vocabulary of {model.config.vocab_size}, its tokenizer {tokenizer.vocab_size} tokens: one belongs to another model')
    model.to(place, precision).eval()
    print(f'{path}: ' + (f'iteration {state["iter_num"]:,}, ' if state else '')
          + f'{model.get_num_params() / 1e6:.2f}M parameters, {tokenizer.kind} tokenizer')
    if export:
        return write_export(model, tokenizer)
    if compile is True and distributed.choose_compile(True, place):
        model.compile(dynamic=True)

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


def find_checkpoint():
    """State and path: checkpoint_path, else the newest of out_dir, or its best where the run asked for that (always_save_checkpoint=False)."""
    if checkpoint_path:
        return checkpoint.load(checkpoint_path, n_head), checkpoint_path
    state, path = checkpoint.load_newest(out_dir)
    best = Path(out_dir) / 'best.pt'
    if best.exists() and (state is None or not state.get('config', {}).get('always_save_checkpoint', True)):
        return checkpoint.load(best), best
    if state is None:
        raise FileNotFoundError(f'{out_dir} has no checkpoint: train one with python train.py --out_dir={out_dir}, or name another --out_dir')
    return state, path


def find_tokenizer(state):
    """meta() of the model's tokenizer: from its checkpoint, or from the folder or file that init_from names."""
    if state is not None:
        return state.get('tokenizer') or nanogpt_tokenizer(state)
    pretrained.find(init_from, also=['resume'])
    meta = pretrained.read_tokenizer(init_from)
    if meta is None:
        print(f"{init_from} has no tokenizer.json: taking GPT-2's")
    return meta or GPT2_META


def nanogpt_tokenizer(state):
    """The tokenizer of a checkpoint that does not hold one: its dataset's where that lies in data/, else GPT-2's, as in nanoGPT."""
    dataset = state.get('config', {}).get('dataset', '')
    for folder in dataset_folders(dataset)[0] if dataset and isinstance(dataset, str) else []:
        if (folder / 'meta.pkl').exists():  # nanoGPT's rule, whether or not the tokens are there too
            print(f'no tokenizer in the checkpoint: taking the characters in {folder / "meta.pkl"}')
            return read_meta_pkl(folder / 'meta.pkl')
        if (folder / 'meta.json').exists():
            print(f'no tokenizer in the checkpoint: taking the one in {folder / "meta.json"}')
            return read_meta(folder)['tokenizer']
    print(f"no tokenizer in the checkpoint, and no dataset {dataset!r} here that has one: taking GPT-2's, as nanoGPT does")
    return GPT2_META


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
