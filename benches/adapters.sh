#!/usr/bin/env bash
# Rank of the shadows' adapters, and A trained or frozen, on held-out tasks of the miniature world: translators ridge and
# products, not refined.
#
#   adapters.sh [--quick] OUT [SEED...]        (default seed: 1)
#
# Writes OUT/seed-N-rR-KIND.json, the summary of `gradtx cross-validate`, for R in 2, 8, 16 and KIND trained or frozen
# (lora.freeze_a), with α/r = 16 and two shadows of each task, one snapshot of each, and prints a row for each. --quick:
# rank 2, one shadow of each task, the first fold. GRADTX names the program (default: target/release/gradtx), THREADS its
# threads (default: 2), RANKS and KINDS what is tried. What is finished is not done again.
set -euo pipefail
program=${GRADTX:-target/release/gradtx}
threads=${THREADS:-2}
ranks=${RANKS:-2 8 16} subsets=72 first=()
if [ "${1:-}" = --quick ]; then
    ranks=${RANKS:-2} subsets=36 first=(--first 1)
    shift
fi
out=${1:?usage: adapters.sh [--quick] OUT [SEED...]}
shift
[ $# -gt 0 ] || set -- 1
mkdir -p "$out"
for seed in "$@"; do
    world=$out/world-$seed
    "$program" world "$world" --world held-out --seed "$seed" --threads "$threads"
    for rank in $ranks; do
        for kind in ${KINDS:-trained frozen}; do
            name=seed-$seed-r$rank-$kind
            case $kind in
                trained) freeze=false ;;
                frozen) freeze=true ;;
                *) echo "error: KINDS: expected trained or frozen, found $kind" >&2; exit 2 ;;
            esac
            "$program" curate --run "$out/$name" --config "$world/settings.toml" --threads "$threads" \
                --set "curate.num_subsets=$subsets" --set curate.num_snapshots=1 \
                --set "lora.r=$rank" --set "lora.lora_alpha=$((16 * rank))" --set "lora.freeze_a=$freeze"
            "$program" cross-validate --run "$out/$name" --data "$world/test/tasks.jsonl" --methods ridge,products \
                --refine none "${first[@]}" --threads "$threads"
            cp "$out/$name/cross-validation/summary.json" "$out/$name.json"
        done
    done
done
python3 - "$out" <<'PYTHON'
import json, pathlib, sys

for path in sorted(pathlib.Path(sys.argv[1]).glob("seed-*.json")):
    found = json.loads(path.read_text())
    cells = [f"{t['name']} {t['pgr']:.1f} [{t['interval'][0]:.0f}, {t['interval'][1]:.0f}]" for t in found["translators"]]
    print(path.stem, f"P_S {found['student']:.1f}", f"P_T {found['teacher']:.1f}", *cells, sep="  ")
PYTHON
