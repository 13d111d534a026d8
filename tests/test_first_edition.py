"""A dataset and checkpoints written by the first edition of this project: they load, resume and end as they did there."""

import json
import shutil

import pytest
from conftest import ROOT, read_metrics, run_here, train_here

FILES = ROOT / 'tests' / 'first_edition'


@pytest.fixture(params=['adamw', 'muon'])
def run(request, tmp_path, monkeypatch):
    """An out_dir with the checkpoint of iteration 10 of 20, and the metrics of the whole run in the first edition."""
    shutil.copytree(FILES / 'dataset', tmp_path / 'first_dataset')
    monkeypatch.chdir(tmp_path)  # the checkpoint names its dataset by this folder
    out_dir = shutil.copytree(FILES / request.param, tmp_path / 'out')
    return out_dir, read_metrics(out_dir)


def test_a_run_of_the_first_edition_is_resumed_to_the_same_losses(run):
    out_dir, expected = run
    code, stdout, stderr, lines = train_here('--init_from=resume', '--device=cpu', out_dir=out_dir)
    assert code == 0 and 'iteration 10)' in stdout, stderr
    for line, before in zip(lines, expected, strict=True):
        assert line['iter'] == before['iter']
        for name in line.keys() & {'loss', 'loss_smoothed', 'grad_norm', 'lr', 'train_loss', 'val_loss', 'val_bpb'}:
            assert line[name] == pytest.approx(before[name], rel=1e-6), (name, line['iter'])


def test_checkpoints_of_the_first_edition_are_sampled(run):
    out_dir, _ = run
    for path in out_dir.glob('*.pt'):
        code, stdout, stderr = run_here('sample.py', f'--checkpoint_path={path}', '--num_samples=1', '--max_new_tokens=20',
                                        '--device=cpu', '--dtype=float32')
        assert code == 0 and '---------------' in stdout, stderr


def test_run_json_of_the_first_edition_gets_a_record_of_the_new_start(run):
    out_dir, _ = run
    (out_dir / 'run.json').write_text(json.dumps(dict(settings=dict(learning_rate=0.5, max_iters=20))), encoding='utf-8')
    assert train_here('--init_from=resume', '--device=cpu', out_dir=out_dir)[0] == 0
    (start,) = json.loads((out_dir / 'run.json').read_text(encoding='utf-8'))['starts']
    assert start['iter_num'] == 10 and start['changed']['learning_rate'] == [0.5, 0.01]
