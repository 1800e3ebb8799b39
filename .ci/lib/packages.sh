# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # the caller removes what stops daemons; why comes from detect.sh
# What to install on this system, and how. Sourced by .ci/setup after detect.sh.

# This system's package manager: apt, dnf, zypper, pacman, apk, conda, or nothing.
package_manager() {
    local names=(apt-get:apt dnf:dnf microdnf:dnf yum:dnf zypper:zypper pacman:pacman apk:apk) name
    for name in "${names[@]}"; do
        ! have "${name%:*}" || { printf '%s' "${name#*:}"; return 0; }
    done
    [ -z "${CONDA_PREFIX:-}" ] || printf conda
}

# package_names MANAGER WHAT …: the packages that have them, a line each.
package_names() {
    local manager=$1 what
    shift
    for what; do
        case $manager:$what in
        apt:c) printf '%s\n' gcc libc6-dev ;;
        apt:cxx) printf '%s\n' g++ ;;
        apt:mpi) printf '%s\n' openmpi-bin libopenmpi-dev ;;
        apt:libclang) apt_libclang ;;
        apt:cluster) printf '%s\n' slurmctld slurmd slurm-client munge ;;
        dnf:c) printf '%s\n' gcc glibc-devel ;;
        dnf:cxx) printf '%s\n' gcc-c++ ;;
        dnf:mpi) printf '%s\n' openmpi-devel ;;
        dnf:libclang) printf '%s\n' clang-libs ;;
        dnf:cluster) printf '%s\n' slurm-slurmctld slurm-slurmd slurm munge ;;
        zypper:c) printf '%s\n' gcc glibc-devel ;;
        zypper:cxx) printf '%s\n' gcc-c++ ;;
        zypper:mpi) printf '%s\n' openmpi4-devel ;;
        zypper:libclang) printf '%s\n' libclang13 ;;
        zypper:cluster) printf '%s\n' slurm slurm-node munge ;;
        pacman:c | pacman:cxx) printf '%s\n' gcc ;;
        pacman:mpi) printf '%s\n' openmpi ;;
        pacman:libclang) printf '%s\n' clang ;;
        pacman:cluster) printf '%s\n' slurm-llnl munge ;;
        apk:c | apk:cxx) printf '%s\n' build-base ;;
        apk:mpi) printf '%s\n' openmpi openmpi-dev ;;
        apk:libclang) printf '%s\n' clang-libclang ;;
        apk:cluster) printf '%s\n' slurm munge ;;
        conda:c) printf '%s\n' c-compiler ;;
        conda:cxx) printf '%s\n' cxx-compiler ;;
        conda:mpi) printf '%s\n' openmpi-mpicc ;;
        conda:libclang) printf '%s\n' libclang ;;
        conda:cluster) ;;
        *:make) printf '%s\n' make ;;
        esac
    done | awk '!seen[$0]++'
}

# The newest libclang that apt knows, and clang's own headers; a name to look for where it knows none.
apt_libclang() {
    local version
    version=$(apt-cache pkgnames libclang1- 2>/dev/null | sed -n 's/^libclang1-\([0-9][0-9]*\)$/\1/p' | sort -n | tail -n 1)
    [ -z "$version" ] && printf 'libclang-dev\n' || printf '%s\n' "libclang1-$version" "libclang-common-$version-dev"
}

# The command that installs packages with this manager.
install_command() {
    case $1 in
    apt) printf 'apt-get install' ;;
    dnf) printf 'dnf install' ;;
    zypper) printf 'zypper install' ;;
    pacman) printf 'pacman -S' ;;
    apk) printf 'apk add' ;;
    conda) printf 'conda install -c conda-forge' ;;
    esac
}

# Says how to install WHAT … (as for package_names) with each way that this machine has.
advise() {
    local manager packages as=''
    manager=$(package_manager)
    if [ -n "$manager" ] && [ "$manager" != conda ]; then
        packages=$(package_names "$manager" "$@" | paste -s -d ' ')
        [ "$(id -u)" = 0 ] || as='as an administrator: '
        say "to install it, $as$(install_command "$manager") $packages"
        case $manager:" $* " in
        dnf:*' mpi '*) say 'then put MPI on the PATH: module load mpi/openmpi-x86_64' ;;
        zypper:*' mpi '*) say 'then put MPI on the PATH: mpi-selector --set openmpi4, and log in again' ;;
        esac
    fi
    if [ -n "${CONDA_PREFIX:-}" ]; then
        say "in the conda environment: $(install_command conda) $(package_names conda "$@" | paste -s -d ' ')"
    fi
    if [ -n "${MODULESHOME:-}${LMOD_CMD:-}${MODULEPATH:-}" ]; then
        say 'with the modules of this cluster (see: module avail): module load gcc openmpi llvm'
    fi
    if [ -z "$manager${MODULESHOME:-}${LMOD_CMD:-}${MODULEPATH:-}" ]; then
        say 'there is no package manager that is known here: install gcc and g++, Open MPI or MPICH with its headers, and libclang'
    fi
}

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# Whether packages can be installed: by apt, as root or by sudo, and it is allowed.
can_install() {
    [ "${GRADTX_NO_INSTALL:-0}" != 1 ] || { why='GRADTX_NO_INSTALL is set'; return 1; }
    [ "$(package_manager)" = apt ] || { why='only apt is used by itself'; return 1; }
    [ "$(id -u)" != 0 ] || return 0
    have sudo || { why='this user is not root, and there is no sudo'; return 1; }
    # Without a terminal, nobody could type sudo's password.
    sudo -n true 2>/dev/null || [ -t 0 ] || { why='sudo asks for a password, and there is no terminal'; return 1; }
}

# apt-get, which waits while another process holds a lock of the package manager.
apt_get() {
    local waited=0 log=$scratch/apt
    while ! as_root env DEBIAN_FRONTEND=noninteractive LC_ALL=C apt-get -qq "$@" >"$log" 2>&1 </dev/null; do
        if ! grep -qE 'Could not get lock|Unable to (acquire|lock)|is another process using it' "$log" ||
            [ $waited -ge "${GRADTX_LOCK_SECONDS:-900}" ]; then
            why=$(grep -m 1 '^E: ' "$log" || tail -n 1 "$log")
            return 1
        fi
        [ $waited != 0 ] || say "another process holds the package manager's lock; waiting for it"
        sleep 5
        waited=$((waited + 5))
    done
}

# No daemon is started by installing its package: Debian asks this file.
policy=$root/usr/sbin/policy-rc.d
keep_daemons_stopped() {
    [ ! -e "$policy" ] || return 0
    stops_daemons=1
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
}

# Installs the packages of WHAT …; those that apt does not know are named and left out.
apt_install() {
    local name names=()
    say 'updating the list of packages'
    apt_get update || say "the list of packages could not be updated: $why"
    while IFS= read -r name; do
        if [ -n "$(apt-cache madison "$name" 2>/dev/null)" ]; then
            names+=("$name")
        else
            say "apt does not know the package $name$(! grep -qi ubuntu "$root/etc/os-release" || echo ' (is the component "universe" enabled?)')"
        fi
    done < <(package_names apt "$@")
    [ ${#names[@]} != 0 ] || return 0
    say "installing ${names[*]}"
    keep_daemons_stopped
    apt_get install -y --no-install-recommends "${names[@]}" || say "they could not be installed: $why"
}
