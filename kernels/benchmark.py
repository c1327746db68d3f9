"""Times the operators of kernels/ at the shapes they run at, beside plain PyTorch and the bandwidth of a copy.

    python kernels/benchmark.py                                      every shape, on the GPU if there is one
    python kernels/benchmark.py --shapes "T/56 batch 1" --threads 1 --instruction-sets

A row is timed only if value and gradients agree with float64. Its bytes are those that must move, each input read once
and each output written once; "% of copy" is that rate over the rate at which the machine copies, measured in the same
run. The backends are the compiled kernels ("cpu", "cuda"), "triton", "reference" (plain PyTorch, a scan by doubling)
and "loop" (plain PyTorch, one token after the other, gradients by autograd).
"""

import argparse
import datetime
import fnmatch
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from selective_scan import backends, reference
from torch import Tensor
from torch.utils.benchmark import Timer

# The scans of the backbone: channels (twice the features) and tokens of each stage, one state.
LAYERS = {
    **{f"T/{side}": (channels, side**2) for side, channels in ((56, 128), (28, 256), (14, 512), (7, 1024))},
    **{f"B/{side}": (channels, side**2) for side, channels in ((56, 192), (28, 384), (14, 768), (7, 1536))},
}
SHAPES = {f"{name} batch {batch}": (batch, *layer) for batch in (1, 128) for name, layer in LAYERS.items()}
SHAPES |= {"detection 200x320": (1, 128, 200 * 320), "segmentation 128x128": (1, 128, 128 * 128)}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Largest relative L2 errors, those of tests/kernels/conftest.py; results of 16 bits may add 1.2 roundings.
TOLERANCE = {"forward": 1e-6, "backward": 5e-6}
# The loop is the yardstick, no kernel of ours: its decays, rounded next to 1, lose digits that the others keep.
LOOP_TOLERANCE = {"forward": 1e-5, "backward": 5e-5}
INSTRUCTION_SETS = ("avx512", "avx2", "default")

Inputs = dict[str, Tensor | bool]
Results = dict[str, Tensor]


@dataclass
class Row:
    """One line of the table; the ratios are to the backends of that name, None where they were not timed."""

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
    times_loop: float | None = None


# ----- what is timed


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str, channels_last: bool) -> Inputs:
    """As the backbone calls the scan: u, delta and B channels-last, softplus of a biased delta."""
    batch, channels, length = shape
    torch.manual_seed(0)

    def activation(rows: int) -> Tensor:
        if channels_last:
            return torch.randn(batch, length, rows, dtype=dtype, device=device).mT
        return torch.randn(batch, rows, length, dtype=dtype, device=device)

    return dict(
        u=activation(channels) + 1,
        delta=activation(channels),
        A=-torch.rand(channels, 1, device=device),
        B=activation(1) + 1,
        delta_bias=torch.rand(channels, device=device),
        delta_softplus=True,
    )


def loop_forward(u, delta, A, B, delta_bias, delta_softplus) -> Tensor:
    """The recurrence as it is written; `delta_softplus` is True in all that is timed."""
    dt = F.softplus(delta.to(A.dtype) + delta_bias[:, None])
    h, states = torch.zeros_like(dt[:, :, None, 0]), []
    for step, u_t, B_t in zip(dt.unbind(-1), u.to(A.dtype).unbind(-1), B.to(A.dtype).unbind(-1), strict=True):
        h = torch.exp(step[..., None] * A) * h + (step * u_t)[..., None] * B_t[:, None]
        states.append(h)
    return torch.stack(states, dim=-1)


def loop_backward(grad: Tensor, **inputs) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs.values() if isinstance(t, Tensor)]
    return torch.autograd.grad(loop_forward(*leaves, inputs["delta_softplus"]), leaves, grad)


