#!/usr/bin/env bash
# Everything that the table of targets needs, on one GPU: ours and PyTorch's in turn.
#
#   benches/gpu.sh [--cpu] [DIR]
#
# Writes lines of JSON to DIR (default: benches/results/gpu_DEVICE_DATE): ours to gradtx.jsonl,
# those of transformers and PEFT to peer.jsonl, what both said to log.txt, and the table to
# table.md. What fails is told at the end, and does not keep the rest from being measured.
#
# GRADTX names the program, built with `make gpu` (default: target/release/gradtx); PYTHON a python with
# torch, transformers and peft (default: python3; `none` leaves PyTorch out). RUNS is the number of
# samples (default: 10). With --cpu the same commands run on a CPU, on sizes that end in a minute:
# the numbers mean nothing, but it is known that the script works.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
program=${GRADTX:-target/release/gradtx}
python=${PYTHON:-python3}
runs=${RUNS:-10}

device=cuda
if [ "${1:-}" = --cpu ]; then
    device=cpu
    runs=${RUNS:-2}
    shift
fi
[ -x "$program" ] || { echo "error: $program: not found; build it with make gpu, or set GRADTX"; exit 2; }

if [ "$device" = cuda ]; then
    name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
    [ -n "$name" ] || { echo "error: nvidia-smi shows no GPU here (--cpu tries the script without one)"; exit 2; }
    "$program" bench translate --device cuda --runs 1 --large 256 --translator small >/dev/null || {
        echo "error: $program cannot use the GPU: gradtx doctor tells what is missing"
        exit 2
    }
else
    name=cpu
fi
# A short name for directories: nvidia-h100-80gb-hbm3.
short=$(tr '[:upper:] /' '[:lower:]--' <<<"$name")
out=${1:-benches/results/gpu_${short}_$(date -u +%F)}
mkdir -p "$out"
log=$out/log.txt
failed=()

run() {
    echo "== $*" | tee -a "$log"
    if ! "$@" >>"$log" 2>&1; then
        failed+=("$*")
        tail -n 3 "$log"
    fi
}

ours() {
    local what=$1
    shift
    run "$program" bench "$what" --device "$device" --runs "$runs" --out "$out/gradtx.jsonl" "$@"
}

peer() {
    [ "$python" != none ] || return 0
    local what=$1
    shift
    run "$python" benches/peer_transformers.py "$what" --device "$device" --runs "$runs" --out "$out/peer.jsonl" "$@"
}

{
    date -u
    "$program" --version
    [ "$device" = cpu ] || nvidia-smi
} >>"$log" 2>&1

if [ "$device" = cuda ]; then
    ours kernels
    for model in qwen2.5-7b "qwen2.5-3b --jobs 4"; do
        read -ra words <<<"$model"
        ours finetune --model "${words[@]}"
        peer finetune --model "${words[0]}"
    done
    ours finetune --model qwen2.5-0.5b
    ours finetune --model qwen2.5-14b --tokens 4096
    ours train
    peer train --pure
    ours translate
    ours generate
    peer generate
    ours generate --batch 1
else
    decoder=tests/goldens/fixtures/qwen2/model/config.json
    small=(--translator tests/goldens/fixtures/t5/model/config.json --tiny 3x10 --llm 4x12 --batch 2)
    large=(--large 256)
    ours kernels --model "$decoder" "${small[@]}" "${large[@]}" --tokens 256 --values 100000
    ours finetune --model "$decoder" "${large[@]}" --tokens 64 --context 16 --jobs 4
    peer finetune --model "$decoder" --tokens 64 --context 16
    ours train "${small[@]}" "${large[@]}"
    peer train "${small[@]}"
    ours translate "${small[@]}" "${large[@]}"
    ours generate --model "$decoder" "${large[@]}" --batch 2 --context 8 --tokens 50
    peer generate --model "$decoder" --batch 2 --context 8 --tokens 20
fi

"$program" bench table "$out" | tee "$out/table.md"
echo "lines and log: $out"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
