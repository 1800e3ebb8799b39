#!/bin/sh
# Differentially private clients of the miniature world: scores of the TinyLM and of translations, by epsilon, and
# the time of a private step.
#
#   benches/privacy.sh PROGRAM DIR [SEEDS]
#
# Models and shadow pairs are those of world `held-out`, whose public data has all tasks; private data are the 256
# examples of client 1 of world `mixed` of the same seed. Writes DIR/scores.jsonl: a line for every score.
set -eu
program=$(realpath "$1"); mkdir -p "$2"; cd "$2"; seeds=${3:-"1 2 3"}
gradtx() { "$program" "$@" --threads 1 --quiet; }
# Private or not, a client takes large batches, and every example counts the same.
recipe="--set finetune.tiny.loss_reduction=sequence --set finetune.tiny.global_batch_size=128"
for seed in $seeds; do
  models=${MODELS:-.}/seed-$seed
  [ -d "$models/run/shadow" ] || {
    gradtx world "$models/world" --world held-out --seed "$seed"
    gradtx curate --run "$models/run" --config "$models/world/settings.toml"
  }
  [ -f "mixed-$seed/private/client-1/test.jsonl" ] || gradtx world "mixed-$seed" --world mixed --seed "$seed"
  data=mixed-$seed/private/client-1; run=run-$seed
  for epsilon in none 8 1 0.1; do
    out=$run/$epsilon; private=""
    [ $epsilon = none ] || private="--dp-epsilon $epsilon --dp-delta 1e-3 --dp-max-grad-norm ${CLIP:-1}"
    # shellcheck disable=SC2086
    gradtx finetune --run $run --config "$models/world/settings.toml" --tuples "$models/run" $recipe $private \
      --data $data/train.jsonl --out $out/tiny --save-adapter
    gradtx evaluate --run "$run" --data "$data/test.jsonl" --model tiny --adapter "$out/tiny/adapter" --out "$out/score/tiny"
    for how in products ridge random; do
      method=$how; random=""
      [ $how != random ] || { method=products; random="--random-update"; }
      # shellcheck disable=SC2086
      gradtx translate --run $run --method $method $random --allow-outliers $out/tiny/update.safetensors --out $out/$how
      gradtx evaluate --run "$run" --data "$data/test.jsonl" --adapter "$out/$how/adapter" --out "$out/score/$how"
    done
    for what in tiny products ridge random; do
      score=$(sed -n 's/.*"score": *\([0-9.]*\).*/\1/p' "$out/score/$what/score.json" | head -1)
      echo "{\"seed\": $seed, \"epsilon\": \"$epsilon\", \"model\": \"$what\", \"score\": $score}" >> scores.jsonl
    done
  done
done
