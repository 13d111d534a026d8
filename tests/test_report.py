"""report.py, and what training writes for it: run.json, samples.md, and the report at its end."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TINY, differences, read_checkpoint, run_here, train_here
from hypothesis import given, settings
from hypothesis import strategies as st

import logs
from logs import write_samples
from report import add_totals, code, markdown, read_metrics, read_run, tables, write_report
from tokens.loader import Loader
from tokens.tokenizer import CharTokenizer
from training.samples import read_prompts


def train(*flags, out_dir):
    code, stdout, stderr, _ = train_here(*flags, out_dir=out_dir)
    assert code == 0, stderr
    return stdout


def step(iter_num, tokens_per_step, dt_s, n_steps=1, **more):
    return dict(iter=iter_num, loss=3.0, loss_smoothed=3.25, lr=1e-3, grad_norm=1.0, tok_per_s=tokens_per_step / dt_s, dt_s=dt_s, n_steps=n_steps, mfu=None, **more)


def evaluation(iter_num, val_loss, val_bpb=None):
    return dict(iter=iter_num, train_loss=val_loss, val_loss=val_loss, val_bpb=val_bpb)


def tables_of(folder):
    """report.md without its pictures, which take a second."""
    return '\n\n'.join(map(markdown, tables([read_run(folder)])))


def write_run(folder, lines, torn='', **facts):
    folder.mkdir(exist_ok=True)
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) + torn, encoding='utf-8')
    if facts:
        (folder / 'run.json').write_text(json.dumps(facts), encoding='utf-8')
    return folder


# -----------------------------------------------------------------------------
# tokens and time


def totals(lines):
    """(updates, tokens, seconds) of each line."""
    add_totals(lines)
    return [pytest.approx((line['updates'], line['tokens'], 60 * line['minutes'])) for line in lines]


def test_tokens_and_time_add_up_over_steps_that_are_not_logged_and_over_a_change_of_batch():
    # step 0 alone took 5 s; steps 1 to 10 took 1 s and 100 tokens each; then, resumed with twice the batch, steps 11 to 20 took 2 s
    lines = [evaluation(0, 4.0), step(0, 100, 5.0), step(10, 100, 1.0, n_steps=10), evaluation(10, 3.5), step(20, 200, 2.0, n_steps=10), evaluation(25, 3.0)]
    assert totals(lines) == [(0, 0, 0), (1, 100, 5), (11, 1100, 15), (10, 1000, 14), (21, 3100, 35), (25, 3900, 43)]


def test_a_run_that_goes_on_from_another_folder_counts_its_tokens_but_only_its_own_time():
    assert totals([evaluation(100, 2.0), step(100, 10, 60.0), step(101, 10, 1.0)])[1:] == [(101, 1010, 60), (102, 1020, 61)]


def test_the_slow_first_step_of_a_resumed_run_counts_once():
    # steps 1 to 10 took 1 s each; 11 to 14 were done, saved, and not logged; resumed, step 15 took 60 s, with twice the batch
    lines = [step(0, 100, 5.0, n_steps=1), step(10, 100, 1.0, n_steps=10), step(15, 200, 60.0, n_steps=1), step(20, 200, 2.0, n_steps=5)]
    assert totals(lines) == [(1, 100, 5), (11, 1100, 15), (16, 1100 + 400 + 200, 15 + 4 + 60), (21, 1700 + 1000, 15 + 4 + 60 + 10)]


def test_a_long_run_is_read_in_time_that_grows_with_its_lines(monkeypatch):
    """Each call of np.interp() converts all points: one call a line needs about 40 minutes for 100,000 lines."""
    calls, interp = [], np.interp
    monkeypatch.setattr(np, 'interp', lambda *args: calls.append(args) or interp(*args))
    add_totals([step(i, 100, 1.0) for i in range(300)])
    assert len(calls) == 2


def test_a_resumed_run_keeps_its_earlier_lines_without_all_of_them_in_memory(tmp_path):
    """All lines in memory took 480 MB for 200,000 of them."""
    path = tmp_path / 'metrics.jsonl'
    lines = [json.dumps(step(i, 100, 1.0)) for i in range(3000)]
    path.write_text('\n'.join([*lines[:2], '{"iter": 2, "lo', *lines[2:], '']), encoding='utf-8')
    tracemalloc.start()
    logs.keep_earlier_lines(path, 2900)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.read_text(encoding='utf-8').splitlines() == lines[:2900]
    assert peak_bytes < path.stat().st_size / 3
    assert {id(name) for line in read_metrics(path) for name in line} == {id(name) for name in read_metrics(path)[0]}


# -----------------------------------------------------------------------------
# the page


def test_an_unfinished_run_with_a_torn_line_has_a_report(tmp_path):
    folder = write_run(tmp_path / 'out', [evaluation(0, 4.0, 5.0), step(0, 100, 1.0), evaluation(1, 2.5, 3.0),
                                           dict(iter=1, hellaswag_acc=0.25), step(1, 100, 1.0, peak_memory_bytes=5e8)],
                       torn='{"iter": 2, "loss": 3.', settings=dict(max_iters=50, seed=1, dropout=0.0), defaults=dict(max_iters=9, seed=1, dropout=0.0),
                       parameters=1234, flops_per_token=2_000_000, dataset_tokens=400, environment=dict(git='abc-dirty'))
    (folder / 'eval.json').write_text(json.dumps(dict(iter=1, results=dict(piqa=dict(acc=0.5, acc_stderr=0.0123, n=1000)))), encoding='utf-8')
    page = write_report([folder]).read_text(encoding='utf-8')
    for row in ('| updates | 2 |', '| max_iters | 50 |', '| tokens | 200 |', '| epochs | 0.50 |', '| minutes in training | 0.03 |', '| parameters | 1,234 |',
                '| best validation loss | 2.5000 |', '| updates then | 1 |', '| bits per byte then | 3.0000 |', '| tokens per second (median) | 100 |',
                '| FLOPs in training | 4e+08 |', '| FLOPs per token, forward and backward | 2e+06 |', '| peak memory in GB | 0.50 |',
                '| piqa | acc 0.5000 ±0.0123   n   1,000 |', '| `max_iters` | `50` | `9` |', '| git | abc-dirty |'):
        assert row in page.splitlines(), row
    assert '`seed`' not in page
    for name in ('loss.png', 'bpb.png', 'training.png', 'benchmarks.png'):
        assert f'({name})' in page and (folder / name).read_bytes().startswith(b'\x89PNG')


def test_two_runs_are_compared_in_one_page(tmp_path):
    defaults = dict(optimizer='adamw', dataset='owt', max_iters=2)
    for name, optimizer in (('a', 'adamw'), ('b', 'muon')):
        write_run(tmp_path / name, [step(0, 100, 1.0)], settings=dict(optimizer=optimizer, dataset='x|y', max_iters=2), defaults=defaults)
    write_samples(tmp_path / 'b', 1, [('To be', 'or not')], is_first=True)
    page = write_report([tmp_path / 'a', tmp_path / 'b'], tmp_path / 'both').read_text(encoding='utf-8')
    assert "| `optimizer` | `'adamw'` | `'muon'` | `'adamw'` |" in page and "| `dataset` | `'x\\|y'` | `'x\\|y'` | `'owt'` |" in page
    assert page.index('Settings that differ') < page.index('`optimizer`') < page.index('`dataset`') and '`max_iters`' not in page
    assert '    or not' in page and f'## Samples of `{tmp_path / "a"}`' not in page
    assert not (tmp_path / 'both' / 'bpb.png').exists() and 'bpb.png' not in page  # nothing was evaluated
    assert not (tmp_path / 'a' / 'report.md').exists()


def blue(path):
    """Where a picture has the first run's colour, (height, width) bool, and its height."""
    from matplotlib.image import imread
    pixels = (imread(path)[..., :3] * 255).round()
    return np.abs(pixels - np.array([0x00, 0x72, 0xB2])).max(axis=2) < 30, len(pixels)


