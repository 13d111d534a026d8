#!/bin/sh
# Check and measure everything that needs one GPU, in two calls of at most eight minutes each:
#
#     sh launch/gpu.sh 1 | tee gpu1.txt     # correctness, training speed, the trainer in all its forms, decoding
#     sh launch/gpu.sh 2 | tee gpu2.txt     # variants, profiles
#
# Each part ends with a line of JSON. If a part fails, the others still run, and the exit code is 1. Parts that would
# start after SECONDS_LIMIT are skipped. Further flags go to every train.py and bench.py. STEPS, PROMPT, NEW, BATCHES
# and OUT shorten or move a run. To try the script on a CPU:
#
#     BATCHES=2 STEPS=2 PROMPT=8 NEW=8 sh launch/gpu.sh 1 --device=cpu --n_layer=2 --n_head=2 --n_embd=32 --block_size=32

cd "$(dirname "$0")/.." || exit 1
half=${1:-1}
[ $# -gt 0 ] && shift
flags="$*"
python=${PYTHON:-python}
out=${OUT:-out-gpu}
steps=${STEPS:-30}
batches=${BATCHES:-16 32 64}
started=$(date +%s)
failed=0

# part NAME COMMAND...: run a command, then print a line of JSON with its exit code and seconds
part() {
    name=$1
    shift
    begun=$(date +%s)
    if [ $((begun - started)) -gt "${SECONDS_LIMIT:-420}" ]; then
        echo "{\"part\": \"$name\", \"skipped\": \"no time left\"}"
        return
    fi
    echo "== $name: $*"
    timeout "${PART_LIMIT:-150}" "$@" </dev/null
    code=$?
    [ $code -eq 0 ] || failed=1
    echo "{\"part\": \"$name\", \"exit_code\": $code, \"seconds\": $(($(date +%s) - begun))}"
}
# $flags is split into words on purpose
# shellcheck disable=SC2086
bench() { name=$1; shift; part "$name" $python bench.py --json --dtype=bfloat16 --steps="$steps" "$@" $flags; }
# shellcheck disable=SC2086
decode() {
    name=$1; shift
    part "$name" $python bench.py --json --mode=decode --dtype=bfloat16 --prompt_tokens="${PROMPT:-512}" \
        --max_new_tokens="${NEW:-128}" "$@" $flags
}
# shellcheck disable=SC2086
train() {
    name=$1; shift
    part "$name" "$@" --dataset="$out/data" --batch_size=16 --gradient_accumulation_steps=2 --max_iters="$steps" \
        --eval_interval=1000 --eval_iters=1 --log_interval=10 --warmup_iters=0 --report=False $flags
}
# one rank in a group of its own: NCCL, the sum of gradients and FSDP run as over many GPUs
rank="$python -m torch.distributed.run --standalone --nproc_per_node=1 train.py"

part data $python launch/gpu_check.py data "$out/data"
if [ "$half" = 1 ]; then
    part gradients $python launch/gpu_check.py gradients $flags
    for batch in $batches; do
        bench "step, batch $batch" --compile=True --batch_size="$batch"
    done
    train "train" $python train.py --out_dir="$out/one"
    train "train, ddp" $rank --out_dir="$out/ddp"
    train "train, fsdp" $rank --parallel=fsdp --out_dir="$out/fsdp"
    part resume $python train.py --init_from=resume --out_dir="$out/one" --max_iters=$((steps + 5)) $flags
    part "numerics, gpu" $python numerics.py dump --out="$out/gpu" --out_dir="$out/one"
    part "numerics, cpu" $python numerics.py dump --out="$out/cpu" --out_dir="$out/one" --device=cpu
    part "numerics, compare" $python numerics.py compare "$out/gpu" "$out/cpu"
    part evaluate $python evaluate.py --tasks=bpb --out_dir="$out/one"
    part gradients-fsdp $python -m torch.distributed.run --standalone --nproc_per_node=1 launch/gpu_check.py \
        gradients --parallel=fsdp $flags
    decode "decode, eager" --compile=False
    decode "decode, compiled" --compile=True
else
    bench "step, loss in one chunk" --compile=True --batch_size=16 --loss_chunks=0
    bench "step, loss in chunks" --compile=True --batch_size=16 --loss_chunks=auto
    bench "step, modern and muon" --compile=True --batch_size=16 --arch=modern --optimizer=muon
    bench "step, eager" --compile=False --batch_size=16
    decode "decode, compiled, batch 8" --compile=True --batch_size=8
    bench "profile, compiled" --compile=True --batch_size=16 --profile=True
    bench "profile, eager" --compile=False --batch_size=16 --profile=True
    bench "step, float32" --compile=False --batch_size=16 --dtype=float32
fi
exit $failed
