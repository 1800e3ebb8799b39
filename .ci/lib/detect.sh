# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # results are read, and scratch and root set, by the caller
# What this machine can build, found by trying it as the build will. Sourced by .ci/setup.
#
# Every `*_works` ends with 0, or with 1 and the reason in `why`. The caller provides
#
#   scratch   an empty directory for what is tried
#   root      before the absolute directories in which libclang is searched: empty, but for tests

lib=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
why=

have() { command -v "$1" >/dev/null 2>&1; }

# The first line of a compiler's output that says what is wrong.
first_error() {
    local line
    line=$(grep -m 1 -iE 'error|not found|cannot|undefined|no such' "$1" || sed -n '/./{p;q;}' "$1")
    printf '%s' "${line:-no message}"
}

# build_and_run SOURCE PROGRAM COMPILER [ARGUMENT …]: compiles and links, then runs it.
build_and_run() {
    local source=$1 program=$2
    shift 2
    have "$1" || { why="\`$1\` is not on the PATH"; return 1; }
    "$@" "$source" -o "$program" >"$scratch/log" 2>&1 ||
        { why="\`$1\` does not build a program: $(first_error "$scratch/log")"; return 1; }
    "$program" >"$scratch/log" 2>&1 || { why="a program that \`$1\` built does not run: $(first_error "$scratch/log")"; return 1; }
}

# The program with which rustc links.
rust_linker() {
    local machine variable
    machine=$(uname -m)
    variable=CARGO_TARGET_${machine^^}_UNKNOWN_LINUX_GNU_LINKER
    printf '%s' "${!variable:-cc}"
}

# A C compiler for crates that build C, and rustc's linker.
c_works() {
    local compiler
    printf '#include <stdio.h>\n#include <math.h>\nint main(void) { return puts("works") < 0; }\n' >"$scratch/c.c"
    read -ra compiler <<<"${CC:-cc}"
    build_and_run "$scratch/c.c" "$scratch/c" "${compiler[@]}" && build_and_run "$scratch/c.c" "$scratch/c" "$(rust_linker)"
}

# A C++17 compiler: $CXX, or the first that works of the usual names. Sets cxx.
cxx_works() {
    local names name first_why=
    cat >"$scratch/cxx.cpp" <<'END'
#include <iostream>
#include <optional>
#include <vector>
int main() {
    std::vector<std::optional<int>> values{1, std::nullopt};
    if (auto [a, b] = std::pair{1, 2}; a < b) std::cout << values.size() << std::endl;
}
END
    read -ra names <<<"${CXX:-g++ c++ clang++}"
    [ -z "${CXX:-}" ] || names=("$CXX")
    for name in "${names[@]}"; do
        local words
        read -ra words <<<"$name"
        if build_and_run "$scratch/cxx.cpp" "$scratch/cxx" "${words[@]}" -std=c++17; then
            cxx=$name
            return 0
        fi
        first_why=${first_why:-$why}
    done
    why=$first_why
    return 1
}

# Splits a command line as a shell does, a word a line, and runs nothing in it.
words_of() { xargs printf '%s\n' 2>/dev/null <<<"$1" || true; }

# Where the crate `mpi` finds MPI, in its own order: sets mpi_by (a compiler, or the name of a package
# of pkg-config), and the arrays mpi_includes and mpi_libraries.
find_mpi() {
    local line word package='' wrapper=${MPICC:-mpicc}
    mpi_by='' mpi_includes=() mpi_libraries=()
    if [ -n "${MPI_PKG_CONFIG:-}" ]; then
        package=$MPI_PKG_CONFIG
    elif [ -n "${CRAY_MPICH_DIR:-}" ] && pkg-config --exists "$CRAY_MPICH_DIR/lib/pkgconfig/mpich.pc" 2>/dev/null; then
        package=$CRAY_MPICH_DIR/lib/pkgconfig/mpich.pc
    elif have "$wrapper"; then
        mpi_by=$wrapper
        line=$("$wrapper" -show 2>"$scratch/log") || true
    else
        for word in mpich ompi; do
            ! pkg-config --exists $word 2>/dev/null || { package=$word; break; }
        done
        [ -n "$package" ] || { why="\`$wrapper\` is not on the PATH"; return 1; }
    fi
    if [ -n "$package" ]; then
        mpi_by=$package
        line=$(pkg-config --cflags --libs "$package" 2>"$scratch/log") ||
            { why="pkg-config does not find $package: $(first_error "$scratch/log")"; return 1; }
    fi
    while IFS= read -r word; do
        case $word in
        -I*) mpi_includes+=("$word") ;;
        -L* | -l*) mpi_libraries+=("$word") ;;
        esac
    done < <(words_of "$line")
}