def test_one_logged_step_and_scores_below_zero_are_seen(tmp_path):
    folder = write_run(tmp_path / 'out', [dict(iter=0, core=-0.125), step(0, 100, 1.0), dict(iter=1, core=-0.25)])
    write_report([folder])
    for name in ('loss.png', 'training.png', 'benchmarks.png'):
        found, height = blue(folder / name)
        assert found[height // 8:].sum() > 20, f'{name}: nothing below the legend'


def test_the_best_loss_is_that_of_best_pt(tmp_path):
    """A run that diverges is never better than before training, and best.pt has the best of what it became."""
    run = write_run(tmp_path / 'run', [evaluation(0, 4.1), step(0, 100, 1.0), evaluation(10, 10.4), evaluation(20, 12.0)])
    page = tables_of(run)
    assert '| best validation loss | 10.4000 |' in page and '| updates then | 10 |' in page
    assert '| best validation loss | 4.1000 |' in tables_of(write_run(tmp_path / 'new', [evaluation(0, 4.1)]))


def test_long_names_stand_whole_in_the_legend_and_foreign_ones_bring_no_warnings(tmp_path, recwarn):
    from matplotlib.image import imread
    folders = [tmp_path / f'muon-lr-3e-3-wd-0.1-seed-{i}-训练' / 'out-shakespeare-char-depth-12' for i in range(3)]
    for folder in folders:
        folder.mkdir(parents=True)
        write_run(folder, [step(0, 100, 1.0)])
    write_report(folders, tmp_path / 'all')
    assert not [w for w in recwarn if 'Glyph' in str(w.message)]
    pixels = imread(tmp_path / 'all/loss.png')[..., :3]
    top = pixels[:len(pixels) // 5]
    assert (top[:, :3] > 0.9).all() and (top[:, -3:] > 0.9).all(), 'cut off at the edge'


def test_a_folder_that_the_locale_cannot_express_has_a_report_with_its_name(tmp_path):
    folder = write_run(tmp_path / '训练', [step(0, 100, 1.0)], starts=[dict(argv=['--out_dir=\udce8\udcae\udcad'])])
    plain = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    subprocess.run([sys.executable, str(ROOT / 'report.py'), str(folder)], env=plain, check=True, capture_output=True)
    page = (folder / 'report.md').read_text(encoding='utf-8')
    assert '训练`' in page and (folder / 'loss.png').exists()


def test_names_with_backticks_are_still_code():
    assert code('a`b') == '`` a`b ``' and code('a') == '`a`' and code('') == ''


@pytest.mark.parametrize('content', [None, '', '{"iter": 0, "lo'])
def test_a_folder_without_a_run_gets_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / 'metrics.jsonl').write_text(content, encoding='utf-8')
    exit_code, stdout, stderr = run_here('report.py', tmp_path, '--out', tmp_path / 'new')
    assert exit_code == 2 and stderr == f'{tmp_path}/metrics.jsonl has no line yet: name the out_dir of a run that has begun to train\n'
    assert not (tmp_path / 'new').exists()


def broken(folder, **files):
    """A run with the given content of some of its files."""
    write_run(folder, [step(0, 100, 1.0)])
    for name, content in files.items():
        (folder / name.replace('_', '.')).write_text(content, encoding='utf-8')
    return folder


@pytest.mark.parametrize('files, message', [
    (dict(run_json='{"settings": 7}'), '/run.json: settings is of type int, expected is dict: ignored'),
    (dict(run_json='{"starts": {"a": 1}}'), '/run.json: starts is of type dict, expected is list: ignored'),
    (dict(run_json='{"starts": [3]}'), ': run.json: a start is of type int, expected is dict: ignored'),
    (dict(run_json='[]'), '/run.json is of type list, expected is dict: ignored'),
    (dict(run_json='[' * 200_000), '/run.json: not JSON in UTF-8'),
    (dict(eval_json='{"results": 3}'), '/eval.json: results is of type int, expected is dict: ignored'),
    (dict(eval_json='{"results": {"piqa": 3}}'), ': eval.json: piqa is of type int, expected is dict: ignored'),
])
def test_what_has_another_form_is_left_out_with_one_line(tmp_path, capsys, files, message):
    page = tables_of(broken(tmp_path / 'out', **files))
    assert capsys.readouterr().out.startswith(f'{tmp_path / "out"}{message}') and '| updates | 1 |' in page


def test_values_of_another_form_are_left_out(tmp_path):
    evals = dict(iter={}, results=dict(piqa=dict(acc={}, n=5, f=0.5, f_stderr={}), core=dict(tasks={})))
    facts = dict(settings=dict(max_iters='x', seed=10**400), parameters=[], flops_per_token=10**400, dataset_tokens={},
                 starts=[dict(changed=7, argv={}, git={})])
    page = tables_of(broken(tmp_path / 'out', eval_json=json.dumps(evals), run_json=json.dumps(facts)))
    assert '| piqa | n       5   f 0.5000 |' in page and 'acc' not in page and '| updates | 1 |' in page


def test_lines_that_are_no_metrics_are_passed_over(tmp_path, capsys):
    bad = ['[' * 200_000, '{"iter": true, "loss": 1}', '{"iter": -1}', '{"iter": 1e3}', '5', '{"iter": 1' + '0' * 400 + '}', '{"iter": 1, "lo']
    odd = dict(step(1, 100, 1.0), loss={}, tok_per_s='x', time=1e9, lr=10**400)
    folder = write_run(tmp_path / 'out', [step(0, 100, 1.0), odd, dict(iter=2, loss=1.0)], torn='\n'.join(bad) + '\n\udce9'.encode('utf-8', 'replace').decode())
    assert [line['iter'] for line in read_metrics(folder / 'metrics.jsonl')] == [0, 1, 2]
    assert capsys.readouterr().out == f'{folder}/metrics.jsonl: damaged lines skipped: 8\n'
    assert '| updates | 3 |' in write_report([folder]).read_text(encoding='utf-8')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
@pytest.mark.parametrize('name', ['metrics.jsonl', 'run.json', 'eval.json', 'samples.md'])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    folder = write_run(tmp_path / 'out', [step(0, 100, 1.0)])
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if name == 'metrics.jsonl':
        with pytest.raises(ValueError, match='metrics.jsonl has no line yet'):
            read_run(folder)
    else:
        tables_of(folder)


def test_each_start_of_a_run_is_shown(tmp_path):
    first = dict(time='2026-11-25T10:00:00+0000', iter_num=0, changed={}, git='abc', host='one', argv=['train.py'], torch='2.13.0', python='3.11.2')
    second = dict(first, iter_num=500, changed=dict(learning_rate=[0.001, 0.0005]), git='def-dirty', host='two', argv=['train.py', '--out_dir=a b'])
    page = tables_of(write_run(tmp_path / 'out', [step(0, 100, 1.0)], settings={}, starts=[first, second]))
    assert "| `2026-11-25T10:00:00+0000` | `0` | `{}` | `abc` | `one` | `['train.py']` | `2.13.0` | `3.11.2` |" in page
    assert "| `500` | `{'learning_rate': [0.001, 0.0005]}` | `def-dirty` | `two` | `['train.py', '--out_dir=a b']` |" in page


def test_nothing_of_a_run_can_steer_the_terminal(tmp_path):
    folder = write_run(tmp_path / 'o\x1b[2Jut', [step(0, 100, 1.0)], settings=dict(dataset='\x1b[1m'), environment={'\x9b': '\x1b]0;x\x07'})
    (folder / 'eval.json').write_text(json.dumps(dict(results={'\x1btask': {'\x1bacc': 0.5}})), encoding='utf-8')
    (folder / 'samples.md').write_text('## Iteration 3\n\n    \x1b[2J\n', encoding='utf-8')
    page = write_report([folder]).read_text(encoding='utf-8')
    assert '\x1b' not in page and '\x9b' not in page and 'o\\x1b[2Jut' in page
    write_samples(folder, 5, [('a\tb\n', '\x1b[2J')], is_first=True)
    assert '    a\tb\n' in (folder / 'samples.md').read_text(encoding='utf-8') and read_run(folder).samples.endswith('    \\x1b[2J')


# -----------------------------------------------------------------------------
# samples.md


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.text(), st.text(alphabet=st.sampled_from('\n\r## Iteration 7\u2028\x0b`*'))), min_size=1, max_size=3))
def test_no_text_of_a_model_is_taken_for_a_heading(tmp_path_factory, pairs):
    folder = write_run(tmp_path_factory.mktemp('samples'), [step(0, 100, 1.0)])
    write_samples(folder, 0, pairs, is_first=True)
    first = read_run(folder).samples
    write_samples(folder, 5, pairs, is_first=False)
    write_samples(folder, 9, pairs, is_first=False)
    write_samples(folder, 5, [('again', 'and again')], is_first=True)  # a run that was resumed does it anew
    page = (folder / 'samples.md').read_bytes().decode()
    assert re.findall('^## Iteration .*', page, re.M) == ['## Iteration 0', '## Iteration 5'] and first in page
    assert read_run(folder).samples.startswith('5\n') and 'and again' in read_run(folder).samples


