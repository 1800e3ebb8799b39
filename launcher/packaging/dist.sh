#!/usr/bin/env bash
# Puts together what is handed to users who do not build: the program without symbols, manual pages,
# completions, batch scripts and documentation, as a tar.gz with its checksum.
#
#   launcher/packaging/dist.sh PROGRAM OUT
#
# PROGRAM is gradtx as it was built; OUT gets gradtx-VERSION-x86_64-linux-glibcN.tar.gz and SHA256SUMS,
# where N is the C library that the program needs, read from its symbols. The same program gives the
# same bytes. With MOST_GLIBC=2.28 it is an error if the program needs a newer one.
set -euo pipefail
[ $# = 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
program=$(realpath "$1") out=$2
root=$(cd "$(dirname "$0")/../.." && pwd)
fail() { echo "error: $*" >&2; exit 1; }
[ -x "$program" ] || fail "$1: expected a program"
mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

case $(file -bL "$program" 2>/dev/null || true) in
*x86-64*) ;;
'') ;; # without file(1), objdump below complains of anything else
*) fail "$1: expected a program for x86-64 Linux" ;;
esac
glibc=$(objdump -T "$program" | grep -o 'GLIBC_2\.[0-9]*' | sed 's/GLIBC_//' | sort -Vu | tail -n 1)
[ -n "$glibc" ] || fail "$1: no symbols of glibc; expected a program that is linked to it dynamically"
if [ -n "${MOST_GLIBC:-}" ] && [ "$(printf '%s\n' "$glibc" "$MOST_GLIBC" | sort -V | tail -n 1)" != "$MOST_GLIBC" ]; then
    newer=$(objdump -T "$program" | grep -oE "\(GLIBC_[0-9.]+\) +[A-Za-z0-9_]+" | tr -d '()' | sort -V | tail -n 3 | tr '\n' ';')
    fail "$1 needs glibc $glibc, and MOST_GLIBC is $MOST_GLIBC ($newer)"
fi
version=$("$program" --version | awk '{ print $2 }')
name=gradtx-$version-x86_64-linux-glibc$glibc
tree=$scratch/$name
share=$tree/share

mkdir -p "$tree/bin" "$share/man/man1" "$share/bash-completion/completions" "$share/zsh/site-functions" \
    "$share/fish/vendor_completions.d" "$share/gradtx/slurm" "$share/doc/gradtx/docs"
strip -o "$tree/bin/gradtx" "$program"
"$program" man "$share/man/man1"
"$program" completions bash >"$share/bash-completion/completions/gradtx"
"$program" completions zsh >"$share/zsh/site-functions/_gradtx"
"$program" completions fish >"$share/fish/vendor_completions.d/gradtx.fish"
cp "$root"/slurm/*.sbatch "$root"/slurm/*.sh "$root"/slurm/cluster.toml "$share/gradtx/slurm/"
cp "$root/README.md" "$root/CHANGELOG.md" "$root/LICENSE" "$root/CITATION.cff" "$share/doc/gradtx/"
cp -r "$root"/docs/*.md "$root/docs/figures" "$share/doc/gradtx/docs/"
libraries=$(objdump -p "$program" | awk '$1 == "NEEDED" { print $2 }' | sort | tr '\n' ' ')
cat >"$tree/INSTALL" <<EOF
gradtx $version for x86-64 Linux with glibc $glibc or newer.

Copy or link bin/gradtx to a directory of your PATH, and share/ to the share/ beside it, or use it from
here. It is linked to: $libraries
On GPUs the driver (libcuda) is needed; cuBLASLt, NCCL and NVRTC are loaded where they are found
(share/doc/gradtx/docs/gpu.md). $("$program" doctor --help >/dev/null && echo "\`gradtx doctor\` shows what this machine has and lacks.")
share/gradtx/slurm has batch scripts and cluster.toml, a site profile to copy to ~/.config/gradtx.
EOF
find "$tree" -type d -exec chmod 755 {} +
find "$tree" -type f -exec chmod 644 {} +
chmod 755 "$tree/bin/gradtx" "$share"/gradtx/slurm/pipeline.sh

(cd "$tree" && find . -type f | LC_ALL=C sort | xargs sha256sum) >"$scratch/sums"
install -m 644 "$scratch/sums" "$tree/SHA256SUMS"
date=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct 2>/dev/null || echo 0)}
tar --sort=name --mtime="@$date" --owner=0 --group=0 --numeric-owner --format=gnu -C "$scratch" -cf - "$name" |
    gzip -9n >"$out/$name.tar.gz"
(cd "$out" && sha256sum "$name.tar.gz") >"$scratch/sums"
install -m 644 "$scratch/sums" "$out/SHA256SUMS"
echo "$out/$name.tar.gz: $(du -k "$out/$name.tar.gz" | cut -f1) KiB, program $(du -k "$tree/bin/gradtx" | cut -f1) KiB; needs glibc $glibc and $libraries"
