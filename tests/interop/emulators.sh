#!/bin/bash
# Emulators of gradtx in several versions of transformers and PEFT:
#   emulators.sh PYTHON...         each the python of an environment with torch, transformers, peft, safetensors
#   KEEP=FOLDER emulators.sh …     also keeps what was written there, as fixtures/ has it
# gradtx writes an emulator of a miniature LLM; transformers opens it and trains through it (emulators.py), and what it
# trained plugs into the LLM: gradtx's result must give the logits that transformers gives.
# GRADTX and PEER name programs that are built already (gradtx, and the example peft_interop).
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || { sed -n 2,7p "$0" >&2; exit 2; }
if [ -z "${GRADTX:-}" ] || [ -z "${PEER:-}" ]; then
  cargo build -q -p gradtx-tests --bin gradtx-under-test --example peft_interop
  GRADTX=target/debug/gradtx-under-test PEER=target/debug/examples/peft_interop
fi
GRADTX=$(realpath "$GRADTX") PEER=$(realpath "$PEER") scripts=$(realpath tests/interop)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_MODULES_CACHE="$work/modules" PYTHONDONTWRITEBYTECODE=1
"$PEER" miniature "$work" >/dev/null
cd "$work"
emulate() { "$GRADTX" emulate --run run --config settings.toml "$@" >/dev/null; }
printf '[emulator]\nedge = [1, 1]\nratio = 0.5\nnum_tokens = 300\n' >>settings.toml
emulate --out emulator
emulate --dense --out whole
mkdir home
cp -r llm home/llm
cp -r emulator/model home/factored
cp -r whole/model home/dense
failed=0
for python in "$@"; do
  version=$("$python" -c 'import peft, transformers as t; print(f"transformers-{t.__version__}-peft-{peft.__version__}")')
  folder=$work/$version
  "$python" "$scripts/emulators.py" write home "$folder" 2>"$work/errors" || { cat "$work/errors" >&2; exit 1; }
  for name in adapter layers; do
    path=$folder/adapter_emulator
    [ $name = adapter ] || path=$folder/layers.safetensors
    rm -rf upgraded
    "$GRADTX" plugin --run run --adapter "$path" --emulator emulator --out upgraded >/dev/null
    "$python" "$scripts/emulators.py" open upgraded "$folder/emulator_logits.safetensors" llm_$name 2>/dev/null ||
      failed=1
  done
  if [ -n "${KEEP:-}" ]; then
    mkdir -p "$KEEP/$version"
    cp -r "$folder"/* "$KEEP/$version/"
  fi
done
if [ -n "${KEEP:-}" ]; then
  mkdir -p "$KEEP/emulator"
  for part in llm factored dense; do
    mkdir -p "$KEEP/emulator/$part"
    cp home/$part/config.json home/$part/model.safetensors "$KEEP/emulator/$part/"
  done
fi
[ $failed = 0 ] && echo "all agree within 1e-4 of the largest logit"
exit $failed
