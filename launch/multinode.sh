#!/usr/bin/env bash
# One node's part of a run over several nodes. Start the same line on each, with the address of any one of them:
#
#     MASTER_ADDR=10.0.0.1 NNODES=2 launch/multinode.sh config/train_gpt2.py --out_dir=/shared/out
#
# Two nodes with 8 GPUs each print "16 ranks" at the start. All need to see the same out_dir: whichever holds the first rank writes there.
# A rank that dies takes the others down with it; all start again (MAX_RESTARTS times) and go on from the newest checkpoint.
# SIGTERM, SIGINT or SIGUSR1 to this process: the step ends, a checkpoint is written, all ranks exit (torchrun itself with 1).
#
#   MASTER_ADDR     a node that all the others reach, where the ranks meet (and MASTER_PORT on it, 29500)
#   NNODES          how many nodes, or MIN:MAX to train on with fewer after one is lost for good
#   NPROC_PER_NODE  ranks of this node: one for each GPU, or for each CPU core where there is none
#   MAX_RESTARTS    100, after any error, also one that comes again, such as a wrong setting: 0 for a first try
#   RUN_ID          tells two runs on one MASTER_PORT apart
#   LOCAL_ADDR      this node's own address, where its host name does not resolve to it
#   SAVE_SECONDS    after a signal, how long ranks may take for step and checkpoint before they are killed, 300
set -euo pipefail

# without this, torchrun came back from 4 of 8 lost ranks; with it, from 8 of 8 (torch 2.13)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SAVE_SECONDS:-300}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Over Ethernet, where NCCL finds InfiniBand cards that lead nowhere:
#     export NCCL_IB_DISABLE=1 NCCL_SOCKET_IFNAME=eth0

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --nproc_per_node="${NPROC_PER_NODE:-auto}" --max_restarts="${MAX_RESTARTS:-100}" \
    --rdzv_backend=c10d --rdzv_endpoint="${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}" --rdzv_id="${RUN_ID:-flatgpt}" \
    ${LOCAL_ADDR:+--local_addr="$LOCAL_ADDR"} --signals_to_handle=SIGTERM,SIGINT,SIGUSR1 \
    "$(dirname "${BASH_SOURCE[0]}")/../train.py" "$@" --auto_resume=True
