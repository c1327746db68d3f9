#!/usr/bin/env bash
# What only a GPU can tell of the kernels, in one go and in under eight minutes: builds them for this card, runs their
# tests on it, compute-sanitizer over some of those, and the benchmark.
#
#   bash kernels/gpu_check.sh [FOLDER]     logs and benchmark.json go into FOLDER, output/gpu_check by default
#
# Needs PyTorch with CUDA, pytest, pytest-xdist, setuptools, a C++ compiler and nvcc. PYTHON names another interpreter than python3.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-output/gpu_check}
python=${PYTHON:-python3}
scan_tests=tests/kernels/test_selective_scan.py
failed=0

# step NAME COMMAND...: output into a log; here its verdict, its time and its last line
step() {
    local log=$out/$1.log start=$SECONDS verdict=ok
    "${@:2}" >"$log" 2>&1 || { verdict=FAILED; failed=1; }
    printf '%-10s %-6s %4d s   %s\n' "$1" $verdict $((SECONDS - start)) "$(grep -v '^ *$' "$log" | tail -1 | cut -c1-110)"
}

build() {
    $python -m pip install --no-build-isolation --no-deps -e kernels/selective_scan -e kernels/dwconv2d &&
        $python -m selective_scan | tee "$out/backends.txt" && grep -q '^cuda *available' "$out/backends.txt"
}

run_tests() { # SECONDS ARGUMENTS...
    timeout "$1" $python -m pytest -q -p no:cacheprovider "${@:2}"
}

sanitize() { # TOOL: forward and backward of every kind of block, in float32
    timeout 60 compute-sanitizer --tool "$1" --error-exitcode 9 $python -m pytest -q -x -p no:cacheprovider \
        $scan_tests -k "cuda and not reference and not triton and sizes and float32"
}

benchmark() {
    timeout 120 $python kernels/benchmark.py --json "$out/benchmark.json" \
        --shapes "*batch 128" "T/56 batch 1" "detection*" "segmentation*" --backends cuda triton reference
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || exit 1
date +%F
mkdir -p "$out"
TORCH_CUDA_ARCH_LIST=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
export TORCH_CUDA_ARCH_LIST
step build build
step tests run_tests 180 -n 8 $scan_tests tests/kernels/test_selective_scan_gpu.py -k "(cuda or triton or gpu)"
step memcheck sanitize memcheck
step racecheck sanitize racecheck
step benchmark benchmark
grep '^copy\|^| shape\|^|---\|| cuda |\|| triton |' "$out/benchmark.log"
exit $failed