# MPI, whichever it is: its header is found with the flags that it states, a program is compiled by
# its compiler, linked as rustc will, and starts. Sets mpi_version. MPI itself is not started.
mpi_works() {
    local compiler object=$scratch/mpi.o
    find_mpi || return 1
    cat >"$scratch/mpi.c" <<'END'
#include <mpi.h>
#include <stdio.h>
int main(void) {
    static char version[MPI_MAX_LIBRARY_VERSION_STRING];
    int length = 0;
    if (MPI_Get_library_version(version, &length) != MPI_SUCCESS) return 1;
    puts(version);
    return 0;
}
END
    read -ra compiler <<<"${CC:-cc}"
    "${compiler[@]}" "${mpi_includes[@]}" -fsyntax-only "$scratch/mpi.c" >"$scratch/log" 2>&1 ||
        { why="mpi.h is not found with the flags of \`$mpi_by\`: $(first_error "$scratch/log")"; return 1; }
    ! have "$mpi_by" || compiler=("$mpi_by")
    "${compiler[@]}" "${mpi_includes[@]}" -c "$scratch/mpi.c" -o "$object" >"$scratch/log" 2>&1 ||
        { why="\`$mpi_by\` does not compile a program: $(first_error "$scratch/log")"; return 1; }
    "$(rust_linker)" "$object" "${mpi_libraries[@]}" -o "$scratch/mpi" >"$scratch/log" 2>&1 ||
        { why="a program with the libraries of \`$mpi_by\` does not link: $(first_error "$scratch/log")"; return 1; }
    timeout 60 "$scratch/mpi" >"$scratch/log" 2>&1 ||
        { why="a program with the libraries of \`$mpi_by\` does not start: $(first_error "$scratch/log")"; return 1; }
    mpi_version=$(sed -n '1s/,.*//p' "$scratch/log" | cut -c 1-60)
    [ -n "$mpi_version" ] || mpi_version=$(head -n 1 "$scratch/log" | cut -c 1-60)
}

# Whether a file is a library of this machine's word size.
is_library() {
    local class=02
    [ "$(getconf LONG_BIT 2>/dev/null || echo 64)" = 64 ] || class=01
    [ "$(od -An -tx1 -N5 "$1" 2>/dev/null | tr -d ' \n')" = "7f454c46$class" ]
}

# libclang's version in a file's name, for comparing as text; as the crate clang-sys reads it.
version_key() {
    local version='' part key=
    case $1 in
    libclang.so.*) version=${1#libclang.so.} ;;
    libclang-*) version=${1#libclang-} version=${version%???} ;;
    esac
    [ -n "$version" ] || return 0
    while IFS= read -r part; do
        [[ $part =~ ^[0-9]{1,9}$ ]] || part=0
        key+=$(printf '%010d.' "$((10#$part))")
    done < <(tr . '\n' <<<"$version")
    printf '%s' "$key"
}

# The files of these patterns that clang-sys would take for libclang. `libclang-cpp` is another library.
libclang_files() {
    local file
    for file; do
        case ${file##*/} in
        *-cpp.*) ;;
        libclang.so | libclang-*.so | libclang.so.* | libclang-*.so.*) ! is_library "$file" || printf '%s\n' "$file" ;;
        esac
    done
}