def test_samples_are_appended_and_the_earlier_ones_read_once(tmp_path, monkeypatch):
    """Each sample read and wrote all earlier ones: 1.5 s for 250 of them, 16 times that for 1,000."""
    place, progress = SimpleNamespace(is_master=True), SimpleNamespace(iter_num=0)
    log = logs.Log(tmp_path, place, progress, 1, 1000)
    n_read, write, read = [], logs.files.write_text, logs.read_text
    monkeypatch.setattr(logs, 'read_text', lambda path: n_read.append(path) or read(path))
    monkeypatch.setattr(logs.files, 'write_text', lambda path, text: n_read.append(path) or write(path, text))
    for progress.iter_num in range(0, 1000, 50):
        log.samples([('a prompt', 'a text')])
    assert len(n_read) == 2
    assert (tmp_path / 'samples.md').read_text(encoding='utf-8').count('## Iteration ') == 20


def test_samples_move_nothing_in_training(tiny, tmp_path):
    flags = *TINY, '--max_iters=6', '--dropout=0.2', f'--dataset={tiny}'
    train(*flags, out_dir=tmp_path / 'without')
    train(*flags, '--generate_interval=2', out_dir=tmp_path / 'with')
    a, b = (read_checkpoint(tmp_path / name / 'ckpt.pt') for name in ('without', 'with'))
    assert not differences(a['model'], b['model']) and not differences(a['optimizer'], b['optimizer'])
    assert not (tmp_path / 'without' / 'samples.md').exists()
    sections = re.split('^## Iteration ', (tmp_path / 'with' / 'samples.md').read_text(encoding='utf-8'), flags=re.M)[1:]
    assert [section.partition('\n')[0] for section in sections] == ['0', '2', '4', '6']
    prompts = [[part.partition('comes')[0] for part in section.split('after the prompt')][1:] for section in sections]
    assert len(prompts[0]) == 4 and all(each == prompts[0] for each in prompts[1:]) and len({section[1:] for section in sections}) == 4  # the weights change