def implementations(device: str) -> dict[str, tuple[Callable, Callable]]:
    """Forward and backward of each backend that runs on `device`."""
    found = {}
    available = backends()
    if available[device].startswith("available"):
        ops = torch.ops.selective_scan
        found[device] = (ops.selective_scan_state, ops.selective_scan_state_backward)
    if device == "cuda" and available["triton"] == "available":
        from selective_scan import triton_kernels

        found["triton"] = (triton_kernels.selective_scan_state, triton_kernels.selective_scan_state_backward)
    found["reference"] = (reference.selective_scan_state, reference.selective_scan_state_backward)
    found["loop"] = (loop_forward, loop_backward)
    return found


# ----- agreement with float64


def ends(inputs: Inputs) -> Inputs:
    """The first and the last image: where the offsets are smallest and largest."""
    batch = len(inputs["u"])
    return {k: v[:: max(batch - 1, 1)] if k in ("u", "delta", "B") else v for k, v in inputs.items()}


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


def verify(forward: Callable, backward: Callable, inputs: Inputs, grad: Tensor, exact: Results) -> str | None:
    """All results for the first and the last image alone, and what belongs to them in the whole batch."""
    few, few_grad = ends(inputs), grad[:: max(len(grad) - 1, 1)]
    tolerance = LOOP_TOLERANCE if forward is loop_forward else TOLERANCE
    wrong = disagreement(evaluate(forward, backward, few, few_grad), exact, tolerance)
    if wrong or len(grad) <= 2:
        return wrong
    whole = evaluate(forward, backward, inputs, grad)
    per_image = ("value", "u", "delta", "B")
    whole = {name: whole[name][:: len(grad) - 1] for name in per_image}
    return disagreement(whole, {name: exact[name] for name in per_image}, tolerance)


# ----- timing


def copy_bandwidth(device: str, threads: int) -> float:
    """Bytes per second, read and written, of copying 256 MiB on a CPU, 1 GiB on a GPU."""
    source = torch.ones(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), threads)


def median_seconds(call: Callable, threads: int) -> float:
    return Timer("call()", globals={"call": call}, num_threads=threads).blocked_autorange(min_run_time=0.3).median


def bytes_per_element(inputs: Inputs, direction: str) -> float:
    """u and delta, their gradients, and the states or their gradient; B, one value for all channels, counts too."""
    activation, state, channels = inputs["u"].element_size(), inputs["A"].element_size(), inputs["u"].shape[1]
    passes = 1 if direction == "forward" else 2
    return passes * (2 * activation + activation / channels) + state


def time_shape(name: str, dtype: str, chosen: list[str], copy: float, args: argparse.Namespace) -> Iterator[Row]:
    inputs = make_inputs(SHAPES[name], DTYPES[dtype], args.device, args.layout == "channels_last")
    few = {k: v.double() if isinstance(v, Tensor) else v for k, v in ends(inputs).items()}
    batch, channels, length = SHAPES[name]
    grad = 1 + torch.randn(batch, channels, 1, length, device=args.device)
    exact_grad = grad[:: max(batch - 1, 1)].double()
    exact = evaluate(reference.selective_scan_state, reference.selective_scan_state_backward, few, exact_grad)
    for backend, (forward, backward) in implementations(args.device).items():
        if backend not in chosen:
            continue
        wrong = verify(forward, backward, inputs, grad, exact)
        if wrong:
            print(f"NOT TIMED: {name} {dtype} {backend} disagrees with float64 in {wrong}", file=sys.stderr)
            continue
        calls = {"forward": lambda f=forward: f(**inputs), "backward": lambda f=backward: f(grad, **inputs)}
        for direction, call in calls.items():
            seconds, size = median_seconds(call, args.threads), bytes_per_element(inputs, direction)
            rate = size * grad.numel() / seconds
            yield Row(
                shape=name,
                dtype=dtype,
                backend=backend,
                direction=direction,
                milliseconds=1e3 * seconds,
                nanoseconds_per_element=1e9 * seconds / grad.numel(),
                bytes_per_element=size,
                gigabytes_per_second=rate / 1e9,
                percent_of_copy=100 * rate / copy,
            )


