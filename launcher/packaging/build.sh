#!/usr/bin/env bash
# Builds the program that is handed to users, for glibc 2.28 where zig can link it, else for the C
# library of this machine, and hands it to dist.sh.
#
#   launcher/packaging/build.sh FEATURES OUT [options of cargo build]
#
# zig and cargo-zigbuild are taken from the PATH, or installed by pip into the target directory, unless
# GRADTX_NO_INSTALL is set.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
features=$1 out=$2
shift 2
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-target}
glibc=2.28 triple=x86_64-unknown-linux-gnu
say() { echo "dist: $*" >&2; }

tools=$(mkdir -p "$target" && cd "$target" && pwd)/dist-tools
export PATH=$tools/bin:$PATH PYTHONPATH=$tools${PYTHONPATH:+:$PYTHONPATH}
has_zig() { command -v cargo-zigbuild >/dev/null && { command -v zig >/dev/null || python3 -m ziglang version >/dev/null 2>&1; }; }
if ! has_zig && [ -z "${GRADTX_NO_INSTALL:-}" ]; then
    say "installing zig and cargo-zigbuild by pip into $tools"
    python3 -m pip install --quiet --target "$tools" cargo-zigbuild==0.24.1 ziglang==0.15.1 >&2 ||
        say "pip could not install them"
fi
if has_zig; then
    say "linking with zig, for glibc $glibc"
    [ -d "$(rustc --print sysroot)/lib/rustlib/$triple" ] || { say "rustc has no standard library for $triple"; exit 1; }
    cargo zigbuild --release --locked --features "$features" -p gradtx --target $triple.$glibc "$@"
    MOST_GLIBC=$glibc launcher/packaging/dist.sh "$target/$triple/release/gradtx" "$out"
else
    say "no zig here: the program will need the C library of this machine ($(ldd --version 2>&1 | head -n 1))"
    cargo build --release --locked --features "$features" -p gradtx "$@"
    launcher/packaging/dist.sh "$target/release/gradtx" "$out"
fi
