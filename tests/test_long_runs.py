"""Long runs: max_hours, checkpoint_minutes, on_event, TensorBoard, and the page of report.py --watch."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import wait

import pytest
from conftest import ROOT, TINY, differences, read_checkpoint, run_here, train_here
from ranks import free_ports
from test_report import evaluation, step, write_run
from test_resume import without_times
from test_train import refused, spoil

from report import read_run
from training import events, signals, watch


def train(*flags, out_dir):
    code, stdout, stderr, lines = train_here(*flags, out_dir=out_dir)
    assert code == 0, stderr
    return stdout, lines


@pytest.fixture(scope='module')
def unbroken(tiny, tmp_path_factory):
    """The out_dir and the metrics of a run to the end."""
    out_dir = tmp_path_factory.mktemp('unbroken')
    return out_dir, train(*TINY, '--dropout=0.1', f'--dataset={tiny}', out_dir=out_dir)[1]


def same_end(out_dir, other):
    ours, theirs = (read_checkpoint(folder / 'ckpt.pt') for folder in (out_dir, other))
    for part in ('model', 'optimizer', 'iter_num', 'history', 'best_val_loss'):
        assert not differences(ours[part], theirs[part], part)


# -----------------------------------------------------------------------------
# max_hours and checkpoint_minutes


@pytest.mark.parametrize('over_at', [7, 9])  # at 10 an evaluation is due, too
def test_a_run_cut_by_max_hours_and_resumed_equals_an_unbroken_one(tiny, unbroken, tmp_path, monkeypatch, over_at):
    encode = json.dumps

    def passing_time(line, *args, **kwargs):
        if 'loss' in line and line.get('iter') == over_at:
            signals.received.append(signals.TIME_OVER)
        return encode(line, *args, **kwargs)

    flags = *TINY, '--dropout=0.1', '--max_hours=1000', f'--dataset={tiny}'
    with monkeypatch.context() as patch:
        patch.setattr(json, 'dumps', passing_time)
        stdout, _ = train(*flags, out_dir=tmp_path)
    assert stdout.splitlines()[-1].startswith(f'stopped by max_hours: {tmp_path}/ckpt.pt has iteration {over_at + 1}; ')
    assert read_checkpoint(tmp_path / 'ckpt.pt')['iter_num'] == over_at + 1

    _, lines = train(*flags, '--init_from=resume', out_dir=tmp_path)
    assert without_times(lines) == without_times(unbroken[1])
    same_end(tmp_path, unbroken[0])


def test_max_hours_and_on_event_are_of_one_start(tiny, tmp_path):
    """A checkpoint from elsewhere must not bring a command."""
    flags = *TINY, '--max_iters=2', f'--dataset={tiny}', '--max_hours=1000', f'--on_event=cat >> {tmp_path}/events; :'
    train(*flags, out_dir=tmp_path / 'out')
    n_bytes = (tmp_path / 'events').stat().st_size
    stdout, _ = train('--init_from=resume', '--max_iters=4', '--device=cpu', out_dir=tmp_path / 'out')
    assert n_bytes > 0 and (tmp_path / 'events').stat().st_size == n_bytes
    assert json.loads((tmp_path / 'out/run.json').read_text(encoding='utf-8'))['settings']['max_hours'] == 0


def test_checkpoint_minutes_save_between_the_intervals_and_move_nothing(tiny, unbroken, tmp_path):
    train(*TINY, '--dropout=0.1', '--checkpoint_minutes=1e-9', '--keep_last_n_checkpoints=-1', f'--dataset={tiny}', out_dir=tmp_path)
    assert [path.stem for path in sorted(tmp_path.glob('ckpt_*.pt'))] == [f'ckpt_{n:08d}' for n in range(1, 20)]
    same_end(tmp_path, unbroken[0])


RANK = '''
import time, distributed
from training import signals
from training.progress import SaveTimes, limit_hours
place = distributed.start('cpu')
with signals.signals_noted():
    times = SaveTimes(100, 1.0)
    print(signals.signal_to_stop(), times.due(1))
    if place.rank == 1:
        times.last_s -= 60
    print(signals.signal_to_stop(), times.due(2), times.due(3))
    if place.rank == 1:
        limit_hours(1e-9)
        while not signals.received:
            time.sleep(0.01)
    print(signals.signal_to_stop(), times.due(100))
    if place.rank == 0:
        signals.received.append(15)
    print(signals.signal_to_stop())
'''


def test_the_clock_of_one_rank_decides_for_all():
    general = {**os.environ, 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_ports(1)[0]), 'PYTHONPATH': str(ROOT)}
    ranks = [subprocess.Popen([sys.executable, '-c', RANK], env={**general, 'RANK': rank, 'LOCAL_RANK': rank}, stdout=subprocess.PIPE, text=True)
             for rank in '01']
    for rank in ranks:
        lines = [line for line in rank.communicate(timeout=600)[0].splitlines() if not line.startswith('[Gloo]')]
        assert lines == ['None False', 'None True False', 'max_hours True', 'max_hours']


# -----------------------------------------------------------------------------
# on_event


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """The commands of these tests end at once, if the machine is not busy."""
    monkeypatch.setattr(events, 'TIMEOUT_S', 300.0)


def calls(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_events_of_a_run(tiny, tmp_path):
    command = f'(cat; echo "$1" >> {tmp_path}/names) >> {tmp_path}/events; echo got'
    stdout, lines = train(*TINY, '--max_iters=5', f'--dataset={tiny}', f'--on_event={command}', out_dir=tmp_path / 'out')
    names = ['saved', 'new_best', 'finished']
    assert (tmp_path / 'names').read_text(encoding='utf-8').split() == names
    assert [line for line in stdout.splitlines() if line.startswith('on_event')] == [f'on_event: {name}: got {name}' for name in names]
    saved, best, finished = calls(tmp_path / 'events')
    assert saved.keys() == {'event', 'out_dir', 'iter', 'max_iters', 'best_val_loss', 'time', 'host', 'path'}
    assert (saved['event'], saved['iter'], saved['path']) == ('saved', 5, str(tmp_path / 'out/ckpt.pt'))
    assert (best['event'], best['val_loss']) == ('new_best', lines[-1]['val_loss'])
    assert (finished['event'], finished['reason'], finished['max_iters']) == ('finished', 'max_iters', 5)


def test_events_of_a_run_that_meets_nan(tiny, tmp_path, monkeypatch):
    spoil(monkeypatch, 2, float('nan'))
    code, _, stderr, _ = train_here(*TINY, '--max_skipped_steps=3', f'--dataset={tiny}', f'--on_event=cat >> {tmp_path}/events; :', out_dir=tmp_path / 'out')
    skipped, limit = calls(tmp_path / 'events')
    assert code == 2 and limit['event'] == 'nan_limit' and limit['reason'] == stderr.strip() and limit['iter'] == 4
    assert (skipped['event'], skipped['iter'], skipped['loss'], skipped['best_val_loss']) == ('skipped_steps', 2, None, None)


@pytest.mark.parametrize('command, problem', [
    ('no-such-command-here', r'failed \(127\), training continues: .*not found'),
    ('echo out of order; exit 7;', r'failed \(7\), training continues: out of order')])
def test_a_command_that_fails_costs_a_line_and_not_the_run(tiny, tmp_path, command, problem):
    stdout, _ = train(*TINY, '--max_iters=1', f'--dataset={tiny}', f'--on_event={command}', out_dir=tmp_path)
    lines = [line for line in stdout.splitlines() if line.startswith('on_event: ')]
    assert re.fullmatch(f'on_event: saved {problem}', lines[0]) and len(lines) == 3, lines
    assert read_checkpoint(tmp_path / 'ckpt.pt')['iter_num'] == 1


def test_a_command_that_hangs_costs_a_line_and_not_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(events, 'TIMEOUT_S', 0.3)
    begun_s = time.monotonic()
    command = 'sleep 1000 & sleep 1000 #'
    stdout, _ = train(*TINY, '--max_iters=1', f'--dataset={tiny}', f'--on_event={command}', out_dir=tmp_path)
    # the events before the last one end or are dropped, by whether their turn came; in any order
    lines = {line for line in stdout.splitlines() if line.startswith('on_event: ')}
    failed = {f'on_event: {event} failed (ended after 0 s), training continues: ' for event in ('saved', 'new_best', 'finished')}
    [dropped] = [int(line.split()[1]) for line in lines - failed] or [0]
    assert len(lines & failed) + dropped == 3 and any(' finished failed ' in line for line in lines)
    assert read_checkpoint(tmp_path / 'ckpt.pt')['iter_num'] == 1 and time.monotonic() - begun_s < 500


def test_events_that_have_ended_are_not_kept():
    hook = events.Hook('true')
    for n in range(20):
        hook.send(f'event{n}', {})
        wait(hook.calls)
    assert len(hook.calls) == 1
    hook.close()


def test_events_that_wait_behind_a_hanging_command_are_dropped_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(events, 'TIMEOUT_S', 0.3)
    hook = events.Hook('sleep 1000 #')
    for n in range(99):
        hook.send(f'event{n}', {})
    hook.send('finished', {})
    hook.close()
    lines = capsys.readouterr().out.splitlines()
    [dropped] = [line for line in lines if line.endswith(' events dropped: the run has ended')]
    assert 'on_event: finished failed (ended after 0 s), training continues: ' in lines
    assert int(dropped.split()[1]) + len(lines) - 2 == 99


def test_a_command_does_not_join_the_ranks(monkeypatch):
    for name in events.RANK_VARIABLES:
        monkeypatch.setenv(name, '1')
    assert events.run('echo "${RANK-none} ${WORLD_SIZE-none}"', 'saved', '') == (0, 'none none saved\n')


def test_a_command_that_sh_cannot_read_is_refused(tiny, tmp_path):
    line = refused(*TINY, f'--dataset={tiny}', '--on_event=mail "me', out_dir=tmp_path / 'out')
    assert line.startswith('on_event=\'mail "me\': sh cannot read it') and line.endswith('give a command line of sh')


# -----------------------------------------------------------------------------
# TensorBoard


def test_tensorboard_has_the_numbers_of_metrics_once_after_a_kill(tiny, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray
    flags = *TINY, '--max_iters=8', '--checkpoint_interval=3', '--tensorboard_log=True', '--generate_interval=5', f'--dataset={tiny}'
    train(*flags, out_dir=tmp_path)
    (tmp_path / 'ckpt.pt').write_bytes((tmp_path / 'ckpt_00000006.pt').read_bytes())  # as if killed before the last save
    _, lines = train(*flags, '--init_from=resume', out_dir=tmp_path)

    events = EventAccumulator(str(tmp_path / 'tensorboard'), size_guidance={'tensors': 0}).Reload()
    names = {name for line in lines for name, value in line.items() if value is not None} - {'iter', 'time'}
    assert {tag for tag in events.Tags()['tensors'] if not tag.startswith('samples/')} == names >= {'loss', 'val_loss', 'lr'}
    for name in names:
        points = [(event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors(name)]
        assert points == [(line['iter'], pytest.approx(line[name], rel=1e-6)) for line in lines if line.get(name) is not None], name
    samples = events.Tensors('samples/1/text_summary')
    assert [event.step for event in samples] == [0, 5, 8] and b'comes' in samples[0].tensor_proto.string_val[0]


def test_a_tensorboard_that_cannot_be_written_ends_alone(tiny, tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    from torch.utils.tensorboard import SummaryWriter

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(SummaryWriter, 'add_scalar', full)
    stdout, lines = train(*TINY, '--max_iters=3', '--tensorboard_log=True', f'--dataset={tiny}', out_dir=tmp_path)
    assert stdout.count('tensorboard: [Errno 28] No space left on device: nothing more is written there') == 1 and len(lines) == 5


# -----------------------------------------------------------------------------
# report.py --watch


def test_a_page_shows_the_age_of_the_last_line_and_the_time_left_then(tmp_path):
    run = write_run(tmp_path / 'run', [step(0, 100, 1.0) | dict(time=time.time() - 1200, eta_s=9000)], torn='{"iter": 1, "lo')
    assert watch.progress_of(read_run(run)) == {'minutes since the last line': '20.0', 'minutes left in training then': '150.0'}
    write_run(run, [step(0, 100, 1.0)])  # of an earlier version
    assert watch.progress_of(read_run(run)) == {}


def test_watching_changes_nothing_but_its_page_and_ends_in_order(tmp_path, monkeypatch):
    pages = []

    def ctrl_c_at_last(seconds):
        pages.append((tmp_path / 'a/report.html').read_text(encoding='utf-8'))
        write_run(tmp_path / 'b', [step(0, 100, 1.0), evaluation(1, 2.5)], settings=dict(seed=1), defaults=dict(seed=2))
        if len(pages) == 2:
            raise KeyboardInterrupt

    write_run(tmp_path / 'a', [step(0, 100, 1.0), evaluation(1, 3.5)], settings=dict(seed=2), defaults=dict(seed=2))
    (tmp_path / 'a/samples.md').write_text('## Iteration 1\n\n**1.** after the prompt\n\n    <script>\n\ncomes\n\n    &\x1b[2J\n', encoding='utf-8')
    (tmp_path / 'b').mkdir()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'a').iterdir()}
    monkeypatch.setattr(time, 'sleep', ctrl_c_at_last)
    code, stdout, stderr = run_here('report.py', '--watch', tmp_path / 'a', tmp_path / 'b')
    assert (code, stderr) == (0, '') and stdout.splitlines()[0] == f'watching: open {tmp_path}/a/report.html in a browser, Ctrl-C ends'
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / 'a').iterdir()}
    after.pop(tmp_path / 'a/report.html')
    assert after == before and sorted(path.name for path in (tmp_path / 'b').iterdir()) == ['metrics.jsonl', 'run.json']

    first, second = pages
    assert f'{tmp_path}/b/metrics.jsonl has no line yet' in first and 'http-equiv="refresh"' in first
    assert '<td>best validation loss</td><td>3.5000</td><td>2.5000</td>' in second and '<td>seed</td><td>2</td><td>1</td><td>2</td>' in second
    assert '    &lt;script&gt;\n' in second and '&amp;\\x1b[2J' in second and '<script' not in second
    assert second.count('src="data:image/png;base64,') == 2 == second.count('src=') and 'href' not in second and '@import' not in second
    last = (tmp_path / 'a/report.html').read_text(encoding='utf-8')
    assert 'http-equiv="refresh"' not in last and 'no longer renewed' in last


def test_watching_a_folder_that_does_not_exist_is_one_line(tmp_path):
    assert run_here('report.py', '--watch', tmp_path / 'none') == (2, '', f'{tmp_path}/none: no such folder: name the out_dir of a run that has begun\n')


def test_a_page_that_cannot_be_written_is_said_once(tmp_path, capsys):
    (tmp_path / 'report.html').mkdir()
    problem = watch.write_page(tmp_path, 'page', None, renewed=True)
    assert watch.write_page(tmp_path, 'page', problem, renewed=True) == problem == 'Is a directory'
    assert capsys.readouterr().out == f'{tmp_path}/report.html: Is a directory: trying again\n'
