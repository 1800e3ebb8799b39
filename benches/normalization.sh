#!/usr/bin/env bash
# Which units of the updates a translator learns best in: trains one on the tuples of a
# finished demo for each normalisation, and evaluates all clients.
#
#   normalization.sh DEMO OUT
#
# Prints a line of JSON for each: relative error on held-out subsets, and exact match in
# percent. GRADTX names the program (default: target/release/gradtx).
set -euo pipefail
program=${GRADTX:-target/release/gradtx}
demo=$1 out=$2
for mode in none scalar scalar_centred block coordinate; do
    run=$out/$mode
    mkdir -p "$run"
    cp -r "$demo/run/shadow" "$run/"
    settings=(--run "$run" --config "$demo/world/settings.toml" --set "translator.update_normalization=$mode" --quiet)
    "$program" train "${settings[@]}" > "$run/train.txt"
    for client in "$demo"/run/clients/*; do
        name=$(basename "$client")
        "$program" translate "${settings[@]}" "$client/finetuned/tiny/update.safetensors" --out "$run/$name/translated" > /dev/null
        "$program" evaluate "${settings[@]}" --data "$demo/world/private/$name/test.jsonl" \
            --adapter "$run/$name/translated/adapter" --out "$run/$name/evaluated" > /dev/null
    done
    python3 - "$run" "$mode" <<'PYTHON'
import json, pathlib, sys

run, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
scores = [json.loads(p.read_text())["exact_match"] * 100 for p in sorted(run.glob("client-*/evaluated/score.json"))]
error = json.loads((run / "translator/validation.json").read_text())["best"]["relative_error"]
line = {"normalization": mode, "relative_error": round(error, 4), "exact_match": round(sum(scores) / len(scores), 1)}
print(json.dumps({**line, "by_client": [round(s, 1) for s in scores]}))
PYTHON
done
