#!/bin/bash
# A SLURM cluster of two nodes with two pretend GPUs each, on this machine, as any user:
# real daemons (munged, slurmctld, two slurmd), everything they write below DIR.
#
#   cluster.sh DIR CONTROLLER_PORT NODE_PORT [NODE_PORT + 1 is used too]
#
# Prints `up` once the nodes are idle, and lives as long as its standard input: at its end,
# which comes even when the process that holds it is killed, everything is stopped and DIR
# removed. Commands for the cluster need `. DIR/env.sh`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$1 controller_port=$2 node_port=$3
umask 022
ulimit -c 0
trap '' INT # of the terminal: the end of the input is what ends this

alive() { local state; state=$(sed -n 's/^State:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) && [ -n "$state" ] && [ "${state#Z}" = "$state" ]; }

# stop PIDFILE …: asks, waits up to 5 s, then kills.
stop() {
    local file pid pids=()
    for file; do
        pid=$(cat "$file" 2>/dev/null) && kill "$pid" 2>/dev/null && pids+=("$pid")
    done
    for pid in ${pids[@]+"${pids[@]}"}; do
        for _ in {1..50}; do alive "$pid" || break; sleep 0.1; done
        ! alive "$pid" || kill -KILL "$pid"
    done
}

finish() {
    set +e
    if timeout 5 scontrol ping >/dev/null 2>&1; then
        timeout 10 scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null
        timeout 10 scancel --user="$(id -un)" 2>/dev/null
        for _ in {1..50}; do [ -z "$(timeout 5 squeue --noheader 2>/dev/null)" ] && break; sleep 0.1; done
    fi
    stop "$dir/run/slurmctld.pid" # first: it would wait for nodes that are gone
    stop "$dir"/run/slurmd.*.pid
    stop "$dir/run/munged.pid"
    rm -rf "$dir"
}

# A node of its own has a host name and /dev/shm of its own, where the kernel allows it: OpenMPI
# names its shared memory by host and local rank. Elsewhere MPI is told to use TCP alone.
isolated=0 node_host=$(hostname -s)
if unshare --uts --mount true 2>/dev/null; then
    isolated=1 node_host='node[1-2]'
fi
chmod 755 "$dir" # munged insists
mkdir -p "$dir"/{state,log,run,gpu,spool,tmp}
for gpu in 0 1; do ln -sfn /dev/null "$dir/gpu/$gpu"; done # SLURM wants a device
(umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
sed -e "s#@DIR@#$dir#g; s#@HOST@#$(hostname -s)#g; s#@USER@#$(id -un)#g; s#@NODE_HOST@#$node_host#g" \
    -e "s#@CONTROLLER_PORT@#$controller_port#g; s#@NODE_PORTS@#$node_port-$((node_port + 1))#g" \
    "$here/slurm.conf.in" >"$dir/slurm.conf"
echo "NodeName=node[1-2] Name=gpu File=$dir/gpu/[0-1]" >"$dir/gres.conf"
# Nothing here uses cgroups, but slurmd looks for them at its start, and ends where it finds none.
echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf"
{ cat /etc/hosts; for node in 1 2; do echo "127.0.0.1 node$node"; done; } >"$dir/hosts"
cat >"$dir/env.sh" <<EOF
export PATH=/usr/sbin:\$PATH SLURM_CONF=$dir/slurm.conf BOX_ISOLATED=$isolated
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1
export OMPI_MCA_btl_tcp_if_include=lo OMPI_MCA_oob_tcp_if_include=lo
EOF
[ "$isolated" = 1 ] || echo "export OMPI_MCA_btl=self,tcp" >>"$dir/env.sh"
# shellcheck disable=SC1091 # written above
. "$dir/env.sh"

trap finish EXIT
munged --socket="$dir/run/munge.sock" --key-file="$dir/munge.key" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"
slurmctld
for node in node1 node2; do "$here/node.sh" "$dir" up $node; done
for _ in {1..100}; do
    idle=$(timeout 3 sinfo --noheader --Node --format=%T 2>/dev/null | grep -cx idle || true)
    [ "$idle" != 2 ] || break
    sleep 0.1
done
if [ "$idle" != 2 ]; then
    echo "the nodes did not come up:"
    tail -n 5 "$dir"/log/*.log
    exit 1
fi
echo up
cat >/dev/null
