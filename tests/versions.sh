#!/usr/bin/env bash
# Kernel and model tests under other Pythons and PyTorches, each in an environment that is removed again:
#   bash tests/versions.sh python3.10:2.11.0 python3.13:2.11.0 [PYTHON:TORCH ...]
# PYTHON is any command. Prints a table; what went wrong is in $OUT, by default
# output/versions. An environment takes 6 GB on the disk.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: $0 PYTHON:TORCH ..." >&2; exit 2; }
out=${OUT:-output/versions} failed=0
mkdir -p "$out"
# The kernels are built in copies, so that those of this checkout stay as they are.
check() { # PYTHON TORCH FOLDER
    "$1" -m venv "$3/venv" && local python=$3/venv/bin/python &&
        grep -v '^torch\|^-e' requirements.txt >"$3/requirements.txt" &&
        $python -m pip install -q "torch==$2" torchvision -r "$3/requirements.txt" &&
        cp -r kernels classification tests pyproject.toml README.md "$3" && rm -f "$3"/kernels/*/*/_C_torch*.so && cd "$3" &&
        FORCE_ONLY_CPU=1 $python -m pip install -q -e kernels/selective_scan -e kernels/dwconv2d -e . &&
        OMP_NUM_THREADS=1 $python -m pytest -q -p no:cacheprovider --random-cases=20 tests/kernels/test_selective_scan.py \
            tests/kernels/test_dwconv2d.py tests/classification/test_spatialmamba.py tests/classification/test_prepacked.py \
            -k "not triton"
}

echo "| Python | PyTorch | kernel and model tests |"
echo "|---|---|---|"
for pair in "$@"; do
    python=${pair%:*} torch=${pair##*:} folder=$(mktemp -d)
    log=$out/$(basename "$("$python" -c 'import platform; print(platform.python_version())')")_torch$torch.log
    (check "$python" "$torch" "$folder") >"$log" 2>&1 || failed=1
    echo "| $(basename "$log" | cut -d_ -f1) | $torch | $(grep -E 'passed|failed|rror' "$log" | tail -1) |"
    rm -rf "$folder"
done
exit $failed
