#!/bin/bash
# What audits find of canaries: clients that memorise them, and clients with differential privacy.
#   audit.sh DIR [RUNS]     writes DIR/results.json: bounds on epsilon and areas under the ROC curve, RUNS (20) of each kind
# Every run has canaries, coins, a training and noise of its own. GRADTX names the program (default: gradtx), EPSILONS what
# private clients promise (default: "1 4"; none is always measured), CANARIES (200) how many canaries a run has.
set -euo pipefail
[ $# -ge 1 ] || { sed -n 2,5p "$0" >&2; exit 2; }
gradtx=$(command -v "${GRADTX:-gradtx}") || { echo "error: ${GRADTX:-gradtx}: no such program; GRADTX names it" >&2; exit 2; }
gradtx=$(realpath "$gradtx") dir=$1 runs=${2:-20} canaries=${CANARIES:-200}
read -ra epsilons <<< "${EPSILONS:-1 4}"
mkdir -p "$dir" && cd "$dir"
quiet() { "$gradtx" "$@" --quiet --threads "${THREADS:-1}"; }
[ -e world/record.json ] || quiet world world --world smoke
data=(world/private/*/train.jsonl)
cat > settings.toml <<'T'
[models]
tiny = "world/tiny"
llm = "world/llm"
[data]
instruction = "none"
prompt = "template"
max_length = 64
[lora]
r = 16
lora_dropout = 0.0
target_modules = "all-linear"
[finetune.tiny]
max_steps = 200
global_batch_size = 64
learning_rate = 0.005
loss_reduction = "sequence"
[privacy]
target_delta = 0.001
T
mkdir -p audits
for ((seed = 1; seed <= runs; seed++)); do
  [ -e "data-$seed.jsonl" ] || quiet audit --insert-canaries "$canaries" --data "${data[0]}" --out "data-$seed.jsonl" --key "key-$seed.json" --seed "$seed"
  for epsilon in none "${epsilons[@]}"; do
    name=$epsilon-$seed
    [ -e "audits/$name.json" ] && continue
    options=()
    [ "$epsilon" = none ] || options=(--set "privacy.target_epsilon=$epsilon")
    quiet finetune --run "run-$epsilon" --config settings.toml --data "data-$seed.jsonl" --out "clients/$name" "${options[@]}" 2> /dev/null
    quiet audit --run "run-$epsilon" --update "clients/$name/update.safetensors" --key "key-$seed.json" --out "audits/$name.json" > /dev/null
  done
done
python3 - "$canaries" "${epsilons[@]}" <<'P'
import json, pathlib, statistics, sys

canaries, epsilons = int(sys.argv[1]), sys.argv[2:]
found = []
for kind in ["none", *epsilons]:
    runs = []
    for path in sorted(pathlib.Path("audits").glob(f"{kind}-*.json"), key=lambda p: int(p.stem.split("-")[1])):
        audit = json.loads(path.read_text())
        runs.append({
            "seed": int(path.stem.split("-")[1]),
            "states": audit["privacy"].get("epsilon") if kind != "none" else None,
            "at_least": audit["epsilon"]["at_least"],
            "auc": {attack["attack"]: round(attack["auc"], 4) for attack in audit["attacks"]},
        })
    best = [max(run["auc"].values()) for run in runs]
    bounds = [run["at_least"] for run in runs]
    above = sum(run["states"] is not None and run["at_least"] > run["states"] for run in runs)
    found.append({"epsilon": kind, "runs": runs, "largest_bound": max(bounds), "median_bound": statistics.median(bounds),
                  "median_best_auc": statistics.median(best), "smallest_best_auc": min(best), "bounds_above_what_is_stated": above})
    print(f"epsilon {kind:>5}: {len(runs)} runs, bound median {statistics.median(bounds):.3f} largest {max(bounds):.3f}, "
          f"best AUC median {statistics.median(best):.3f}, {above} bounds above what is stated")
pathlib.Path("results.json").write_text(json.dumps({"canaries": canaries, "delta": 1e-3, "kinds": found}, indent=1) + "\n")
P
