"""The recipes in config/: what follows from what in the depth dial, and that the short ones train."""

import math

import pytest
from conftest import ROOT, pack_chars, sentences, train_here, train_settings

from configurator import config_of, configure
from tokens.dataset import read_meta

DEPTH = str(ROOT / 'config' / 'depth.py')


@pytest.fixture
def dial(tiny, capsys):
    """What config/depth.py with some flags makes of train.py's settings."""
    def dial(*flags):
        settings = train_settings()
        configure(settings, [DEPTH, f'--dataset={tiny}', *flags])
        return config_of(settings)
    return dial


def batch_tokens(s):
    return s['gradient_accumulation_steps'] * s['batch_size'] * s['block_size']


def test_width_and_heads_follow_from_depth(dial):
    sizes = [(s['n_layer'], s['n_embd'], s['n_head']) for s in (dial('--depth=4'), dial('--depth=12'), dial('--depth=5', '--head_dim=64'), dial('--depth=5'))]
    assert sizes == [(4, 256, 2), (12, 768, 6), (5, 320, 5), (5, 384, 3)]


def test_the_horizon_is_max_iters_else_flops_else_tokens_per_weight(dial, tiny):
    n_weights = 12 * 4 * 256**2 + 256 * read_meta(tiny)['vocab_size']  # of the blocks and the head
    s = dial('--depth=4', '--target_param_data_ratio=20')
    assert s['max_iters'] * batch_tokens(s) == pytest.approx(20 * n_weights, rel=0.002)
    s = dial('--depth=4', '--target_param_data_ratio=20', '--target_flops=1e15', '--block_size=512')
    flops_per_token = 6 * n_weights + 12 * 4 * 256 * 512
    assert s['max_iters'] * batch_tokens(s) * flops_per_token == pytest.approx(1e15, rel=0.02)
    assert dial('--depth=4', '--target_flops=1e15', '--max_iters=77')['max_iters'] == 77


def test_batch_rates_and_decay_follow_from_the_horizon(dial):
    reference, longer = dial('--target_param_data_ratio=15.5'), dial('--target_param_data_ratio=62')  # 85M weights: 1.32e9 tokens, and 4 times as many
    assert batch_tokens(reference) == 2**19 and batch_tokens(longer) == 2**20  # 4**0.383 = 1.7
    assert reference['matrix_lr'] == 0.02 and longer['matrix_lr'] == pytest.approx(0.02 * math.sqrt(2))
    assert reference['weight_decay'] == pytest.approx(0.28, rel=0.02) and longer['weight_decay'] == pytest.approx(0.28 * math.sqrt(2) / 4, rel=0.02)
    narrow = dial('--depth=3', '--head_dim=64', '--gradient_accumulation_steps=32')  # 192 wide
    assert batch_tokens(narrow) == 2**19 and narrow['embedding_lr'] == pytest.approx(0.3 * 2) and narrow['head_lr'] == pytest.approx(0.008 * 2)
    assert dial('--gradient_accumulation_steps=3')['gradient_accumulation_steps'] == 3 and dial('--matrix_lr=0.5')['matrix_lr'] == 0.5


def test_schedules_are_fractions_of_the_run(dial):
    short, long = dial('--max_iters=20'), dial('--max_iters=20000')
    assert (short['warmup_iters'], short['muon_warmup_iters'], short['eval_interval']) == (0, 2, 2)
    assert (long['warmup_iters'], long['muon_warmup_iters'], long['eval_interval']) == (400, 2000, 2000)
    assert short['matrix_lr'] * short['weight_decay'] <= 0.02 + 1e-12


@pytest.mark.parametrize('flag', ['--depth=0', '--head_dim=-1', '--max_iters=0', '--target_flops=0', '--batch_size=0'])
def test_a_dial_below_its_range_is_one_line(dial, flag):
    with pytest.raises(ValueError, match=rf'depth\.py:\d+: ValueError: {flag[2:]}(\.0)?: accepted is more than 0$'):
        dial(flag)


def test_the_dial_trains(tiny, tmp_path):
    code, stdout, stderr, lines = train_here(DEPTH, f'--dataset={tiny}', '--depth=1', '--block_size=16', '--batch_size=256', '--head_dim=32', '--max_iters=10',
                                             '--device=cpu', '--dtype=float32', out_dir=tmp_path)
    assert code == 0, stderr
    assert 'modern' in stdout and lines[-1]['iter'] == 10 and lines[-1]['val_loss'] < lines[0]['val_loss'] - 0.4


@pytest.mark.parametrize('config, tokens', [('speedrun_cpu', 1024), ('quickstart', 2048), ('shakespeare_cpu', 2048)])
def test_the_recipes_for_two_cores_train_what_they_say(config, tokens, tmp_path):
    data = pack_chars(tmp_path / 'data', sentences(20_000, 1), sentences(1000, 2))
    code, stdout, stderr, lines = train_here(f'config/{config}.py', f'--dataset={data}', '--max_iters=20', '--device=cpu', out_dir=tmp_path / 'out')
    assert code == 0, stderr
    assert f'{tokens:,} tokens a step' in stdout and lines[-1]['val_loss'] < 1.5
    assert ('val_loss' in lines[0]) == (config != 'speedrun_cpu'), 'it counts the whole command, and evaluates at the end only'


def test_a_small_model_is_tuned_by_the_recipe_of_the_results():
    """docs/RESULTS.md gives it as two config files and four flags."""
    names = ('optimizer', 'matrix_lr', 'embedding_lr', 'learning_rate', 'head_lr', 'min_lr', 'weight_decay', 'beta1', 'beta2', 'grad_clip', 'decay_lr',
             'lr_schedule', 'decay_fraction', 'warmup_iters', 'batch_size', 'gradient_accumulation_steps', 'isolate_documents', 'auto_resume')
    flags = ['--matrix_lr=0.02', '--embedding_lr=0.2', '--learning_rate=0.002', '--head_lr=0.002']
    small, measured = train_settings(), train_settings()
    configure(small, [str(ROOT / 'config/finetune_small.py')])
    configure(measured, [str(ROOT / 'config/quickstart.py'), str(ROOT / 'config/finetune_dolly.py'), *flags])
    assert {name: small[name] for name in names} == {name: measured[name] for name in names}
