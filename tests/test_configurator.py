"""configurator.py: what each way of giving a setting gives, and the exact line for each way of getting it wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configurator import config_of, configure
from files import one_line_errors

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = '''"""Train a toy.

    python toy.py config/a.py

It trains nothing.
"""
import sys
from typing import Literal
from configurator import config_of, configure
from files import one_line_errors

VERSION = 3
_hidden = 1
names = ['not', 'a', 'setting']
model = None
# -----------------------------------------------------------------------------
# input and output
out_dir = 'out'
eval_only = False  # stop after the first evaluation

# wandb
wandb_log = False
wandb_run_name = 'gpt2'

# data
gradient_accumulation_steps = 5 * 8
batch_size = 12  # rows: "#" is no comment
start = '\\n'
# optimizer, and
# sampling
learning_rate = 6e-4
dropout = 0.0
max_iters = 600000  # -1 is no end
top_k: int | None = 200
seed: int | None = None
# system
compile: bool | Literal['auto'] = 'auto'  # falls back to eager
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
label: str | None = None

if __name__ == '__main__':
    with one_line_errors():
        explicit = configure(globals())
        print(sorted(explicit))
        {body}
'''


def toy(**changes):
    """The globals of the script above, as they stand before configure()."""
    source = SCRIPT.format(body='')
    settings = {'__name__': 'toy', **changes}
    exec(compile(source, 'toy.py', 'exec', dont_inherit=True), settings)
    return settings


def given_by(*argv, **changes):
    """name -> value of the settings that argv gives."""
    settings = toy(**changes)
    return {name: settings[name] for name in configure(settings, argv)}


def error_of(*argv):
    settings = toy()
    before = dict(settings)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        configure(settings, argv)
    assert settings == before, 'a refused command line must change nothing'
    return str(e.value)


def same(a, b):
    return a == b and all(type(a[name]) is type(b[name]) for name in a)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes config/NAME in a fresh working directory and returns the name as a user types it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config').mkdir()

    def write(text, name='x.py'):
        (tmp_path / 'config' / name).write_bytes(text if isinstance(text, bytes) else text.encode('utf-8'))
        return f'config/{name}'
    return write


@pytest.fixture
def run(tmp_path):
    """Runs the script above, in tmp_path/home, as a process in another folder."""
    def run(*argv, body='', cwd=tmp_path, **env):
        script = tmp_path / 'home' / 'toy.py'
        script.parent.mkdir(exist_ok=True)
        script.write_text(SCRIPT.format(body=body), encoding='utf-8')
        env = {**os.environ, 'PYTHONPATH': str(ROOT), **env}
        return subprocess.run([sys.executable, str(script), *argv], cwd=cwd, env=env, capture_output=True, encoding='utf-8')
    return run


# -----------------------------------------------------------------------------
# what is a setting


def test_settings_are_the_plain_public_names():
    config = config_of(toy())
    assert list(config) == ['out_dir', 'eval_only', 'wandb_log', 'wandb_run_name', 'gradient_accumulation_steps', 'batch_size', 'start',
                            'learning_rate', 'dropout', 'max_iters', 'top_k', 'seed', 'compile', 'dtype', 'label']
    assert config['gradient_accumulation_steps'] == 40


# -----------------------------------------------------------------------------
# flags


@pytest.mark.parametrize('argv, expected', [
    ('--learning_rate=1', {'learning_rate': 1.0}),
    ('--dropout=0', {'dropout': 0.0}),
    ('--learning_rate=1e-3', {'learning_rate': 1e-3}),
    ('--learning_rate=inf', {'learning_rate': float('inf')}),
    ('--learning_rate=-1', {'learning_rate': -1.0}),
    ('--learning_rate -1', {'learning_rate': -1.0}),
    ('--max_iters=1_000', {'max_iters': 1000}),
    ('--max_iters=1e3', {'max_iters': 1000}),
    ('--compile=false', {'compile': False}),
    ('--compile=1', {'compile': True}),
    ('--compile=auto', {'compile': 'auto'}),
    ('--compile', {'compile': True}),
    ('--compile auto --eval_only', {'compile': 'auto', 'eval_only': True}),
    ('--eval_only=True', {'eval_only': True}),
    ('--eval_only=0', {'eval_only': False}),
    ('--eval_only false', {'eval_only': False}),
    ('--eval_only --wandb_log', {'eval_only': True, 'wandb_log': True}),
    ('--wandb_run_name=42', {'wandb_run_name': '42'}),
    ('--wandb_run_name=None', {'wandb_run_name': 'None'}),
    ('--start=a=b', {'start': 'a=b'}),
    ('--start=', {'start': ''}),
    ('--start=--', {'start': '--'}),
    ('--top_k=None', {'top_k': None}),
    ('--seed=1', {'seed': 1}),
    ('--label=None', {'label': None}),
    ('--label=1', {'label': '1'}),
    ('--batch_size 32', {'batch_size': 32}),
    ('--batch-size=32', {'batch_size': 32}),
    ('--batch_size=1 --batch_size=2', {'batch_size': 2}),
    ('--batch_size=12', {'batch_size': 12}),  # the default is given all the same
    ('--dtype=bfloat16', {'dtype': 'bfloat16'}),
    ('', {}),
])
def test_flag(argv, expected):
    assert same(given_by(*argv.split()), expected)


@pytest.mark.parametrize('argv, expected', [
    ('--learnin_rate=1', '--learnin_rate: unknown setting, did you mean --learning_rate?'),
    ('--qqq=1', '--qqq: unknown setting, --help lists all'),
    ('--_hidden=1', '--_hidden: unknown setting, --help lists all'),
    ('-batch_size=1', '-batch_size: unknown setting, did you mean --batch_size?'),
    ('batch_size=1', 'batch_size: unknown setting, did you mean --batch_size?'),
    ('--batch_size=12.5', '--batch_size=12.5: accepted is a whole number'),
    ('--batch_size=1e30', '--batch_size=1e30: accepted is a whole number'),
    ('--batch_size=inf', '--batch_size=inf: accepted is a whole number'),
    ('--batch_size=True', '--batch_size=True: accepted is a whole number'),
    ('--batch_size=None', '--batch_size=None: accepted is a whole number'),
    ('--batch_size=', '--batch_size=: accepted is a whole number'),
    ('--batch_size', '--batch_size: no value, write --batch_size=VALUE: accepted is a whole number'),
    ('--batch_size --eval_only', '--batch_size: no value, write --batch_size=VALUE: accepted is a whole number'),
    ('--learning_rate=nan', '--learning_rate=nan: accepted is a number'),
    ('--learning_rate=fast', '--learning_rate=fast: accepted is a number'),
    ('--learning_rate=1' + 400 * '0', '--learning_rate=1' + 400 * '0' + ': accepted is a number'),
    ('--top_k=few', '--top_k=few: accepted is a whole number or None'),
    ('--eval_only=yes', '--eval_only=yes: accepted are True, False'),
    ('--eval_only None', '--eval_only=None: accepted are True, False'),
    ('--compile=maybe', '--compile=maybe: accepted are True, False, auto'),
    ('--dtype=bf16', '--dtype=bf16: accepted are auto, float32, bfloat16, float16; did you mean bfloat16?'),
])
def test_wrong_flag(argv, expected):
    assert error_of(*argv.split()) == expected


# -----------------------------------------------------------------------------
# config files


def test_nanogpt_finetune_config_runs_as_it_stands(config):
    """In the manner of nanoGPT's finetune_shakespeare.py and train_gpt2.py: an import, a computed name, an expression."""
    values = given_by(config('''# finetune
import time
from math import pi

out_dir = 'out-shakespeare'
eval_only = False
wandb_run_name = 'ft-' + str(time.time())
max_iters = 600 # about
gradient_accumulation_steps = 5 * 8
learning_rate = 3e-5
dropout = 0
# compile = False
'''))
    assert values.pop('wandb_run_name').startswith('ft-')
    assert same(values, {'out_dir': 'out-shakespeare', 'eval_only': False, 'max_iters': 600, 'gradient_accumulation_steps': 40,
                         'learning_rate': 3e-5, 'dropout': 0.0})


