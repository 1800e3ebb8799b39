#!/usr/bin/env bash
# The training steps here and in PyTorch, in turn on the same machine, raw lines to one file.
#
#     benches/steps/compare.sh OUT.jsonl [ROUNDS]      PYTHON=python with torch, transformers, peft
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: compare.sh OUT.jsonl [ROUNDS]}
rounds=${2:-3}
python=${PYTHON:-python3}
cargo bench -p gradtx-benches --bench steps --no-run
{
    printf '{"date":"%s","cpu":"%s","cores":%s}\n' "$(date -u +%F)" \
        "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)" "$(nproc)"
    for round in $(seq "$rounds"); do
        for what in gemm lora translator; do
            cargo bench -q -p gradtx-benches --bench steps -- "$what" --runs 3 | sed "s/^{/{\"round\":$round,\"who\":\"gradtx\",/"
            [ "$what" = gemm ] && continue
            "$python" benches/steps/peer_torch.py "$what" --runs 3 --how batch4 | sed "s/^{/{\"round\":$round,\"who\":\"torch\",/"
        done
    done
} | tee "$out"
