"""Times Spatial-Mamba beside other backbones of its size, and its training step beside plain PyTorch or beside theirs.

    python -m classification.benchmark                     inference, batches of 1 and 8, on the GPU if there is one
    python -m classification.benchmark --train             a training step with and without this repository's kernels
    python -m classification.benchmark --train --peers     a training step of each backbone
    python -m classification.benchmark --sizes 224 1024    inference of one image of each size, time a pixel and memory
    python -m classification.benchmark --profile           the kernels of one batch on a GPU, the longest first
    python -m classification.benchmark --runtime openvino  inference of exported models, or by onnxruntime, on a CPU

Inference takes the models in turn, so that a machine whose speed drifts slows all of them, and prints medians. Training
steps run in a process each, whose peak memory is printed; each makes the same steps from the same seed. On a GPU a
figure is images per second, and products in float32 use no TF32.
"""

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.errors import prepare_console
from classification.export import export, write_onnx
from classification.memory import keep_freed_memory
from classification.models import VARIANTS, SpatialMamba, optimise_for_cpu, spatialmamba

SPATIAL_MAMBA = "spatialmamba_tiny"
OTHERS = ("convnext_tiny", "swin_tiny_patch4_window7_224", "mambaout_tiny")
UNOPTIMISED = " without optimise_for_cpu"
STEPS = 4
GPU_SECONDS = 0.25
MIB = 2**20


def build(name: str, args: argparse.Namespace) -> nn.Module:
    unoptimised = name.endswith(UNOPTIMISED)
    name = name.removesuffix(UNOPTIMISED)
    if name in VARIANTS:
        model = SpatialMamba(**VARIANTS[name])
    else:
        model = timm.create_model(name, **({"img_size": args.size} if name.startswith("swin") else {}))
    model = model.to(args.device, dtype(args) if args.cast else torch.float32, memory_format=memory_format(args))
    if args.device == "cpu" and name in VARIANTS and not args.plain and not unoptimised:
        optimise_for_cpu(model, prepack_weights=not args.train)
    return torch.compile(model, mode=args.compile) if args.compile else model


def random_images(batch: int, args: argparse.Namespace) -> Tensor:
    images = torch.randn(batch, 3, args.size, args.size, device=args.device)
    return images.to(args.device, dtype(args) if args.cast else torch.float32, memory_format=memory_format(args))


def dtype(args: argparse.Namespace) -> torch.dtype:
    return getattr(torch, args.dtype)


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.preserve_format


