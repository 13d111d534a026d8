"""The core tests on other versions of torch, each in an environment of its own. Downloads several gigabytes: -m full alone."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

CORE = [f'tests/test_{name}.py' for name in ('model', 'optim', 'checkpoint', 'train', 'distributed')]


@pytest.mark.full
@pytest.mark.parametrize('torch', ['torch==2.11.*', 'torch'])
def test_the_core_runs_on(torch, tmp_path):
    python = tmp_path / 'venv' / ('Scripts' if os.name == 'nt' else 'bin') / 'python'
    subprocess.run([sys.executable, '-m', 'venv', tmp_path / 'venv'], check=True)
    packages = [line for line in (ROOT / 'requirements.txt').read_text(encoding='utf-8').splitlines() if '>=' in line and 'torch' not in line]
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', torch, *packages], check=True)
    done = subprocess.run([python, '-m', 'pytest', '-q', *CORE], cwd=ROOT, capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 0, done.stdout[-3000:]
