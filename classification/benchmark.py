"""Times Spatial-Mamba beside other backbones of its size, and its training step beside plain PyTorch.

    python -m classification.benchmark                     inference, batches of 1 and 8, on the GPU if there is one
    python -m classification.benchmark --train             a training step with and without this repository's kernels

Inference takes the models in turn, so that a machine whose speed drifts slows all of them, and prints medians. Training
steps run in a process each, whose peak memory is printed; both make the same steps from the same seed.
"""

import argparse
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import nn

from classification.memory import keep_freed_memory
from classification.models import VARIANTS, SpatialMamba, linear, spatialmamba

SPATIAL_MAMBA = "spatialmamba_tiny"
OTHERS = ("convnext_tiny", "swin_tiny_patch4_window7_224", "mambaout_tiny")
STEPS = 4  # timed ones, after one that is not
MIB = 2**20


def build(name: str, size: int) -> nn.Module:
    if name in VARIANTS:
        return SpatialMamba(**VARIANTS[name])
    return timm.create_model(name, **({"img_size": size} if name.startswith("swin") else {}))


def seconds_of(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, getattr(torch, args.dtype), enabled=args.dtype != "float32")


# ----- inference


def time_inference(args: argparse.Namespace) -> None:
    models = {name: build(name, args.size).to(args.device).eval() for name in (args.model, *OTHERS)}
    print("| model | " + " | ".join(f"ms per image, batch {batch}" for batch in args.batch) + " |")
    print("|---|" + "---|" * len(args.batch))
    medians = {name: [] for name in models}
    for batch in args.batch:
        images = torch.randn(batch, 3, args.size, args.size, device=args.device)
        times = {name: [] for name in models}
        with torch.inference_mode(), autocast(args):
            for _ in range(args.rounds + 1):
                for name, model in models.items():
                    times[name].append(seconds_of(lambda m=model, x=images: m(x), args.device))
        for name, seconds in times.items():
            medians[name].append(1e3 * statistics.median(seconds[1:]) / batch)
    for name, values in medians.items():
        print(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in values) + " |")


# ----- training


def use_plain_pytorch(device: str) -> None:
    """The operators by their packages' plain PyTorch, linear layers and convolutions by PyTorch's own, from now on."""
    for package in ("selective_scan", "dwconv2d"):
        loading, plain = (importlib.import_module(f"{package}.{module}") for module in ("loading", "reference"))
        library = torch.library.Library(package, "IMPL")
        for name in loading.OPERATORS:
            library.impl(name, loading.without_autocast(getattr(plain, name)), device.upper(), allow_override=True)
        _KEPT.append(library)  # what it registers ends with it
    linear.ONEDNN = False
    spatialmamba.DepthwiseConv3x3.forward = lambda self, x: F.conv2d(
        x, self.weight, self.bias, padding=1, groups=x.shape[1]
    )


_KEPT = []


def train(args: argparse.Namespace) -> dict[str, float | list[float]]:
    """Steps of AdamW on random images and labels: their losses, the median time, and the process's peak memory."""
    if args.device == "cpu" and not args.plain:
        keep_freed_memory()  # as main.py does
    torch.manual_seed(0)
    model = build(args.model, args.size).to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not args.plain)  # fused as in optim.py
    images = torch.randn(args.batch[0], 3, args.size, args.size, device=args.device)
    labels = torch.randint(1000, (args.batch[0],), device=args.device)
    losses, times = [], []

    def step() -> None:
        with autocast(args):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    for _ in range(STEPS + 1):
        times.append(seconds_of(step, args.device))
    on_gpu = args.device == "cuda"
    unit = 1 if sys.platform == "darwin" else 1024  # of what getrusage says
    peak = torch.cuda.max_memory_allocated() if on_gpu else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"losses": losses, "milliseconds": 1e3 * statistics.median(times[1:]), "peak": peak}


def compare_training(args: argparse.Namespace) -> None:
    print("| kernels | loss of each step | ms per step | peak memory, MiB |\n|---|---|---|---|")
    results = []
    for plain in ("", "--plain"):
        command = [sys.executable, "-m", "classification.benchmark", "--train", "--one", *sys.argv[1:], plain]
        done = subprocess.run([a for a in command if a], stdout=subprocess.PIPE, check=True, text=True)
        results.append(json.loads(done.stdout))
        found = results[-1]
        losses = " ".join(f"{loss:.6f}" for loss in found["losses"])
        name = "plain PyTorch" if plain else "this repository's"
        print(f"| {name} | {losses} | {found['milliseconds']:.0f} | {found['peak'] / MIB:.0f} |", flush=True)
    ours, plain = results
    print(f"\n{plain['milliseconds'] / ours['milliseconds']:.2f} times as fast as plain PyTorch")


def parse_arguments() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=VARIANTS, default=SPATIAL_MAMBA)
    parser.add_argument("--train", action="store_true", help="training steps instead of inference")
    parser.add_argument("--batch", type=int, nargs="+", help="images at once; 1 and 8, with --train 8")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--rounds", type=int, default=10, help="of inference, after one that is not counted")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of autocast")
    parser.add_argument("--threads", type=int, help="of the CPU; by default as many as PyTorch takes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)  # of one training process
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch = args.batch or ([8] if args.train else [1, 8])
    if args.train and len(args.batch) > 1:
        parser.error("--train takes one --batch")
    return args


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.plain:
        use_plain_pytorch(args.device)
    if args.one:
        print(json.dumps(train(args)))
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {args.size}x{args.size} pixels, {args.dtype}\n")
    if args.train:
        compare_training(args)
    else:
        time_inference(args)


if __name__ == "__main__":
    main()