def test_later_files_win_and_flags_win_over_all_wherever_they_stand(config):
    a = config('batch_size = 1\nlearning_rate = 1\nmax_iters = 1', 'a.py')
    b = config('batch_size *= 20\nmax_iters = 2', 'b.py')  # builds on a.py
    expected = {'batch_size': 20, 'learning_rate': 1.0, 'max_iters': 3}
    for argv in ([a, b, '--max_iters=3'], ['--max_iters=3', a, b], [a, '--max_iters', '3', b]):
        assert same(given_by(*argv), expected)
    assert given_by(b, a)['batch_size'] == 1
    assert given_by('--eval_only', a)['eval_only'] is True


def test_what_a_file_keeps_for_itself(config):
    assert given_by(config('import os, math as m\nfrom math import pi, e\n_half = 6\ndef f(): return _half\nclass C: pass\n'
                           'g = lambda: 2\nfor _i in range(3): pass\nbatch_size = f()\n'
                           'for i in range(3): pass\ndel i, seed\n_l = [k for k in (1, 2)]')) == {'batch_size': 6}


def test_a_file_may_take_its_settings_from_another(config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    config('batch_size = 7\nwandb_log = True', 'base_of_test.py')
    assert given_by(config('from config.base_of_test import *\nmax_iters = 5')) == {'batch_size': 7, 'wandb_log': True, 'max_iters': 5}


@pytest.mark.parametrize('text', [b'\xef\xbb\xbfstart = "\xe4\xbd\xa0"\r\nbatch_size = 1\r\n', '# coding: gbk\nstart = "你"\nbatch_size = 1'.encode('gbk')])
def test_bom_crlf_and_declared_encodings(config, text):
    assert given_by(config(text)) == {'start': '你', 'batch_size': 1}


def test_numbers_of_numpy_become_plain(config):
    values = given_by(config('import numpy as np\nlearning_rate = np.float32(0.5)\nbatch_size = np.prod([3, 4])\nmax_iters = 6e5'))
    assert same(values, {'learning_rate': 0.5, 'batch_size': 12, 'max_iters': 600000})


@pytest.mark.parametrize('text, expected', [
    ('learnin_rate = 1', ': unknown setting learnin_rate, did you mean learning_rate?'),
    ('qqq = 1', ': unknown setting qqq (a name of its own begins with _)'),
    ('VERSION = 4', ': unknown setting VERSION (a name of its own begins with _)'),
    ('batch_size = True', ': batch_size = True: accepted is a whole number'),
    ('batch_size = 12.5', ': batch_size = 12.5: accepted is a whole number'),
    ("batch_size = '12'", ": batch_size = '12': accepted is a whole number"),
    ('batch_size = None', ': batch_size = None: accepted is a whole number'),
    ('batch_size = [1]', ': batch_size = [1]: accepted is a whole number'),
    ("learning_rate = float('nan')", ': learning_rate = nan: accepted is a number'),
    ('wandb_run_name = 42', ': wandb_run_name = 42: accepted is text'),
    ('eval_only = 1', ': eval_only = 1: accepted are True, False'),
    ("compile = 'yes'", ": compile = 'yes': accepted are True, False, auto"),
    ("dtype = 'fp16'", ": dtype = 'fp16': accepted are auto, float32, bfloat16, float16"),
    ('import os\nbatch_size = = 1', ':2: SyntaxError: invalid syntax'),
    ('batch_size = 1\nmax_iters = batch_siz', ":2: NameError: name 'batch_siz' is not defined"),
    ('import json\njson.loads("x")', ':2: JSONDecodeError: Expecting value'),
    ('def f():\n    return 1 / 0\nbatch_size = f()', ':2: ZeroDivisionError: division by zero'),
])
def test_wrong_config(config, text, expected):
    assert error_of(config(text)) == 'config/x.py' + expected


def test_missing_config_names_the_nearest(config):
    config('', 'train_gpt2.py')
    for typed in ('config/train_gpt.py', 'train_gpt2', 'confg/train_gpt2.py'):
        assert error_of(typed) == f'{typed}: no such config file, did you mean config/train_gpt2.py?'
    assert error_of('nothing/like.it') == 'nothing/like.it: no such config file'
    assert error_of('config') == 'config: no such config file'


# -----------------------------------------------------------------------------
# what is printed


def test_overrides_line_names_what_differs(capsys, monkeypatch):
    given_by('--batch_size=12')
    assert capsys.readouterr().out == ''
    given_by('--batch_size=32', '--start=\n', '--out_dir=x', '--compile=False')
    assert capsys.readouterr().out == "overrides: out_dir = 'x', batch_size = 32, compile = False\n"
    given_by(f'--start={"word " * 30}', '--out_dir=x')
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("overrides: out_dir = 'x', start = 'word") and lines[1].startswith('  word') and max(map(len, lines)) <= 100
    monkeypatch.setenv('RANK', '1')
    given_by('--batch_size=32')
    assert capsys.readouterr().out == ''


def test_help(run):
    done = run('--batch_size=1', '--help')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.partition('\n\n')[2] == '''Train a toy.

    python toy.py config/a.py

It trains nothing.

Settings, as flags or in a config file:

input and output
  --out_dir=out
  --eval_only=False                    stop after the first evaluation

wandb
  --wandb_log=False
  --wandb_run_name=gpt2

data
  --gradient_accumulation_steps=40
  --batch_size=12                      rows: "#" is no comment
  --start='\\n'

optimizer, and
sampling
  --learning_rate=0.0006
  --dropout=0.0
  --max_iters=600000                   -1 is no end
  --top_k=200                          [a whole number or None]
  --seed=None                          [a whole number or None]

system
  --compile=auto                       falls back to eager [True, False, auto]
  --dtype=auto                         [auto, float32, bfloat16, float16]
  --label=None                         [text or None]
'''


def test_config_is_found_from_any_working_directory(run, tmp_path):
    (tmp_path / 'home' / 'config').mkdir(parents=True)
    (tmp_path / 'home' / 'config' / 'x.py').write_text('batch_size = 5', encoding='utf-8')
    assert run('config/x.py').stdout == "overrides: batch_size = 5\n['batch_size']\n"
    (tmp_path / 'config').mkdir()  # the working directory's own goes first
    (tmp_path / 'config' / 'x.py').write_text('batch_size = 6', encoding='utf-8')
    assert run('config/x.py').stdout == "overrides: batch_size = 6\n['batch_size']\n"
    assert run('config/y.py').stderr == 'config/y.py: no such config file\n'


@pytest.mark.parametrize('argv, body, env, code, expected', [
    (['--learnin_rate=1'], '', {}, 2, '--learnin_rate: unknown setting, did you mean --learning_rate?\n'),
    (['--batch_size=\nx'], '', {}, 2, '--batch_size= x: accepted is a whole number\n'),
    (['--q=1'], '', {'RANK': '1', 'WORLD_SIZE': '2'}, 2, 'rank 1: --q: unknown setting, --help lists all\n'),
    (['--q=1'], '', {'RANK': '0', 'WORLD_SIZE': '1'}, 2, '--q: unknown setting, --help lists all\n'),
    ([], "open('nowhere/x.bin')", {}, 2, 'nowhere/x.bin: No such file or directory\n'),
    ([], "raise FileNotFoundError('a: \\n  b')", {}, 2, 'a: b\n'),
    ([], 'raise ValueError', {}, 2, 'ValueError\n'),
    ([], "raise BrokenPipeError(32, 'Broken pipe')", {}, 2, '[Errno 32] Broken pipe\n'),  # not our stdout: it is said
    ([], 'raise KeyboardInterrupt', {}, 130, 'interrupted\n'),
    ([], 'sys.exit(7)', {}, 7, ''),
])
def test_exit_code_and_one_line(run, argv, body, env, code, expected):
    done = run(*argv, body=body, **env)
    assert (done.returncode, done.stderr) == (code, expected)


def test_traceback_on_request_and_for_our_own_mistakes(run):
    assert 'in <module>' in run('--q=1', FLATGPT_TRACEBACK='1').stderr
    assert 'in <module>' in run(body='assert 1 == 2').stderr


def test_characters_that_the_terminal_lacks_end_no_run(run):
    done = run(body="print('\\u4f60')", PYTHONIOENCODING='ascii')
    assert (done.returncode, done.stdout) == (0, '[]\n\\u4f60\n')


@pytest.mark.skipif(os.name == 'nt', reason='pipes of another kind')
def test_a_closed_pipe_is_quiet(run, tmp_path):
    run()  # writes the script
    command = [sys.executable, str(tmp_path / 'home' / 'toy.py'), '--help']
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b'')


