"""Times the scan, the fusion and the 3x3 convolution at Spatial-Mamba's shapes, beside plain PyTorch and a copy.

    python kernels/benchmark.py                               all three and every shape, on the GPU if there is one
    python kernels/benchmark.py --shapes "T/56 batch 1" --threads 1 --instruction-sets
    python kernels/benchmark.py --ops fusion --layout contiguous

A row is timed only if value and gradients agree with float64. Its bytes are those that must move: each input is read
once, and each output is written once. "% of copy" is the rate of these bytes over the machine's copy rate, which the
same run measures. The backends are the compiled kernels ("cpu", "cuda"), "triton", "reference" (the package's plain
PyTorch) and "naive", the operator written without the package:

    scan     selective_scan_state; naive is a loop over tokens, with gradients by autograd
    fusion   state_fusion_output; naive is three pads, three convolutions, their sum and the output equation
    dwconv   dilated_dwconv2d, 3x3 with zeros; naive is torch.nn.functional.conv2d, which is oneDNN's or cuDNN's
"""

import argparse
import datetime
import fnmatch
import importlib
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import dwconv2d
import selective_scan
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

# The planes of Spatial-Mamba's scans, T for Tiny and B for Base: channels (twice the features) and side of each stage,
# one state.
LAYERS = {
    **{f"T/{side}": (channels, side, side) for side, channels in ((56, 128), (28, 256), (14, 512), (7, 1024))},
    **{f"B/{side}": (channels, side, side) for side, channels in ((56, 192), (28, 384), (14, 768), (7, 1536))},
}
SHAPES = {f"{name} batch {batch}": (batch, *layer) for batch in (1, 128) for name, layer in LAYERS.items()}
SHAPES |= {"detection 200x320": (1, 128, 200, 320), "segmentation 128x128": (1, 128, 128, 128)}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Largest relative L2 errors, as in tests/kernels/conftest.py. 16-bit results may add 1.2 roundings.
TOLERANCE = {"forward": 1e-6, "backward": 5e-6}
# The naive forms are only for comparison. Their decays, rounded next to 1, lose digits that the other backends keep.
NAIVE_TOLERANCE = {"forward": 1e-5, "backward": 5e-5}
INSTRUCTION_SETS = ("avx512", "avx2", "default")

Inputs = dict[str, Tensor | bool]
Results = dict[str, Tensor]


@dataclass
class Row:
    """One line of the table. A ratio to another backend is None if that backend was not timed."""

    op: str
    shape: str
    dtype: str
    backend: str
    direction: str
    milliseconds: float
    nanoseconds_per_element: float
    bytes_per_element: float
    gigabytes_per_second: float
    percent_of_copy: float
    times_reference: float | None = None
    times_naive: float | None = None


# ----- inputs and operators


def planes(batch: int, channels: int, height: int, width: int, like: Tensor, channels_last: bool) -> Tensor:
    x = torch.randn(batch, channels, height, width, dtype=like.dtype, device=like.device)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def scan_inputs(batch: int, channels: int, height: int, width: int, like: Tensor, channels_last: bool) -> Inputs:
    """The scan's inputs as in Spatial-Mamba: delta has a bias and softplus, and planes are rows of tokens."""

    def activation(rows: int) -> Tensor:
        return planes(batch, rows, height, width, like, channels_last).flatten(2)

    return dict(
        u=activation(channels) + 1,
        delta=activation(channels),
        A=-torch.rand(channels, 1, device=like.device),
        B=activation(1) + 1,
        delta_bias=torch.rand(channels, device=like.device),
        delta_softplus=True,
    )


def fusion_inputs(batch: int, channels: int, height: int, width: int, like: Tensor, channels_last: bool) -> Inputs:
    states = torch.empty(0, device=like.device)
    weights = ("weight3", "weight3_d3", "weight3_d5")
    return dict(
        h=1 + planes(batch, channels, height, width, states, channels_last),
        **{name: 1 + torch.randn(channels, 1, 3, 3, device=like.device) for name in weights},
        alpha=torch.rand(3, device=like.device) / 9,
        C=1 + planes(batch, 1, height, width, like, channels_last),
        D=torch.rand(channels, device=like.device),
        x=1 + planes(batch, channels, height, width, like, channels_last),
    )


