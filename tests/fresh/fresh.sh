#!/usr/bin/env bash
# Set-up and a build of the smallest program with bindgen, in bare root directories: `make fresh`.
#
#   fresh.sh [SYSTEM …]      debian-12, debian-13, ubuntu-24.04; all of them without arguments
#
# Needs root and debootstrap. The root directories are made from the distributions' archives in
# FRESH_DIR (/var/tmp), and removed at the end; a system whose archive is not reached is skipped. This
# machine's Rust toolchain and cargo's crates are mounted read-only; nothing else of it is seen there.
# FRESH_FULL=1 also runs the README's `make demo` and `make test` on the first system, in the state in
# which it is installed. FRESH_CASES names the cases to run.
# shellcheck disable=SC2016 # commands in back quotes are quoted, not run
set -euo pipefail
cd "$(dirname "$0")/../.."
repository=$PWD

[ "$(id -u)" = 0 ] || { echo 'fresh: this needs root, for chroot and mount' >&2; exit 1; }
command -v debootstrap >/dev/null || { echo 'fresh: this needs debootstrap' >&2; exit 1; }
toolchain=$(rustc --print sysroot)
crates=${CARGO_HOME:-$HOME/.cargo}/registry

# Mounts are seen by the inner process alone, and end with it, however it ends.
if [ -z "${FRESH_INNER:-}" ]; then
    work=$(mktemp -d "${FRESH_DIR:-/var/tmp}/gradtx-fresh.XXXXXX")
    trap 'rm -rf --one-file-system "$work"' EXIT
    cargo fetch --locked --quiet
    FRESH_INNER=$work unshare --mount --propagation private "$0" "$@"
    exit
fi
work=$FRESH_INNER

say() { printf 'fresh: %s\n' "$*"; }

declare -A suites=([debian-12]=bookworm [debian-13]=trixie [ubuntu-24.04]=noble)
declare -A llvm=([debian-12]=14 [debian-13]=19 [ubuntu-24.04]=18)
compilers=(gcc libc6-dev g++ make)
mpi=(openmpi-bin libopenmpi-dev)

# Ubuntu's keys, where this machine lacks them, from Debian's package of them.
ubuntu_keyring() {
    local name=usr/share/keyrings/ubuntu-archive-keyring.gpg base
    [ ! -e /$name ] || { echo /$name; return; }
    for base in "$work"/debian-*.base; do
        chroot "$base" sh -c 'cd /tmp && apt-get download -qq ubuntu-keyring' >/dev/null 2>&1 || return 1
        dpkg-deb -x "$base"/tmp/ubuntu-keyring_*.deb "$work/keys" && echo "$work/keys/$name"
        return
    done
    return 1
}

