#!/usr/bin/env bash
# Everything that only a GPU can show, on a machine that has nothing but a driver: what is here, the
# two ceilings, whether results are right, how fast the work is, and where its time goes.
#
#   run.sh [--minutes M] [--only correct|speed|profile] [--tests GROUPS] [--emulated] OUT
#
#   --minutes M     ends within M minutes with what there is by then (default: 8; emulated: 5)
#   --only PART     this part, after the machine and its ceilings
#   --tests GROUPS  these groups of device tests only, such as "matrix attention"
#   --emulated      on the stand-in driver, on small sizes: shows that all of this works
#
# OUT gets results.jsonl (a line of JSON for every test, comparison, measurement and step of this
# script), log.txt, table.md, and profile.csv where Nsight Compute is installed. The exit code is 0
# when everything was done, or that of the first part that failed: 11 machine, 12 ceilings,
# 13 correct, 14 speed, 15 profile; 16 if nothing failed, but time was over; 2 for a wrong command.
#
# PYTHON names the python with torch, transformers and peft (default: python3; `none` does without).
set -uo pipefail

usage() { sed -n '2,19s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
wrong() { echo "error: $1 (run.sh --help)" >&2; exit 2; }

minutes='' only='' groups='' emulated=0 out=''
while [ $# -gt 0 ]; do
    case $1 in
        --minutes) minutes=${2:-}; shift ;;
        --only) only=${2:-}; shift ;;
        --tests) groups=${2:-}; shift ;;
        --emulated) emulated=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) wrong "$1: no such option" ;;
        *) [ -z "$out" ] || wrong "one directory for results is enough"; out=$1 ;;
    esac
    shift || wrong "an option lacks its value"
done
[ -n "$out" ] || wrong "a directory for the results is missing"
case $only in '' | correct | speed | profile) ;; *) wrong "--only $only: expected correct, speed or profile" ;; esac
: "${minutes:=$((emulated ? 5 : 8))}"
total=$(awk -v m="$minutes" 'BEGIN { if (m !~ /^[0-9]+\.?[0-9]*$/ || m == 0) exit 1; printf "%d", 60 * m }') ||
    wrong "--minutes $minutes: expected a number above 0"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
results=$out/results.jsonl log=$out/log.txt
rm -f "$results" "$log" "$out/table.md" "$out/profile.csv"
{ : >>"$results"; } 2>/dev/null || wrong "$out: cannot be written to"
scratch=$(mktemp -d "${TMPDIR:-/tmp}/gradtx-gpu-check.XXXXXX")
export TMPDIR=$scratch GRADTX_TEST_RESULTS=$results

# Seconds of this script at which everything is over; the last ones are for the table.
ending=$((total > 60 ? 6 : total / 10 + 1))
deadline=$((total - ending)) part_deadline=$deadline
SECONDS=0

python=${PYTHON:-python3}
[ "$python" = none ] || command -v "$python" >/dev/null 2>&1 || python=none
program=$here/gradtx kernel_tests=$here/kernel-tests model_tests=$here/model-tests

# ---- running things

child=''
stop_child() {
    [ -n "$child" ] || return 0
    kill -TERM -- "-$child" 2>/dev/null
    for _ in 1 2 3 4 5; do kill -0 "$child" 2>/dev/null || break; sleep 0.2; done
    kill -KILL -- "-$child" 2>/dev/null
    child=''
}
clean_up() { stop_child; rm -rf "$scratch"; }
trap clean_up EXIT
trap 'exit 143' TERM INT

# limited SECONDS FILE COMMAND...: runs it with its output in FILE. Its status; 124 when its time was
# over, 125 when there was none left. What cannot be killed is left behind.
limited() {
    local limit=$1 file=$2 left=$((part_deadline - SECONDS)) end status
    shift 2
    [ "$left" -gt 0 ] || return 125
    end=$((SECONDS + (limit < left ? limit : left)))
    setsid "$@" >"$file" 2>&1 </dev/null &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        if [ "$SECONDS" -ge "$end" ]; then
            stop_child
            return 124
        fi
        sleep 0.1
    done
    wait "$child"
    status=$?
    child=''
    return $status
}

# ---- results

escaped() { printf '%s' "$1" | tr -d '\000-\010\013-\037' | tr '\n\t' '  ' | sed 's/\\/\\\\/g; s/"/\\"/g'; }
failed_part='' was_late=0 summary=$scratch/summary
: >"$summary"