# -----------------------------------------------------------------------------
# anything at all


KEYS = st.one_of(st.sampled_from(sorted(config_of(toy()))), st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0=')))
VALUES = st.one_of(st.sampled_from(['nan', '1e400', 'None', 'True', '٣', '1__0', '9' * 5000]), st.text(), st.floats().map(str), st.integers().map(str))


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=KEYS, value=VALUES, joined=st.booleans())
def test_any_flag_is_taken_whole_or_refused_by_name(capsys, key, value, joined):
    settings = toy()
    defaults = config_of(settings)
    try:
        explicit = configure(settings, [f'--{key}={value}'] if joined else [f'--{key}', value])
    except SystemExit as e:
        assert e.code == 0 and ('help' == key or value in ('--help', '-h'))
    except ValueError as e:
        assert key in str(e) or value in str(e)
    except FileNotFoundError as e:  # a bare --flag, and then a config file
        assert defaults[key] in (False, 'auto') and value in str(e)
    else:
        assert explicit == {key.replace('-', '_')}
        config = config_of(settings)
        assert {name for name in config if config[name] != defaults[name]} <= explicit
        assert all(type(v) in (bool, int, float, str, type(None)) and v == v for v in config.values())


def test_one_line_errors_passes_results_through():
    with one_line_errors():
        result = 1
    assert result == 1


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 4 bytes")])
def test_memory_that_is_not_there_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code == 2 and capsys.readouterr().err.startswith('not enough memory: use a smaller model, batch or block_size')


