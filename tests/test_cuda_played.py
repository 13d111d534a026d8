"""CUDA without a GPU: fake tensors on device cuda generate, and refuse a mix of devices or a look at a value."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from model import GPT, GPTConfig

# without CUDA's kernels torch aborts at the first copy to a fake device
pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason='needs a CUDA build of torch, but no GPU')
DEVICE = torch.device('cuda', 0)


def fake_model(arch):
    with torch.device(DEVICE):
        return GPT(GPTConfig(arch=arch, block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16))


@pytest.fixture
def fakes():
    with FakeTensorMode():
        yield


def test_fake_tensors_tell_a_look_at_a_value_and_a_mix_of_devices(fakes):
    on_gpu = torch.ones((), device=DEVICE)
    with pytest.raises(DataDependentOutputException):
        on_gpu.item()
    with pytest.raises(RuntimeError, match='device'):
        torch.ones(3, device=DEVICE) + torch.ones(3)


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