# note PART NAME STATUS SECONDS [WHY]: a line of results, and of the table.
note() {
    local why=${5:-}
    printf '{"part":"%s","name":"%s","status":"%s","seconds":%s,"why":"%s"}\n' "$1" "$(escaped "$2")" "$3" "$4" \
        "$(escaped "$why")" >>"$results"
    printf '| %s | %s | %s | %s | %s |\n' "$1" "$2" "$3" "$4" "${why//|//}" >>"$summary"
    echo "$1: $2: $3${why:+ ($why)}"
    case $3 in
        failed | stopped) [ -n "$failed_part" ] || failed_part=$1 ;;
        'no time left') was_late=1 ;;
    esac
}

# The last line of a log that says something.
reason() { grep -E '^(error|Error|thread|.*Error:)|panicked' "$1" | tail -n 1 | cut -c 1-300; }

# step PART NAME SECONDS COMMAND...: one thing to do, its output in the log.
step() {
    local part=$1 name=$2 limit=$3 begin=$SECONDS status
    shift 3
    limited "$limit" "$scratch/output" "$@"
    status=$?
    { echo "== $*"; cat "$scratch/output" 2>/dev/null; } >>"$log"
    case $status in
        0) note "$part" "$name" passed $((SECONDS - begin)) ;;
        124) note "$part" "$name" stopped $((SECONDS - begin)) "its time was over" ;;
        125) note "$part" "$name" 'no time left' 0 ;;
        *) note "$part" "$name" failed $((SECONDS - begin)) "status $status: $(reason "$scratch/output")" ;;
    esac
    : >"$scratch/output"
    return $status
}

# ---- the machine

use_stand_ins() {
    export LD_LIBRARY_PATH=$here/emulated GRADTX_CUDA_CACHE=$here/emulated/kernels
    unset GRADTX_TEST_ON_DEVICE
}

part_machine() {
    local directories='' names
    if [ "$emulated" = 1 ]; then
        use_stand_ins
    else
        export GRADTX_TEST_ON_DEVICE=1
        # A copy, for kernels of other devices than those that it is for are compiled into it.
        cp -R "$here/cubins" "$scratch/cubins"
        export GRADTX_CUDA_CACHE=${GRADTX_CUDA_CACHE:-$scratch/cubins}
    fi
    if [ "$python" != none ]; then
        limited 20 "$scratch/directories" "$python" "$here/libraries.py" directories &&
            directories=$(cat "$scratch/directories")
        limited 20 "$scratch/versions" "$python" "$here/libraries.py" versions || : >"$scratch/versions"
        names=$(tr '\n' ',' <"$scratch/versions" | sed 's/,$//; s/,/, /g')
    fi
    # The emulated run uses its own libraries alone.
    [ "$emulated" = 1 ] || export GRADTX_CUDA_LIBRARIES="${GRADTX_CUDA_LIBRARIES:+$GRADTX_CUDA_LIBRARIES:}$directories"
    {
        date -u
        uname -srm
        nproc
        grep -m 1 'model name' /proc/cpuinfo
        grep -m 1 MemTotal /proc/meminfo
        echo "Python's packages: ${names:-none}"
        echo "directories of libraries: ${directories:-none}"
    } >>"$log" 2>&1
    note machine "packages of Python" passed 0 "${names:-none}"
    if command -v nvidia-smi >/dev/null 2>&1 && [ "$emulated" = 0 ]; then
        step machine 'nvidia-smi' 30 nvidia-smi
    fi
    step machine 'the program starts' 30 "$program" --version
    # It says which driver, device and libraries are found; that a cluster is missing is no failure.
    limited 40 "$scratch/doctor" "$program" doctor
    cat "$scratch/doctor" >>"$log"
    for library in cuBLASLt NCCL; do
        note machine "$library" passed 0 "$(grep -m 1 "$library" "$scratch/doctor" | tr -s ' ' | cut -c 1-200)"
    done
}

large() { if [ "$emulated" = 1 ]; then echo 32; else echo 8192; fi; }

part_ceilings() {
    step ceilings 'product and copy' 60 "$program" bench ceilings --device cuda --runs 3 --large "$(large)" --out "$results"
}

# ---- correct

# The most valuable first, of both executables. Tests of `host` that speak of the stand-in driver are not among them.
device_groups='matrix attention lora rmsnorm rows flat t5_attention models host::repeated host::uploads host::operations bench::random nccl::sums'
emulated_groups='matrix attention::head lora::adapted rmsnorm rows flat t5_attention models::greedy host::repeated host::operations'