# All libraries that the crate clang-sys finds, the one that it takes first.
libclang_candidates() (
    shopt -s nullglob
    LC_ALL=C
    found=()
    if [ -n "${LIBCLANG_PATH:-}" ]; then
        found=("$LIBCLANG_PATH" "$LIBCLANG_PATH"/libclang*)
        [ ! -d "$LIBCLANG_PATH" ] || found=("$LIBCLANG_PATH"/libclang*)
    else
        directories=()
        ! prefix=$("${LLVM_CONFIG_PATH:-llvm-config}" --prefix 2>/dev/null) || directories=("$prefix/bin" "$prefix/lib" "$prefix/lib64")
        IFS=: read -ra more <<<"${LD_LIBRARY_PATH:-}:${LIBRARY_PATH:-}"
        for directory in "${directories[@]}" "${more[@]}"; do
            [ -z "$directory" ] || found+=("$directory"/libclang*)
        done
        found+=("$root"/usr/local/llvm*/lib*/libclang* "$root"/usr/local/lib*/*/*/libclang* "$root"/usr/local/lib*/*/libclang*
            "$root"/usr/local/lib*/libclang* "$root"/usr/lib*/*/*/libclang* "$root"/usr/lib*/*/libclang* "$root"/usr/lib*/libclang*)
    fi
    libclang_files "${found[@]}" | while IFS= read -r file; do
        printf '%s\t%s\n' "$(version_key "${file##*/}")" "$file"
    done | sort -s -r -t $'\t' -k 1,1 | cut -f 2-
)

# Libraries that clang-sys does not find, but does where LIBCLANG_PATH names them: of an active conda
# environment, and beside a clang on the PATH.
libclang_elsewhere() (
    shopt -s nullglob
    [ -z "${LIBCLANG_PATH:-}" ] || exit 0
    directories=()
    [ -z "${CONDA_PREFIX:-}" ] || directories+=("$CONDA_PREFIX/lib")
    ! have clang || directories+=("$(dirname "$(readlink -f "$(command -v clang)")")/../lib")
    for directory in "${directories[@]}"; do libclang_files "$directory"/libclang*; done
)

# The directories that bindgen takes from a clang program, as arguments.
clang_includes() {
    local program path line bindir
    program=${CLANG_PATH:-}
    if [ -z "$program" ]; then
        ! bindir=$("${LLVM_CONFIG_PATH:-llvm-config}" --bindir 2>/dev/null) || [ ! -x "$bindir/clang" ] || program=$bindir/clang
        [ -n "$program" ] || program=$(command -v clang || true)
        if [ -z "$program" ]; then
            IFS=: read -ra path <<<"$PATH"
            for line in "${path[@]}"; do
                program=$(compgen -G "$line/clang-[0-9]*" | head -n 1) && break
            done
        fi
    fi
    [ -n "$program" ] && [ -x "$program" ] || return 0
    "$program" -E -x c - -v </dev/null 2>&1 |
        sed -n '/#include <...> search starts here:/,/End of search list./{s/^ \(\/.*\)$/\1/p;}' |
        while IFS= read -r line; do printf -- '-isystem\n%s\n' "$line"; done
}

# libclang, as bindgen will load it: it parses MPI's header, with the C compiler's own headers where
# clang's are not here. Sets libclang, and the variables of the environment that bindgen needs for
# it, empty if it needs none: need_libclang_path and need_clang_args.
libclang_works() {
    local candidates=() ours header=$scratch/header.h extra file gcc_headers arguments first_why=
    libclang='' need_libclang_path='' need_clang_args=''
    mapfile -t candidates < <(libclang_candidates)
    ours=${candidates[0]:-}
    mapfile -t -O "${#candidates[@]}" candidates < <(libclang_elsewhere)
    if [ ${#candidates[@]} = 0 ]; then
        why='libclang is not found (libclang-cpp is another library)'
        [ -z "${LIBCLANG_PATH:-}" ] || why="LIBCLANG_PATH names $LIBCLANG_PATH, where no libclang is"
        return 1
    fi
    "$(rust_linker)" "$lib/libclang.c" -o "$scratch/libclang" -ldl >"$scratch/log" 2>&1 ||
        { why="libclang cannot be tried: $(first_error "$scratch/log")"; return 1; }
    printf '#include <stddef.h>\n' >"$header"
    [ ${#mpi_libraries[@]} = 0 ] || printf '#include <mpi.h>\n' >>"$header"
    mapfile -t arguments < <(clang_includes)
    arguments=("${mpi_includes[@]}" "${arguments[@]}")
    gcc_headers=$("$(rust_linker)" -print-file-name=include 2>/dev/null || true)
    for extra in '' ${gcc_headers:+"-isystem $gcc_headers"}; do
        for file in "${candidates[@]}"; do
            local more
            mapfile -t more < <(words_of "${BINDGEN_EXTRA_CLANG_ARGS:-} $extra" | sed '/^$/d')
            if timeout 60 "$scratch/libclang" "$file" "$header" "${more[@]}" "${arguments[@]}" >"$scratch/log" 2>&1; then
                libclang=$file
                [ "$file" = "$ours" ] || need_libclang_path=$file
                [ -z "$extra" ] || need_clang_args="${BINDGEN_EXTRA_CLANG_ARGS:+$BINDGEN_EXTRA_CLANG_ARGS }$extra"
                return 0
            fi
            first_why=${first_why:-"$file does not work: $(first_error "$scratch/log")"}
        done
    done
    why=$first_why
    return 1
}

# at_least VERSION WANTED: compares numbers with dots.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# rustc and cargo of at least version $1. Sets rust_version.
rust_works() {
    local wanted=$1 program version
    for program in rustc cargo; do
        if ! have $program; then
            why="\`$program\` is not on the PATH"
            [ ! -x "${CARGO_HOME:-${HOME:-/}/.cargo}/bin/$program" ] ||
                why+=", but in ${CARGO_HOME:-$HOME/.cargo}/bin: \`. ${CARGO_HOME:-$HOME/.cargo}/env\`"
            return 1
        fi
        version=$($program --version 2>"$scratch/log") || { why="\`$program\` does not run: $(first_error "$scratch/log")"; return 1; }
        version=$(sed -n 's/^[a-z]* \([0-9][0-9.]*\).*/\1/p' <<<"$version")
        at_least "${version:-0}" "$wanted" || { why="\`$program\` ($(command -v $program)) is ${version:-of an unknown version}, and $wanted is needed"; return 1; }
        rust_version=$version
    done
}

# Whether python3 has a pip that could be asked to install something.
pip_works() {
    have python3 || { why="\`python3\` is not on the PATH"; return 1; }
    python3 -m pip --version >/dev/null 2>"$scratch/log" || { why='python3 has no pip'; return 1; }
}
