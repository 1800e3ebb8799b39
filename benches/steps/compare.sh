#!/usr/bin/env bash
# Training steps on a CPU here and in PyTorch, in turn on the same machine, raw lines to one file:
# a LoRA step of a Qwen2.5-0.5B shape on 4 examples of 256 tokens, a step of a Flan-T5-small-sized
# Grad-Transformer at batch 8.
#
#   benches/steps/compare.sh OUT.jsonl [ROUNDS]
#
# GRADTX names the program (default: target/release/gradtx), PYTHON a python with torch,
# transformers and peft. On a GPU: benches/gpu.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: compare.sh OUT.jsonl [ROUNDS]}
rounds=${2:-3}
program=${GRADTX:-target/release/gradtx}
python=${PYTHON:-python3}
{
    printf '{"date":"%s","cpu":"%s","cores":%s}\n' "$(date -u +%F)" \
        "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)" "$(nproc)"
    lines=$(mktemp)
    trap 'rm -f "$lines"' EXIT
    for round in $(seq "$rounds"); do
        : >"$lines"
        "$program" bench finetune --tokens 1024 --context 256 --runs 3 --out "$lines" >/dev/null
        "$program" bench train --runs 3 --out "$lines" >/dev/null
        sed "s/^{/{\"round\":$round,/" "$lines"
        for what in lora translator; do
            "$python" benches/steps/peer_torch.py "$what" --runs 3 --how batch4 | sed "s/^{/{\"round\":$round,\"who\":\"torch\",/"
        done
    done
} | tee "$out"
