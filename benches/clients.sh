#!/usr/bin/env bash
# Several clients at once in the miniature world `unseen`: five owners of examples of one task, and five
# of different tasks; translated one by one, from their mean, and from their sum.
#
#   clients.sh [--quick] OUT [SEED]        (default seed: 1)
#
# Writes OUT/clients.json: exact match in percent on the test examples of client 1, or of clients 1 to 5 together.
# --quick: two owners in the place of five, one shadow of each task in the place of two. GRADTX names the program
# (default: target/release/gradtx), THREADS its threads (default: 2).
set -euo pipefail
program=$(realpath "${GRADTX:-target/release/gradtx}")
threads=${THREADS:-2}
owners=5 subsets=54
if [ "${1:-}" = --quick ]; then
    owners=2 subsets=27
    shift
fi
mkdir -p "${1:?usage: clients.sh [--quick] OUT [SEED]}"
cd "$1"
seed=${2:-1}
run() { "$program" "$1" --run run --config world/settings.toml "${@:2}" --threads "$threads"; }
"$program" world world --world unseen --seed "$seed" --threads "$threads"
private=world/private
split -n "l/$owners" -d --additional-suffix=.jsonl "$private/client-1/train.jsonl" part-
for ((i = 1; i <= owners; i++)); do cat "$private/client-$i/test.jsonl"; done > tests.jsonl
sets=(--set "curate.num_subsets=$subsets" --set curate.num_snapshots=2)
run curate "${sets[@]}"
same=() different=()
for ((i = 0; i < owners; i++)); do
    run finetune --data "part-0$i.jsonl" --out "same-$i" "${sets[@]}"
    run finetune --data "$private/client-$((i + 1))/train.jsonl" --out "different-$i" "${sets[@]}"
    same+=("same-$i/update.safetensors")
    different+=("different-$i/update.safetensors")
done
# NAME TESTS and what `translate` takes.
score() {
    local name=$1 tests=$2
    for method in ridge products; do
        run translate --method "$method" --out "$name-$method" "${sets[@]}" "${@:3}"
        run evaluate --data "$tests" --adapter "$name-$method/adapter" --out "score-$name-$method" "${sets[@]}"
    done
}
score one "$private/client-1/test.jsonl" "${same[0]}"
score same-mean "$private/client-1/test.jsonl" "${same[@]}"
score different-mean tests.jsonl "${different[@]}"
score different-sum tests.jsonl --combine sum --allow-outliers "${different[@]}"
for ((i = 0; i < owners; i++)); do
    score "different-$i" "$private/client-$((i + 1))/test.jsonl" "${different[$i]}"
done
python3 - <<'PYTHON'
import json, pathlib

found = {p.parent.name.removeprefix("score-"): json.loads(p.read_text()) for p in pathlib.Path().glob("score-*/score.json")}
rows = {name: round(100 * s["right"] / s["examples"], 2) for name, s in sorted(found.items())}
pathlib.Path("clients.json").write_text(json.dumps(rows, indent=1) + "\n")
for name, percent in rows.items():
    print(f"{percent:6.1f}  {name}")
PYTHON
