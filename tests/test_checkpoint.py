"""checkpoint.py: never half-written, never silently wrong, and the same state back, whatever optimizer and architecture."""

import copy
import errno
import io
import os
import random
import re
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, differences

import checkpoint
import files
from model import GPT, GPTConfig
from optim import OptimizerSettings, configure_optimizers
from training.progress import Progress
from weights import torchfile

SIZES = dict(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=8)


def small_state(iter_num=10, run_id='a', **more):
    """A checkpoint with a recognisable tensor, loadable but of no model."""
    return dict(model={'weight': torch.full((300,), float(iter_num)), 'bias': torch.arange(7.0)}, optimizer={'state': {}, 'param_groups': []},
                scaler={}, model_args=SIZES | {'n_layer': 1}, iter_num=iter_num, best_val_loss=2.5, config={'dataset': 'x'}, run_id=run_id,
                format=checkpoint.FORMAT, **more)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def save_many(folder, iter_nums, run_id='a', resumed_from='', at=0, **settings):
    """Save as one process does: of a new run, or of one resumed from a file at an iteration."""
    checkpoints = checkpoint.CheckpointFolder(folder, resumed_from, at)
    for iter_num in iter_nums:
        checkpoints.save(small_state(iter_num, run_id), **settings)
    return checkpoints


def error_of(path):
    with pytest.raises((ValueError, OSError)) as caught:
        checkpoint.load(path)
    message = str(caught.value).replace(str(path), 'PATH')
    assert '\n' not in message and len(message) < 300
    return message


