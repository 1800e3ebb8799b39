#!/usr/bin/env bash
# What several ranks on one machine cost and bring, on the models of a miniature world.
#
#   ranks.sh WORLD OUT [REPEATS]
#
# WORLD is what `gradtx world` makes. Prints lines of JSON:
#
# * the machine;
# * curation of 64 small shadow jobs (32 subsets, two models, one job per group) on 1 and on 4
#   ranks of one thread: seconds in all; per job, milliseconds of waiting for work, of waiting for
#   the disk, and of anything else but training and loading models; and the share of the ranks'
#   time in which they had nothing to do;
# * steps of the Grad-Transformer's training on 1 and 2 ranks of one thread, and on one rank of
#   two threads: seconds of a step, and how much of that was communication and waiting for data.
#
# GRADTX names the program (default: target/release/gradtx); it must be built with MPI.
set -euo pipefail
program=$(realpath "${GRADTX:-target/release/gradtx}")
world=$1 out=$2 repeats=${3:-3}
mkdir -p "$out"
config=$(find "$world" -maxdepth 1 -name "*.toml" | head -n 1)
# More ranks than cores, and perhaps a container whose only user is root.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 \
    OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_hwloc_base_binding_policy=none

# go RANKS THREADS STAGE RUN …
go() {
    local ranks=$1 threads=$2 stage=$3 run=$4
    shift 4
    mpirun -n "$ranks" "$program" "$stage" --quiet --threads "$threads" --run "$run" --config "$config" "$@" >/dev/null
}

jobs=(--set curate.num_subsets=32 --set curate.jobs_per_batch=1 --set curate.tiny.max_steps=40 --set curate.llm.max_steps=20
    --set curate.num_snapshots=4 --set curate.snapshot_steps=2)
model=(--set translator.d_model=256 --set translator.d_ff=512 --set translator.num_heads=4 --set translator.d_kv=64
    --set translator.num_layers=4 --set translator.num_decoder_layers=4)
steps=(--set train.max_steps=60 --set train.eval_steps=60 --set train.global_batch_size=32 --set train.per_device_train_batch_size=16)

printf '{"machine": true, "cpu": "%s", "cores": %s, "date": "%s", "mpi": "%s", "world": "%s"}\n' \
    "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" "$(nproc)" "$(date -u +%F)" \
    "$(mpirun --version | head -n 1)" "$(basename "$config")"
for repeat in $(seq "$repeats"); do
    for ranks in 1 4; do
        run=$out/curate-$ranks-$repeat
        go "$ranks" 1 curate "$run" "${jobs[@]}"
        python3 - "$run" "$ranks" "$repeat" <<'PYTHON'
import json, pathlib, sys

run, ranks, repeat = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rows = [json.loads(line) for line in (run / "shadow/throughput-ranks.jsonl").read_text().splitlines()]
total = sum(row["wall_s"] for row in rows)
keys = ("training_s", "delivering_s", "loading_s", "waiting_s", "after_s")
spent = {key: sum(row[key] for row in rows) for key in keys}
jobs = sum(row["groups"] for row in rows)
other = (total - sum(spent.values())) / jobs
line = {"work": "curate", "ranks": ranks, "repeat": repeat, "jobs": jobs, "wall_s": round(rows[0]["wall_s"], 3),
        "jobs_by_rank": [row["groups"] for row in rows],
        "waiting_ms_per_job": round(1e3 * spent["waiting_s"] / jobs, 3), "other_ms_per_job": round(1e3 * other, 3),
        "writing_ms_per_job": round(1e3 * spent["delivering_s"] / jobs, 3),
        "training_share": round(spent["training_s"] / total, 4),
        "idle_share": round((spent["waiting_s"] + spent["after_s"]) / total, 4)}
print(json.dumps(line))
PYTHON
    done
    for way in "1 1" "2 1" "1 2"; do
        read -r ranks threads <<<"$way"
        run=$out/train-$ranks-$threads-$repeat
        mkdir -p "$run"
        cp -r "$out/curate-1-$repeat/shadow" "$run/"
        go "$ranks" "$threads" train "$run" "${jobs[@]}" "${model[@]}" "${steps[@]}"
        python3 - "$run" "$ranks" "$threads" "$repeat" <<'PYTHON'
import json, pathlib, sys

run, (ranks, threads, repeat) = pathlib.Path(sys.argv[1]), map(int, sys.argv[2:])
row = json.loads((run / "translator/throughput.jsonl").read_text().splitlines()[-1])
ms = {key + "_ms": round(1e3 * seconds, 2) for key, seconds in row["seconds"].items()}
print(json.dumps({"work": "train", "ranks": ranks, "threads": threads, "repeat": repeat,
                  "step_ms": round(sum(ms.values()), 2), **ms}))
PYTHON
    done
done
