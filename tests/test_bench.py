"""bench.py on a model of a few thousand weights: what it prints, and that its numbers belong together. How fast is no test's business."""

import json
import math
import os

import pytest
import torch
from conftest import (
    TINY,
    differences,
    read_checkpoint,
    run_here,
    train_here,
)

import bench
from configurator import config_of, configure
from corpus.train_tokenizer import train_bpe
from dev import compare
from model import GPT, GPTConfig
from optim import OptimizerSettings
from tokens.loader import Loader

SMALL = ('--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16', '--vocab_size=65', '--batch_size=2', '--device=cpu', '--dtype=float32')
STEP = (*SMALL, '--warmup_steps=1', '--steps=3')
DECODE = (*SMALL, '--mode=decode', '--prompt_tokens=8', '--max_new_tokens=5', '--rounds=2')


def run_bench(*flags):
    """(exit code, stdout, stderr, the last line's object or None) of python bench.py."""
    code, stdout, stderr = run_here('bench.py', '--json', *flags)
    return code, stdout, stderr, json.loads(stdout.splitlines()[-1]) if code == 0 else None


@pytest.mark.parametrize('arch, optimizer', [('gpt2', 'adamw'), ('modern', 'muon')])
def test_step(arch, optimizer):
    code, stdout, stderr, result = run_bench(*STEP, f'--arch={arch}', f'--optimizer={optimizer}')
    assert (code, stderr) == (0, '')
    ms = result['step_ms']
    assert 0 < ms['min'] <= ms['median'] <= ms['max'] and ms['n'] == 3
    assert result['tok_per_s'] == pytest.approx(2 * 16 / ms['median'] * 1000)
    assert result['flop_per_s'] == pytest.approx(result['tok_per_s'] * result['flops_per_token'])
    assert result['matmul_share'] == pytest.approx(result['flop_per_s'] / result['matmul_flop_per_s']) and 0 < result['matmul_share'] < 1
    assert f'the step reaches {result["matmul_share"]:.0%} of the rate of its matrix products alone' in stdout
    # six for each weight of the matrices and the head, and the T x C products of scores and values
    assert result['flops_per_token'] == 6 * (2 * 12 * 16 * 16 + 65 * 16) + 12 * 2 * 16 * 16
    assert result['loss'] == pytest.approx(math.log(65), abs=0.5)
    assert result['mfu'] is None  # nobody knows a processor's peak
    assert result['settings']['arch'] == arch and result['machine']['torch'] == torch.__version__ and result['dtype'] == 'float32'
    for word in ('tok_per_s', 'flop_per_s', ' (median of 3, ', 'loss', 'peak_memory_bytes', 'step 1 of 4', f'torch {torch.__version__}'):
        assert word in stdout


def test_profile_names_the_five_operations_that_cost_most():
    code, stdout, _, result = run_bench(*STEP, '--profile=True')
    ms, shares = [cost[1] for cost in result['top_costs']], [cost[2] for cost in result['top_costs']]
    assert code == 0 and len(ms) == 5 and ms == sorted(ms, reverse=True) and 0 < sum(shares) < 1
    assert all(f'{share:.1%}' in stdout and name in stdout for name, _, share in result['top_costs'])
    assert not [name for name, *_ in result['top_costs'] if '#' in name], 'Optimizer.step#AdamW.step encloses operations, and is none'


@pytest.mark.parametrize('arch', ['gpt2', 'modern', 'llama'])
def test_decode(arch):
    code, stdout, stderr, result = run_bench(*DECODE, f'--arch={arch}')
    assert (code, stderr) == (0, '')
    assert result['parameters'] >= 2 * 12 * 16 * 16 + 65 * 16, 'packed for decoding, they count, too'
    assert result['prefill_ms']['n'] == 2 and result['decode_ms']['n'] == 2 * (5 - 1)  # the prompt gives the first token
    assert result['prefill_tok_per_s'] == pytest.approx(2 * 8 / result['prefill_ms']['median'] * 1000)
    assert result['decode_tok_per_s'] == pytest.approx(2 / result['decode_ms']['median'] * 1000)
    norms = 0 if arch == 'modern' else 5 * 16
    matrix = 16 * 16 * (12 if arch != 'llama' else 4 + 12)  # a layer's; SwiGLU of width 64 has three matrices
    assert result['weight_bytes'] == 4 * (2 * matrix + 65 * 16 + norms)
    assert result['cache_bytes'] == 4 * 2 * 2 * 16 * 2 * (8 + 5 / 2)
    assert result['memory_limit_ms'] is None  # so few weights stay in the caches
    assert 'prefill_ms ' in stdout and 'decode_tok_per_s ' in stdout


