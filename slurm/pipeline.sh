#!/bin/bash
# Submits curate → train → evaluate → report. Training and evaluation start when the job before
# them has succeeded, and are cancelled when it fails; the report waits for the training's
# success and for the end of evaluation, so one client that fails does not cost the page.
#
#   slurm/pipeline.sh RUN CONFIG [CLIENT …]
#
# CLIENT: see evaluate.sbatch. sbatch itself reads SBATCH_ACCOUNT, SBATCH_PARTITION and the like;
# options for one stage are in CURATE, TRAIN, EVALUATE and REPORT, e.g. CURATE='--nodes=8 --time=1-0'.
# ARRAY=32 curates by an array of 32 jobs.
set -euo pipefail

[ $# -ge 2 ] || { echo "usage: $0 RUN CONFIG [CLIENT …]" >&2; exit 2; }
run=$1 config=$2
shift 2
case $run in -*) run=./$run ;; esac # else commands take it for an option
# Bash would evaluate anything else where it computes with it.
[[ ${ARRAY:-1} =~ ^[1-9][0-9]{0,6}$ ]] || { echo "error: ARRAY=$ARRAY: expected a number of jobs" >&2; exit 2; }
GRADTX_SLURM=$(cd "$(dirname "$0")" && pwd)
export GRADTX_SLURM
mkdir -p "$run/logs"
read -ra for_curate <<<"${CURATE:-}"
read -ra for_train <<<"${TRAIN:-}"
read -ra for_evaluate <<<"${EVALUATE:-}"
read -ra for_report <<<"${REPORT:-}"

# A chain without its end is of no use.
jobs=()
trap '[ $? = 0 ] || [ ${#jobs[@]} = 0 ] || scancel "${jobs[@]}"' EXIT

# submit OPTIONS SCRIPT ARGUMENTS: a job, when $after allows; its number is then in $id.
after='' id=''
submit() {
    id=$(sbatch --parsable ${after:+--dependency="$after" --kill-on-invalid-dep=yes} "$@")
    id=${id%%;*}
    jobs+=("$id")
    echo "$id  $name"
}

# sbatch replaces `%j` and the like in names of files; `%%` is a percent sign.
logs=${run//%/%%}/logs
one="$logs/%x-%j.log" each="$logs/%x-%A_%a.log"
name=curate
if [ -n "${ARRAY:-}" ]; then
    submit --output="$each" --array="0-$((ARRAY - 1))" ${for_curate[@]+"${for_curate[@]}"} \
        "$GRADTX_SLURM/curate_array.sbatch" "$run" --config "$config"
else
    submit --output="$one" ${for_curate[@]+"${for_curate[@]}"} "$GRADTX_SLURM/curate.sbatch" "$run" --config "$config"
fi
name=train after=afterok:$id
submit --output="$one" ${for_train[@]+"${for_train[@]}"} "$GRADTX_SLURM/train.sbatch" "$run"
after=afterok:$id
if [ $# -gt 0 ]; then
    name="evaluate, $# clients"
    submit --output="$each" --array="0-$(($# - 1))" ${for_evaluate[@]+"${for_evaluate[@]}"} \
        "$GRADTX_SLURM/evaluate.sbatch" "$run" "$@"
    after+=,afterany:$id
fi
name=report
submit --output="$one" ${for_report[@]+"${for_report[@]}"} "$GRADTX_SLURM/report.sbatch" "$run"
printf -v shown %q "$run"
echo "watch: gradtx status $shown; squeue --jobs=$(IFS=,; echo "${jobs[*]}")"