def test_prompts_end_with_the_last_token_before_the_answer_where_a_mask_says_where(tiny, tmp_path):
    loader = Loader(tiny, 'val', block_size=32, batch_size=4, order='sequential')
    assert list(map(len, read_prompts('', None, loader))) == [16] * 4
    batch = loader.windows(np.arange(4))
    batch.y[:, :20] = -100
    batch.y[3] = -100  # a window without any target
    loader.windows = lambda g: batch
    assert [len(prompt) for prompt in read_prompts('', None, loader)] == [21, 21, 21, 16]


# -----------------------------------------------------------------------------
# at the end of training


def test_a_chinese_prompt_of_the_command_line_is_read_where_the_locale_is_not_utf8():
    flag = '你好\r\n好'.encode().decode('ascii', 'surrogateescape')
    assert read_prompts(flag, CharTokenizer('你好'), None) == [[0, 1], [1]]


def test_training_ends_with_its_report(tiny, tmp_path):
    stdout = train(*TINY, '--max_iters=3', '--report=True', f'--dataset={tiny}', out_dir=tmp_path)
    assert f'report: {tmp_path}/report.md' in stdout and stdout.splitlines()[-1].startswith('done: ')
    page = (tmp_path / 'report.md').read_text(encoding='utf-8')
    assert '| updates | 3 |' in page and '| max_iters | 3 |' in page and '| device | cpu, 1 threads |' in page and '| `n_embd` | `16` | `768` |' in page
    assert '| tokens | 384 |' in page  # 3 steps of 8 windows of 16
    facts = json.loads((tmp_path / 'run.json').read_text(encoding='utf-8'))
    assert facts['settings']['n_embd'] == 16 and facts['defaults']['n_embd'] == 768 and facts['flops_per_token'] > 6 * 2 * 12 * 16**2


