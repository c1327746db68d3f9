#!/usr/bin/env bash
# What only a GPU can tell, in one go and in about ten minutes: builds the kernels for this card, runs their tests on it,
# compute-sanitizer over some of those, the benchmarks, and trains on it in float32 and under both kinds of AMP.
#
#   bash kernels/gpu_check.sh [FOLDER]     logs and benchmark_*.json go into FOLDER, output/gpu_check by default
#
# Needs PyTorch with CUDA, timm, pytest, pytest-xdist, setuptools, a C++ compiler and nvcc; for `train`, all of
# requirements.txt. PYTHON names another interpreter than python3.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-output/gpu_check}
python=${PYTHON:-python3}
tests=(tests/kernels/test_selective_scan.py tests/kernels/test_dwconv2d.py)
gpu_tests=(tests/kernels/test_selective_scan_gpu.py tests/kernels/test_dwconv2d_gpu.py)
failed=0

# step NAME COMMAND...: output into a log; here its verdict, its time and its last line
step() {
    local log=$out/$1.log start=$SECONDS verdict=ok
    "${@:2}" >"$log" 2>&1 || { verdict=FAILED; failed=1; }
    printf '%-10s %-6s %4d s   %s\n' "$1" $verdict $((SECONDS - start)) "$(grep -v '^ *$' "$log" | tail -1 | cut -c1-110)"
}

build() {
    timeout 240 $python -m pip install --no-build-isolation --no-deps -e kernels/selective_scan -e kernels/dwconv2d -e . &&
        $python -m selective_scan | tee "$out/backends.txt" && grep -q '^cuda *available' "$out/backends.txt" &&
        $python -m dwconv2d | tee -a "$out/backends.txt" && [ "$(grep -c '^cuda *available' "$out/backends.txt")" = 2 ]
}

run_tests() { # SECONDS ARGUMENTS...
    timeout "$1" $python -m pytest -q -p no:cacheprovider "${@:2}"
}

# Without PyTorch's allocator, whose large blocks would hide what is read or written beyond a tensor: forward and backward
# of every kind of block, in float32.
sanitize() { # TOOL
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 60 compute-sanitizer --tool "$1" --error-exitcode 9 \
        $python -m pytest -q -x -p no:cacheprovider "${tests[@]}" -k "cuda and not reference and not triton and not float64 and \
        not float16 and (sizes or small_planes or large_planes or (conv_kernels and replicate))"
}

benchmark() { # the scan's naive form, a loop over tokens, would take minutes
    run_benchmark scan --ops scan --backends cuda triton reference
    run_benchmark planes --ops fusion dwconv --backends cuda triton reference naive
}

run_benchmark() { # NAME ARGUMENTS...
    timeout 75 $python kernels/benchmark.py --json "$out/benchmark_$1.json" --layout contiguous --dtypes bfloat16 \
        --shapes "T/* batch 128" "T/56 batch 1" "detection*" "segmentation*" "${@:2}"
}

model() {
    for dtype in float32 bfloat16; do timeout 40 $python -m classification.benchmark --batch 1 128 --dtype $dtype; done
    timeout 40 $python -m classification.benchmark --train --batch 128 --dtype bfloat16
}

# On digits, and on the same at 224 pixels with the tiny model; the losses of the three are to stay together.
train() {
    $python -m classification.data.digits "$out/digits" || return
    for amp in off float16 bfloat16; do
        run_training micro_digits $amp && run_training tiny $amp TRAIN.EPOCHS 6 TRAIN.WARMUP_EPOCHS 1 DATA.BATCH_SIZE 64 \
            TRAIN.BASE_LR 2e-3 AUG.MIXUP 0.0 AUG.CUTMIX 0.0 AUG.AUTO_AUGMENT "" AUG.HFLIP 0.0 TRAIN.EMA.DECAY 0.95 || return
    done
    for run in "$out"/runs/*/*; do
        echo "${run#"$out"/runs/}: $(grep -o 'train loss [0-9.]*' "$run/log.txt" | cut -d' ' -f3 | xargs)"
    done
}

run_training() { # CONFIG AMP KEY VALUE...
    timeout 60 $python classification/main.py --cfg "classification/configs/spatialmamba/spatialmamba_$1.yaml" \
        --data-path "$out/digits" --output "$out/runs" --tag "$2" --opts TRAIN.AMP "$2" "${@:3}"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || exit 1
date +%F
mkdir -p "$out"
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # the tests ask PyTorch for deterministic algorithms
TORCH_CUDA_ARCH_LIST=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
export TORCH_CUDA_ARCH_LIST
step build build
step tests run_tests 150 -n 8 "${tests[@]}" -k "cuda or triton"
step gpu run_tests 60 "${gpu_tests[@]}" # one after the other: some fill the card
step memcheck sanitize memcheck
step racecheck sanitize racecheck
step benchmark benchmark
step model model
step train train
grep '^copy\|^| op\|^|---\|| cuda |\|| triton |' "$out/benchmark.log"
cat "$out/model.log"
grep '^spatialmamba_.*: [0-9]' "$out/train.log"
exit $failed