def dwconv_inputs(batch: int, channels: int, height: int, width: int, like: Tensor, channels_last: bool) -> Inputs:
    return dict(
        x=1 + planes(batch, channels, height, width, like, channels_last),
        weight=1 + torch.randn(channels, 1, 3, 3, device=like.device, dtype=like.dtype),
        bias=torch.randn(channels, device=like.device, dtype=like.dtype),
        dilation=1,
        padding_mode="zeros",
    )


def naive_scan(u, delta, A, B, delta_bias, delta_softplus) -> Tensor:
    """The recurrence, one token at a time. `delta_softplus` is True in every timed call."""
    dt = F.softplus(delta.to(A.dtype) + delta_bias[:, None])
    h, states = torch.zeros_like(dt[:, :, None, 0]), []
    for step, u_t, B_t in zip(dt.unbind(-1), u.to(A.dtype).unbind(-1), B.to(A.dtype).unbind(-1), strict=True):
        h = torch.exp(step[..., None] * A) * h + (step * u_t)[..., None] * B_t[:, None]
        states.append(h)
    return torch.stack(states, dim=-1)


def naive_fusion(h, weight3, weight3_d3, weight3_d5, alpha, C, D, x) -> Tensor:
    fused = 0
    for a, weight, dilation in zip(alpha, (weight3, weight3_d3, weight3_d5), (1, 3, 5), strict=True):
        padded = F.pad(h, (dilation,) * 4, mode="replicate")
        fused = fused + a * F.conv2d(padded, weight, dilation=dilation, groups=h.shape[1])
    return (fused * C.to(h.dtype) + D[:, None, None] * x.to(h.dtype)).to(x.dtype)


def naive_dwconv(x, weight, bias, dilation, padding_mode) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])


def backward_of(naive: Callable) -> Callable:
    """The gradients of `naive` by autograd. The forward pass runs too, as it does for a user of `naive`."""

    def backward(grad: Tensor, **inputs) -> tuple[Tensor, ...]:
        leaves = {n: t.detach().requires_grad_() for n, t in inputs.items() if isinstance(t, Tensor)}
        return torch.autograd.grad(naive(**inputs | leaves), list(leaves.values()), grad)

    return backward


@dataclass
class Operator:
    """The operator behind a name of `--ops`."""

    package: str
    name: str
    make_inputs: Callable[..., Inputs]
    naive: Callable[..., Tensor]
    images: tuple[str, ...]  # the inputs that have a part for each image
    not_for_backward: tuple[str, ...] = ()  # inputs that its backward operator does not take

    def of(self, functions) -> tuple[Callable, Callable]:
        """Forward and backward among `functions`: operators, or a module of implementations."""
        backward = getattr(functions, f"{self.name}_backward")

        def without_some(grad: Tensor, **inputs):
            return backward(grad, **{n: t for n, t in inputs.items() if n not in self.not_for_backward})

        return getattr(functions, self.name), without_some

    def reference(self) -> tuple[Callable, Callable]:
        return self.of(self._module("reference"))

    def _module(self, kind: str) -> ModuleType:
        part = {"selective_scan": "scan", "dwconv2d": "plane"}[self.package]
        return importlib.import_module(f"{self.package}.{part}_{kind}")

    def implementations(self, device: str) -> dict[str, tuple[Callable, Callable]]:
        """Forward and backward of each backend that runs on `device`."""
        found = {}
        available = importlib.import_module(self.package).backends()
        if available[device].startswith("available"):
            found[device] = self.of(getattr(torch.ops, self.package))
        if device == "cuda" and available["triton"] == "available":
            found["triton"] = self.of(self._module("triton"))
        found["reference"] = self.reference()
        found["naive"] = (self.naive, backward_of(self.naive))
        return found


OPERATORS = {
    "scan": Operator("selective_scan", "selective_scan_state", scan_inputs, naive_scan, ("u", "delta", "B")),
    "fusion": Operator("dwconv2d", "state_fusion_output", fusion_inputs, naive_fusion, ("h", "C", "x")),
    "dwconv": Operator("dwconv2d", "dilated_dwconv2d", dwconv_inputs, naive_dwconv, ("x",), ("bias",)),
}