def test_float16_and_int8_are_compared_in_processes_of_their_own():
    code, stdout, stderr, result = run_bench(*DECODE, '--quantize=both', '--rounds=1', '--dtype=auto')
    assert (code, stderr) == (0, '') and set(result['runs']) == {'none_1', 'none_8', 'int8_1', 'int8_8'}
    for n_rows in (1, 8):
        ours, int8 = result['runs'][f'none_{n_rows}'], result['runs'][f'int8_{n_rows}']
        assert int8['settings']['quantize'] == 'int8' and int8['settings']['batch_size'] == n_rows
        assert result['ratios'][f'decode_tok_per_s_{n_rows}'] == pytest.approx(int8['decode_tok_per_s'] / ours['decode_tok_per_s'])
    assert '| 8, decode_tok_per_s | ' in stdout


def test_the_heads_of_llama_set_the_size_of_its_cache():
    heads = '--n_head=4', '--n_kv_head=2', '--head_size=6', '--n_hidden=32'
    code, _, stderr, result = run_bench(*DECODE, '--arch=llama', *heads, '--quantize=int8')
    assert (code, stderr) == (0, '')
    assert result['cache_bytes'] == 4 * 2 * 2 * (2 * 6) * 2 * (8 + 5 / 2)
    matrices = 2 * (16 * (4 + 2 * 2) * 6 + 16 * 4 * 6 + 3 * 16 * 32) + 65 * 16
    assert result['weight_bytes'] == matrices + 4 * 5 * 16  # a byte each, and the norms in float32
    code, _, stderr, result = run_bench(*STEP, '--arch=llama', *heads)
    assert (code, stderr) == (0, '') and result['flops_per_token'] == 6 * matrices + 12 * 2 * (4 * 6) * 16


def test_memory_limit(monkeypatch, capsys):
    monkeypatch.setattr(bench, 'CACHE_BYTES', 0)
    words, result = run_main(monkeypatch, capsys, bench, '--json', *DECODE)
    limit_s = (result['weight_bytes'] + result['cache_bytes']) / result['read_bytes_per_s']
    assert result['memory_limit_ms'] == pytest.approx(limit_s * 1000)
    assert any(line.startswith('memory_share ') for line in words)


def test_data(tiny):
    code, stdout, stderr, result = run_bench('--mode=data', f'--dataset={tiny}', '--batch_size=3', '--block_size=16', '--steps=4', '--warmup_steps=1', '--profile')
    assert (code, stderr) == (0, '') and result['batch_ms']['n'] == 4
    assert result['tok_per_s'] == pytest.approx(3 * 16 / result['batch_ms']['median'] * 1000)
    assert 'batch_ms ' in stdout and 'open_s ' in stdout


def test_reference_computes_what_the_model_does(tiny):
    model = GPT(GPTConfig(16, 65, 2, 2, 16, activation='gelu')).eval()
    loader = Loader(tiny, 'train', block_size=16, batch_size=3)
    x, y, _ = loader.batch(5)
    for ours, theirs in zip((x, y), compare.plain_batch(loader, 5)):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(compare.plain_logits(model, x), model(x, y)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(compare.plain_logits(model, x, [-1]), model(x)[0], atol=1e-5, rtol=0)
    assert compare.plain_next(model, x[:1], top_k=1)[0, -1] == model.generate(x[:1], 1, temperature=0)[0, -1]


def run_main(monkeypatch, capsys, module, *flags):
    """(lines before the last, the last line's object) of a script's main(), run as a function here."""
    for name in config_of(vars(module)):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that they are put back
    configure(vars(module), list(flags))
    module.main()
    *words, last = capsys.readouterr().out.splitlines()
    return words, json.loads(last)


def test_compare(tiny, monkeypatch, capsys):
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=16)
    monkeypatch.setattr(compare, 'TRAINING', {'tiny': (shape, 3, 4)})
    monkeypatch.setattr(compare, 'DECODING', dict(shape, vocab_size=300))
    words, result = run_main(monkeypatch, capsys, compare, f'--dataset={tiny}', '--warmup_steps=1', '--prompt_tokens=8',
                             '--max_new_tokens=4', '--rounds=1', '--device=cpu')
    training = result['training']['tiny']
    assert training['ratio'] == pytest.approx(training['reference_ms'] / training['ms'])
    assert training['loss'] == pytest.approx(training['reference_loss'], rel=1e-3)  # two kinds of GELU, maybe bfloat16
    assert result['decoding']['tok_per_s'] > 0
    assert sum(line.startswith('| ') for line in words) == 2 + 2 + 1