# test_group GROUP SECONDS: a line for every test. A test that ends the process or never ends costs
# itself; those behind it run in a process of their own.
test_group() {
    local group=$1 limit=$2 names=() left=() begin=$SECONDS status name line tests
    for tests in "$kernel_tests" "$model_tests"; do
        mapfile -t names < <(grep "^$group" "$scratch/names-$(basename "$tests")")
        [ ${#names[@]} = 0 ] || break
    done
    if [ ${#names[@]} = 0 ]; then
        note correct "$group" failed 0 "no such tests, or they do not start"
        return
    fi
    while [ ${#names[@]} -gt 0 ]; do
        begin=$SECONDS
        limited "$limit" "$scratch/tests" "$tests" --test-threads 1 --exact "${names[@]}"
        status=$?
        { echo "== $tests --exact ${names[*]}"; cat "$scratch/tests" 2>/dev/null; } >>"$log"
        left=() line=''
        for name in "${names[@]}"; do
            line=$(grep -E "^test ${name}( - should panic)? \.\.\. " "$scratch/tests" 2>/dev/null)
            case $line in
                *' ok') note correct "$name" passed $((SECONDS - begin)) ;;
                *' ignored'*) ;;
                *' FAILED') note correct "$name" failed $((SECONDS - begin)) "$(grep -A 1 "^thread '$name'" "$scratch/tests" | tail -n 1 | cut -c 1-300)" ;;
                '') left+=("$name") ;;
                *) case $status in
                    124) note correct "$name" stopped $((SECONDS - begin)) "its time was over" ;;
                    *) note correct "$name" failed $((SECONDS - begin)) "it ended the process with status $status" ;;
                esac ;;
            esac
        done
        if [ ${#left[@]} = ${#names[@]} ]; then
            for name in "${left[@]}"; do
                case $status in
                    124) note correct "$name" stopped $((SECONDS - begin)) "its time was over" ;;
                    125) note correct "$name" 'no time left' 0 ;;
                    *) note correct "$name" failed 0 "the tests do not start: status $status" ;;
                esac
            done
            return
        fi
        names=("${left[@]}")
    done
}

part_correct() {
    local group limit=60 chosen=$groups tests
    if [ "$emulated" = 1 ]; then
        limit=${GPU_CHECK_GROUP_SECONDS:-60}
        : "${chosen:=$emulated_groups}"
    fi
    for tests in "$kernel_tests" "$model_tests"; do
        "$tests" --list --format terse 2>>"$log" | sed -n 's/: test$//p' >"$scratch/names-$(basename "$tests")"
    done
    for group in ${chosen:-$device_groups}; do test_group "$group" "$limit"; done
    [ -z "$groups" ] || return 0
    # The whole pipeline in f32 and bf16, against the CPU's results.
    test_group demo::the_whole_pipeline 120
    sanitizer
}

sanitizer() {
    local tool found=''
    for tool in compute-sanitizer /usr/local/cuda/bin/compute-sanitizer; do
        [ -n "$found" ] || found=$(command -v "$tool" || true)
    done
    if [ -z "$found" ] || [ "$emulated" = 1 ]; then
        note correct compute-sanitizer skipped 0 "not installed, or emulated"
        return
    fi
    for tool in memcheck racecheck; do
        step correct "compute-sanitizer $tool" 60 "$found" --tool "$tool" --error-exitcode 9 "$kernel_tests" --test-threads 1 \
            --exact matrix::products_of_odd_shapes lora::adapted_layers attention::head_size_128
    done
}

# ---- speed

ours() {
    local name=$1 limit=$2 what=$3
    shift 3
    step speed "ours: $name" "$limit" "$program" bench "$what" --device cuda --large "$(large)" --out "$results" "$@"
}

peer() {
    local name=$1 limit=$2
    shift 2
    if ! grep -q '^torch ' "$scratch/versions" 2>/dev/null; then
        note speed "PyTorch: $name" skipped 0 "no PyTorch here"
        return
    fi
    step speed "PyTorch: $name" "$limit" "$python" "$here/peer_transformers.py" "$@" --out "$results"
}

part_speed() {
    if [ "$emulated" = 1 ]; then
        emulated_speed
        return
    fi
    ours 'fine-tune 7B' 60 finetune --model qwen2.5-7b --runs 4 --profile
    peer 'fine-tune 7B' 90 finetune --device cuda --model qwen2.5-7b --runs 2
    ours 'fine-tune 3B, 4 jobs' 45 finetune --model qwen2.5-3b --jobs 4 --runs 4 --profile
    peer 'fine-tune 3B' 60 finetune --device cuda --model qwen2.5-3b --runs 2
    ours 'Grad-Transformer step' 45 train --runs 5 --profile
    peer 'Grad-Transformer step' 60 train --device cuda --pure --runs 3
    ours 'generation 7B' 45 generate --runs 2 --profile
    ours 'single operations' 60 kernels --runs 3
    peer 'generation 7B' 60 generate --device cuda --runs 1
    ours 'translation' 30 translate --runs 3
}