# ----- agreement with float64


def ends(op: Operator, inputs: Inputs) -> Inputs:
    """The inputs of the first and the last image, whose offsets in memory are smallest and largest."""
    batch = len(inputs[op.images[0]])
    return {n: t[:: max(batch - 1, 1)] if n in op.images else t for n, t in inputs.items()}


def evaluate(forward: Callable, backward: Callable, inputs: Inputs, grad: Tensor) -> Results:
    names = [name for name, t in inputs.items() if isinstance(t, Tensor)]
    return {"value": forward(**inputs), **dict(zip(names, backward(grad, **inputs), strict=True))}


def disagreement(actual: Results, exact: Results, tolerance: dict[str, float]) -> str | None:
    """The first result that is further from `exact` than `tolerance` allows, or None."""
    for name, value in exact.items():
        allowed = tolerance["forward" if name == "value" else "backward"] * value.norm()
        if actual[name].dtype in (torch.float16, torch.bfloat16):
            allowed += 1.2 * (value.to(actual[name].dtype).double() - value).norm()
        error = (actual[name].double() - value).norm()
        if not error <= allowed:
            return f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return None


def verify(op: Operator, backend: str, calls: tuple[Callable, Callable], inputs: Inputs, grad: Tensor, exact: Results):
    """Check all results of a batch of the first and last image, then these images' results in the whole batch.

    Returns the first disagreement, or None.
    """
    few, few_grad = ends(op, inputs), grad[:: max(len(grad) - 1, 1)]
    tolerance = NAIVE_TOLERANCE if backend == "naive" else TOLERANCE
    wrong = disagreement(evaluate(*calls, few, few_grad), exact, tolerance)
    if wrong or len(grad) <= 2:
        return wrong
    whole = evaluate(*calls, inputs, grad)
    per_image = ("value", *op.images)
    whole = {name: whole[name][:: len(grad) - 1] for name in per_image}
    return disagreement(whole, {name: exact[name] for name in per_image}, tolerance)


# ----- timing


def copy_bandwidth(device: str, threads: int) -> float:
    """Bytes read and written per second by a copy of 256 MiB on a CPU, or 1 GiB on a GPU."""
    source = torch.ones(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), threads)


def median_seconds(call: Callable, threads: int) -> float:
    return Timer("call()", globals={"call": call}, num_threads=threads).blocked_autorange(min_run_time=0.3).median


def bytes_to_move(inputs: Inputs, output: Tensor, direction: str) -> int:
    """Forward: inputs and output. Backward: inputs, their gradients and the output's gradient."""
    sizes = sum(t.nbytes for t in inputs.values() if isinstance(t, Tensor))
    return output.nbytes + sizes * (1 if direction == "forward" else 2)


def time_shape(op_name: str, shape: str, dtype: str, copy: float, args: argparse.Namespace) -> Iterator[Row]:
    op, like = OPERATORS[op_name], torch.empty(0, dtype=DTYPES[dtype], device=args.device)
    torch.manual_seed(0)
    inputs = op.make_inputs(*SHAPES[shape], like, args.layout == "channels_last")
    few = {n: t.double() if isinstance(t, Tensor) else t for n, t in ends(op, inputs).items()}
    exact_forward, exact_backward = op.reference()
    output = exact_forward(**inputs)
    grad = 1 + torch.randn_like(output)
    exact = evaluate(exact_forward, exact_backward, few, grad[:: max(len(grad) - 1, 1)].double())
    for backend, calls in op.implementations(args.device).items():
        if args.backends and backend not in args.backends:
            continue
        if wrong := verify(op, backend, calls, inputs, grad, exact):
            print(f"NOT TIMED: {op_name} {shape} {dtype} {backend} disagrees with float64 in {wrong}", file=sys.stderr)
            continue
        timed = {"forward": partial(calls[0], **inputs), "backward": partial(calls[1], grad, **inputs)}
        for direction, call in timed.items():
            seconds, size = median_seconds(call, args.threads), bytes_to_move(inputs, output, direction)
            yield Row(
                op=op_name,
                shape=shape,
                dtype=dtype,
                backend=backend,
                direction=direction,
                milliseconds=1e3 * seconds,
                nanoseconds_per_element=1e9 * seconds / output.numel(),
                bytes_per_element=size / output.numel(),
                gigabytes_per_second=size / seconds / 1e9,
                percent_of_copy=100 * size / seconds / copy,
            )


