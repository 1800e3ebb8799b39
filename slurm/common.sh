# shellcheck shell=bash
# What the batch scripts share. They source this file and then call `ranks STAGE …`, once or
# several times; when they end, [finish] says how it went and requeues a job that was asked to stop.
#
# Arguments of every script: RUN, the run directory, then what the stage takes.
# Environment, all of it optional:
#   GRADTX           the program (gradtx on the PATH)
#   GRADTX_MPI       how srun starts MPI: pmix (OpenMPI), pmi2 (MPICH), none
#   GRADTX_SRUN      more options of srun, e.g. --cpu-bind=cores
#   GRADTX_RESTARTS  how often a job may be requeued (20)
# Set by scripts of `gradtx submit`: LOG_NAME, the start of the logs' names; SRUN_OPTIONS, more
# options of srun; CONTAINER, if the program is in a container; LAUNCHER, what starts it there.
set -euo pipefail

RUN=${1:?"usage: sbatch [options] SCRIPT RUN [arguments of the stage]"}
shift
case $RUN in -*) RUN=./$RUN ;; esac # else commands take it for an option
GRADTX=${GRADTX:-gradtx}
[ -n "${CONTAINER:-}" ] || [ -n "$(command -v -- "$GRADTX")" ] || { echo "error: $GRADTX: not found; put it on the PATH or set GRADTX"; exit 127; }

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}
# A log for every rank and start: RUN/logs/gradtx-curate-17.0.log, after a requeue -17-r1.0.log.
mkdir -p "$RUN/logs"
logs=$RUN/logs/${LOG_NAME:-$SLURM_JOB_NAME}-$job
[ "$restarts" = 0 ] || logs+=-r$restarts

threads=()
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    threads=(--threads "$SLURM_CPUS_PER_TASK")
    export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
fi
# Scratch of the node, where the cluster has one for the job.
export TMPDIR=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}
read -ra srun_options <<<"${GRADTX_SRUN:-}"
srun_options=(${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} ${srun_options[@]+"${srun_options[@]}"})
launcher=(${LAUNCHER[@]+"${LAUNCHER[@]}"})

# describe: the first line of the job's log: program and version, nodes, GPUs and driver, settings.
describe() {
    local version gpus settings='' nodes=${SLURM_JOB_NUM_NODES:-1}
    if [ -n "${CONTAINER:-}" ] && [ ${#launcher[@]} = 0 ]; then
        version="$GRADTX in a container"
    else
        version=$(${launcher[@]+"${launcher[@]}"} "$GRADTX" --version 2>&1 | head -n 1) || version="$GRADTX does not start"
    fi
    gpus=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | sort | uniq -c |
        sed -E 's/^ *([0-9]+) (.*), ([^,]*)$/\1 x \2, driver \3/' | paste -sd';') || true
    [ ! -f "$RUN/run.toml" ] || settings=", settings $(sha256sum <"$RUN/run.toml" | cut -c1-12)"
    echo "$SLURM_JOB_NAME $job: $version on $SLURM_JOB_NODELIST (nodes: $nodes, tasks:" \
        "${SLURM_NTASKS:-$((nodes * ${SLURM_NTASKS_PER_NODE:-1}))}); ${gpus:-no GPU}$settings;" \
        "started $(date -u '+%Y-%m-%d %H:%M:%S') UTC"
}

# ranks STAGE …: the stage on all ranks of the job; fails as it fails. Curation writes to the
# node's scratch first, where there is one, unless its options say where.
ranks() {
    local stage=$1
    shift
    case "$stage $* " in
    *" --scratch"*) ;;
    curate*) [ -z "${SLURM_TMPDIR:-}" ] || set -- --scratch "$SLURM_TMPDIR" "$@" ;;
    esac
    tasks "$GRADTX" "$stage" ${threads[@]+"${threads[@]}"} "$@"
}

# tasks COMMAND …: the command on all ranks of the job. A step that has started is only ever
# asked to stop; where there was a request already, none begins.
tasks() {
    local rc
    [ -z "$asked" ] || return "$STOPPED"
    # srun replaces `%j` and the like in names of files; `%%` is a percent sign.
    srun --mpi="${GRADTX_MPI:-pmix}" --kill-on-bad-exit=1 --open-mode=append --output="${logs//%/%%}.%t.log" \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
        ${srun_options[@]+"${srun_options[@]}"} ${launcher[@]+"${launcher[@]}"} "$@" &
    step=$!
    while true; do
        interrupted='' rc=0
        wait "$step" || rc=$?
        [ -n "$interrupted" ] || break # else a signal ended the wait, not the step
    done
    step=''
    return "$rc"
}

# SLURM's signal before the time limit (--signal=B:USR1@…) reaches this shell alone, which passes
# it on; when SLURM ends a job, the ranks get SIGTERM themselves. To the ranks both are the same
# request: finish the step, write a checkpoint, exit with STOPPED. A second one ends them at once.
readonly STOPPED=75 ANSWER='stopping at the end of this step'
asked='' interrupted='' step=''
ask() {
    interrupted=1
    [ -z "$asked" ] || return 0
    asked=1
    [ -z "$step" ] || pass_on "$1" &
}
# srun loses a signal while it is still starting the ranks: so again, until they answer or end.
pass_on() {
    sleep "$1"
    until grep -qs "$ANSWER" "$logs".*.log; do
        kill -USR1 "$step" 2>/dev/null || return 0
        sleep 10
    done
}
trap 'ask 0' USR1
trap 'ask 10' TERM

# A job that is being cancelled may not come back; one that SLURM requeues needs no help.
is_running() { [[ $(scontrol show job --oneliner "$job") == *JobState=RUNNING* ]]; }

finish() {
    local rc=$1 error most=${GRADTX_RESTARTS:-20} end was_stop=''
    trap - EXIT
    trap '' USR1 TERM
    # What went wrong on a rank, if anything did. (With --json, a stop is an event of that kind too.)
    error=$(cat "$logs".*.log 2>/dev/null | grep -E '^error|"event":"error"' |
        grep -vE '"code":(75|143)\b' | head -n 1) || true
    # A rank that was not listening yet dies of the signal (138), and SLURM ends the others with it.
    case $rc:$asked in $STOPPED:* | 137:1 | 138:1 | 143:1) was_stop=1 ;; esac
    if [ "$rc" = 0 ]; then
        end="done"
    elif [ -z "$was_stop" ] || [ -n "$error" ]; then
        end="FAILED with exit code $rc${error:+, $error}"
    elif ! is_running; then
        end="stopped on request"
    elif [ "$restarts" -ge "$most" ]; then
        end="stopped on request, and NOT requeued after $restarts restarts (GRADTX_RESTARTS)"
    elif scontrol requeue "$job"; then
        end="stopped on request, requeued"
    else
        end="stopped on request, and could NOT be requeued"
    fi
    echo "$SLURM_JOB_NAME $job: $end; $SECONDS s on $SLURM_JOB_NODELIST; logs: $logs.*.log"
    exit "$rc"
}
trap 'finish $?' EXIT

describe
