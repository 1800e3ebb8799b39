#!/bin/bash
# Five clients with a task between them, of which up to two are poisoned, and every way of combining their updates:
#   poisoned.sh DIR [SEED]     DIR is made: the world `mixed`, its tuples, and DIR/results.json
# What each does to the accuracy of the translated LLM on the task's test examples. GRADTX names the program (default: gradtx),
# THREADS its threads (default: 2).
# METHOD is the translator (default: products), with a fixed penalty of its regression.
set -euo pipefail
[ $# -ge 1 ] || { sed -n 2,6p "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
gradtx=$(command -v "${GRADTX:-gradtx}") || { echo "error: ${GRADTX:-gradtx}: no such program; GRADTX names it" >&2; exit 2; }
gradtx=$(realpath "$gradtx") dir=$1 seed=${2:-1} method=${METHOD:-products}
mkdir -p "$dir" && cd "$dir"
quiet() { "$gradtx" "$@" --threads "${THREADS:-2}" --quiet; }
[ -e world/record.json ] || quiet world world --world mixed --seed "$seed"
quiet curate --run run --config world/settings.toml
[ -d package ] || quiet init-clients --run run --out package

# The private rows of one task, in five parts.
mkdir -p data updates
for i in 1 2 3 4 5; do
  awk -v i="$i" 'NR % 5 == i % 5' world/private/client-1/train.jsonl > "data/part-$i.jsonl"
  quiet finetune --run package --set models.tiny=world/tiny --data "data/part-$i.jsonl" --out "clients/$i" --save-adapter
  cp "clients/$i/update.safetensors" "updates/client-$i.safetensors"
done

# Clients 4 and 5 with poison in the place of what they learned.
poison() { # NAME CLIENT FACTOR [NOISE]
  [ -e "updates/$1.safetensors" ] && return
  python3 "$here/poison.py" package/initial "clients/$2/adapter" "clients/$1" "$3" ${4:+"$4"}
  quiet convert --run package --set models.tiny=world/tiny --adapter "clients/$1" --examples 51 --out "updates/$1.safetensors"
}
poison scaled 5 100
poison flipped 5 -1
poison flipped-large 5 -5
poison colluding-a 4 -5 0.05
poison colluding-b 4 -5 0.1
cp updates/client-5.safetensors updates/nan.safetensors
printf '\x00\x00\xc0\x7f' | dd of=updates/nan.safetensors bs=1 seek=$(($(stat -c %s updates/nan.safetensors) - 4)) conv=notrunc status=none

score() { # NAME UPDATES OPTIONS...
  local name=$1 updates=$2
  shift 2
  local files=()
  for update in $updates; do files+=("updates/$update.safetensors"); done
  quiet translate --run run --method "$method" --set translate.penalty=0.01 "${files[@]}" --out "translated/$name" "$@" 2> "said/$name" ||
    { cat "said/$name" >&2; return; }
  quiet evaluate --run run --data world/private/client-1/test.jsonl --adapter "translated/$name/adapter" --out "scores/$name"
}
mkdir -p said
quiet evaluate --run run --data world/private/client-1/test.jsonl --out scores/base-llm
for i in 1 2 3 4 5; do score "client-$i" "client-$i"; done
honest="client-1 client-2 client-3 client-4 client-5"
for how in mean median trimmed-mean geometric-median clipped; do
  case $how in
    clipped) options=(--combine mean --clip-norm median) ;;
    *) options=(--combine "$how") ;;
  esac
  score "none+$how" "$honest" "${options[@]}"
  score "scaled+$how" "client-1 client-2 client-3 client-4 scaled" "${options[@]}" --allow-outliers
  score "flipped+$how" "client-1 client-2 client-3 client-4 flipped" "${options[@]}"
  score "flipped-large+$how" "client-1 client-2 client-3 client-4 flipped-large" "${options[@]}" --allow-outliers
  score "colluding+$how" "client-1 client-2 client-3 colluding-a colluding-b" "${options[@]}" --allow-outliers
done
# Refused unless they are accepted by name.
for poisoned in nan scaled; do
  if quiet translate --run run --method "$method" updates/client-1.safetensors "updates/$poisoned.safetensors" --out refused 2> "said/$poisoned"; then
    echo "$poisoned was accepted" >&2; exit 1
  fi
done
python3 - "$seed" "$method" > results.json <<'P'
import json, pathlib, sys
seed, method = int(sys.argv[1]), sys.argv[2]
scores, warnings = {}, {}
for path in sorted(pathlib.Path("scores").glob("*/score.json")):
    score = json.loads(path.read_text())
    scores[path.parent.name] = score["score"]
for path in sorted(pathlib.Path("translated").glob("*+mean/clients.json")):
    found = json.loads(path.read_text())
    rows = {c["name"]: {k: c.get(k) for k in ("norm", "distance", "warnings")} for c in found["clients"]}
    warnings[path.parent.name] = {"clients": rows, "cosines": found["cosines"], "usual": found.get("usual")}
refused = {name: pathlib.Path("said", name).read_text().strip() for name in ("nan", "scaled")}
print(json.dumps({"seed": seed, "method": method, "scores": scores, "clients": warnings, "refused": refused}, indent=1))
P
