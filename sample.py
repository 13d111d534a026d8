"""Continue a prompt with a trained model, answer a file of questions, or export the model.

    python sample.py --out_dir=out-quickstart --start="ROMEO:" --num_samples=2 --max_new_tokens=200
    python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?"
    python sample.py --out_dir=out-quickstart --export=exported    # for transformers; weights.npz for NumPy
    python sample.py --out_dir=out --export=model.gguf --quantize=int8    # for llama.cpp, q8_0
    python sample.py --out_dir=out-dolly --prompts=questions.jsonl --answers=answers.jsonl --temperature=0

A sample ends where the model ends the document.
"""

import codecs
import os
from pathlib import Path
from typing import Literal

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # as in train.py

import torch

import devices
import distributed
from chat import Answerer, Sampling, check, choose_style, prepare_decoding, talk
from configurator import configure
from corpus.readers import read_text
from files import as_utf8, one_line_errors, printable
from tasks.answers import answer_questions, read_questions, write_answers
from tokens.tokenizer import opening
from weights import adapters
from weights.begin import build_model, find_start
from weights.card import model_card

# -----------------------------------------------------------------------------
# the model
init_from = 'resume'  # the checkpoint in out_dir; or gpt2 ... gpt2-xl, a transformers folder, an .npz file
out_dir = 'out'
checkpoint_path = ''  # this file instead of the checkpoint in out_dir; may be another trainer's
n_head: int | None = None  # for a checkpoint_path that does not store it
tokenizer = ''  # gpt2, byte, or a folder with tokenizer.json, for a model that has none
strict = True  # False: checkpoint_path may lack weights or have others, which are listed
export = ''  # write the model to this folder for transformers, or this .npz or .gguf file; do not sample
adapter = False  # export a run's LoRA adapter alone, for peft
# the text
start = '\n'  # the prompt, or FILE:prompt.txt; may contain <|endoftext|>
num_samples = 10
max_new_tokens = 500
# questions instead of a prompt
chat = False  # read them from the terminal, as chat.py does
prompts = ''  # a file that corpus/conversations.py reads, or lines in a .txt file; its answers are compared
answers = ''  # the JSONL file to write the model's answers to
batch_size = 16  # prompts to answer at a time
# prompt template; auto = the one the model was tuned with
style: Literal['auto', 'chat', 'alpaca', 'chatml'] = 'auto'
# how to draw
temperature = 0.8  # lower is more predictable, 0 always takes the most likely token
top_k: int | None = 200  # draw among this many most likely tokens; 0 or None = all
top_p: float | None = None  # draw among the fewest tokens with this total probability; None = all
seed = 1337
# system
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
compile: bool | Literal['auto'] = 'auto'  # auto = eager: compiling pays for long batches only
quantize: Literal['none', 'int8'] = 'none'  # int8: a byte a weight, for single samples on the CPU or .gguf
# -----------------------------------------------------------------------------


def encode_prompt(text, tokenizer, is_default):
    """Return the ids of the prompt, at least one."""
    if text.startswith('FILE:'):
        text = read_text(text.removeprefix('FILE:'))
    text = as_utf8(text).replace('\r\n', '\n')  # as corpora are read
    if text and not (is_default and tokenizer.eot is None):
        return tokenizer.prefix + tokenizer.encode(text, allowed_special={'<|endoftext|>'})
    ids = opening(tokenizer)
    if is_default and tokenizer.decode(ids) != text:
        print(f'the vocabulary has no line break, so this starts with {tokenizer.decode(ids)!r}')
    return ids


def print_samples(steps, tokenizer, prompt_text, n_samples):
    """Print the first sample while it is drawn, then the others, each followed by nanoGPT's rule."""
    rule = '\n---------------\n'
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # a character may span several tokens
    rows = [[] for _ in range(n_samples)]
    print(printable(prompt_text), end='', flush=True)
    for tokens in steps:
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
        if tokens[0] is not None:
            piece = decoder.decode(tokenizer.decode_bytes(tokens[:1]))
            print(printable(piece), end='', flush=True)
    print(printable(decoder.decode(b'', final=True)), end=rule)
    for row in rows[1:]:
        print(printable(prompt_text + tokenizer.decode(row)), end=rule)


