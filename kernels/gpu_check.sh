#!/usr/bin/env bash
# Checks what only a GPU can tell. The script runs the tests of the kernels on it, compute-sanitizer over some of those,
# benchmarks of the kernels and of the whole model beside its peers, and training in float32 and with both kinds of AMP.
#
#   bash kernels/gpu_check.sh FOLDER [STEP...]     all steps take about twenty minutes on 16 cores and one H100
#
# FOLDER/gpu_check.tar.gz holds the logs and the benchmarks' JSON. It is written anew after each step, so that a run
# that is cut short leaves what it has. These are the steps. They run in this order, or in that of the arguments:
#   build          compiles the kernels for this card, unless kernels for CUDA are already there
#   cuda           tests of the CUDA kernels: values and gradients of the scan, the fusion and the convolution
#   cuda_runtime   tests of the CUDA kernels: streams, graphs, large tensors
#   triton_block   tests of the Triton kernels that a model uses, norm_gate, depthwise_* and mlp, and of the block
#   benchmark      the scan, the fusion and the 3x3 convolution in both layouts
#   model          the whole model beside its peers: inference and training, eager and compiled
#   profile        where the time of the whole model goes
#   triton_planes  tests of the Triton kernels in place of missing CUDA kernels: scan, fusion, convolution
#   memcheck       compute-sanitizer: accesses to memory
#   racecheck      compute-sanitizer: races in shared memory
#   train          digits, and the tiny model at 224 pixels, without AMP, in float16 and bfloat16, and compiled
#
# tests/kernels/test_*_cuda.py emulate CUDA on the host and need no GPU, so no step runs them.
#
# The script needs PyTorch with CUDA, timm, pytest and pytest-xdist. `build` also needs setuptools, a C++ compiler and
# nvcc, and `train` needs all of requirements.txt. PYTHON names another interpreter than python3.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:?"usage: bash kernels/gpu_check.sh FOLDER [STEP...]"}
shift
[ $# -gt 0 ] || set -- build cuda cuda_runtime triton_block benchmark model profile triton_planes memcheck racecheck train
python=${PYTHON:-python3}
tests=(tests/kernels/test_selective_scan.py tests/kernels/test_dwconv2d.py)
gpu_tests=(tests/kernels/test_selective_scan_gpu.py tests/kernels/test_dwconv2d_gpu.py)
failed=0
verdicts=()

# step NAME: its function's output goes into a log; its verdict, its time and its last line are printed at the end
step() {
    local log=$out/$1.log start=$SECONDS verdict=ok
    step_"$1" >"$log" 2>&1 || { verdict=FAILED; failed=1; }
    verdicts+=("$(printf '%-14s %-6s %4d s   %s' "$1" $verdict $((SECONDS - start)) "$(grep -v '^ *$' "$log" | tail -1 | cut -c1-110)")")
    tar -czf "$folder/gpu_check.tar.gz" -C "$out" .
}

# all COMMAND, COMMAND...: runs each of the lines it reads, and fails if one of them failed
all() {
    local line status=0
    while read -r line; do
        [ -z "$line" ] || { echo "+ $line"; eval "$line" </dev/null || status=1; }
    done
    return $status
}

backends() {
    $python -m selective_scan && $python -m dwconv2d
}

step_build() {
    if [ "$(backends | grep -c '^cuda *available')" != 2 ]; then
        timeout 240 $python -m pip install --no-build-isolation --no-deps -e kernels/selective_scan -e kernels/dwconv2d -e . || return
    fi
    backends | tee "$out/backends.txt"
    [ "$(grep -c '^cuda *available' "$out/backends.txt")" = 2 ]
}

run_tests() { # SECONDS ARGUMENTS...; the tests ask PyTorch for deterministic algorithms
    CUBLAS_WORKSPACE_CONFIG=:4096:8 TORCHINDUCTOR_COMPILE_THREADS=1 OMP_NUM_THREADS=1 timeout "$1" $python -m pytest -q -p no:cacheprovider "${@:2}"
}

step_cuda() {
    run_tests 240 -n "$(nproc)" "${tests[@]}" -k "cuda and not triton"
}

step_cuda_runtime() { # one after the other: some fill the card
    run_tests 120 "${gpu_tests[@]}"
}

step_triton_block() {
    run_tests 120 -n "$(nproc)" tests/kernels/test_token_ops.py tests/classification/test_fused_block.py --random-cases 100
}

step_triton_planes() {
    run_tests 300 -n "$(nproc)" "${tests[@]}" --random-cases 40 -k triton
}

# This runs without PyTorch's allocator, whose large blocks would hide what is read or written beyond a tensor. It
# covers forward and backward of every kind of block, in float32, at lengths and sizes that the tool finishes.
sanitize() { # TOOL
    CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 120 compute-sanitizer --tool "$1" --error-exitcode 9 \
        --kernel-regex kns=scan --kernel-regex kns=dwconv --kernel-regex kns=sum_partials \
        $python -m pytest -q -x -p no:cacheprovider "${tests[@]}" -k "cuda and not reference and not triton and not float64 and \
        not float16 and not 64521 and not 3136 and (sizes or small_planes or (conv_kernels and replicate))" || return
    CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 120 compute-sanitizer --tool "$1" --error-exitcode 9 \
        --kernel-regex kns=_kernel \
        $python -m pytest -q -x -p no:cacheprovider tests/kernels/test_token_ops.py -k "triton and (5x7 or odd) and (float32 or (mlp and float16))"
}
step_memcheck() { sanitize memcheck; }
step_racecheck() { sanitize racecheck; }

step_benchmark() { # the scan's naive form, a loop over tokens, would take minutes
    all <<'LINES'
run_benchmark contiguous scan --ops scan --backends cuda triton
run_benchmark channels_last scan --ops scan --backends cuda triton
run_benchmark contiguous planes --ops fusion dwconv --backends cuda triton naive
run_benchmark channels_last planes --ops fusion dwconv --backends cuda triton naive
LINES
}

run_benchmark() { # LAYOUT NAME ARGUMENTS...
    timeout 100 $python kernels/benchmark.py --json "$out/benchmark_$2_$1.json" --layout "$1" --dtypes bfloat16 \
        --shapes "T/* batch 128" "detection*" "${@:3}"
}

step_model() {
    all <<'LINES'
timeout 60 $python -m classification.benchmark --batch 1 128 --dtype bfloat16
timeout 60 $python -m classification.benchmark --batch 1 128 --dtype bfloat16 --channels-last
timeout 60 $python -m classification.benchmark --batch 128 --dtype bfloat16 --cast --channels-last
timeout 60 $python -m classification.benchmark --batch 128 --rounds 3
timeout 120 $python -m classification.benchmark --train --peers --batch 128 --dtype bfloat16
timeout 120 $python -m classification.benchmark --train --peers --batch 128 --dtype bfloat16 --channels-last
timeout 60 $python -m classification.benchmark --train --batch 64 --dtype bfloat16
timeout 300 $python -m classification.benchmark --batch 1 128 --dtype bfloat16 --compile reduce-overhead
timeout 300 $python -m classification.benchmark --train --peers --batch 128 --dtype bfloat16 --channels-last --compile reduce-overhead
LINES
}

step_profile() {
    all <<'LINES'
timeout 60 $python -m classification.benchmark --profile --batch 128 --dtype bfloat16
timeout 60 $python -m classification.benchmark --profile --batch 128 --dtype bfloat16 --train --rows 60
LINES
}

# The losses of the three kinds of AMP are to stay together.
step_train() {
    $python -m classification.data.digits "$out/digits" || return
    for amp in off float16 bfloat16; do
        run_training micro_digits $amp && run_training tiny $amp TRAIN.EPOCHS 6 TRAIN.WARMUP_EPOCHS 1 DATA.BATCH_SIZE 64 \
            TRAIN.BASE_LR 2e-3 AUG.MIXUP 0.0 AUG.CUTMIX 0.0 AUG.AUTO_AUGMENT "" AUG.HFLIP 0.0 TRAIN.EMA.DECAY 0.95 || return
    done
    run_training micro_digits bfloat16 --compile reduce-overhead --tag graphs || return
    for run in "$out"/runs/*/*; do
        echo "${run#"$out"/runs/}: $(grep -o 'train loss [0-9.]*' "$run/log.txt" | cut -d' ' -f3 | xargs)"
    done
    rm -rf "$out/digits" "$out"/runs/*/*/*.pth
}

run_training() { # CONFIG AMP KEY VALUE... or FLAG...
    timeout 200 $python classification/main.py --cfg "classification/configs/spatialmamba/spatialmamba_$1.yaml" \
        --data-path "$out/digits" --output "$out/runs" --tag "$2" --opts TRAIN.AMP "$2" "${@:3}"
}

for name in "$@"; do
    declare -F step_"$name" >/dev/null || { echo "gpu_check: no step '$name'; see the head of $0" >&2; exit 2; }
done
card=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader) || exit 1
mkdir -p "$folder"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
TORCH_CUDA_ARCH_LIST=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
export TORCH_CUDA_ARCH_LIST
for name in "$@"; do step "$name"; done
for name in benchmark model profile; do
    [ ! -f "$out/$name.log" ] || grep -a '^+\|^|\|times as fast\|images per second\|^copy\|NOT TIMED\|Error' "$out/$name.log" | cut -c1-160
done
for name in cuda cuda_runtime triton_block triton_planes memcheck racecheck; do
    [ ! -f "$out/$name.log" ] || grep -a '^FAILED\|^ERROR\|^E  ' "$out/$name.log" | cut -c1-160 | head -20
done
[ ! -f "$out/train.log" ] || grep -a '^spatialmamba_.*: [0-9]' "$out/train.log"
echo "$card, $(date +%F)"
printf '%s\n' "${verdicts[@]}"
exit $failed
