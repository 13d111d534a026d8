"""CUDA without a GPU.

Fake tensors on device cuda generate, and refuse a mix of devices or a look at a value. The scripts take their
CUDA branches and compute on the CPU (played.py), with the numbers of a CPU run.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, differences, read_checkpoint, read_metrics, run_here
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from model import GPT, GPTConfig

# without CUDA's kernels torch aborts at the first copy to a fake device
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason='needs a CUDA build of torch')
DEVICE = torch.device('cuda', 0)


def fake_model(arch):
    with torch.device(DEVICE):
        return GPT(GPTConfig(arch=arch, block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16))


@pytest.fixture
def fakes():
    with FakeTensorMode():
        yield


@needs_cuda_build
def test_fake_tensors_tell_a_look_at_a_value_and_a_mix_of_devices(fakes):
    on_gpu = torch.ones((), device=DEVICE)
    with pytest.raises(DataDependentOutputException):
        on_gpu.item()
    with pytest.raises(RuntimeError, match='device'):
        torch.ones(3, device=DEVICE) + torch.ones(3)


@needs_cuda_build
@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
@pytest.mark.parametrize('static', [False, True])
def test_cached_logits_stay_on_the_gpu(fakes, arch, static):
    from kernels import KVCache
    model = fake_model(arch).eval()
    cache = KVCache(model.config, 2, 16, DEVICE, torch.float32, static=static)
    idx = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        for tokens in (idx, idx[:, :1], idx[:, :1]):
            logits, _ = model(tokens, cache=cache)
            assert logits.device == DEVICE and logits.shape == (2, 1, 50)


# -----------------------------------------------------------------------------
# the scripts on a played GPU


TRAIN = {'float32': (), 'bfloat16': ('--dtype=bfloat16',), 'muon': ('--optimizer=muon', '--arch=modern')}
BENCH = ('--json', '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16', '--vocab_size=50', '--batch_size=2')
OTHERS = {
    'sample': ('sample.py', '--num_samples=2', '--max_new_tokens=20', '--dtype=float32', '--compile=False'),
    'evaluate': ('evaluate.py', '--tasks=bpb', '--dtype=float32'),
    'step': ('bench.py', *BENCH, '--steps=2', '--warmup_steps=1', '--compile=False'),
    'decode': ('bench.py', *BENCH, '--mode=decode', '--prompt_tokens=8', '--max_new_tokens=5', '--rounds=2'),
}


def commands(tiny, folder, device):
    """Every run by name. sample.py and evaluate.py read the float32 run of the same folder."""
    runs = {name: ('train.py', *TINY, '--max_iters=6', '--compile=False', *flags, f'--dataset={tiny}',
                   f'--out_dir={folder / name}') for name, flags in TRAIN.items()}
    runs.update(OTHERS)
    for name in ('sample', 'evaluate'):
        runs[name] += (f'--out_dir={folder / "float32"}',)
    return {name: (*command, f'--device={device}') for name, command in runs.items()}


@pytest.fixture(scope='module')
def played(tiny, tmp_path_factory):
    """(folder, facts of each run) on the played GPU, all in one process."""
    folder = tmp_path_factory.mktemp('cuda')
    runs = commands(tiny, folder, 'cuda')
    script, arguments = ROOT / 'tests' / 'played.py', json.dumps(list(runs.values()))
    command = [sys.executable, str(script), str(folder / 'facts'), arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding='utf-8', timeout=600,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((folder / 'facts').read_text(encoding='utf-8'))
    return folder, dict(zip(runs, facts, strict=True))


@pytest.fixture(scope='module')
def expected(tiny, tmp_path_factory):
    """(folder, standard output of each run) on the CPU."""
    folder, stdouts = tmp_path_factory.mktemp('cpu'), {}
    for name, command in commands(tiny, folder, 'cpu').items():
        code, stdouts[name], stderr = run_here(*command)
        assert code == 0, stderr
    return folder, stdouts


def test_the_device_that_is_set_has_an_index(played):
    assert [facts['set_device'] for facts in played[1].values()] == [['cuda:0']] * 7


@pytest.mark.parametrize('name', TRAIN)
def test_training_prefetches_pins_and_gives_the_numbers_of_the_cpu(played, expected, name):
    facts = played[1][name]
    assert 'device: NVIDIA H200' in facts['stdout']
    assert facts['prefetch'][0] is True and facts['pin_memory'] and facts['synchronize']
    for a, b in zip(read_metrics(played[0] / name), read_metrics(expected[0] / name), strict=True):
        for key in {'loss', 'grad_norm', 'train_loss', 'val_loss'} & b.keys():
            assert a[key] == b[key], (b['iter'], key)
    weights = [read_checkpoint(folder / name / 'ckpt.pt')['model'] for folder in (played[0], expected[0])]
    assert differences(*weights) == []


def test_samples_and_evaluation_are_those_of_the_cpu(played, expected):
    stdouts = played[1]['sample']['stdout'], expected[1]['sample']
    texts = [stdout.split('tokenizer\n')[1] for stdout in stdouts]
    assert texts[0] == texts[1] and texts[0].strip()
    assert played[1]['evaluate']['pin_memory']
    paths = [folder / 'float32' / 'eval.json' for folder in (played[0], expected[0])]
    results = [json.loads(path.read_text(encoding='utf-8')) for path in paths]
    assert results[0]['results'] == results[1]['results'] and results[0]['device'] == 'NVIDIA H200'


@pytest.mark.parametrize('mode', ['step', 'decode'])
def test_bench_waits_for_a_gpu_and_reports_its_memory(played, mode):
    result = json.loads(played[1][mode]['stdout'].splitlines()[-1])
    assert result['machine']['device'] == 'NVIDIA H200'
    assert played[1][mode]['synchronize']
    assert result['peak_memory_bytes'] == 123 << 20
