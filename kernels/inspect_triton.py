"""Compiles the Triton kernels ahead of time, without a GPU, and prints the resources that each needs.

    python kernels/inspect_triton.py                            for sm_75, sm_80 and sm_90, at the shapes of T (Tiny)
    python kernels/inspect_triton.py --arch 90 --ops depthwise  one architecture, operators with this in their name

Each launcher runs on fake CUDA tensors, so that kernels are compiled with the types, alignments and tiles of real
launches. A stack frame holds spilled registers in memory. Kernels that training uses should have none.
"""

import argparse
import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from dwconv2d import mlp_triton, plane_triton, token_triton
from selective_scan import gate_triton, scan_triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

# Channels of the block and side of each stage of T, and of two stages of B, whose channels do not fill a tile.
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7), (96, 56), (768, 7))
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BATCH, STATES, EPS = 128, 1, 1e-5


@dataclass
class Compiled:
    """A compiled kernel: its name, and the resources of a thread and a block."""

    operator: str
    kernel: str
    registers: int
    frame: int  # bytes
    shared: int  # bytes
    warps: int


class _Driver:
    """Replaces Triton's driver, so that Triton compiles for a GPU that is not there."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class _Pointer:
    """A tensor as Triton sees it: its type and address."""

    def __init__(self, tensor: Tensor):
        self.dtype = tensor.dtype
        self.offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return 2**20 + self.offset

    def ptr_range(self) -> int:
        return 0


def _launch(kernel: triton.JITFunction, programs: int, *args: object, **constants: object) -> None:
    """Launch through Triton each time, without the dictionary of compiled kernels in `launching`."""
    kernel[(programs,)](*args, **constants)


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[tuple[str, object]]]:
    """Make launches compile for `arch` instead of running, and list the names and compiled kernels."""
    run, compiled = triton.JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        args = [_Pointer(a) if isinstance(a, Tensor) else a for a in args]
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__.strip("_"), kernel))

    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(arch)),
        mock.patch.object(triton.JITFunction, "run", compile_only),
        mock.patch.object(torch.cuda, "device_of", return_value=contextlib.nullcontext()),
        mock.patch.object(token_triton, "launch", _launch),
        mock.patch.object(gate_triton, "launch", _launch),
        mock.patch.object(mlp_triton, "launch", _launch),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(arch, 10)),
    ):
        yield compiled


def calls(dim: int, side: int, dtype: torch.dtype, layout: str) -> dict[str, Callable[[], object]]:
    """The launchers of every operator, as a block of `dim` channels calls them under autocast."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="cuda")

    def parameter(*shape):
        return empty(*shape, dtype=torch.float32)

    inner = 2 * dim
    tokens, projection = empty(BATCH, side, side, dim), empty(BATCH, side, side, 2 * inner)
    x, z = projection.chunk(2, dim=-1)
    planes, states = empty(BATCH, inner, side, side), parameter(BATCH, inner, STATES, side, side)
    C = empty(BATCH, STATES, side, side)
    if layout == "channels_last":
        planes, C = (t.contiguous(memory_format=torch.channels_last) for t in (planes, C))
    conv, norm = (parameter(dim, 1, 3, 3), parameter(dim)), (parameter(dim), parameter(dim))
    inner_conv, inner_norm = (parameter(inner, 1, 3, 3), parameter(inner)), (parameter(inner), parameter(inner))
    fusion = (states, *(parameter(inner, 1, 3, 3) for _ in range(3)), parameter(3), C, parameter(inner), planes)
    scan = (planes.flatten(2), planes.flatten(2), parameter(inner, STATES), C.flatten(2), parameter(inner), True)
    scale = empty(BATCH)
    mlp_biases = parameter(4 * dim), parameter(dim)
    found = {
        "selective_scan_state": lambda: scan_triton.selective_scan_state(*scan),
        "selective_scan_state_backward": lambda: scan_triton.selective_scan_state_backward(states.flatten(3), *scan),
        "state_fusion_output": lambda: plane_triton.state_fusion_output(*fusion),
        "state_fusion_output_backward": lambda: plane_triton.state_fusion_output_backward(planes, *fusion),
    }
    if layout == "contiguous":
        norm_args = (tokens, conv[0], norm[0], EPS, tokens, scale)
        found |= {
            "depthwise_silu": lambda: token_triton.depthwise_silu(x, *inner_conv),
            "depthwise_silu_backward": lambda: token_triton.depthwise_silu_backward(
                planes, x, *inner_conv, planes, planes
            ),
            "depthwise_residual_norm": lambda: token_triton.depthwise_residual_norm(
                tokens, *conv, *norm, EPS, tokens, scale
            ),
            "depthwise_residual_norm first": lambda: token_triton.depthwise_residual_norm(tokens, *conv, *norm, EPS),
            "depthwise_residual_norm_backward": lambda: token_triton.depthwise_residual_norm_backward(
                tokens, tokens, tokens, *norm_args
            ),
            "mlp": lambda: mlp_triton.mlp(
                tokens, empty(4 * dim, dim), *mlp_biases[:1], empty(dim, 4 * dim), mlp_biases[1]
            ),
            "norm_gate": lambda: gate_triton.norm_gate(planes, z, *inner_norm, EPS),
            "norm_gate_backward": lambda: gate_triton.norm_gate_backward(x, planes, z, *inner_norm, EPS),
        }
    return found


def usage(kernel: object) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack frame, from the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("REG", "STACK"))


def inspect(arch: int, wanted: list[str], dtypes: list[str], stages: tuple[tuple[int, int], ...]) -> Iterator[Compiled]:
    """Yield the kernels of operators whose name has one of `wanted`. Each compiled variant appears once."""
    seen = set()
    for (dim, side), name in ((stage, name) for stage in stages for name in dtypes):
        for layout in ("contiguous", "channels_last"):
            with FakeTensorMode(), recording(arch) as compiled:
                for operator, call in calls(dim, side, DTYPES[name], layout).items():
                    if not any(part in operator for part in wanted):
                        continue
                    compiled.clear()
                    call()
                    for kernel, binary in compiled:
                        if binary.hash in seen:
                            continue
                        seen.add(binary.hash)
                        registers, frame = usage(binary)
                        shared, warps = binary.metadata.shared, binary.metadata.num_warps
                        where = f"{operator} {dim} at {side} {name} {layout}"
                        yield Compiled(where, kernel, registers, frame, shared, warps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[75, 80, 90])
    parser.add_argument("--ops", nargs="+", default=[""], help="parts of operators' names")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--stages", type=int, nargs="+", default=range(len(STAGES)), help=f"indices into {STAGES}")
    args = parser.parse_args()
    for arch in args.arch:
        print(f"sm_{arch}\n\n| kernel | operator | registers | frame, bytes | shared, bytes | warps |")
        print("|---|---|---|---|---|---|")
        for k in inspect(arch, args.ops, args.dtypes, tuple(STAGES[i] for i in args.stages)):
            print(f"| {k.kernel} | {k.operator} | {k.registers} | {k.frame} | {k.shared} | {k.warps} |", flush=True)


if __name__ == "__main__":
    main()