def damage(path, position=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 1
    path.write_bytes(data)


# -----------------------------------------------------------------------------
# writing


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    def write(f):
        f.write(b'new')
        raise error
    path = tmp_path / 'file'
    for error in (OSError('disk full'), KeyboardInterrupt()):
        path.write_bytes(b'old')
        with pytest.raises(type(error)):
            files.write_atomically(path, write)
        assert names(tmp_path) == ['file'] and path.read_bytes() == b'old'


def test_a_file_name_outside_the_encoding_of_the_locale_is_written_and_read_back(tmp_path):
    value = {'out_dir': '中文 \udce4'}
    files.write_json(tmp_path / 'run.json', value)
    assert files.read_json(tmp_path / 'run.json') == value


def test_a_checkpoint_in_a_folder_whose_name_is_not_utf8_is_read(tmp_path):
    path = tmp_path / os.fsdecode(b'\xe4') / 'ckpt.pt'
    path.parent.mkdir()
    files.write_atomically(path, lambda f: torchfile.write({'iter_num': 3}, f))
    assert torchfile.read(path) == {'iter_num': 3}


def test_a_name_that_the_locale_cannot_express_is_printed_as_utf8():
    assert files.printable('输出'.encode().decode('ascii', 'surrogateescape')) == '输出'
    assert files.printable('\udce8\x1b \ud83d') == '\ufffd\\x1b \ud83d'


def test_the_order_is_fsync_replace_fsync_of_the_folder(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    path = tmp_path / 'file'

    def recorded_fsync(descriptor):
        calls.append('fsync folder' if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f'fsync {[p.read_bytes() for p in tmp_path.iterdir()]}')
        fsync(descriptor)

    def recorded_replace(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        calls.append('replace')
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', recorded_fsync)
    monkeypatch.setattr(os, 'replace', recorded_replace)
    files.write_atomically(path, lambda f: f.write(b'content'))
    assert calls == ["fsync [b'content']", 'replace'] + ['fsync folder'] * (os.name == 'posix')


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip('fcntl')

    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, 'lockf', none)
    files.lock(tmp_path).close()
    assert capsys.readouterr().out == f'{tmp_path}/.lock: No locks available: this file system has no locks, make sure that no other process writes there\n'


def test_leftovers_of_a_killed_writer_go_with_the_next_save(tmp_path):
    for name in ('.ckpt.pt.tmp123', '.best.pt.tmp7', '.ckpt_00000010.pt.tmp7', '.other.tmp1'):
        (tmp_path / name).write_bytes(b'half')
    (tmp_path / '.mine').write_bytes(b'')
    save_many(tmp_path, [10])
    assert names(tmp_path) == ['.mine', 'ckpt.pt']


def test_best_holds_weights_only(tmp_path):
    checkpoints = checkpoint.CheckpointFolder(tmp_path)
    checkpoints.save(small_state(10), is_best=True)
    checkpoints.save(small_state(20))
    best = checkpoint.load(tmp_path / 'best.pt')
    assert best['iter_num'] == 10 and not {'optimizer', 'scaler'} & best.keys()
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter_num'] == 20


# -----------------------------------------------------------------------------
# how many stay


@pytest.mark.parametrize('keep_last_n, kept', [(0, []), (1, [40]), (3, [20, 30, 40]), (-1, [10, 20, 30, 40])])
def test_keep_last_n(tmp_path, keep_last_n, kept):
    save_many(tmp_path, [10, 20, 30, 40, 50], keep_last_n=keep_last_n)
    assert names(tmp_path) == ['ckpt.pt'] + [f'ckpt_{n:08d}.pt' for n in kept]
    for n in kept:
        assert checkpoint.load(tmp_path / f'ckpt_{n:08d}.pt')['iter_num'] == n
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter_num'] == 50


def test_numbers_are_compared_as_numbers(tmp_path):
    save_many(tmp_path, [99_999_999, 100_000_000, 100_000_001], keep_last_n=1)
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_100000000.pt']


def test_nothing_is_pruned_before_the_new_one_is_there(tmp_path, monkeypatch):
    checkpoints = save_many(tmp_path, [10, 20, 30], keep_last_n=2)

    def fill_the_disk(state, f):
        f.write(b'half')
        raise OSError('disk full')
    monkeypatch.setattr(torch, 'save', fill_the_disk)
    with pytest.raises(OSError, match='disk full'):
        checkpoints.save(small_state(40), keep_last_n=1)
    assert {'ckpt.pt', 'ckpt_00000010.pt', 'ckpt_00000020.pt'} <= set(names(tmp_path))
    assert not [name for name in names(tmp_path) if 'tmp' in name]
    assert checkpoint.load_newest(tmp_path)[0]['iter_num'] == 30


def test_where_there_are_no_hard_links_it_is_a_copy(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError('not supported')
    monkeypatch.setattr(os, 'link', link)
    save_many(tmp_path, [10, 20, 30], keep_last_n=1)
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_00000020.pt']
    assert checkpoint.load(tmp_path / 'ckpt_00000020.pt')['iter_num'] == 20


def test_a_checkpoint_that_somebody_moved_away_does_not_stop_the_saving(tmp_path):
    checkpoints = save_many(tmp_path, [10, 20], keep_last_n=1)
    (tmp_path / 'ckpt.pt').rename(tmp_path / 'mine.pt')
    checkpoints.save(small_state(30), keep_last_n=1)
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_00000010.pt', 'mine.pt'] and checkpoint.load(tmp_path / 'ckpt.pt')['iter_num'] == 30


def test_keeping_maps_no_file_that_is_about_to_be_replaced(tmp_path):
    if not os.path.exists('/proc/self/maps'):
        pytest.skip('needs /proc')
    save_many(tmp_path, [10, 20], keep_last_n=1)  # Windows refuses to replace a file that is mapped
    with open('/proc/self/maps', encoding='utf-8') as f:
        assert str(tmp_path) not in f.read()


# -----------------------------------------------------------------------------
# one folder, several runs


def test_a_new_run_sets_the_checkpoints_of_another_aside(tmp_path, capsys):
    save_many(tmp_path, [1000, 2000, 3000], 'first', keep_last_n=2)
    save_many(tmp_path, [1500], 'second', keep_last_n=2)
    others = ['ckpt.pt', 'ckpt_00001000.pt', 'ckpt_00002000.pt']
    assert names(tmp_path) == ['ckpt.pt', 'old-1'] and names(tmp_path / 'old-1') == others
    assert f'{tmp_path}: ckpt_00002000.pt, ckpt_00001000.pt, ckpt.pt moved to {tmp_path / "old-1"}' in capsys.readouterr().out
    newest = tmp_path / 'ckpt.pt'
    save_many(tmp_path, [2500, 3500], 'second', resumed_from=newest, at=1500, keep_last_n=2)
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_00001500.pt', 'ckpt_00002500.pt', 'old-1']
    for expected in (3500, 2500, 1500):
        state, path = checkpoint.load_newest(tmp_path)
        assert (state['iter_num'], state['run_id']) == (expected, 'second')
        path.unlink()
    assert checkpoint.load(tmp_path / 'old-1/ckpt_00002000.pt')['run_id'] == 'first'


def test_files_set_aside_are_never_overwritten(tmp_path):
    for n, run_id in enumerate(('first', 'second', 'third')):
        save_many(tmp_path, [10], run_id)
        assert names(tmp_path) == ['ckpt.pt', *(f'old-{i}' for i in range(1, n + 1))]
    runs = [checkpoint.load(tmp_path / folder / 'ckpt.pt')['run_id'] for folder in ('old-1', 'old-2', '')]
    assert runs == ['first', 'second', 'third']


def test_a_run_that_went_back_sets_its_later_checkpoints_aside(tmp_path):
    save_many(tmp_path, [10, 20, 30, 40], keep_last_n=-1)
    save_many(tmp_path, [25, 35], keep_last_n=-1, resumed_from=tmp_path / 'ckpt_00000020.pt', at=20)
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_00000010.pt', 'ckpt_00000020.pt', 'ckpt_00000025.pt', 'old-1']
    assert names(tmp_path / 'old-1') == ['ckpt.pt', 'ckpt_00000030.pt']
    assert checkpoint.load(tmp_path / 'old-1/ckpt.pt')['iter_num'] == 40


def test_a_run_goes_on_where_the_newest_was_damaged(tmp_path):
    save_many(tmp_path, [10, 20, 30], keep_last_n=2)
    damage(tmp_path / 'ckpt.pt')
    state, path = checkpoint.load_newest(tmp_path, rename_damaged=True)
    save_many(tmp_path, [state['iter_num'] + 10], keep_last_n=2, resumed_from=path, at=state['iter_num'])
    assert names(tmp_path) == ['ckpt.pt', 'ckpt.pt.corrupt', 'ckpt_00000010.pt', 'ckpt_00000020.pt']


def test_a_failed_copy_does_not_forget_a_best_loss_that_is_saved(tmp_path, monkeypatch):
    checkpoints, progress = checkpoint.CheckpointFolder(tmp_path), Progress()
    progress.iter_num = 10
    progress.note_evaluation(3.0)
    checkpoints.save_or_warn(small_state(10), progress, keep_last_n=1, is_best=True, must_succeed=False)

    def full(*_):
        raise OSError(28, 'No space left on device', str(tmp_path / 'ckpt_00000010.pt'))
    monkeypatch.setattr(os, 'link', full)
    monkeypatch.setattr(checkpoint, 'write_atomically', full)
    checkpoints.save_or_warn(small_state(20), progress, keep_last_n=1, is_best=False, must_succeed=False)
    assert progress.best_val_loss == 3.0


# no space for the best weights, or for the checkpoint after them; nothing at all while the weights are not finite
def test_what_could_not_be_saved_is_said_and_not_remembered(tmp_path, monkeypatch, capsys):
    checkpoints, progress = checkpoint.CheckpointFolder(tmp_path / 'my ckpt.pt run'), Progress(iter_num=0)
    (tmp_path / 'my ckpt.pt run').mkdir()
    assert checkpoints.what_is_saved() == 'no checkpoint has been saved yet'
    progress.iter_num = 10
    progress.note_evaluation(3.0)
    how = dict(keep_last_n=0, is_best=True, must_succeed=False)
    checkpoints.save_or_warn(small_state(10), progress, **how)
    with monkeypatch.context() as patch:
        def full(path, write):
            raise OSError(28, 'No space left on device', str(path))
        patch.setattr(checkpoint, 'write_atomically', full)
        progress.iter_num = 20
        assert progress.note_evaluation(2.0) and progress.best_val_loss == 2.0
        checkpoints.save_or_warn(small_state(20), progress, **how)
    assert progress.best_val_loss == 3.0
    newest = tmp_path / 'my ckpt.pt run' / 'ckpt.pt'
    assert f'No space left on device: the last good checkpoint is {newest} of iteration 10' in capsys.readouterr().out
    spoilt = small_state(30)
    spoilt['model']['weight'][7] = float('nan')
    checkpoints.save_or_warn(spoilt, progress, **how)
    said = capsys.readouterr().out
    assert 'NOT SAVED at iteration 30, the weights or the validation loss are not finite' in said
    assert said.endswith(f'the last good checkpoint is {newest} of iteration 10 (best.pt: the lowest validation loss)\n')
    assert checkpoint.load(newest)['iter_num'] == 10


# -----------------------------------------------------------------------------
# reading what is damaged


@pytest.fixture(scope='module')
def packed():
    """The bytes of a checkpoint, and its state."""
    state, buffer = small_state(), io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue(), state


def is_noticed(path, data, state):
    """Whether load() refuses the data; if it does not, they must be the state, bit for bit."""
    path.write_bytes(data)
    try:
        loaded = checkpoint.load(path)
    except ValueError:
        return True
    assert not differences(loaded, state)
    return False


def flipped(data, bit):
    copy = bytearray(data)
    copy[bit // 8] ^= 1 << bit % 8
    return bytes(copy)


def test_flipped_bits_are_noticed_or_change_nothing(tmp_path, packed):
    data, state = packed
    draw = random.Random(0)
    for _ in range(40):
        is_noticed(tmp_path / 'ckpt.pt', flipped(data, draw.randrange(8 * len(data))), state)
    # in a tensor, none goes unnoticed
    start = data.index(state['model']['weight'].numpy().tobytes())
    assert all(is_noticed(tmp_path / 'ckpt.pt', flipped(data, bit), state) for bit in range(8 * start, 8 * (start + 1200), 61))
    # every bit of one entry of the directory: among them the one that makes a tensor a folder, read as nothing
    entry = data.rindex(b'PK\1\2', 0, data.rindex(b'data/1'))
    noticed = [is_noticed(tmp_path / 'ckpt.pt', flipped(data, bit), state) for bit in range(8 * entry, 8 * (entry + 46))]
    assert noticed[8 * 38 + 4]


def test_every_flipped_bit_of_a_saved_file_is_noticed(tmp_path):
    save_many(tmp_path, [10])
    data = (tmp_path / 'ckpt.pt').read_bytes()
    directory = data.index(b'PK\1\2')  # from there to the end, and bits of all the rest
    bits = [*range(0, 8 * directory, 23), *range(8 * directory, 8 * len(data), 3), *range(8 * len(data) - 200, 8 * len(data))]
    for bit in bits:
        (tmp_path / 'ckpt.pt').write_bytes(flipped(data, bit))
        with pytest.raises(ValueError, match='is damaged|is not a readable checkpoint'):
            torchfile.read(tmp_path / 'ckpt.pt')
    for n in range(len(data) - 60, len(data)):  # at len(data) - 14 the checksum is gone as a whole
        (tmp_path / 'ckpt.pt').write_bytes(data[:n])
        with pytest.raises(ValueError, match='is damaged|is not a readable checkpoint'):
            torchfile.read(tmp_path / 'ckpt.pt')


def test_truncated_empty_and_zeroed_files_are_noticed(tmp_path, packed):
    data, state = packed
    for n in {0, 1, 30, 100, len(data) // 2, len(data) - 100, len(data) - 22, len(data) - 1}:
        assert is_noticed(tmp_path / 'ckpt.pt', data[:n], state), n
    for start in range(0, len(data), 256):
        zeroed = data[:start] + bytes(len(data[start:start + 256])) + data[start + 256:]
        noticed = is_noticed(tmp_path / 'ckpt.pt', zeroed, state)
    assert noticed  # the end of the directory


@pytest.mark.parametrize('write, message', [
    (lambda f: None, 'PATH is not a readable checkpoint (File is not a zip file)'),
    (lambda f: f.write(b'some text\n' * 100), 'PATH is not a readable checkpoint (File is not a zip file)'),
    (lambda f: zipfile.ZipFile(f, 'w').close(), 'PATH is not a readable checkpoint'),
    (lambda f: torch.save([1, 2], f), 'PATH holds a list, not a checkpoint dict'),
    (lambda f: torch.save(torch.zeros(3), f), 'PATH holds a Tensor, not a checkpoint dict'),
    (lambda f: torch.save({'weight': torch.zeros(3)}, f), "PATH: its weights (weight) lack GPT-2's names, transformer.wte.weight and so on"),
    (lambda f: torch.save({'epoch': 3}, f), 'PATH has no weights by name, itself or under model, model_state_dict, state_dict'),
    (lambda f: torch.save(small_state() | {'model': {1: 2}}, f), 'PATH: 1 is int: accepted are dense floating-point weights'),
    (lambda f: torch.save(small_state() | {'model_args': 3}, f), 'PATH is not a checkpoint of flatGPT or nanoGPT: model_args is a int'),
    (lambda f: torch.save(small_state() | {'iter_num': '../x'}, f), 'PATH is not a checkpoint of flatGPT or nanoGPT: iter_num is a str'),
    (lambda f: torch.save(small_state() | {'config': 'x'}, f), 'PATH is not a checkpoint of flatGPT or nanoGPT: config is a str'),
    (lambda f: torch.save(small_state() | {'format': 2}, f), 'PATH has format 2, this version reads 1: use a newer flatGPT'),
])
def test_what_is_no_checkpoint_gets_one_line(tmp_path, write, message):
    path = tmp_path / 'ckpt.pt'
    with open(path, 'wb') as f:
        write(f)
    assert error_of(path).startswith(message)


def test_a_checkpoint_that_asks_for_code_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'was_here'),)

    path = tmp_path / 'ckpt.pt'
    for name in ('model', 'config', 'anything'):
        torch.save(small_state() | {name: Hostile()}, path)
        assert re.fullmatch(r'PATH is not a readable checkpoint \(it asks for \w+\.mkdir, and only tensors and plain values are read\)', error_of(path))
        assert not (tmp_path / 'was_here').exists()


def test_a_missing_file_and_one_that_cannot_be_opened_are_no_damage(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='No such file'):
        checkpoint.load(tmp_path / 'ckpt.pt')
    save_many(tmp_path, [10])

    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('builtins.open', refuse)
    with pytest.raises(PermissionError):
        checkpoint.load_newest(tmp_path)
    monkeypatch.undo()
    assert names(tmp_path) == ['ckpt.pt']


def test_the_newest_that_can_be_read_is_taken(tmp_path, capsys):
    assert checkpoint.load_newest(tmp_path) == checkpoint.load_newest(tmp_path / 'none') == (None, None)
    save_many(tmp_path, [10, 20, 30], keep_last_n=2)
    for newest, older, n in (('ckpt.pt', 'ckpt_00000020.pt', 20), ('ckpt_00000020.pt', 'ckpt_00000010.pt', 10)):
        damage(tmp_path / newest)
        state, path = checkpoint.load_newest(tmp_path, rename_damaged=True)
        assert (state['iter_num'], path) == (n, tmp_path / older)
        said = capsys.readouterr().out
        assert said.startswith(f'{tmp_path / newest} is damaged: its checksum ') and f'renamed to {newest}.corrupt' in said
    damage(tmp_path / 'ckpt_00000010.pt')
    for _ in range(2):  # the second time too: nothing readable is not the same as nothing
        with pytest.raises(ValueError, match='has no readable checkpoint left'):
            checkpoint.load_newest(tmp_path, rename_damaged=True)
    assert names(tmp_path) == ['ckpt.pt.corrupt', 'ckpt_00000010.pt.corrupt', 'ckpt_00000020.pt.corrupt']


def test_readers_change_nothing(tmp_path, capsys):
    save_many(tmp_path, [10, 20], keep_last_n=1)
    damage(tmp_path / 'ckpt.pt')
    state, _ = checkpoint.load_newest(tmp_path)
    assert state['iter_num'] == 10 and 'trying an older one' in capsys.readouterr().out
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_00000010.pt']


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError("can't allocate memory: 4 bytes"), OSError(errno.EIO, 'Input/output error'),
                                   OSError(errno.EMFILE, 'Too many open files')])
def test_only_proved_damage_renames_a_file(tmp_path, monkeypatch, error):
    save_many(tmp_path, [10, 20], keep_last_n=1)

    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(torch, 'load', fail)
    with pytest.raises((MemoryError, OSError)):
        checkpoint.load_newest(tmp_path, rename_damaged=True)
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_00000010.pt']


SAVE = """
import sys
import torch
import checkpoint
def rss(name):
    with open('/proc/self/status', encoding='ascii') as f:
        return int(f.read().split(name + ':')[1].split()[0]) * 1024
folder = checkpoint.CheckpointFolder(sys.argv[1])
for n_rows in (1, 1 << 14):  # the first time torch loads what it needs
    state = dict(model={'weight': torch.ones(n_rows, 1024)}, optimizer={}, scaler={}, iter_num=n_rows)
    if n_rows > 1:
        with open('/proc/self/clear_refs', 'w') as f:
            f.write('5')
        before = rss('VmRSS')
    folder.save(state, is_best=True)
print(rss('VmHWM') - before)
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='the peak of the resident set is read from /proc')
def test_saving_ckpt_and_best_takes_no_copy_of_the_weights(tmp_path):
    done = subprocess.run([sys.executable, '-c', SAVE, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == ['best.pt', 'ckpt.pt'] and (tmp_path / 'best.pt').stat().st_size > 64 << 20
    assert int(done.stdout.splitlines()[-1]) < 40 << 20  # of 64 MB; the checksum reads 16 MB at a time


def test_a_dangling_link_is_an_error(tmp_path):
    (tmp_path / 'ckpt.pt').symlink_to(tmp_path / 'unmounted' / 'ckpt.pt')
    with pytest.raises(FileNotFoundError) as error:
        checkpoint.load_newest(tmp_path, rename_damaged=True)
    assert str(error.value) == (f'{tmp_path}/ckpt.pt is a link to {tmp_path}/unmounted/ckpt.pt, which does not exist: put that file back')


@pytest.mark.parametrize('make', [lambda path: path.symlink_to(path.with_name('unmounted')), Path.touch], ids=['dangling link', 'file'])
def test_an_out_dir_that_cannot_be_listed_is_an_error(tmp_path, make):
    make(tmp_path / 'out')
    with pytest.raises(OSError, match='out'):
        checkpoint.load_newest(tmp_path / 'out', rename_damaged=True)


def test_a_file_in_torchs_format_before_1_6_is_left_where_it_is(tmp_path):
    torch.save(small_state(), tmp_path / 'ckpt.pt', _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match='is in the format of torch before 1.6'):
        checkpoint.load_newest(tmp_path, rename_damaged=True)
    assert names(tmp_path) == ['ckpt.pt']


def test_a_sound_file_of_another_kind_is_left_where_it_is(tmp_path):
    save_many(tmp_path, [10, 20], keep_last_n=1)
    torch.save(small_state() | {'format': 2}, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='has format 2, this version reads 1: use a newer flatGPT'):
        checkpoint.load_newest(tmp_path)
    assert names(tmp_path) == ['ckpt.pt', 'ckpt_00000010.pt']


# -----------------------------------------------------------------------------
# model and optimizers


def new_model(arch, seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(arch=arch, **{**SIZES, **changes}))


def new_optimizers(model, optimizer, learning_rate=1e-2, weight_decay=0.1):
    return configure_optimizers(model, OptimizerSettings(optimizer, learning_rate, weight_decay=weight_decay))


def train(model, optimizers, n_steps, seed=0):
    """Steps on random tokens; returns the weights."""
    torch.manual_seed(seed)
    for _ in range(n_steps):
        idx = torch.randint(13, (4, 9))
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return copy.deepcopy(model.state_dict())


def through_a_file(folder, state):
    checkpoint.CheckpointFolder(folder).save(small_state() | state)
    return checkpoint.load(folder / 'ckpt.pt')


BOTH = pytest.mark.parametrize('arch, optimizer', [('gpt2', 'adamw'), ('gpt2', 'muon'), ('modern', 'adamw'), ('modern', 'muon')])


@BOTH
def test_scatter_gives_back_what_gather_took(tmp_path, arch, optimizer):
    model = new_model(arch)
    optimizers = new_optimizers(model, optimizer)
    train(model, optimizers, 3)
    state = through_a_file(tmp_path, checkpoint.gather(model, optimizers))

    other = new_model(arch, seed=1)
    others = new_optimizers(other, optimizer)
    checkpoint.scatter(state, other, others)
    assert not differences(checkpoint.gather(other, others), checkpoint.gather(model, optimizers))
    assert not differences(train(other, others, 2), train(model, optimizers, 2))
    assert (other.lm_head.weight is other.transformer.wte.weight) == (arch == 'gpt2')  # tied weights stay tied


@BOTH
def test_settings_of_now_win_over_the_stored_ones(tmp_path, arch, optimizer):
    model = new_model(arch)
    optimizers = new_optimizers(model, optimizer)
    train(model, optimizers, 3)
    state = through_a_file(tmp_path, checkpoint.gather(model, optimizers))

    other = new_model(arch, seed=1)
    others = new_optimizers(other, optimizer, learning_rate=3e-3, weight_decay=0.01)
    settings = [{k: v for k, v in group.items() if k != 'params'} for each in others for group in each.param_groups]
    checkpoint.scatter(state, other, others)
    assert settings == [{k: v for k, v in group.items() if k != 'params'} for each in others for group in each.param_groups]
    for each in optimizers:  # the same change by hand
        for ours, theirs in zip(each.param_groups, others[optimizers.index(each)].param_groups):
            ours.update({k: v for k, v in theirs.items() if k != 'params'})
    assert not differences(train(other, others, 2), train(model, optimizers, 2))


def test_scatter_names_what_does_not_fit():
    model = new_model('gpt2')
    optimizers = new_optimizers(model, 'adamw')
    train(model, optimizers, 1)
    state = copy.deepcopy(checkpoint.gather(model, optimizers)) | dict(format=1)
    with pytest.raises(ValueError, match=re.escape(
            'the checkpoint has no momentum_buffer of transformer.h.0.attn.c_attn.weight with shape (24, 8): resume it with its --optimizer and --lr_groups')):
        checkpoint.scatter(state, model, new_optimizers(model, 'muon'))
    larger = new_model('gpt2', vocab_size=17)
    with pytest.raises(ValueError, match=re.escape('the checkpoint: transformer.wte.weight has shape (13, 8), the model expects (17, 8)')):
        checkpoint.scatter(state, larger, new_optimizers(larger, 'adamw'))


# -----------------------------------------------------------------------------
# nanoGPT's format


def write_nanogpt(path, model, optimizer, prefix):
    """What nanoGPT's train.py saves: its own names, numbered moments, a tensor for the loss."""
    torch.save(dict(
        model={f'{prefix}{k}': v for k, v in model.state_dict().items()}, optimizer=optimizer.state_dict(), iter_num=2000,
        model_args=dict(n_layer=2, n_head=2, n_embd=8, block_size=8, bias=False, vocab_size=13, dropout=0.0),
        best_val_loss=torch.tensor(1.5), config=dict(dataset='shakespeare_char', out_dir='out')), path)


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module._orig_mod.'])
def test_a_checkpoint_of_nanogpt_goes_on(tmp_path, prefix):
    model = new_model('gpt2', bias=False, activation='gelu')
    decay, rest = ([p for p in model.parameters() if (p.dim() >= 2) == matrices] for matrices in (True, False))
    theirs = torch.optim.AdamW([dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)], lr=1e-2, betas=(0.9, 0.95), fused=True)
    train(model, [theirs], 3)
    write_nanogpt(tmp_path / 'ckpt.pt', model, theirs, prefix)

    state, _ = checkpoint.load_newest(tmp_path)
    assert (state['iter_num'], state['best_val_loss'], type(state['best_val_loss'])) == (2000, 1.5, float)
    ours = GPT(GPTConfig(**state['model_args']))
    assert (ours.config.arch, ours.config.activation, ours.config.bias) == ('gpt2', 'gelu', False)
    optimizers = configure_optimizers(ours, OptimizerSettings(learning_rate=1e-2))
    checkpoint.scatter(state, ours, optimizers)
    moments = optimizers[0].state
    for p, q in zip(ours.parameters(), model.parameters()):
        assert not differences(moments[p], theirs.state[q])
    assert not differences(train(ours, optimizers, 2), train(model, [theirs], 2))

    with pytest.raises(ValueError, match='resume it with its --optimizer and --lr_groups'):
        checkpoint.scatter(state, ours, new_optimizers(ours, 'muon'))


@pytest.mark.parametrize('change, words', [
    (dict(model_args=dict(n_layer='abc')), "n_layer = 'abc' is none that this version knows"),
    (dict(model_args=dict(n_kv_heads=2)), 'n_kv_heads = 2 is none that this version knows'),
    (dict(model=dict(w=torch.ones(2, dtype=torch.int8))), 'w is torch.int8, torch.strided: accepted are dense floating-point weights'),
    (dict(format=torch.ones(3)), 'this version reads 1'),
    (dict(history='abc'), 'history is a str'),
    (dict(history=[1.0]), 'its history is [1.0], accepted are five numbers'),
    (dict(history=[None] * 5), 'accepted are five numbers'),
    (dict(since_best='x'), 'since_best is a str'),
    (dict(position=[1]), 'position is a list'),
])
def test_contents_of_the_wrong_kind_get_one_line(tmp_path, change, words):
    torch.save(small_state() | change, tmp_path / 'ckpt.pt')
    assert words in error_of(tmp_path / 'ckpt.pt')