def seconds_of(call: Callable[[], object], device: str) -> float:
    """Return the seconds of one call; on a GPU, the mean over a quarter of a second, because launches overlap."""

    def run(calls: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    first = run(1)
    return run(max(1, round(GPU_SECONDS / first))) if device == "cuda" else first


def autocast(args: argparse.Namespace) -> torch.autocast:
    enabled = args.dtype != "float32" and not args.cast
    return torch.autocast(args.device, dtype(args), enabled=enabled)


# ----- inference


def time_inference(args: argparse.Namespace) -> None:
    also = [args.model + UNOPTIMISED] if args.device == "cpu" and args.model in VARIANTS else []
    models = {name: build(name, args).eval() for name in (args.model, *also, *args.beside)}
    compare_inference(models, args)


def compare_inference(models: dict[str, Callable[[Tensor], object]], args: argparse.Namespace) -> None:
    on_gpu = args.device == "cuda"
    unit = "images per second" if on_gpu else "ms per image"
    print("| model | " + " | ".join(f"{unit}, batch {batch}" for batch in args.batch) + " |")
    print("|---|" + "---|" * len(args.batch))
    medians = {name: [] for name in models}
    for batch in args.batch:
        images = random_images(batch, args)
        times = {name: [] for name in models}
        with torch.inference_mode(), autocast(args):
            for _ in range(args.rounds + 1):
                for name, model in models.items():
                    times[name].append(seconds_of(lambda m=model, x=images: m(x), args.device))
        for name, seconds in times.items():
            medians[name].append(statistics.median(seconds[1:]) / batch)
    for name, values in medians.items():
        print(f"| {name} | " + " | ".join(f"{1 / s:.0f}" if on_gpu else f"{1e3 * s:.1f}" for s in values) + " |")


def time_runtime(args: argparse.Namespace) -> None:
    """Time the inference of each model, exported to ONNX, in the runtime `--runtime`."""
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for name in (args.model, *args.beside):
            target = Path(folder, f"{name}.onnx")
            if name in VARIANTS:
                program = export(SpatialMamba(**VARIANTS[name]), args.size)
            else:
                more = {"img_size": args.size} if name.startswith("swin") else {}
                images = torch.zeros(1, 3, args.size, args.size)
                program = torch.export.export(timm.create_model(name, **more).eval(), (images,))
            write_onnx(program, target)
            models[name] = RUNTIMES[args.runtime](target, torch.get_num_threads())
        compare_inference(models, args)


def _onnxruntime(path: Path, threads: int) -> Callable[[Tensor], object]:
    import onnxruntime  # optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def _openvino(path: Path, threads: int) -> Callable[[Tensor], object]:
    import openvino  # optional

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.compile_model(path, "CPU", settings)
    return lambda images: model([images.numpy()])


RUNTIMES = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def infer(args: argparse.Namespace) -> dict[str, float]:
    """Return the median time of inference and the process's peak memory."""
    if args.device == "cpu":
        keep_freed_memory()  # also for the other backbones, which gain as much
    model, images = build(args.model, args).eval(), random_images(args.batch[0], args)
    with torch.inference_mode(), autocast(args):
        times = [seconds_of(lambda: model(images), args.device) for _ in range(args.rounds + 1)]
    return {"milliseconds": 1e3 * statistics.median(times[1:]), "peak": peak_memory(args.device)}


def compare_sizes(args: argparse.Namespace) -> None:
    """Time each model and size in a process of its own, so that each has its own peak memory."""
    print("| pixels of a side | model | ns a pixel | peak memory, MiB | time of the first to its |")
    print("|---|---|---|---|---|")
    for size in args.sizes:
        first = None
        for name in (args.model, *args.beside):
            found = in_a_process("--model", name, "--size", str(size))
            pixel = 1e6 * found["milliseconds"] / args.batch[0] / size**2
            first = first or pixel
            print(f"| {size} | {name} | {pixel:.0f} | {found['peak'] / MIB:.0f} | {first / pixel:.2f} |", flush=True)


# ----- training


def use_plain_pytorch(device: str) -> None:
    """From now on, compute the operators by their packages' plain PyTorch code."""
    for package in ("selective_scan", "dwconv2d"):
        loading = importlib.import_module(f"{package}.loading")
        library = torch.library.Library(package, "IMPL")
        for name, kernels in loading.OPERATORS.items():
            library.impl(name, loading.without_autocast(kernels.plain), device.upper(), allow_override=True)
        _KEPT.append(library)  # its registrations end when the library is deleted
    spatialmamba.has_fused_kernels = lambda x: False


_KEPT = []


def training_step(args: argparse.Namespace) -> tuple[Callable[[], None], list[float | Tensor]]:
    """Return a function that makes one AdamW step on random images and labels, and the list that it adds losses to."""
    torch.manual_seed(0)
    model = build(args.model, args).train()
    if args.grad_checkpointing:
        model.set_grad_checkpointing()  # timm's models have it too
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not args.plain)  # fused as in optim.py
    images = random_images(args.batch[0], args)
    labels = torch.randint(1000, (args.batch[0],), device=args.device)
    losses = []

    def step() -> None:
        with autocast(args):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    return step, losses


def train(args: argparse.Namespace) -> dict[str, float | list[float]]:
    """Return the losses of the first steps, the median time of later steps, and the process's peak memory."""
    if args.device == "cpu" and not args.plain:
        keep_freed_memory()  # as main.py does
    step, losses = training_step(args)
    times = [seconds_of(step, args.device) for _ in range(args.steps + 1)]
    losses = [loss.item() for loss in losses[: args.steps + 1]]
    milliseconds = 1e3 * statistics.median(times[1:])
    return {"losses": losses, "milliseconds": milliseconds, "peak": peak_memory(args.device)}


