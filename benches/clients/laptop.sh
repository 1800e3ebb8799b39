#!/bin/bash
# A client without a GPU: LoRA on a model of the shape of Qwen2.5-0.5B with random bf16 weights, beside transformers + PEFT.
#   laptop.sh DIR      writes DIR/steps.jsonl (times of steps, in turn) and DIR/memory.jsonl (peak resident memory)
# GRADTX names the program (default: gradtx), PYTHON a Python with torch, transformers, peft and safetensors (default: python3),
# THREADS the threads of both (default: all), ROUNDS how often they take turns (default: 3).
set -euo pipefail
[ $# -eq 1 ] || { sed -n 2,5p "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
gradtx=$(command -v "${GRADTX:-gradtx}") || { echo "error: ${GRADTX:-gradtx}: no such program; GRADTX names it" >&2; exit 2; }
gradtx=$(realpath "$gradtx") python=${PYTHON:-python3} threads=${THREADS:-$(nproc)} rounds=${ROUNDS:-3}
mkdir -p "$1" && cd "$1"
[ -e world/record.json ] || "$gradtx" world world --world mixed --quiet --threads "$threads"
[ -e data.jsonl ] || "$python" "$here/laptop.py" make world .
cat > run.toml <<'T'
[models]
tiny = "model"
llm = "model"
[data]
public = "data.jsonl"
instruction = "none"
prompt = "template"
max_length = 1024
[lora]
r = 2
lora_alpha = 32.0
target_modules = ["q_proj", "v_proj"]
[finetune.tiny]
max_steps = 2
global_batch_size = 8
T
export OMP_NUM_THREADS=$threads
step=(finetune --device cpu --model qwen2.5-0.5b --tokens 512 --context 128 --warmup 1 --runs 2 --threads "$threads" --out steps.jsonl)
peak() { "$python" "$here/laptop.py" run "$@" >> memory.jsonl; }
for ((round = 0; round < rounds; round++)); do
  peak "gradtx, 512 tokens" "$gradtx" bench "${step[@]}"
  peak "transformers + PEFT, 512 tokens" "$python" "$here/../peer_transformers.py" "${step[@]}" --batched
done
rm -rf run client
peak "gradtx finetune, streams of 2048 tokens" "$gradtx" finetune --run run --config run.toml --data data.jsonl --out client \
  --threads "$threads" --set device.max_tokens_per_microbatch=2048 -v 2> finetune.txt
grep -A 9 'of memory' finetune.txt
cat memory.jsonl
