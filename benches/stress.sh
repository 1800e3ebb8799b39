#!/usr/bin/env bash
# What translators reach for clients unlike the shadows, and how well bad translations can be seen.
#
#   stress.sh [--quick] DIR [FIRST_FOLDS]        (default: 1)
#
# DIR is what `gradtx demo DIR --world held-out` made. Prints a row per kind of client and translator, and writes
# DIR/stress/cross-validation/variants.json. --quick: 2 of the 36 tasks, one text of --leave-out. GRADTX names the program
# (default: target/release/gradtx), THREADS its threads (default: 2).
set -euo pipefail
program=${GRADTX:-target/release/gradtx}
folds=4 left_out='+3,(x!;'
if [ "${1:-}" = --quick ]; then
    folds=18 left_out='+3'
    shift
fi
dir=${1:?usage: stress.sh [--quick] DIR [FIRST_FOLDS]}
"$program" cross-validate --run "$dir/stress" --tuples "$dir/run" --data "$dir/world/test/tasks.jsonl" \
    --folds "$folds" --first "${2:-1}" --methods ridge,products --refine products \
    --clients as-curated,longer,shorter,mixture,half-noise,noise,fewer-prompts,unseen-value \
    --without-prompts '<rotr>,<swap>,<half>' --leave-out "$left_out" --threads "${THREADS:-2}"
