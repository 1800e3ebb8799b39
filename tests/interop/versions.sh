#!/bin/bash
# Exchange with several versions of transformers and PEFT, both ways:
#   versions.sh PYTHON...      each the python of an environment with torch, transformers, peft, safetensors
# For each: what it writes (tests/interop/versions.py) opens in gradtx and gives the same logits, and what
# gradtx writes (an adapter, and the model it was merged into) opens there and gives the same logits.
# GRADTX and PEER name programs that are built already (gradtx, and the example peft_interop).
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || { sed -n 2,6p "$0" >&2; exit 2; }
if [ -z "${GRADTX:-}" ] || [ -z "${PEER:-}" ]; then
  cargo build -q -p gradtx-tests --bin gradtx-under-test --example peft_interop
  GRADTX=target/debug/gradtx-under-test PEER=target/debug/examples/peft_interop
fi
GRADTX=$(realpath "$GRADTX") PEER=$(realpath "$PEER")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0 n=0
for python in "$@"; do
  folder=$work/$((++n))
  "$python" tests/interop/versions.py write "$folder" 2>/dev/null
  for adapter in "$folder"/adapter_*; do
    kind=$(basename "$adapter")
    # One sequence and its logits, by the names that the example knows.
    "$python" - "$folder/logits.safetensors" "$kind" "$work/one.safetensors" <<'P'
import sys
from safetensors.torch import load_file, save_file
stored = load_file(sys.argv[1])
save_file({"tokens": stored["tokens"], "logits": stored[sys.argv[2]]}, sys.argv[3])
P
    printf '%-20s read here:  ' "$kind"
    "$PEER" open "$folder/qwen2" "$adapter" "$work/one.safetensors" || failed=1
  done
  "$PEER" write "$folder/qwen2" "$work/own" "$work/own.safetensors" >/dev/null
  printf '[models]\ntiny = "%s"\nllm = "%s"\n' "$folder/qwen2" "$folder/qwen2" >"$work/run.toml"
  rm -rf "$work/run" "$work/merged"
  "$GRADTX" merge --run "$work/run" --config "$work/run.toml" --model llm --adapter "$work/own" \
    --out "$work/merged" >/dev/null
  "$python" tests/interop/versions.py open "$folder/qwen2" "$work/own" "$work/own.safetensors" "$work/merged" \
    2>/dev/null || failed=1
done
[ $failed = 0 ] && echo "all agree within 1e-4 of the largest logit"
exit $failed
