#!/usr/bin/env bash
# Run one node's ranks of a run over several nodes. Start the same line on each node, with the address of one of them:
#
#     MASTER_ADDR=10.0.0.1 NNODES=2 launch/multinode.sh config/train_gpt2.py --out_dir=/shared/out
#
# Two nodes with 8 GPUs each print "16 ranks" at the start. All nodes must see the same out_dir: the first rank, on
# any of them, writes there. If a rank dies, all ranks restart, MAX_RESTARTS times at most, from the newest checkpoint.
# After SIGTERM, SIGINT or SIGUSR1 to this process the ranks finish the step, save and exit (torchrun itself with 1).
#
#   MASTER_ADDR     a node that all others can reach, where the ranks meet
#   MASTER_PORT     a free port there, 29500
#   NNODES          the number of nodes, or MIN:MAX to continue with fewer after losing one
#   NPROC_PER_NODE  ranks of this node: one for each GPU, or for each CPU core if there is none
#   MAX_RESTARTS    100; restarts follow every error, even a wrong setting, so use 0 for a first try
#   RUN_ID          tells two runs on one MASTER_PORT apart
#   LOCAL_ADDR      this node's own address, if its host name does not resolve to it
#   IFNAME          the network interface between the nodes, such as eth0, if gloo or NCCL choose a wrong one
#   SAVE_SECONDS    after a signal, how long a step and saving may take before the ranks are killed, 300
# Over Ethernet, if NCCL finds InfiniBand cards that are not connected: NCCL_IB_DISABLE=1
set -euo pipefail

python=${PYTHON:-python}
"$python" - <<'CHECK'
import re, sys
from importlib.metadata import PackageNotFoundError, version
try:
    found = version('torch')
except PackageNotFoundError:
    sys.exit('launch/multinode.sh: torch is not installed for this Python: set PYTHON')
if tuple(map(int, re.findall(r'\d+', found)[:2])) < (2, 10):
    sys.exit(f'launch/multinode.sh: torch {found} is too old, its torchrun does not pass signals on: '
             'install torch 2.10 or newer')
CHECK

# with torch 2.13, torchrun recovered from 4 of 8 lost ranks without this, from 8 of 8 with it
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SAVE_SECONDS:-300}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ -n "${IFNAME:-}" ]; then
    export GLOO_SOCKET_IFNAME="$IFNAME" NCCL_SOCKET_IFNAME="$IFNAME"
fi

exec "$python" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --nproc_per_node="${NPROC_PER_NODE:-auto}" --max_restarts="${MAX_RESTARTS:-100}" \
    --rdzv_backend=c10d --rdzv_endpoint="${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" \
    --rdzv_id="${RUN_ID:-flatgpt}" ${LOCAL_ADDR:+--local_addr="$LOCAL_ADDR"} \
    --signals_to_handle=SIGTERM,SIGINT,SIGUSR1 \
    "$(dirname "${BASH_SOURCE[0]}")/../train.py" "$@" --auto_resume=True
