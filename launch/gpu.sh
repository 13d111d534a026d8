#!/bin/sh
# Everything that docs/RESULTS.md wants from one GPU, in one call of about ten minutes:
#   sh launch/gpu.sh | tee gpu.txt
# Each part ends with a line of JSON. Flags go to every part, STEPS, PROMPT and NEW shorten them; on a CPU, to see that all of it runs:
#   STEPS=2 PROMPT=8 NEW=8 sh launch/gpu.sh --device=cpu --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2

cd "$(dirname "$0")/.." || exit 1
flags="$*"
failed=0
part() {
    echo "== $*"
    # shellcheck disable=SC2086
    "$@" $flags || { echo "FAILED: $*"; failed=1; }
}
bench() { part python bench.py --batch_size=32 --dtype=bfloat16 --steps="${STEPS:-30}" "$@"; }
decode() { part python bench.py --mode=decode --dtype=bfloat16 --prompt_tokens="${PROMPT:-512}" --max_new_tokens="${NEW:-128}" "$@"; }
train() { part "$@" --dataset=shakespeare_char --batch_size=16 --gradient_accumulation_steps=1 --n_layer=12 --n_head=12 --n_embd=768 \
    --block_size=1024 --max_iters="${STEPS:-30}" --eval_interval=1000 --eval_iters=1 --log_interval=10 --warmup_iters=0; }

# a training step of GPT-2 (124M): compiled, eager, and plain in float32
bench --compile=True
bench --compile=False
bench --compile=False --dtype=float32
bench --compile=True --arch=modern --optimizer=muon
# where the time goes
bench --compile=True --steps=3 --profile=True
bench --compile=False --steps=3 --profile=True
# generation with the KV cache
decode --compile=False
decode --compile=True
decode --compile=True --batch_size=8
# the trainer as one process, and as the only rank of a group, which needs no wrapping: the three should be equally fast
[ -e data/shakespeare_char/meta.json ] || part python data/shakespeare_char/prepare.py
train python train.py --out_dir=out-gpu-one
train torchrun --standalone --nproc_per_node=1 train.py --out_dir=out-gpu-rank
train torchrun --standalone --nproc_per_node=1 train.py --parallel=fsdp --out_dir=out-gpu-fsdp
exit $failed
