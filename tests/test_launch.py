"""launch/: two nodes played by two agents on this machine, and SLURM played by scripts that do what srun, scontrol and its signals do."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, differences, last_iter, read_checkpoint, read_metrics, wait_for
from ranks import free_ports
from test_faults import pids_of_ranks, run_ranks
from test_resume import without_times

pytestmark = pytest.mark.skipif(os.name != 'posix' or not shutil.which('bash'), reason='needs bash')


@pytest.mark.parametrize('script', ['gpu.sh', 'multinode.sh', 'slurm.sbatch'])
def test_the_scripts_are_sound_bash(script):
    assert subprocess.run(['bash', '-n', str(ROOT / 'launch' / script)], capture_output=True).stderr == b''


def test_an_old_torch_is_refused_with_the_reason(tmp_path):
    """torchrun before 2.10 has no --signals_to_handle."""
    info = tmp_path / 'torch-2.9.1.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n', encoding='utf-8')
    done = subprocess.run([str(ROOT / 'launch' / 'multinode.sh')], capture_output=True, text=True,
                          env={**os.environ, 'PYTHON': sys.executable, 'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr == ('launch/multinode.sh: torch 2.9.1 is too old, its torchrun does not pass signals on: '
                           'install torch 2.10 or newer\n')


@pytest.mark.parametrize('half', [pytest.param(half, marks=pytest.mark.full) for half in '12'])
def test_every_part_of_the_gpu_script_works_at_the_size_of_a_cpu(half, tmp_path):
    tiny = '--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32'
    settings = dict(BATCHES='2', STEPS='2', PROMPT='8', NEW='8', OUT=str(tmp_path), PYTHON=sys.executable, SECONDS_LIMIT='100000',
                    PART_LIMIT='1000', OMP_NUM_THREADS='1')
    done = subprocess.run(['sh', str(ROOT / 'launch' / 'gpu.sh'), half, *tiny], capture_output=True, text=True, env={**os.environ, **settings})
    parts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"part"')]
    assert done.returncode == 0 and len(parts) > 8, done.stdout + done.stderr
    assert all(part['exit_code'] == 0 for part in parts)


def test_the_check_of_the_gradients_works_under_fsdp():
    flags = '--device=cpu', '--parallel=fsdp', '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=32'
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1', str(ROOT / 'launch' / 'gpu_check.py'), 'gradients']
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0 and json.loads(done.stdout)['least_norm'] > 0, done.stderr


def start_nodes(*flags, log, n_nodes=2):
    """launch/multinode.sh as each node would start it, one rank each."""
    [port] = free_ports(1)
    env = {**os.environ, 'MASTER_ADDR': '127.0.0.1', 'LOCAL_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'NNODES': str(n_nodes), 'NPROC_PER_NODE': '1',
           'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'}
    with open(log, 'a', encoding='utf-8') as output:
        return [subprocess.Popen([str(ROOT / 'launch' / 'multinode.sh'), *flags], stdout=output, stderr=output, env=env) for _ in range(n_nodes)]


@pytest.mark.parametrize('kills', [0, pytest.param(2, marks=pytest.mark.full)])
def test_two_nodes_train_as_two_ranks_of_one_also_after_a_rank_is_killed(kills, tiny, tmp_path):
    n_iters, out_dir, log = 20 + 150 * kills, tmp_path / 'out', tmp_path / 'log.txt'
    flags = [*TINY, f'--dataset={tiny}', f'--max_iters={n_iters}', '--checkpoint_interval=10', '--eval_interval=100']
    run_ranks(*flags, out_dir=tmp_path / 'one', n_ranks=2, folder=tmp_path)
    nodes, gone = start_nodes(*flags, f'--out_dir={out_dir}', log=log), set()
    try:
        for kill in range(kills):
            def next_to_kill():
                return [pid for pid in pids_of_ranks(nodes[kill % 2].pid) if pid not in gone]
            wait_for(lambda: last_iter(out_dir) >= 40 + 100 * kill and next_to_kill() or any(node.poll() is not None for node in nodes))
            gone |= {pid for node in nodes for pid in pids_of_ranks(node.pid)}
            os.kill(pids_of_ranks(nodes[kill % 2].pid)[0], signal.SIGKILL)
        codes = [node.wait(600) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert codes == [0, 0], log.read_text(encoding='utf-8')[-5000:]
    assert '(2 ranks x ' in log.read_text(encoding='utf-8')
    assert without_times(read_metrics(out_dir)) == without_times(read_metrics(tmp_path / 'one'))
    assert not differences(*(read_checkpoint(folder / 'ckpt.pt')['model'] for folder in (out_dir, tmp_path / 'one')))


# -----------------------------------------------------------------------------
# SLURM

# srun starts the command in a step of its own, passes signals on to each process of it, and returns its exit code
SRUN = '''#!/usr/bin/env bash
while [ "${1:0:2}" = -- ]; do echo "srun $1"; shift; done
set -m
trap 'kill -USR1 -- -$! || exit 1' USR1
trap 'kill -TERM -- -$! || exit 1' TERM
"$@" &
while kill -0 $! 2>/dev/null; do wait $!; done
wait $!
'''
SCONTROL = '''#!/usr/bin/env bash
if [ "$1" = show ]; then echo asked >&2; sleep "${ANSWER_S:-0}"; printf '127.0.0.1\\nsecond\\n'; else echo "scontrol $*" | tee -a "$REQUEUED"; fi
'''
STEP = '''#!/usr/bin/env bash
trap 'echo saved; exit 1' USR1
trap 'echo ended; exit 1' TERM
echo "step: $MASTER_ADDR $MASTER_PORT $RUN_ID $NNODES $*"
for _ in {1..6000}; do sleep 0.05; [ "$1" = quick ] && exit $2; done
'''


@pytest.fixture
def slurm(tmp_path):
    """Starts launch/slurm.sbatch as a job of a folder: (process, its log, where requeued jobs are written down)."""
    for name, text in (('srun', SRUN), ('scontrol', SCONTROL)):
        (tmp_path / name).write_text(text, encoding='utf-8')
        (tmp_path / name).chmod(0o755)
    log, requeued = tmp_path / 'slurm-123.out', tmp_path / 'requeued'

    def start(folder, *arguments, **env):
        job = {'SLURM_JOB_NODELIST': 'n[1-2]', 'SLURM_JOB_ID': '123', 'SLURM_JOB_NUM_NODES': '1', 'REQUEUED': str(requeued)}
        with open(log, 'a', encoding='utf-8') as output:
            return subprocess.Popen(['bash', str(ROOT / 'launch' / 'slurm.sbatch'), *arguments], cwd=folder, stdout=output, stderr=output,
                                    env={**os.environ, **job, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', **env})
    return start, log, requeued


@pytest.mark.parametrize('arguments, number, code, goes_on', [
    (['config/x.py', '--a=b c'], signal.SIGUSR1, 1, True),  # the time limit
    (['config/x.py'], signal.SIGTERM, 1, False),  # scancel, or a preemption, after which SLURM itself queues the job
    (['quick', '0'], None, 0, False),
    (['quick', '2'], None, 2, False),
])
def test_a_job_is_queued_again_where_the_time_limit_ended_it_and_only_there(slurm, tmp_path, arguments, number, code, goes_on):
    start, log, requeued = slurm
    (tmp_path / 'launch').mkdir()
    (tmp_path / 'launch' / 'multinode.sh').write_text(STEP, encoding='utf-8')
    (tmp_path / 'launch' / 'multinode.sh').chmod(0o755)
    job = start(tmp_path, *arguments)
    wait_for(lambda: f'step: 127.0.0.1 10123 123 1 {" ".join(arguments)}\n' in log.read_text(encoding='utf-8'))
    if number:
        job.send_signal(number)
    assert job.wait(600) == code, log.read_text(encoding='utf-8')
    assert ('saved' in log.read_text(encoding='utf-8')) == (number == signal.SIGUSR1)
    assert requeued.exists() == goes_on and (not goes_on or requeued.read_text(encoding='utf-8') == 'scontrol requeue 123\n')


def test_a_job_whose_time_ends_before_srun_has_started_is_queued_again(slurm, tmp_path):
    start, log, requeued = slurm
    (tmp_path / 'launch').mkdir()
    (tmp_path / 'launch' / 'multinode.sh').write_text(STEP, encoding='utf-8')
    (tmp_path / 'launch' / 'multinode.sh').chmod(0o755)
    job = start(tmp_path, 'config/x.py', ANSWER_S='1')
    wait_for(lambda: 'asked\n' in log.read_text(encoding='utf-8'))
    job.send_signal(signal.SIGUSR1)
    assert job.wait(600) > 0 and requeued.exists(), log.read_text(encoding='utf-8')
    assert 'unbound' not in log.read_text(encoding='utf-8')


def test_the_headers_of_the_job():
    text = (ROOT / 'launch' / 'slurm.sbatch').read_text(encoding='utf-8')
    headers = [line.removeprefix('#SBATCH ') for line in text.split('set -uo pipefail')[0].splitlines() if line.startswith('#SBATCH')]
    wanted = {'--requeue', '--open-mode=append', '--signal=B:USR1@300', '--ntasks-per-node=1', '--exclusive', '--mem=0'}
    assert wanted <= set(headers) and any(header.startswith('--cpus-per-task=') for header in headers)


@pytest.mark.full
def test_a_job_that_reaches_its_limit_saves_is_queued_again_and_goes_on(slurm, tiny, tmp_path):
    start, log, requeued = slurm
    flags = [*TINY, f'--dataset={tiny}', '--dropout=0.1', '--eval_interval=100000', f'--out_dir={tmp_path / "out"}']
    env = dict(NPROC_PER_NODE='2', LOCAL_ADDR='127.0.0.1', PYTHON=sys.executable, OMP_NUM_THREADS='1')
    job = start(ROOT, *flags, '--max_iters=100000', **env)
    wait_for(lambda: last_iter(tmp_path / 'out') > 20 or job.poll() is not None)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(600) != 0 and requeued.exists(), log.read_text(encoding='utf-8')
    stopped_at = last_iter(tmp_path / 'out')
    assert read_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter_num'] == stopped_at + 1
    job = start(ROOT, *flags, f'--max_iters={stopped_at + 10}', SLURM_RESTART_COUNT='1', **env)
    assert job.wait(600) == 0, log.read_text(encoding='utf-8')
    assert [line['iter'] for line in read_metrics(tmp_path / 'out') if 'loss' in line] == list(range(stopped_at + 10))
    assert 'job 123, start 1, ' in log.read_text(encoding='utf-8') and 'job 123, start 2, ' in log.read_text(encoding='utf-8')
    assert requeued.read_text(encoding='utf-8').count('requeue') == 1