emulated_speed() {
    local decoder=$here/fixtures/qwen2/model/config.json t5=$here/fixtures/t5/model/config.json small
    small=(--translator "$t5" --tiny 3x16 --llm 4x24 --batch 2)
    local once=(--warmup 0 --runs 1)
    ours 'fine-tune' 60 finetune --model "$decoder" "${once[@]}" --tokens 24 --context 12 --jobs 2 --profile
    peer 'fine-tune' 60 finetune --device cpu --model "$decoder" "${once[@]}" --tokens 24 --context 12
    ours 'Grad-Transformer step' 60 train "${small[@]}" "${once[@]}" --profile
    peer 'Grad-Transformer step' 60 train --device cpu "${small[@]}" "${once[@]}"
    ours 'generation' 60 generate --model "$decoder" "${once[@]}" --batch 2 --context 5 --tokens 6 --profile
    ours 'single operations' 60 kernels --model "$decoder" "${small[@]}" "${once[@]}" --tokens 24 --values 500 --context 7
    peer 'generation' 60 generate --device cpu --model "$decoder" "${once[@]}" --batch 2 --context 5 --tokens 6
    ours 'translation' 30 translate "${small[@]}" "${once[@]}"
}

# ---- profile

# Kernels of our own that took longest in the fine-tune, one a line; those that usually do otherwise.
slowest() {
    local names=()
    mapfile -t names < <(grep '"name":"finetune"' "$results" | tail -n 1 |
        grep -o '"name":"[a-z_0-9]*","calls"' | head -n 5 | cut -d '"' -f 4)
    [ ${#names[@]} -gt 0 ] || names=(flash_backward_128 flash_forward_128_ahead silu_backward rmsnorm_lora_backward)
    printf '%s\n' "${names[@]}"
}

part_profile() {
    local tool found='' counters name
    for tool in ncu /usr/local/cuda/bin/ncu /opt/nvidia/nsight-compute/*/ncu; do
        [ -n "$found" ] || found=$(command -v "$tool" || true)
    done
    if [ -z "$found" ] || [ "$emulated" = 1 ]; then
        note profile 'Nsight Compute' skipped 0 "not installed, or emulated"
        return
    fi
    counters=gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed
    counters+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,l1tex__throughput.avg.pct_of_peak_sustained_active
    counters+=,lts__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active
    counters+=,sm__inst_executed_pipe_tensor.sum,sm__inst_executed.sum,l1tex__data_bank_conflicts_pipe_lsu.sum
    counters+=,launch__registers_per_thread,launch__occupancy_limit_shared_mem
    # One run for each: they are launched in different parts of a step, and two launches of each are enough.
    while read -r name; do
        step profile "Nsight Compute: $name" 60 "$found" --clock-control none --csv --log-file "$scratch/profile.csv" \
            --metrics "$counters" --kernel-name "regex:^$name" --launch-count 2 \
            "$program" bench finetune --device cuda --model qwen2.5-7b --warmup 0 --runs 1 --large 1024
        grep '^"' "$scratch/profile.csv" >>"$out/profile.csv" 2>/dev/null
        rm -f "$scratch/profile.csv"
    done < <(slowest)
}

# ---- all of it

# within SHARE PART: the part may take so many hundredths of the time, and all that is left if it is alone.
within() {
    local share=$1 part=$2
    part_deadline=$deadline
    if [ -z "$only" ]; then
        part_deadline=$((SECONDS + total * share / 100))
        [ "$part_deadline" -lt "$deadline" ] || part_deadline=$deadline
    fi
    [ -z "$only" ] || [ "$only" = "$part" ] || return 0
    "part_$part"
}

write_table() {
    part_deadline=$total
    {
        echo "# GPU check, $(date -u +%F)"
        echo
        limited 5 "$scratch/table" env -C "$out" "$program" bench table results.jsonl && cat "$scratch/table"
        echo
        echo '| part | what | result | seconds | |'
        echo '|---|---|---|---|---|'
        cat "$summary"
    } >"$out/table.md"
}

# No file may be larger than 16 MiB; the beginning and the end of a long log say most.
shorten() {
    local file=$1 most=$((15 << 20))
    [ -f "$file" ] && [ "$(stat -c %s "$file")" -gt "$most" ] || return 0
    { head -c $((most / 2)) "$file"; printf '\n[…]\n'; tail -c $((most / 2)) "$file"; } >"$scratch/short"
    cat "$scratch/short" >"$file"
}

part_machine
part_ceilings
within 42 correct
within 44 speed
within 100 profile
write_table
shorten "$log"
[ ! -f "$out/profile.csv" ] || shorten "$out/profile.csv"
echo "results: $out ($SECONDS s)"
case $failed_part in
    '') [ "$was_late" = 0 ] || exit 16 ;;
    machine) exit 11 ;;
    ceilings) exit 12 ;;
    correct) exit 13 ;;
    speed) exit 14 ;;
    *) exit 15 ;;
esac
