#!/bin/bash
# A node of the cluster in DIR (see cluster.sh).
#
#   node.sh DIR up|crash NODE
#
# up     starts its slurmd, and clears away what a crash left of MPI's start: a requeued job
#        has the same name again
# crash  kills slurmd and all processes of its jobs at once, as a power failure would
set -euo pipefail
dir=$1 what=$2 node=$3
# shellcheck disable=SC1091 # cluster.sh writes it
. "$dir/env.sh"
case $what in
up)
    mkdir -p "$dir/spool/$node" "$dir/tmp/$node"
    rm -rf "$dir/spool/$node"/pmix.* "$dir/spool/$node"/stepd.slurm.pmix.* "$dir/tmp/$node"/spmix_appdir_*
    if [ "$BOX_ISOLATED" = 1 ]; then
        # shellcheck disable=SC2016 # for the inner shell
        unshare --uts --mount --propagation slave sh -c \
            'hostname "$1" && mount -t tmpfs -o size=50% shm /dev/shm && mount --bind "$2/hosts" /etc/hosts && exec slurmd -N "$1"' \
            sh "$node" "$dir"
    else
        slurmd -N "$node"
    fi
    ;;
crash)
    slurmd=$(cat "$dir/run/slurmd.$node.pid")
    victims=("$slurmd") world=''
    if [ "$BOX_ISOLATED" = 1 ]; then
        world=$(readlink "/proc/$slurmd/ns/uts")
        [ "$world" != "$(readlink /proc/self/ns/uts)" ] || { echo "$node is not a world of its own"; exit 1; }
    fi
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        if [ -n "$world" ]; then
            # Whatever lives under the node's host name.
            [ "$(readlink "$process/ns/uts" 2>/dev/null)" != "$world" ] || victims+=("$pid")
        elif grep -qzx "SLURMD_NODENAME=$node" "$process/environ" 2>/dev/null &&
            grep -qzx "SLURM_CONF=$dir/slurm.conf" "$process/environ" 2>/dev/null; then
            # A job's process, and the slurmstepd above it.
            parent=$(awk '/^PPid:/ { print $2 }' "$process/status" 2>/dev/null) || continue
            ! grep -q '^slurmstepd:' "/proc/$parent/cmdline" 2>/dev/null || victims+=("$parent")
            victims+=("$pid")
        fi
    done
    kill -KILL "${victims[@]}" 2>/dev/null || true # some may have gone with others
    ;;
esac
