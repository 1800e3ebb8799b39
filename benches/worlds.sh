#!/usr/bin/env bash
# What the translators reach in the three miniature worlds, over seeds of everything.
#
#   worlds.sh OUT [SEED...]        (default seeds: 1 2 3)
#
# Writes OUT/WORLD-SEED (the demo's directory) and OUT/WORLD-SEED.json (its table), and
# prints a row per world and seed: mean exact match over clients in percent, PGR in
# brackets. GRADTX names the program (default: target/release/gradtx).
set -euo pipefail
program=${GRADTX:-target/release/gradtx}
out=$1
shift
[ $# -gt 0 ] || set -- 1 2 3
mkdir -p "$out"
for seed in "$@"; do
    for world in mixed same unseen; do
        "$program" demo "$out/$world-$seed" --world "$world" --seed "$seed" > "$out/$world-$seed.txt"
        cp "$out/$world-$seed/run/table.json" "$out/$world-$seed.json"
    done
done
python3 - "$out" <<'PYTHON'
import json, pathlib, sys

for path in sorted(pathlib.Path(sys.argv[1]).glob("*-[0-9]*.json")):
    rows = json.loads(path.read_text())[0]["rows"]
    cells = [f"{r['mean']:.1f}" + ("" if r.get("pgr") is None else f" ({r['pgr']:.0f})") for r in rows[2:]]
    print(path.stem, *cells, sep="  ")
PYTHON
