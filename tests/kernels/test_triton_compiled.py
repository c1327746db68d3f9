"""The Triton kernels compile ahead of time for GPUs that are not there, as the launchers launch them."""

import os
import subprocess
import sys

import pytest
from running import ROOT

ON_TOKENS = ["depthwise", "norm_gate"]
# Architecture, types, stages of T and B, operators: all that T's training under autocast uses on an H100; others for
# breadth. The MLP's kernel is for 16 bits, few channels and sm_80 or later.
CASES = {
    "sm_90": (90, ["bfloat16"], range(4), [*ON_TOKENS, "mlp"]),
    "sm_80": (80, ["float32"], [3], ON_TOKENS),
    "sm_80, MLP": (80, ["float16"], [4], ["mlp"]),
    "sm_75": (75, ["float16"], [5], [*ON_TOKENS, "mlp"]),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile(case):
    """What training uses keeps its registers: no stack frame. In a process without Triton's interpreter."""
    arch, dtypes, stages, operators = CASES[case]
    arguments = ["--arch", arch, "--dtypes", *dtypes, "--stages", *stages, "--ops", *operators]
    command = [sys.executable, "kernels/inspect_triton.py", *map(str, arguments)]
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "kernel |" in line][1:]
    kernels = {row[0] for row in rows}
    on_tokens = {
        "silu_kernel", "residual_norm_kernel", "norm_backward_kernel", "convolution_backward_kernel", "sums_kernel",
        "forward_kernel", "backward_kernel",
    }  # fmt: skip
    expected = on_tokens if "depthwise" in operators else set()
    assert kernels == expected | ({"mlp_kernel"} if case in ("sm_90", "sm_80, MLP") else set())
    if case == "sm_90":
        assert [row for row in rows if int(row[3])] == []