# make_base SYSTEM: its bare root directory, with the list of packages.
make_base() {
    local system=$1 base=$work/$1.base log=$work/$1.log keyring options=(--variant=minbase)
    local script=/usr/share/debootstrap/scripts/${suites[$system]}
    if [[ $system = ubuntu-* ]]; then
        keyring=$(ubuntu_keyring) || { say "$system: skipped, Ubuntu's keys are not here (package ubuntu-keyring)"; return 1; }
        [ -e "$script" ] || script=${script%/*}/gutsy # which all of Ubuntu's newer names are links to
        options+=(--keyring="$keyring" "--components=main,universe")
    fi
    # Without a mirror, it takes the distribution's own archive.
    debootstrap "${options[@]}" "${suites[$system]}" "$base" '' "$script" >"$log" 2>&1 ||
        { say "$system: skipped, its archive is not reached or not usable: $(tail -n 1 "$log")"; return 1; }
    chroot "$base" apt-get update -qq >"$log" 2>&1 || { say "$system: skipped: $(tail -n 1 "$log")"; return 1; }
    chroot "$base" useradd --create-home ada
    mkdir -p "$base"/{src,rust,cargo/registry,probe/target} "$work/$system.debs/partial" "$work/$system.built"
    git -C "$repository" ls-files -z --cached --others --exclude-standard |
        (cd "$repository" && xargs -0 sh -c 'for f; do [ ! -e "$f" ] || printf "%s\0" "$f"; done' sh) |
        tar -C "$repository" --null -T - -c | tar -C "$base/src" -x
    cp "$repository/Cargo.lock" "$base/probe/"
    write_probe "$base/probe"
    chroot "$base" chown -R ada /src /probe /cargo
}

# The smallest program with bindgen: it uses MPI where set-up found it.
write_probe() {
    mkdir -p "$1/src"
    cat >"$1/Cargo.toml" <<'END'
[package]
name = "probe"
version = "0.1.0"
edition = "2024"
[features]
mpi = ["dep:mpi"]
[dependencies]
mpi = { version = "0.8", default-features = false, optional = true }
[workspace]
END
    cat >"$1/src/main.rs" <<'END'
fn main() {
    #[cfg(feature = "mpi")]
    println!("built with {}", mpi::environment::library_version().expect("a text"));
    #[cfg(not(feature = "mpi"))]
    println!("built without MPI");
}
END
    cat >"$1/Makefile" <<'END'
include /src/target/setup.mk
run:
	cargo run --quiet --offline --features '$(filter mpi,$(SETUP_FEATURES))'
END
}

# open_root SYSTEM: a fresh copy of its bare root directory, mounted at $new.
open_root() {
    local system=$1
    new=$work/new
    mkdir -p "$new" "$work/upper" "$work/overlay"
    mount -t overlay overlay -o "lowerdir=$work/$system.base,upperdir=$work/upper,workdir=$work/overlay" "$new"
    mount -t proc proc "$new/proc"
    mount --rbind /dev "$new/dev"
    for pair in "$toolchain:rust" "$crates:cargo/registry"; do
        mount --bind "${pair%:*}" "$new/${pair#*:}"
        mount -o remount,bind,ro "$new/${pair#*:}"
    done
    mount --bind "$work/$system.debs" "$new/var/cache/apt/archives"
    mount --bind "$work/$system.built" "$new/probe/target"
}

close_root() {
    umount -R -l "$new"
    rm -rf "$work/upper" "$work/overlay"
}

# inside USER DIRECTORY COMMAND …: in the root directory, with nothing of this machine's environment.
inside() {
    local user=$1 directory=$2 home=/root
    shift 2
    [ "$user" = root ] || home=/home/$user
    env -i PATH=/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME="$home" CARGO_HOME=/cargo \
        CARGO_NET_OFFLINE=true "${environment[@]}" \
        chroot --userspec="$user" "$new" sh -c 'cd "$0" && exec "$@"' "$directory" "$@"
}

# attempt COMMAND …: in a shell of its own, which its first failure ends; sets code. It is no condition
# itself, for within one bash goes on after failures.
attempt() {
    set +e
    (set -e; "$@")
    code=$?
    set -e
}

# Ends a case, which runs in a shell of its own.
wrong() { echo "$1" >"$work/wrong"; exit 1; }
has() { grep -qF -- "$1" "$work/said" || wrong "\"$1\" was not said"; }

# set_up USER RESULT TEXT …: .ci/setup as USER; then the probe, built `with` or `without` MPI, or nothing
# where set-up must have `failed`. Set-up must have said every TEXT.
set_up() {
    local user=$1 result=$2 text code=0
    shift 2
    inside "$user" /src .ci/setup >"$work/said" 2>&1 || code=$?
    for text; do has "$text"; done
    if [ "$result" = failed ]; then
        [ $code = 1 ] || wrong "set-up ended with $code"
        return
    fi
    [ $code = 0 ] || wrong "set-up ended with $code"
    rm -rf "$work/$system.built"/debug/{build,.fingerprint}/mpi*
    chroot "$new" chown -R "$user" /probe/target
    inside "$user" /probe make --no-print-directory run >>"$work/said" 2>&1 || wrong 'the build failed'
    case $result in
    with) has 'built with Open MPI' ;;
    without) has 'built without MPI'; has 'leaves out the feature `mpi`' ;;
    esac
}

install() { inside root / env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >"$work/said" 2>&1 || wrong "$* could not be installed"; }

case_nothing() { set_up root with 'missing: a C compiler' 'missing: MPI' 'installing'; }
case_libclang_cpp_only() {
    install "libclang-cpp${llvm[$system]}"
    set_up root with 'missing: libclang: libclang is not found (libclang-cpp is another library)' installing
}
case_mpi_without_libclang() {
    install "${compilers[@]}" "${mpi[@]}" "libclang-cpp${llvm[$system]}"
    environment=(GRADTX_NO_INSTALL=1)
    set_up root without 'missing: libclang' 'apt-get install libclang1-'
    environment=()
    set_up root with 'installing libclang1-'
}
case_libclang_without_mpi() {
    install "${compilers[@]}" "libclang1-${llvm[$system]}"
    environment=(GRADTX_NO_INSTALL=1)
    set_up root without 'missing: MPI: `mpicc` is not on the PATH' 'apt-get install openmpi-bin libopenmpi-dev'
    environment=()
    set_up root with 'installing openmpi-bin libopenmpi-dev'
}
# The C compiler's own headers stand in for clang's.
case_libclang_without_headers() {
    install "${compilers[@]}" "${mpi[@]}" "libclang1-${llvm[$system]}"
    environment=(GRADTX_NO_INSTALL=1)
    set_up root with ready
}
case_user_without_sudo() {
    set_up ada failed 'as an administrator: apt-get install' 'error: nothing can be built without'
    install "${compilers[@]}"
    set_up ada without 'this user is not root, and there is no sudo' 'as an administrator: apt-get install openmpi-bin'
    install "${mpi[@]}" "libclang1-${llvm[$system]}" "libclang-common-${llvm[$system]}-dev"
    set_up ada with ready
}
case_pip_that_cannot_install() {
    install "${compilers[@]}" python3-pip
    environment=(PIP_NO_INDEX=1 GRADTX_NO_INSTALL=0)
    set_up root with 'pip could not install NVRTC'
}
cases=(nothing libclang_cpp_only mpi_without_libclang libclang_without_mpi libclang_without_headers user_without_sudo
    pip_that_cannot_install)

# The README's two commands, as a user who has installed what set-up named.
whole_readme() {
    local goal began
    environment=()
    open_root "$1"
    inside root /src .ci/setup
    for goal in demo test; do
        began=$SECONDS
        inside root /src make $goal || { say "$1: make $goal failed"; return 1; }
        say "$1: make $goal took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
    done
    close_root
}

systems=("$@")
[ ${#systems[@]} != 0 ] || systems=(debian-12 debian-13 ubuntu-24.04)
made=() failed=0 passed=0
for system in "${systems[@]}"; do
    [ -n "${suites[$system]:-}" ] || { say "no such system: $system"; exit 1; }
    began=$SECONDS
    attempt make_base "$system"
    if [ $code = 0 ]; then
        made+=("$system")
        say "$system: made in $((SECONDS - began)) s"
    fi
done
[ ${#made[@]} != 0 ] || { say 'no root directory could be made'; exit 1; }
for system in "${made[@]}"; do
    for case in ${FRESH_CASES:-"${cases[@]}"}; do
        began=$SECONDS environment=()
        open_root "$system"
        rm -f "$work/wrong"
        attempt "case_$case"
        if [ $code = 0 ]; then
            passed=$((passed + 1))
            say "$system: $case: ok, $((SECONDS - began)) s"
        else
            failed=$((failed + 1))
            say "$system: $case: FAILED: $(cat "$work/wrong" 2>/dev/null || echo 'a command failed')"
            sed 's/^/    /' "$work/said" | tail -n 40
        fi
        close_root
    done
done
if [ "${FRESH_FULL:-0}" = 1 ]; then whole_readme "${made[0]}" || failed=$((failed + 1)); fi
say "$passed passed, $failed failed"
[ $failed = 0 ]