def add_ratios(rows: list[Row]) -> None:
    times = {(r.shape, r.dtype, r.direction, r.backend): r.milliseconds for r in rows}
    for row in rows:
        for backend in ("reference", "naive"):
            other = times.get((row.shape, row.dtype, row.direction, backend))
            setattr(row, f"times_{backend}", other and other / row.milliseconds)


def time_instruction_set(op: str, shape: str, dtype: str, isa: str, args: argparse.Namespace) -> list[Row]:
    """Time the kernels of a lesser instruction set, in a new process, because PyTorch chooses once per process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        command = [sys.executable, __file__, "--device=cpu", "--backends=cpu", f"--json={out}", f"--shapes={shape}"]
        command += [f"--ops={op}", f"--dtypes={dtype}", f"--threads={args.threads}", f"--layout={args.layout}"]
        subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": isa}, check=True, stdout=subprocess.DEVNULL)
        return [Row(**{**row, "backend": f"cpu {isa}"}) for row in json.loads(out.read_text())["rows"]]


# ----- output

COLUMNS = ("op", "shape", "dtype", "backend", "direction", "ms", "ns/element", "B/element", "GB/s", "% of copy")
COLUMNS += ("x reference", "x naive")


def line(row: Row) -> str:
    ratios = ["" if r is None else f"{r:.1f}" for r in (row.times_reference, row.times_naive)]
    numbers = (row.nanoseconds_per_element, row.bytes_per_element, row.gigabytes_per_second, row.percent_of_copy)
    cells = [row.op, row.shape, row.dtype, row.backend, row.direction, f"{row.milliseconds:.3f}"]
    cells += [f"{numbers[0]:.3f}", *(f"{x:.1f}" for x in numbers[1:]), *ratios]
    return "| " + " | ".join(cells) + " |"


def describe(device: str, threads: int) -> dict[str, str | int]:
    cpu = f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    header = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "torch": torch.__version__,
    }
    for package in (selective_scan, dwconv2d):
        header[package.__name__] = ", ".join(
            n for n, state in package.backends().items() if state.startswith("available")
        )
    return header


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--shapes", nargs="+", default=["*"], help="patterns, such as 'T/*'")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="by default float32, and on a GPU bfloat16")
    parser.add_argument("--backends", nargs="+", choices=("cpu", "cuda", "triton", "reference", "naive"))
    parser.add_argument("--layout", choices=("channels_last", "contiguous"), default="channels_last")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on the CPU")
    parser.add_argument("--instruction-sets", action="store_true", help="on a CPU, time the lesser ones too")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    args.shapes = [name for name in SHAPES if any(fnmatch.fnmatch(name, pattern) for pattern in args.shapes)]
    if not args.shapes:
        parser.error(f"no shape matches; the shapes are {', '.join(SHAPES)}")
    args.dtypes = args.dtypes or (["float32", "bfloat16"] if args.device == "cuda" else ["float32"])
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # because the naive forms must have float32's precision
    header, copy = describe(args.device, args.threads), copy_bandwidth(args.device, args.threads)
    header["copy, GB/s"] = round(copy / 1e9, 1)
    print(*(f"{key}: {value}" for key, value in header.items()), sep="\n")
    print("\n| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    everything = []
    for op, name, dtype in itertools.product(args.ops, args.shapes, args.dtypes):
        rows = list(time_shape(op, name, dtype, copy, args))
        if args.instruction_sets and args.device == "cpu":
            here = torch.backends.cpu.get_cpu_capability().lower()
            for isa in INSTRUCTION_SETS[INSTRUCTION_SETS.index(here) + 1 :] if here in INSTRUCTION_SETS else ():
                rows += time_instruction_set(op, name, dtype, isa, args)
        add_ratios(rows)
        print(*map(line, rows), sep="\n", flush=True)
        everything += rows
        if args.json:  # after each shape, so that an interrupted run leaves its rows
            args.json.write_text(json.dumps({**header, "rows": list(map(asdict, everything))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
