#!/usr/bin/env bash
# What translators reach for clients unlike the shadows, and how well bad translations can be seen.
#
#   stress.sh DIR [FIRST_FOLDS]        (default: 1)
#
# DIR is what `gradtx demo DIR --world held-out` made. Prints a row per kind of client and translator, and writes
# DIR/run/cross-validation/variants.json. GRADTX names the program (default: target/release/gradtx).
set -euo pipefail
program=${GRADTX:-target/release/gradtx}
dir=$1
"$program" cross-validate --run "$dir/run" --data "$dir/world/test/tasks.jsonl" --first "${2:-1}" \
    --methods ridge,products --refine products \
    --clients as-curated,longer,shorter,mixture,half-noise,noise,fewer-prompts,unseen-value \
    --without-prompts '<rotr>,<swap>,<half>' --leave-out '+3,(x!;'