def test_compare_with_llama_cpp(monkeypatch, capsys):
    pytest.importorskip('llama_cpp', reason='llama-cpp-python is not installed: pip install llama-cpp-python')
    tokenizer = train_bpe(['the cat sat on the mat ' * 9], 270)
    monkeypatch.setattr(compare, 'load_tokenizer', lambda meta: tokenizer)
    monkeypatch.setattr(compare, 'GPT2_TOKENS', 270)
    monkeypatch.setattr(compare, 'DECODING', dict(n_layer=1, n_head=2, n_embd=64, block_size=256, vocab_size=320))
    _, result = run_main(monkeypatch, capsys, compare, '--llama', '--prompt_tokens=8', '--max_new_tokens=4', '--rounds=1', '--device=cpu')
    for numbers in result['llama'].values():
        assert numbers['ratio'] == pytest.approx(numbers['llama_ms'] / numbers['ms'])


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_the_update_is_that_of_train(tiny, tmp_path, optimizer):
    flags = f'--optimizer={optimizer}', '--gradient_accumulation_steps=1', '--max_iters=3', '--eval_interval=3', '--decay_lr=False'
    code, _, err, _ = train_here(*TINY, *flags, '--learning_rate=1e-3', '--weight_decay=0.01', f'--dataset={tiny}', out_dir=tmp_path)
    assert code == 0, err
    trained = read_checkpoint(tmp_path / 'ckpt.pt')
    loader = Loader(tiny, 'train', block_size=16, batch_size=4, seed=1337)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**trained['model_args']))
    batches = [(loader.batch(i), loader.count_targets(i)) for i in range(3)]
    settings = OptimizerSettings(optimizer, learning_rate=1e-3, weight_decay=0.01)
    assert len(list(bench.train(model, batches, torch.device('cpu'), torch.float32, settings=settings))) == 3
    assert differences(model.state_dict(), trained['model']) == []


def test_json_adds_a_line():
    code, stdout, _ = run_here('bench.py', *STEP)
    assert code == 0 and 'tok_per_s ' in stdout and '{' not in stdout


def test_batch_size_follows_the_mode():
    tiny = [flag for flag in SMALL if 'batch_size' not in flag]
    assert run_bench(*tiny, '--steps=1', '--warmup_steps=0')[3]['settings']['batch_size'] == 12
    assert run_bench(*tiny, *DECODE[len(SMALL):])[3]['settings']['batch_size'] == 1


def test_windows_of_a_dataset(tiny):
    code, _, stderr, result = run_bench(*STEP, f'--dataset={tiny}')
    assert (code, stderr) == (0, '') and result['settings']['dataset'] == str(tiny)
    code, _, stderr, _ = run_bench(*STEP, f'--dataset={tiny}', '--vocab_size=2')
    assert code == 2 and stderr.startswith(f'vocab_size=2: dataset {tiny} has ') and stderr.endswith(' or more\n')


@pytest.mark.parametrize('flags, message', [
    (['--mode=decod'], '--mode=decod: accepted are step, decode, data; did you mean decode?'),
    (['--steps=0'], '--steps=0: accepted is 1 or more'),
    (['--mode=decode', '--max_new_tokens=1'], '--max_new_tokens=1: accepted is 2 or more'),
    (['--mode=decode', '--prompt_tokens=1000'], 'prompt_tokens=1000 and max_new_tokens=128 do not fit into block_size=1024: use --block_size=1128 or more'),
    (['--loss_chunks=-1'], '--loss_chunks=-1: accepted is 0 or more'),
    (['--n_embd=10', '--n_head=3'], 'n_embd=10, n_head=3: accepted is a multiple of 3'),
])
def test_wrong_settings(flags, message):
    code, _, stderr, _ = run_bench(*flags)
    assert (code, stderr) == (2, message + '\n')


def test_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_bench(*STEP)[0] == 0 and not os.listdir(tmp_path)
