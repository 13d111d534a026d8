"""A run that is killed and resumed ends as one that was not, bit for bit; and which checkpoint a run goes on from."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, differences, pack_chars, read_checkpoint, sentences, train_here

from model import GPT
from weights.begin import Start

# Each case runs in a child of one process that has imported torch but not used it. What die() replaces is the encoding of a line
# of metrics.jsonl: the process ends in the middle of the step, after checkpoints and lines that a resumed run must undo or keep.
KILLED_RUNS = '''
import json, os, runpy, signal, sys
import torch
torch.set_num_threads(1)
train, cases = sys.argv[1], json.loads(sys.argv[2])
for argv, die_at in cases:
    child = os.fork()
    if child == 0:
        encode = json.dumps
        def die(line, *args, **kwargs):
            if 'loss' in line and line.get('iter') == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(line, *args, **kwargs)
        json.dumps = die
        sys.argv = [train, *argv]
        runpy.run_path(train, run_name='__main__')
        os._exit(0)
    print('ended by', -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
'''
TIMES = ('tok_per_s', 'eta_s', 'dt_s', 'n_steps', 'peak_memory_bytes', 'time')

# name: flags of the run, iteration that it dies in (a checkpoint every 5, an epoch ends after 8), flags of the resumption
CASES = {
    'adamw, before an epoch ends': ('--dropout=0.1', 7, ''),
    'adamw, in the second epoch': ('--dropout=0.1', 13, ''),
    'adamw, in the third epoch': ('--dropout=0.1', 19, ''),
    'muon, before an epoch ends': ('--dropout=0.1 --optimizer=muon --arch=modern', 7, ''),
    'muon, in the second epoch': ('--dropout=0.1 --optimizer=muon --arch=modern', 13, ''),
    'normuon': ('--dropout=0.1 --optimizer=muon --normuon=True --arch=llama', 13, ''),
    'float16 with its scaler': ('--dtype=float16', 13, ''),
    'bfloat16, logged now and then': ('--dtype=bfloat16 --log_interval=3', 15, ''),
    'spikes skipped': ('--dropout=0.1 --max_iters=40 --skip_spikes=1.1 --decay_lr=False', 33, ''),
    'other evaluations': ('--dropout=0.1', 12, '--eval_interval=4 --eval_iters=1'),
}


def without_times(lines):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def trajectory(lines):
    return [line for line in without_times(lines) if 'loss' in line]


@pytest.fixture(scope='module')
def killed(tiny, tmp_path_factory):
    """{name: out_dir} of runs that were killed."""
    if not hasattr(os, 'fork'):
        pytest.skip('needs os.fork')
    folder = tmp_path_factory.mktemp('killed')
    out_dirs = {name: folder / str(i) for i, name in enumerate(CASES)}
    runs = [([*TINY, *flags.split(), f'--dataset={tiny}', f'--out_dir={out_dirs[name]}'], die_at) for name, (flags, die_at, _) in CASES.items()]
    done = subprocess.run([sys.executable, '-c', KILLED_RUNS, str(ROOT / 'train.py'), json.dumps(runs)], capture_output=True, text=True, timeout=600,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    assert done.stdout.count(f'ended by {int(signal.SIGKILL)}\n') == len(CASES), done.stderr
    return out_dirs


@pytest.fixture(scope='module')
def unbroken(tiny, tmp_path_factory):
    """flags -> out_dir and metrics of a run to the end, done once for each."""
    runs = {}

    def run(flags):
        if flags not in runs:
            out_dir = tmp_path_factory.mktemp('unbroken')
            code, _, stderr, lines = train_here(*TINY, *flags.split(), f'--dataset={tiny}', out_dir=out_dir)
            assert code == 0, stderr
            runs[flags] = out_dir, lines
        return runs[flags]
    return run


@pytest.fixture
def finished(tiny, unbroken, tmp_path):
    """An out_dir of its own with a run of 20 iterations in it: ckpt.pt and ckpt_00000015.pt."""
    return shutil.copytree(unbroken('')[0], tmp_path / 'finished')


def resume(out_dir, *flags):
    code, stdout, stderr, lines = train_here('--init_from=resume', '--device=cpu', *flags, out_dir=out_dir)
    assert code == 0, stderr
    return stdout, lines


# -----------------------------------------------------------------------------
# as if nothing had happened


@pytest.mark.parametrize('name', CASES)
def test_a_killed_run_resumed_equals_an_unbroken_one(name, killed, unbroken):
    flags, die_at, new_flags = CASES[name]
    last_saved = (die_at - 1) // 5 * 5 if die_at % 5 else die_at
    out_dir = killed[name]
    assert read_checkpoint(out_dir / 'ckpt.pt')['iter_num'] == last_saved
    with open(out_dir / 'metrics.jsonl', 'a', encoding='utf-8') as f:
        f.write('{"iter": 99, "los')  # torn, as a crash leaves it

    stdout, lines = resume(out_dir, *new_flags.split())

    expected_dir, expected_lines = unbroken(flags)
    ours, theirs = read_checkpoint(out_dir / 'ckpt.pt'), read_checkpoint(expected_dir / 'ckpt.pt')
    for part in ('model', 'optimizer', 'scaler', 'iter_num', 'history', 'tokenizer', 'data'):
        assert not differences(ours[part], theirs[part], part)
    assert trajectory(lines) == trajectory(expected_lines)
    if not new_flags:
        assert without_times(lines) == without_times(expected_lines)
        assert ours['best_val_loss'] == theirs['best_val_loss']
        assert not differences(read_checkpoint(out_dir / 'best.pt')['model'], read_checkpoint(expected_dir / 'best.pt')['model'])
    assert f'iteration {last_saved})' in stdout
    if 'skip_spikes' in flags:
        assert 0 < ours['history'][0] < 20, 'the factor is not right for this test'


def last_line(stdout):
    """The last line, but for the acknowledgement of a signal, which another thread prints when its turn comes."""
    return [line for line in stdout.splitlines() if not line.endswith(': stopping after this step or batch')][-1]


# flags of the run, the iteration in which SIGTERM comes; an evaluation every 5: at 10 it is due when the run stops, at 20 it is the last
@pytest.mark.parametrize('optimizer, comes_at', [('adamw', 7), ('adamw', 9), ('muon', 9), ('adamw', 19)])
def test_a_stopped_run_resumed_equals_an_unbroken_one(tiny, unbroken, tmp_path, monkeypatch, optimizer, comes_at):
    flags = '--dropout=0.1 --optimizer=muon --arch=modern' if optimizer == 'muon' else '--dropout=0.1'
    encode = json.dumps

    def signalled(line, *args, **kwargs):
        if 'loss' in line and line.get('iter') == comes_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(line, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(json, 'dumps', signalled)
        code, stdout, stderr, _ = train_here(*TINY, *flags.split(), f'--dataset={tiny}', out_dir=tmp_path)
    k = comes_at + 1
    assert code == 0, stderr
    assert last_line(stdout) == f'stopped by SIGTERM: {tmp_path}/ckpt.pt has iteration {k}; python train.py --init_from=resume --out_dir={tmp_path} continues'
    assert read_checkpoint(tmp_path / 'ckpt.pt')['iter_num'] == k

    _, lines = resume(tmp_path)
    expected_dir, expected_lines = unbroken(flags)
    assert without_times(lines) == without_times(expected_lines)
    for name in ('ckpt.pt', 'best.pt'):
        ours, theirs = (read_checkpoint(folder / name) for folder in (tmp_path, expected_dir))
        for part in {'model', 'iter_num', 'history', 'best_val_loss', 'to_evaluate'} & theirs.keys():
            assert not differences(ours[part], theirs[part], part)
        assert not differences(ours.get('optimizer', {}).get('state'), theirs.get('optimizer', {}).get('state'))  # the groups have the rates of the last step
    assert not list(tmp_path.glob('*.old'))


def test_a_signal_before_the_first_step_ends_the_run_in_order(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(GPT, 'get_num_params', lambda self: os.kill(os.getpid(), signal.SIGUSR1) or 1)
    code, stdout, stderr, lines = train_here(*TINY, f'--dataset={tiny}', out_dir=tmp_path)
    assert code == 0 and last_line(stdout) == 'stopped by SIGUSR1 at iteration 0, where this run began: nothing new to save', stderr
    assert lines == [] and not (tmp_path / 'ckpt.pt').exists()


def test_max_iters_raised_on_resume_continues(tiny, unbroken, tmp_path):
    code, _, stderr, _ = train_here(*TINY, '--max_iters=12', f'--dataset={tiny}', out_dir=tmp_path / 'out')
    assert code == 0, stderr
    stdout, lines = resume(tmp_path / 'out', '--max_iters=20')
    assert 'max_iters = 20 from now on, was 12' in stdout
    expected_dir, expected_lines = unbroken('')
    assert without_times(lines) == without_times(expected_lines)  # the evaluation at 12 is gone: an unbroken run has none
    assert not differences(read_checkpoint(tmp_path / 'out' / 'ckpt.pt')['model'], read_checkpoint(expected_dir / 'ckpt.pt')['model'])


def test_a_finished_run_resumed_changes_no_file_but_metrics(finished):
    before = {path.name: path.read_bytes() for path in finished.glob('*.pt')}
    stdout, lines = resume(finished)
    assert [line['iter'] for line in lines if 'val_loss' in line] == [0, 5, 10, 15, 20]
    assert {path.name: path.read_bytes() for path in finished.glob('*.pt')} == before


@pytest.mark.parametrize('content', ['5', '{"starts": 5}', '{"settings": 3}'])
def test_what_is_damaged_in_run_json_is_left_out_with_one_line(finished, content):
    (finished / 'run.json').write_text(content, encoding='utf-8')
    code, stdout, stderr, _ = train_here('--init_from=resume', '--device=cpu', out_dir=finished)
    assert (code, stderr) == (0, '') and stdout.count('run.json') == stdout.count(': ignored') == 1
    assert len(json.loads((finished / 'run.json').read_text(encoding='utf-8'))['starts']) == 1


# -----------------------------------------------------------------------------
# which checkpoint


def test_a_damaged_checkpoint_is_named_and_the_next_older_one_taken(finished, unbroken):
    data = bytearray((finished / 'ckpt.pt').read_bytes())
    data[len(data) // 2] ^= 1
    (finished / 'ckpt.pt').write_bytes(data)
    stdout, lines = resume(finished)
    assert 'ckpt.pt' in stdout and 'ckpt.pt.corrupt' in stdout and 'ckpt_00000015.pt (iteration 15)' in stdout
    assert (finished / 'ckpt.pt.corrupt').read_bytes() == data
    expected_dir, expected_lines = unbroken('')
    assert without_times(lines) == without_times(expected_lines)
    assert not differences(read_checkpoint(finished / 'ckpt.pt')['model'], read_checkpoint(expected_dir / 'ckpt.pt')['model'])


def test_a_new_run_in_a_used_folder_never_falls_back_on_the_other_run(finished, tiny):
    code, _, stderr, _ = train_here(*TINY, '--seed=5', '--max_iters=12', '--eval_interval=3', f'--dataset={tiny}', out_dir=finished)
    assert code == 0, stderr
    assert [path.name for path in finished.glob('ckpt_*.pt')] == ['ckpt_00000009.pt']  # not 15 and 20, which the other run left
    (finished / 'ckpt.pt').write_bytes(b'damaged')
    assert 'ckpt_00000009.pt (iteration 9)' in resume(finished)[0]


def test_no_readable_checkpoint_is_an_error(finished):
    for path in finished.glob('ckpt*.pt'):
        path.write_bytes(b'not a checkpoint')
    code, _, stderr, _ = train_here('--init_from=resume', '--device=cpu', out_dir=finished)
    remedy = 'see the damaged files there, or start again with another --out_dir'
    assert (code, stderr) == (2, f'{finished} has no readable checkpoint left: {remedy}\n')


def test_auto_resume_starts_where_nothing_is_and_goes_on_where_something_is(tiny, unbroken, tmp_path):
    flags = *TINY, '--auto_resume=True', f'--dataset={tiny}'
    code, stdout, stderr, _ = train_here(*flags, '--max_iters=6', out_dir=tmp_path / 'out')
    assert code == 0 and 'iteration' not in stdout.split('done:')[0], stderr
    code, stdout, stderr, lines = train_here(*flags, out_dir=tmp_path / 'out')
    assert code == 0 and 'ckpt.pt (iteration 6)' in stdout, stderr
    assert trajectory(lines) == trajectory(unbroken('')[1])


def test_checkpoint_path_is_where_a_run_goes_on_from(finished, unbroken, tmp_path):
    stdout, lines = resume(tmp_path / 'new', f'--checkpoint_path={finished / "ckpt_00000015.pt"}')
    assert without_times(lines) == without_times([line for line in unbroken('')[1] if line['iter'] >= 15])
    assert read_checkpoint(tmp_path / 'new' / 'ckpt.pt')['iter_num'] == 20


def test_auto_resume_takes_checkpoint_path_only_until_out_dir_has_its_own(finished, tmp_path):
    flags = '--auto_resume=True', '--device=cpu', f'--checkpoint_path={finished / "ckpt_00000015.pt"}'
    code, stdout, stderr, lines = train_here(*flags, '--max_iters=18', out_dir=tmp_path / 'new')
    assert code == 0 and lines[0]['iter'] == 15, stderr
    code, stdout, stderr, lines = train_here(*flags, '--max_iters=20', out_dir=tmp_path / 'new')
    assert code == 0 and 'ckpt.pt (iteration 18)' in stdout, stderr
    assert [line['iter'] for line in lines if 'loss' in line] == [15, 16, 17, 18, 19]


def test_checkpoint_interval_does_not_depend_on_eval_interval(tiny, tmp_path):
    code, _, stderr, lines = train_here(*TINY, '--max_iters=11', '--eval_interval=7', '--checkpoint_interval=3', '--keep_last_n_checkpoints=-1',
                                        f'--dataset={tiny}', out_dir=tmp_path)
    assert code == 0, stderr
    assert [line['iter'] for line in lines if 'val_loss' in line] == [0, 7, 11]
    kept = [int(path.stem[5:]) for path in sorted(tmp_path.glob('ckpt_*.pt'))]
    assert kept == [3, 6, 7, 9]  # 7 because it was the best
    assert read_checkpoint(tmp_path / 'ckpt.pt')['iter_num'] == 11


def test_keep_last_n_checkpoints_stay(tiny, tmp_path):
    code, _, stderr, _ = train_here(*TINY, '--eval_interval=3', '--keep_last_n_checkpoints=2', f'--dataset={tiny}', out_dir=tmp_path)
    assert code == 0, stderr
    assert sorted(path.name for path in tmp_path.glob('*.pt')) == ['best.pt', 'ckpt.pt', 'ckpt_00000015.pt', 'ckpt_00000018.pt']


def test_best_pt_holds_the_weights_of_the_lowest_validation_loss(tmp_path):
    # how often each character occurs can be learned from the training text and helps; what follows what does not: the loss falls, then rises
    text = sentences(2000, 1)
    data = pack_chars(tmp_path / 'data', text, ''.join(random.Random(3).sample(text, 500)))
    code, _, stderr, lines = train_here(*TINY, '--max_iters=40', '--decay_lr=False', '--keep_last_n_checkpoints=-1', f'--dataset={data}',
                                        out_dir=tmp_path)
    assert code == 0, stderr
    losses = {line['iter']: line['val_loss'] for line in lines if 'val_loss' in line}
    best_iter = min(losses, key=losses.get)
    assert 0 < best_iter < 40, 'the text is not made right for this test'
    best = read_checkpoint(tmp_path / 'best.pt')
    assert (best['iter_num'], best['best_val_loss']) == (best_iter, losses[best_iter])
    assert 'optimizer' not in best
    assert not differences(best['model'], read_checkpoint(tmp_path / f'ckpt_{best_iter:08d}.pt')['model'])
    assert read_checkpoint(tmp_path / 'ckpt.pt')['best_val_loss'] == losses[best_iter]


def test_there_is_a_best_pt_even_where_training_made_the_model_worse(tiny, tmp_path):
    code, _, stderr, lines = train_here(*TINY, '--max_iters=4', '--learning_rate=50', '--decay_lr=False', f'--dataset={tiny}', out_dir=tmp_path)
    assert code == 0, stderr
    evaluations = [line for line in lines if 'val_loss' in line]
    assert evaluations[1]['val_loss'] > evaluations[0]['val_loss'], 'the rate is not high enough for this test'
    assert read_checkpoint(tmp_path / 'best.pt')['iter_num'] == 4


# -----------------------------------------------------------------------------
# which settings


def test_settings_given_now_win_and_are_named(finished):
    stdout, _ = resume(finished, '--max_iters=22', '--weight_decay=0.2', '--learning_rate=0.01')
    assert 'max_iters = 22 from now on, was 20\nweight_decay = 0.2 from now on, was 0.1\n' in stdout
    assert '\nlearning_rate =' not in stdout  # given, but as it was
    start = json.loads((finished / 'run.json').read_text(encoding='utf-8'))['starts'][-1]
    assert start['changed'].items() >= dict(max_iters=[20, 22], weight_decay=[0.1, 0.2]).items()
    assert start['changed'].keys() <= {'max_iters', 'weight_decay', 'init_from', 'out_dir'}
    state = read_checkpoint(finished / 'ckpt.pt')
    assert state['config']['weight_decay'] == 0.2
    assert {group['weight_decay'] for group in state['optimizer']['param_groups']} == {0.2, 0.0}


def test_a_best_loss_of_other_windows_is_not_the_one_to_beat(finished):
    before = read_checkpoint(finished / 'ckpt.pt')['best_val_loss']
    stdout, lines = resume(finished, '--eval_iters=1', '--max_iters=25', '--eval_interval=5')
    assert f'eval_iters changed: the best validation loss of {before:.4f} was measured on other windows' in stdout
    assert read_checkpoint(finished / 'ckpt.pt')['best_val_loss'] == lines[-1]['val_loss']


def test_the_count_of_steps_skipped_in_a_row_begins_again():
    assert Start(state=dict(history=[7.0, 6.0, 5.0, 4.0, 3.0])).history == [7.0, 0.0, 5.0, 4.0, 3.0]


@pytest.mark.parametrize('flag, was', [('n_layer=3', 2), ('arch=modern', 'gpt2'), ('block_size=8', 16), ('optimizer=muon', 'adamw')])
def test_what_cannot_change_fails_and_leaves_everything(finished, flag, was):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    code, _, stderr, _ = train_here('--init_from=resume', '--device=cpu', f'--{flag}', out_dir=finished)
    name = flag.split('=')[0]
    assert (code, stderr) == (2, f'{flag}: {finished}/ckpt.pt has {name}={was}: give --{name}={was}\n')
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_another_tokenizer_fails_and_leaves_everything(finished, tmp_path):
    text = sentences(2000, 1)
    data = pack_chars(tmp_path / 'other', text, text, ''.join(sorted(set(text), reverse=True)))
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    code, _, stderr, _ = train_here('--init_from=resume', '--device=cpu', f'--dataset={data}', '--max_iters=30', out_dir=finished)
    assert code == 2 and stderr.count('\n') == 1
    assert f'{finished}/ckpt.pt was trained with tokenizer ' in stderr and f'{data} was packed with ' in stderr
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_other_data_is_said(finished, tmp_path, tiny):
    text = sentences(2000, 1)
    data = pack_chars(tmp_path / 'other', text, text)
    assert 'not the one that the checkpoint was trained on' in resume(finished, f'--dataset={data}', '--max_iters=21')[0]
    assert 'not the one that the checkpoint was trained on' in resume(finished, f'--dataset={tiny}', '--max_iters=22')[0]
    assert 'not the one that the checkpoint was trained on' not in resume(finished, '--max_iters=23')[0]


@pytest.mark.parametrize('flags, problem', [
    (['--init_from=resume', '--checkpoint_path={}/best.pt'], '{}/best.pt holds weights only (best.pt?): resume from ckpt.pt or a numbered one, '
                                                             'or begin with its weights by --init_from=checkpoint --checkpoint_path=FILE\n'),
    (['--init_from=resume', '--checkpoint_path={}/none.pt'], '{}/none.pt: No such file or directory\n'),
    (['--checkpoint_path={}/ckpt.pt'], 'checkpoint_path={}/ckpt.pt is not used by init_from=scratch: add --init_from=resume to resume from it, '
                                      'or --init_from=checkpoint to begin with its weights\n'),
    (['--init_from=a.pt', '--checkpoint_path={}/ckpt.pt'], 'init_from=a.pt, checkpoint_path={}/ckpt.pt: name one file to begin with, by --init_from=FILE.pt '
                                                           'or by --init_from=checkpoint --checkpoint_path=FILE\n'),
])
def test_checkpoint_path_that_cannot_be_resumed(finished, flags, problem, tmp_path):
    code, _, stderr, _ = train_here(*(flag.format(finished) for flag in flags), '--device=cpu', out_dir=tmp_path / 'new')
    assert (code, stderr) == (2, problem.format(finished))
    assert not (tmp_path / 'new').exists()
