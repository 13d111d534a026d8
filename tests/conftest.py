"""What the tests share: a tiny dataset made of made-up sentences, and train.py as a user runs it, in a process or in this one."""

import ast
import contextlib
import io
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)
# the same examples in every run, however long one takes
hypothesis.settings.register_profile('flatgpt', deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile('flatgpt')

# a run of these takes about a second: 64 training windows, 8 a step, so an epoch is 8 steps
TINY = ('--batch_size=4', '--gradient_accumulation_steps=2', '--block_size=16', '--n_layer=2', '--n_head=2', '--n_embd=16',
        '--learning_rate=1e-2', '--min_lr=1e-3', '--warmup_iters=2', '--lr_decay_iters=20', '--max_iters=20', '--eval_interval=5',
        '--eval_iters=2', '--device=cpu', '--dtype=float32', '--report=False')
TINY_TOKENS = 65 * 16
CHARS = ''.join(map(chr, [10, *range(32, 127)]))


def pytest_configure(config):
    config.addinivalue_line('markers', 'full: the full size of a test that has a reduced one, run by -m full alone')


def pytest_collection_modifyitems(config, items):
    if 'full' not in (config.option.markexpr or '').split() and not any('::' in arg for arg in config.args):  # nor asked for by name
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker('full')])
        items[:] = [item for item in items if not item.get_closest_marker('full')]


def train_settings():
    """The settings of train.py as its globals() hold them. Importing the script would train."""
    tree = ast.parse((ROOT / 'train.py').read_bytes())
    kept = [node for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign)) and ast.unparse(node)[0].islower()]
    settings = {'Literal': typing.Literal, '__file__': str(ROOT / 'train.py')}
    exec(compile(ast.Module(kept, []), 'train.py', 'exec'), settings)
    return settings


def sentences(n_chars, seed):
    """Text of a small grammar, the same each time."""
    draw, text = random.Random(seed), ''
    subjects, verbs, places = ('the cat', 'a dog', 'one fox', 'my hen'), ('sat', 'ran', 'slept', 'sang'), ('here', 'by the sea', 'at home')
    while len(text) < n_chars:
        text += f'{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(places)}.\n'
    return text[:n_chars]


def pack_chars(folder, train, val, chars=None):
    from corpus.pack import write_dataset
    from tokens.tokenizer import CharTokenizer
    write_dataset(folder, CharTokenizer(chars or ''.join(sorted(set(train + val)))), {'train': [train], 'val': [val]}, 'a test')
    return folder


@pytest.fixture(scope='session', autouse=True)
def gpt2_merges():
    """Put GPT-2's merges, if they are at hand, where a download would: a slow network fails no test."""
    from corpus.fetch import cache_folder
    merges, cached = ROOT.parent / 'shared/data/gpt2_bpe/vocab.bpe', cache_folder() / 'vocab.bpe'
    if merges.exists() and not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(merges, cached)


@pytest.fixture(scope='session')
def small():
    """A model of CHARS whose guesses are far from even. Tests that change it put it back."""
    from model import GPT, GPTConfig
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=32, vocab_size=len(CHARS), n_layer=2, n_head=2, n_embd=16)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """A folder with a prepared dataset of characters. Not to be changed: copy it for that."""
    return pack_chars(tmp_path_factory.mktemp('data') / 'tiny', sentences(TINY_TOKENS, 1), sentences(500, 2))


def read_metrics(out_dir):
    path = Path(out_dir) / 'metrics.jsonl'
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []


def run_train(*flags, out_dir, n_proc=1, cwd=None, env=None):
    """python train.py, or torchrun where n_proc > 1: (exit code, stdout, stderr, lines of metrics.jsonl)."""
    launch = [sys.executable] if n_proc == 1 else [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n_proc}']
    done = subprocess.run([*launch, str(ROOT / 'train.py'), *map(str, flags), f'--out_dir={out_dir}'], cwd=cwd, text=True, encoding='utf-8',
                          capture_output=True, timeout=600, env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})})
    return done.returncode, done.stdout, done.stderr, read_metrics(out_dir)


def run_here(script, *flags):
    """(exit code, stdout, stderr) of a script, without the seconds that a new process needs to import torch."""
    stdout, stderr, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [str(ROOT / script), *map(str, flags)]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
    return code, stdout.getvalue(), stderr.getvalue()


def train_here(*flags, out_dir):
    """What run_train gives for one process, in this one."""
    return *run_here('train.py', *flags, f'--out_dir={out_dir}'), read_metrics(out_dir)


def last_iter(out_dir):
    """The last whole line's iteration in metrics.jsonl, which a run may be writing; -1 where there is none."""
    path = Path(out_dir) / 'metrics.jsonl'
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)['iter']
        except ValueError:
            pass  # being written
    return -1


def wait_for(condition, timeout_s=600):
    """Poll until something has happened, however slow the machine is."""
    ends_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_at, 'it did not happen'
        time.sleep(0.01)


def read_checkpoint(path):
    return torch.load(path, map_location='cpu', weights_only=True)


def differences(a, b, path=''):
    """Where two checkpoints, or parts of them, are not equal bit for bit: [] if nowhere."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in a.keys() | b.keys() for d in differences(a.get(key), b.get(key), f'{path}.{key}')]
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b)) for d in differences(*pair, f'{path}[{i}]')]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if equal else [path]


def survives(n, work):
    """Runs work() in a child that is killed before its change number n to a file, counted from 0; whether it came through."""
    child = os.fork()
    if child == 0:
        changes = 0

        def die_at_n(event, args):
            nonlocal changes
            if event in ('os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'open'):
                changes += 1
                if changes > n:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(die_at_n)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f'work() failed by itself before change {n}'
    return status == 0
