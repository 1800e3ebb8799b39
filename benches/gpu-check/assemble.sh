#!/usr/bin/env bash
# Puts together the directory that `make gpu-check` makes: everything that run.sh needs, and nothing
# that is looked for elsewhere.
#
#   assemble.sh PROGRAM KERNEL_TESTS MODEL_TESTS CUBINS EMULATED OUT
#
# PROGRAM is gradtx, KERNEL_TESTS and MODEL_TESTS the executables of the tests of CUDA operations, and of
# models and the program; CUBINS the directory with their device code, EMULATED that with the stand-in
# libraries and kernels for --emulated. Fails if the result is larger than 60 MiB, or needs a newer C
# library than glibc 2.34.
set -euo pipefail
[ $# = 6 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
program=$1 kernel_tests=$2 model_tests=$3 cubins=$4 emulated=$5 out=$6
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
most_kib=$((60 * 1024))
newest_glibc=2.34

rm -rf "$out"
mkdir -p "$out"
out=$(cd "$out" && pwd)
strip -o "$out/gradtx" "$program"
strip -o "$out/kernel-tests" "$kernel_tests"
strip -o "$out/model-tests" "$model_tests"
cp -R "$cubins" "$out/cubins"
cp -R "$emulated" "$out/emulated"
find "$out/emulated" -type f -exec strip --strip-unneeded {} +
for model in qwen2 t5; do
    mkdir -p "$out/fixtures/$model/model"
    cp "$root/tests/goldens/fixtures/$model/model/config.json" "$out/fixtures/$model/model/"
done
cp "$here/run.sh" "$here/libraries.py" "$root/benches/peer_transformers.py" "$out/"
[ ! -f "$root/docs/gpu.md" ] || cp "$root/docs/gpu.md" "$out/README.md"
chmod -R a+rX "$out"
chmod a+x "$out/run.sh" "$out/gradtx" "$out/kernel-tests" "$out/model-tests"

for file in "$out/gradtx" "$out/kernel-tests" "$out/model-tests" "$out"/emulated/*.so* "$out"/emulated/kernels/*; do
    needs=$(objdump -T "$file" | grep -o 'GLIBC_2\.[0-9.]*' | sed 's/GLIBC_//' | sort -V | tail -n 1)
    if [ "$(printf '%s\n%s\n' "$needs" "$newest_glibc" | sort -V | tail -n 1)" != "$newest_glibc" ]; then
        echo "error: $file needs glibc $needs; machines with $newest_glibc are to run it"
        exit 1
    fi
done
kib=$(du -sk "$out" | cut -f 1)
if [ "$kib" -gt "$most_kib" ]; then
    echo "error: $out has $kib KiB, more than the $most_kib that are to be copied to a machine"
    exit 1
fi
echo "$out: $((kib / 1024)) MiB"
