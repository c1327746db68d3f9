#!/usr/bin/env bash
# What only a GPU can tell of the kernels, in one go and in under eight minutes: builds them for this card, runs their
# tests on it, compute-sanitizer over some of those, and the benchmarks.
#
#   bash kernels/gpu_check.sh [FOLDER]     logs and benchmark_*.json go into FOLDER, output/gpu_check by default
#
# Needs PyTorch with CUDA, timm, pytest, pytest-xdist, setuptools, a C++ compiler and nvcc. PYTHON names another
# interpreter than python3.
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
grep '^copy\|^| op\|^|---\|| cuda |\|| triton |' "$out/benchmark.log"
cat "$out/model.log"
exit $failed
