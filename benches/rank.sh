#!/usr/bin/env bash
# Rank of the shadows' adapters on held-out tasks of the miniature world: translators ridge and products, not refined.
#
#   rank.sh OUT [SEED...]        (default seed: 1)
#
# Writes OUT/seed-N-rR.json, the summary of `gradtx cross-validate`, for R in 2, 8, 16, with α/r = 16 and two shadows
# of each task, one snapshot of each, and prints a row for each. GRADTX names the program (default:
# target/release/gradtx), THREADS its threads (default: 2), RANKS the ranks.
set -euo pipefail
program=${GRADTX:-target/release/gradtx}
threads=${THREADS:-2}
out=$1
shift
[ $# -gt 0 ] || set -- 1
mkdir -p "$out"
for seed in "$@"; do
    world=$out/world-$seed
    "$program" world "$world" --world held-out --seed "$seed" --threads "$threads"
    for rank in ${RANKS:-2 8 16}; do
        name=seed-$seed-r$rank
        "$program" curate --run "$out/$name" --config "$world/settings.toml" --threads "$threads" \
            --set curate.num_subsets=72 --set curate.num_snapshots=1 \
            --set "lora.r=$rank" --set "lora.lora_alpha=$((16 * rank))"
        "$program" cross-validate --run "$out/$name" --data "$world/test/tasks.jsonl" --methods ridge,products \
            --refine none --threads "$threads"
        cp "$out/$name/cross-validation/summary.json" "$out/$name.json"
    done
done
python3 - "$out" <<'PYTHON'
import json, pathlib, sys

for path in sorted(pathlib.Path(sys.argv[1]).glob("seed-*.json")):
    found = json.loads(path.read_text())
    cells = [f"{t['pgr']:.1f} [{t['interval'][0]:.0f}, {t['interval'][1]:.0f}]" for t in found["translators"]]
    print(path.stem, f"P_S {found['student']:.1f}", f"P_T {found['teacher']:.1f}", *cells, sep="  ")
PYTHON