def peak_memory(device: str) -> int:
    """Return the peak memory in bytes: PyTorch's on a GPU, the process's on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes in getrusage's unit
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_a_process(*arguments: str) -> dict[str, float | list[float]]:
    command = [sys.executable, "-m", "classification.benchmark", *sys.argv[1:], "--one", *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def compare_training(args: argparse.Namespace) -> None:
    runs = {"this repository's": [], "plain PyTorch": ["--plain"]}
    if args.peers:
        runs = {name: ["--model", name] for name in (args.model, *args.beside)}
    print(f"| {'model' if args.peers else 'kernels'} | loss of each step | ms per step | peak memory, MiB |")
    print("|---|---|---|---|")
    milliseconds = []
    for name, arguments in runs.items():
        found = in_a_process(*arguments)
        milliseconds.append(found["milliseconds"])
        losses = " ".join(f"{loss:.6f}" for loss in found["losses"])
        print(f"| {name} | {losses} | {found['milliseconds']:.0f} | {found['peak'] / MIB:.0f} |", flush=True)
    if args.peers:
        rates = (f"{name} {1e3 * args.batch[0] / ms:.4g}" for name, ms in zip(runs, milliseconds, strict=True))
        print(f"\nimages per second: {', '.join(rates)}")
    else:
        print(f"\n{milliseconds[1] / milliseconds[0]:.2f} times as fast as plain PyTorch")


# ----- where the time goes


def profile(args: argparse.Namespace) -> None:
    """Print the time of one batch on a GPU and its kernels, the longest first."""
    if args.train:
        call, _ = training_step(args)
    else:
        model, images = build(args.model, args).eval(), random_images(args.batch[0], args)

        def call() -> None:
            with torch.inference_mode(), autocast(args):
                model(images)

    whole = [seconds_of(call, "cuda") for _ in range(3)][-1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.key_averages() if e.self_device_time_total]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    total, launches = sum(e.self_device_time_total for e in kernels), sum(e.count for e in kernels)
    print(f"{args.model}, batch {args.batch[0]}: {1e3 * whole:.2f} ms")
    print(f"{total / 1e3:.2f} of them in {launches} kernels\n")
    print("| ms | % | launches | kernel |\n|---|---|---|---|")
    for e in kernels[: args.rows]:
        ms = e.self_device_time_total / 1e3
        print(f"| {ms:.3f} | {100e3 * ms / total:.1f} | {e.count} | {e.key[:110]} |")


def positive(text: str) -> int:
    """Read a whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default=SPATIAL_MAMBA, help="one of ours, or of timm's by its name")
    parser.add_argument("--train", action="store_true", help="training steps instead of inference")
    parser.add_argument("--peers", action="store_true", help="with --train: beside the other backbones")
    parser.add_argument("--profile", action="store_true", help="the GPU's kernels, with --train those of a step")
    parser.add_argument("--runtime", choices=RUNTIMES, help="inference of exported models on a CPU, batch 1")
    parser.add_argument("--rows", type=positive, default=40, help="of --profile, at most")
    parser.add_argument("--batch", type=positive, nargs="+", help="images at once; 1 and 8, with --train 8")
    parser.add_argument("--size", type=positive, help="pixels of an image's side; 224 by default")
    parser.add_argument("--sizes", type=positive, nargs="+", metavar="PIXELS", help="inference at each, batch 1")
    parser.add_argument("--steps", type=positive, default=STEPS, help="of --train, after one that is not counted")
    parser.add_argument("--grad-checkpointing", action="store_true", help="of --train: each block is computed twice")
    parser.add_argument("--rounds", type=positive, default=10, help="of inference, after one that is not counted")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of autocast")
    parser.add_argument("--cast", action="store_true", help="model and images in --dtype, without autocast")
    parser.add_argument(
        "--compile", nargs="?", const="default", choices=("default", "reduce-overhead", "max-autotune"),
        help="through torch.compile, in this mode; reduce-overhead replays CUDA graphs",
    )  # fmt: skip
    parser.add_argument("--beside", nargs="*", default=OTHERS, help="timm's names of the other backbones")
    parser.add_argument("--channels-last", action="store_true", help="weights and images laid out as NHWC")
    parser.add_argument("--threads", type=positive, help="of the CPU; by default as many as PyTorch takes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)  # passed to a training process
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch = args.batch or ([8] if args.train or args.profile else [1] if args.runtime or args.sizes else [1, 8])
    if (args.train or args.profile) and len(args.batch) > 1:
        parser.error("--train and --profile take one --batch")
    if args.profile and args.device != "cuda":
        parser.error("--profile needs a GPU")
    if args.runtime and (args.train or args.profile or args.batch != [1] or args.device != "cpu"):
        parser.error("--runtime times inference of one image on --device cpu")
    if args.runtime and (args.dtype != "float32" or args.cast or args.compile or args.channels_last):
        parser.error("--runtime takes no --dtype, --cast, --compile or --channels-last: it runs the model in float32")
    if args.sizes and (args.train or args.profile or args.runtime or len(args.batch) > 1):
        parser.error("--sizes times inference, with one --batch")
    if args.sizes and args.size and not args.one:
        parser.error("--size and --sizes exclude each other")
    if args.device == "cuda" and not gpu:
        parser.error("--device cuda: PyTorch finds no GPU here")
    for name in (args.model, *args.beside):
        if name not in VARIANTS and not timm.is_model(name):
            parser.error(f"{name}: is neither one of ours ({', '.join(VARIANTS)}) nor a model of timm")
    if args.cast and args.dtype == "float32":
        parser.error("--cast goes with --dtype")
    if args.grad_checkpointing and not args.train:
        parser.error("--grad-checkpointing goes with --train")
    if args.peers and not args.train:
        parser.error("--peers goes with --train; inference is always timed beside the other backbones")
    args.size = args.size or 224
    return args


def main() -> None:
    prepare_console()
    args = parse_arguments()
    torch.backends.cudnn.allow_tf32 = False
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.plain:
        use_plain_pytorch(args.device)
    if args.one:
        print(json.dumps(train(args) if args.train else infer(args)))
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    how = [args.dtype, "without autocast" if args.cast else "", f"compiled ({args.compile})" if args.compile else ""]
    how += ["NHWC" if args.channels_last else "", f"by {args.runtime}" if args.runtime else ""]
    how = ["" if args.sizes else f"{args.size}x{args.size} pixels", *how]
    print(f"{where}, torch {torch.__version__}, {', '.join(filter(None, how))}\n")
    if args.profile:
        profile(args)
    elif args.train:
        compare_training(args)
    elif args.runtime:
        time_runtime(args)
    elif args.sizes:
        compare_sizes(args)
    else:
        time_inference(args)


if __name__ == "__main__":
    main()