def test_other_errors_of_ours_keep_their_traceback():
    with pytest.raises(RuntimeError, match='a mistake of ours'), one_line_errors():
        raise RuntimeError('a mistake of ours')


@pytest.mark.skipif(os.name != 'posix', reason='needs a shell')
@pytest.mark.parametrize('closed', ['', '<&-'])
def test_a_closed_stderr_is_neither_missed_nor_given_to_a_file(tmp_path, closed):
    code = '''
import sys
from tqdm import tqdm
from files import one_line_errors
with one_line_errors(), open('file', 'w') as file:
    for _ in tqdm(range(3), mininterval=9):
        pass
    raise ValueError(f'wrong {sys.stderr.isatty()} {file.fileno() > 2}')
'''
    done = subprocess.run(['sh', '-c', f'exec "$@" 2>&- {closed}', '-', sys.executable, '-c', code], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 2 and done.stdout.splitlines()[-1] == 'wrong False True'


# -----------------------------------------------------------------------------
# settings that follow from others


DERIVE = '''
learning_rate = 1
def derive(depth: int = 12, kind: Literal['a', 'b'] | None = None, max_iters=None, batch_size=8, *, learning_rate):
    return dict(gradient_accumulation_steps=depth * batch_size, dropout=0.5, out_dir=f'{kind} {max_iters} {learning_rate}')
'''


@pytest.mark.parametrize('argv, expected', [
    ([], dict(gradient_accumulation_steps=96, out_dir='None None 1.0')),
    (['--depth=4'], dict(gradient_accumulation_steps=32)),
    (['--depth', '4', '--kind=b'], dict(gradient_accumulation_steps=32, out_dir='b None 1.0')),
    (['--max_iters=5', '--batch_size=1', '--learning_rate=2'], dict(gradient_accumulation_steps=12, out_dir='None 5 2.0')),
    (['--gradient_accumulation_steps=7', '--depth=4', '--dropout=0'], dict(gradient_accumulation_steps=7, dropout=0.0)),
    (['config/later.py', '--depth=4'], dict(gradient_accumulation_steps=33)),
])
def test_a_config_file_derives_settings_from_flags_and_flags_win_over_them(config, argv, expected):
    config('gradient_accumulation_steps += 1', 'later.py')
    given = given_by(config('from typing import Literal' + DERIVE, 'dial.py'), *argv)
    assert same({name: given[name] for name in expected}, expected)
    assert given.keys() == {'learning_rate', 'gradient_accumulation_steps', 'dropout', 'out_dir'} | (
        {argument.partition('=')[0].lstrip('-') for argument in argv if argument[:3] in ('--m', '--b')})


def test_an_earlier_file_reaches_derive(config):
    first = config('batch_size = 3\nmax_iters = 9', 'first.py')
    given = given_by(first, config('from typing import Literal' + DERIVE, 'dial.py'), '--depth=1')
    assert (given['gradient_accumulation_steps'], given['out_dir']) == (3, 'None 9 1.0')


@pytest.mark.parametrize('argv, problem', [
    (['--dept=4'], '--dept: unknown setting, did you mean --depth?'),
    (['--depth=x'], '--depth=x: accepted is a whole number'),
    (['--kind=c'], '--kind=c: accepted are a, b, None'),
    (['--depht', '4'], '--depht: unknown setting, did you mean --depth?'),
])
def test_flags_of_a_files_own_settings_are_checked(config, argv, problem):
    assert error_of(config('from typing import Literal' + DERIVE, 'dial.py'), *argv).startswith(problem)
    assert error_of('--depth=4') == '--depth: unknown setting, --help lists all'


@pytest.mark.parametrize('body, problem', [
    ("    return dict(batchsize=3)", ', derive(): unknown setting batchsize, did you mean batch_size?'),
    ("    return dict(batch_size='3')", ", derive(): batch_size = '3': accepted is a whole number"),
    ("    x = 1\n    return dict(batch_size=x // depth)", ':4: ZeroDivisionError: integer division or modulo by zero'),
])
def test_a_derive_that_fails_names_file_and_line(config, body, problem):
    file = config('# a dial\ndef derive(depth: int = 0):\n' + body)
    assert error_of(file) == file + problem