def add_ratios(rows: list[Row]) -> None:
    times = {(r.shape, r.dtype, r.direction, r.backend): r.milliseconds for r in rows}
    for row in rows:
        for backend in ("reference", "loop"):
            naive = times.get((row.shape, row.dtype, row.direction, backend))
            setattr(row, f"times_{backend}", naive and naive / row.milliseconds)


def time_instruction_set(name: str, dtype: str, isa: str, args: argparse.Namespace) -> list[Row]:
    """The compiled kernels for a lesser processor, in a process of their own, which is when PyTorch chooses."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        command = [sys.executable, __file__, "--device=cpu", "--backends=cpu", f"--json={out}", f"--shapes={name}"]
        command += [f"--dtypes={dtype}", f"--threads={args.threads}", f"--layout={args.layout}"]
        subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": isa}, check=True, stdout=subprocess.DEVNULL)
        return [Row(**{**row, "backend": f"cpu {isa}"}) for row in json.loads(out.read_text())["rows"]]


# ----- output

COLUMNS = (
    "shape",
    "dtype",
    "backend",
    "direction",
    "ms",
    "ns/element",
    "B/element",
    "GB/s",
    "% of copy",
    "x reference",
)
COLUMNS += ("x loop",)


def line(row: Row) -> str:
    ratios = ["" if r is None else f"{r:.1f}" for r in (row.times_reference, row.times_loop)]
    numbers = (row.nanoseconds_per_element, row.bytes_per_element, row.gigabytes_per_second, row.percent_of_copy)
    cells = [row.shape, row.dtype, row.backend, row.direction, f"{row.milliseconds:.3f}"]
    cells += [f"{numbers[0]:.3f}", *(f"{x:.1f}" for x in numbers[1:]), *ratios]
    return "| " + " | ".join(cells) + " |"


def describe(device: str, threads: int) -> dict[str, str | int]:
    cpu = f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "torch": torch.__version__,
        "backends": ", ".join(name for name, state in backends().items() if state.startswith("available")),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", default=["*"], help="patterns, such as 'T/*'")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="float32; on a GPU also bfloat16")
    parser.add_argument("--backends", nargs="+", choices=("cpu", "cuda", "triton", "reference", "loop"))
    parser.add_argument("--layout", choices=("channels_last", "contiguous"), default="channels_last")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--instruction-sets", action="store_true", help="on a CPU, the lesser ones too")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    args = parser.parse_args()
    args.shapes = [name for name in SHAPES if any(fnmatch.fnmatch(name, pattern) for pattern in args.shapes)]
    if not args.shapes:
        parser.error(f"no shape matches; there are {', '.join(SHAPES)}")
    args.dtypes = args.dtypes or (["float32", "bfloat16"] if args.device == "cuda" else ["float32"])
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    header, copy = describe(args.device, args.threads), copy_bandwidth(args.device, args.threads)
    header["copy, GB/s"] = round(copy / 1e9, 1)
    print(*(f"{key}: {value}" for key, value in header.items()), sep="\n")
    print("\n| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    everything = []
    for name in args.shapes:
        for dtype in args.dtypes:
            chosen = args.backends or list(implementations(args.device))
            rows = list(time_shape(name, dtype, chosen, copy, args))
            if args.instruction_sets and args.device == "cpu":
                here = torch.backends.cpu.get_cpu_capability().lower()
                for isa in INSTRUCTION_SETS[INSTRUCTION_SETS.index(here) + 1 :]:
                    rows += time_instruction_set(name, dtype, isa, args)
            add_ratios(rows)
            print(*map(line, rows), sep="\n", flush=True)
            everything += rows
    if args.json:
        args.json.write_text(json.dumps({**header, "rows": list(map(asdict, everything))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
