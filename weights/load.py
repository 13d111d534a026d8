"""A trained model with its tokenizer, wherever it is: a run's out_dir, one checkpoint, GPT-2's names, a folder, an .npz file.

    state, path = find_model('resume', 'out-quickstart')
    tokenizer = load_tokenizer(find_tokenizer(state, path))
    model = build_model(state, path, tokenizer)

The three steps are apart so that a script can refuse a wrong prompt or task before the weights are read.
"""

import re
from pathlib import Path

import checkpoint
import distributed
from files import print0
from model import GPT, GPTConfig
from tokens.dataset import dataset_folders, read_meta, read_meta_pkl
from tokens.tokenizer import GPT2_META
from weights import pretrained


def find_model(init_from='resume', out_dir='out', checkpoint_path='', n_head=None):
    """(state, path) of a checkpoint: checkpoint_path, else out_dir's; (None, init_from) for any other init_from.

    n_head  of a checkpoint_path that does not say it
    """
    if init_from != 'resume':
        pretrained.find(init_from, also=['resume'])
        return None, init_from
    return (checkpoint.load(checkpoint_path, n_head), checkpoint_path) if checkpoint_path else find_checkpoint(out_dir)


def find_checkpoint(out_dir):
    """State and path of the newest checkpoint of out_dir, or of its best where the run asked for that (always_save_checkpoint=False).

    The first rank chooses for all. ValueError where a run that goes on has replaced the file before the others read it.
    """
    state = None

    def choose():
        nonlocal state
        state, path = checkpoint.load_newest(out_dir)
        best = Path(out_dir) / 'best.pt'
        if best.exists() and (state is None or not state.get('config', {}).get('always_save_checkpoint', True)):
            state, path = checkpoint.load(best), best
        if state is None:
            raise FileNotFoundError(f'{out_dir} has no checkpoint: train one with python train.py --out_dir={out_dir}, or name another --out_dir')
        return path, state['iter_num']

    path, iter_num = distributed.on_first_rank(choose)
    state = checkpoint.load(path) if state is None else state
    if state['iter_num'] != iter_num:
        raise ValueError(f'{path} was of iteration {iter_num} and is now of {state["iter_num"]}, the run goes on: copy it, and name the copy '
                         'with --checkpoint_path')
    return state, path


def find_tokenizer(state, path):
    """meta() of the tokenizer of what find_model() found."""
    if state is not None:
        return state.get('tokenizer') or nanogpt_tokenizer(state)
    meta = pretrained.read_tokenizer(path)
    if meta is None:
        print0(f"{path} has no tokenizer.json: taking GPT-2's")
    return meta or GPT2_META


def nanogpt_tokenizer(state):
    """The tokenizer of a checkpoint that does not hold one: its dataset's where that lies in data/, else GPT-2's, as in nanoGPT."""
    dataset = state.get('config', {}).get('dataset', '')
    is_name = isinstance(dataset, str) and dataset and not re.search(r'[/\\]|\.\.', dataset)  # a file from elsewhere opens no other folder
    for folder in dataset_folders(dataset)[0] if is_name else []:
        if (folder / 'meta.pkl').exists():  # nanoGPT's rule, whether or not the tokens are there too
            print0(f'no tokenizer in the checkpoint: taking the characters in {folder / "meta.pkl"}')
            return read_meta_pkl(folder / 'meta.pkl')
        if (folder / 'meta.json').exists():
            print0(f'no tokenizer in the checkpoint: taking the one in {folder / "meta.json"}')
            return read_meta(folder)['tokenizer']
    print0(f"no tokenizer in the checkpoint, and no dataset {dataset!r} here that has one: taking GPT-2's, as nanoGPT does")
    return GPT2_META


def build_model(state, path, tokenizer, dtype=None, strict=True):
    """The model of what find_model() found, on the CPU, ready for inference; its tokenizer must fit.

    dtype   of the parameters of a model that is no checkpoint of ours; None = torch.float32
    strict  False: a checkpoint may lack weights or have others, which are listed
    """
    if state is None:
        model = GPT.from_pretrained(path, dtype=dtype)
    else:
        model = GPT(GPTConfig(**state['model_args']))
        checkpoint.load_weights(model, state['model'], path, strict)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f'{path} has a vocabulary of {model.config.vocab_size}, its tokenizer {tokenizer.vocab_size} tokens: one belongs to another model')
    print0(f'{path}: ' + (f'iteration {state["iter_num"]:,}, ' if state else '')
           + f'{model.get_num_params() / 1e6:.2f}M parameters, {tokenizer.kind} tokenizer')
    return model.eval()