def test_the_report_of_a_new_run_shows_nothing_of_the_one_before_it_in_the_folder(tiny, tmp_path):
    write_samples(tmp_path, 7, [('of the run', 'before')], is_first=True)
    write_run(tmp_path, [step(0, 100, 1.0)])
    (tmp_path / 'eval.json').write_text(json.dumps(dict(iter=7, results=dict(piqa=dict(acc=0.5)))), encoding='utf-8')
    train(*TINY, '--max_iters=2', '--report=True', f'--dataset={tiny}', out_dir=tmp_path)
    page = (tmp_path / 'report.md').read_text(encoding='utf-8')
    assert '## Evaluation' not in page and '## Samples' not in page
    assert all((tmp_path / 'old-1' / name).exists() for name in ('metrics.jsonl', 'eval.json', 'samples.md'))


def test_a_report_that_cannot_be_written_leaves_the_run_as_it_was(tiny, tmp_path):
    (tmp_path / 'loss.png').mkdir()
    stdout = train(*TINY, '--max_iters=2', '--report=True', f'--dataset={tiny}', out_dir=tmp_path)
    assert 'no report: IsADirectoryError: ' in stdout and stdout.splitlines()[-1].startswith('done: ')
    assert read_checkpoint(tmp_path / 'ckpt.pt')['iter_num'] == 2