def export_model(model, trained):
    """Write the model, or its LoRA adapter alone, and print how to use it."""
    if adapter:
        paths = adapters.save(model, export, trained.lora['base'])
    else:
        card = model_card(trained, model, Path(export).name)
        paths = model.save_pretrained(export, trained.tokenizer, trained.style, card, quantize)
    for path in paths:
        print(f'{path}: {path.stat().st_size:,} bytes')
    reader = 'AutoModelForCausalLM.from_pretrained'
    if export.endswith('.npz'):
        reader = 'numpy.load'
    if export.endswith('.gguf'):
        print(f'run it with llama-cli -m {export}')
    elif not adapter:
        print(f"read it with {reader}('{export}'), or here with --init_from={export}")


def check_settings():
    """Raise ValueError for a setting that is invalid, alone or with another."""
    check('num_samples', num_samples, num_samples >= 1, '1 or more')
    check('batch_size', batch_size, batch_size >= 1, '1 or more')
    check('compile', compile, not (prompts and compile is True), 'auto or False with --prompts')
    check('quantize', quantize, quantize == 'none' or compile is not True, 'none with --compile=True')
    if bool(prompts) != bool(answers) or (chat and prompts):
        raise ValueError('--prompts=FILE and --answers=FILE go together, and without --chat')
    if answers and (Path(answers).is_dir() or not Path(answers).parent.is_dir()):
        raise ValueError(f'--answers={answers}: accepted is a file in an existing folder')
    if quantize != 'none' and export and not export.endswith('.gguf'):
        raise ValueError(f'--quantize={quantize}: accepted is none, or an export to a .gguf file')


def check_adapter(trained):
    """Raise ValueError if the adapter of a run cannot be exported for peft."""
    if not (export and trained.lora and Path(export).suffix not in ('.npz', '.gguf')):
        raise ValueError('adapter=True: needs --export=FOLDER, and a run with lora_rank')
    base = trained.lora['base']
    if base.endswith(('.pt', '.npz')) or adapters.base_of(base):
        raise ValueError(f'adapter=True: peft cannot read the base model {base}: '
                         'export the whole model without --adapter')


if __name__ == '__main__':
    with one_line_errors():
        # find mistakes before the weights are read
        explicit = configure(globals())
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
        check_settings()
        place = distributed.start(device)
        trained = find_start(init_from, out_dir, checkpoint_path, n_head, tokenizer)
        if adapter:
            check_adapter(trained)
        template, prompt, questions, n_rows = '', [], [], num_samples
        if chat:
            n_rows = 1
        elif prompts:
            questions, n_rows = read_questions(prompts), batch_size
        if chat or prompts:
            template = choose_style(style, trained)
        else:
            prompt = encode_prompt(start, trained.tokenizer, is_default='start' not in explicit)

        precision = devices.choose_dtype(dtype, place.device, packs=compile is not True)
        if export and dtype == 'auto':
            precision = torch.float32  # as it was trained
        model = build_model(trained, precision, strict, merge=not adapter).to(place.device, precision)
        torch.manual_seed(seed)
        if not export:
            prepare_decoding(model, place.device, compile, quantize, n_rows)
        answerer = Answerer(model, trained.tokenizer, template, sampling)
        if export:
            export_model(model, trained)
        elif chat:
            talk(answerer)
        elif prompts:
            write_answers(answers, questions, answer_questions(answerer, questions, batch_size))
        else:
            idx = torch.tensor(prompt, device=place.device).repeat(num_samples, 1)  # (num_samples, T)
            steps = sampling.stream(model, trained.tokenizer, idx, {trained.tokenizer.eot})
            special = trained.tokenizer.bos, trained.tokenizer.eot
            prompt_text = trained.tokenizer.decode([i for i in prompt if i not in special])
            print_samples(steps, trained.tokenizer, prompt_text, num_samples)
