"""Compiles the CUDA sources of a kernel package with nvcc and prints the resources of each kernel, without a GPU.

    python kernels/inspect_cuda.py selective_scan                   every architecture that setup.py builds for
    python kernels/inspect_cuda.py dwconv2d --arch 9.0 --names 'BFloat16'

A line is for one kernel and architecture. It has registers, spilled bytes and SASS instructions, where a loop counts
once. Kernels that are templates of a number of items also have instructions per item. A compiler warning is an error
with exit status 1. The script disassembles with cuobjdump from PATH, or with the one that comes with Triton.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
TILE = 7 * 7
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)", re.MULTILINE)


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def cuobjdump() -> str | Path | None:
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return shutil.which("cuobjdump") or (bundled if bundled and bundled.exists() else None)


def inspect(source: Path, arch: str, folder: Path) -> Iterator[tuple[str, int, int, int | None]]:
    """Mangled name, registers, bytes spilled and instructions of each kernel."""
    number = arch.replace(".", "")
    binary = folder / f"{source.stem}.{number}.cubin"
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Werror=all-warnings"]
    report = run("nvcc", *flags, f"-arch=sm_{number}", "-cubin", source, "-o", binary)
    tool, counts = cuobjdump(), {}
    if tool:
        for part in run(tool, "--dump-sass", binary).split("Function : ")[1:]:
            counts[part.split()[0]] = len(INSTRUCTION.findall(part))
    for found in RESOURCES.finditer(report):
        spilled = int(found["stores"]) + int(found["loads"])
        yield found["name"], int(found["registers"]), spilled, counts.get(found["name"])


def demangle(names: list[str]) -> list[str]:
    """Demangle names and remove namespaces and arguments. Without c++filt, names stay as they are."""
    if not names or not shutil.which("c++filt"):
        return names
    plain = run("c++filt", *names).splitlines()
    return [re.sub(r"^void |\b\w+::|\((?!int|bool)[^()]*\)$|\((int|bool)\)", "", name) for name in plain]


def items_of(name: str) -> int | None:
    """Items that a thread computes: pixels of a tile, or tokens, the first number of the scan's template arguments."""
    if name.startswith("tiled_"):
        return TILE
    numbers = re.search(r"scan_\w+<.*?\b(\d+)\b", name)
    return int(numbers[1]) if numbers else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=sorted(p.parents[1].name for p in HERE.glob("*/csrc/cuda")))
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="such as 9.0")
    parser.add_argument("--names", default="", help="only kernels whose name contains this")
    args = parser.parse_args()
    sources = sorted((HERE / args.package / "csrc" / "cuda").glob("*.cu"))
    jobs = [(source, arch) for arch in args.arch for source in sources]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: list(inspect(*job, Path(folder))), jobs))
    print("| architecture | kernel | registers | bytes spilled | instructions | per item |\n|---|---|---|---|---|---|")
    for (_, arch), rows in zip(jobs, results, strict=True):
        for name, (_, registers, spilled, count) in zip(demangle([row[0] for row in rows]), rows, strict=True):
            items = items_of(name)
            each = f"{count / items:.0f}" if items and count else ""
            if args.names in name:
                print(f"| {arch} | {name} | {registers} | {spilled} | {count or ''} | {each} |")


if __name__ == "__main__":
    main()
