"""Builds csrc/ into one shared library of PyTorch operators, where there are a PyTorch and a compiler to build with.

Both kernel packages have this file, dwconv2d by a link; the name comes from pyproject.toml.

Without either the package installs all the same, and `selective_scan.backends()` tells what is missing; with both, a
build that fails is an error. CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they mean to PyTorch's own
extensions; FORCE_ONLY_CPU=1 leaves the CUDA part out.
"""

import functools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NAME = re.search(r'^name = "(\w+)"', Path("pyproject.toml").read_text(), re.MULTILINE)[1]
PROBE = """import json, torch
print(json.dumps([*torch.__path__, torch.__version__, torch.version.cuda, torch.compiled_with_cxx11_abi()]))"""
X86 = platform.machine() in ("x86_64", "AMD64")
VECTORS = {"_avx2": "-mavx2 -mfma", "_avx512": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma"}
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


@functools.cache
def find_torch():
    """Of the environment that is installed into, even while pip builds in one that has setuptools alone."""
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    probes = (run(sys.executable, "-c", PROBE, env=env) for env in (None, outside))
    return next((json.loads(p.stdout.splitlines()[-1]) for p in probes if p.returncode == 0), None)


def find_nvcc(torch_cuda):
    """Where PyTorch looks: CUDA_HOME or CUDA_PATH, else PATH, whose nvcc may be a wrapper, else the usual place."""
    if not torch_cuda or os.environ.get("FORCE_ONLY_CPU", "0").lower() not in ("", "0", "false", "no", "off"):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(Path(home, "bin/nvcc")) if home else shutil.which("nvcc")
    if home and not nvcc:
        sys.exit(f"{NAME}: {home}, which CUDA_HOME names, has no bin/nvcc; unset it, or set FORCE_ONLY_CPU=1")
    nvcc = nvcc or shutil.which(USUAL_NVCC)
    if not nvcc:
        return None
    version = re.search(r"release (\d+)", run(nvcc, "--version").stdout)
    top = re.search(r"TOP=(.+)", run(nvcc, "-v", "--dryrun", "x.cu").stderr)
    if not version or not top:
        sys.exit(f"{NAME}: {nvcc} --version does not work; repair it, or set FORCE_ONLY_CPU=1")
    if version[1] != torch_cuda.split(".")[0]:
        sys.exit(
            f"{NAME}: {nvcc} is of CUDA {version[1]}, but PyTorch of CUDA {torch_cuda}: point CUDA_HOME to a toolkit "
            "of PyTorch's version, or set FORCE_ONLY_CPU=1 to install without the CUDA kernels"
        )
    return Path(top[1], "bin/nvcc").resolve()


def gencode(nvcc):
    """TORCH_CUDA_ARCH_LIST, as in "8.0;9.0+PTX"; by default all of ours that nvcc knows, and PTX of the newest."""
    known = run(nvcc, "--list-gpu-arch").stdout.split()
    ours = ";".join(a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known) + "+PTX"
    for name in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or ours):
        arch, ptx = name.removesuffix("+PTX").replace(".", ""), name.endswith("+PTX")
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            sys.exit(f"{NAME}: TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', but has {name!r}")
        yield f"-gencode=arch=compute_{arch},code={f'[sm_{arch},compute_{arch}]' if ptx else f'sm_{arch}'}"


class BuildKernels(build_ext):
    def run(self):
        self.cxx = shlex.split(os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "")
        if sys.platform != "linux" or not self.cxx or not find_torch():
            print(f"{NAME}: compiles no kernels, which takes Linux, a C++ compiler and an installed PyTorch")
            self.extensions = []
        for old in Path(self.build_lib, NAME).glob("_C_torch*.so"):
            old.unlink()  # or one of another PyTorch would be installed again
        super().run()

    def get_ext_filename(self, name):
        """Says which PyTorch it is for, so that another one does not load it."""
        if not find_torch():
            return super().get_ext_filename(name)
        return f"{name.replace('.', '/')}_torch{'_'.join(find_torch()[1].split('.')[:2])}.so"

    def build_extension(self, extension):
        torch, _, torch_cuda, cxx11_abi = find_torch()
        nvcc = find_nvcc(torch_cuda)
        include, lib = [f"-isystem{torch}/include"], [f"-L{torch}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
        if nvcc:
            include += [f"-isystem{nvcc.parents[1]}/include"]
            lib += ["-ltorch_cuda", "-lc10_cuda", f"-L{nvcc.parents[1]}/lib64", "-lcudart"]
        common = ["-O3", "-std=c++17", *(["-DKERNELS_X86"] if X86 else [])]
        host = [*self.cxx, *common, "-fPIC", "-fopenmp", "-Wall", f"-D_GLIBCXX_USE_CXX11_ABI={cxx11_abi:d}"]
        device = [nvcc, *common, "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", *(gencode(nvcc) if nvcc else [])]
        steps, objects = [], []
        for source in map(Path, extension.sources):
            vectors = next((flags for suffix, flags in VECTORS.items() if source.stem.endswith(suffix)), None)
            if (vectors and not X86) or (source.parent.name == "cuda" and not nvcc):
                continue
            compiler = device if source.suffix == ".cu" else [*host, *include, *(vectors or "").split()]
            objects.append(Path(self.build_temp, source.parent.name, source.name + ".o"))
            steps.append([*compiler, "-c", source, "-o", objects[-1]])
            self.mkpath(str(objects[-1].parent))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            list(pool.map(lambda step: self.spawn(list(map(str, step))), steps))
        target = self.get_ext_fullpath(extension.name)
        self.mkpath(os.path.dirname(target))
        # PyTorch's own OpenMP, where it brings one: a second one would have threads of its own.
        openmp = next(map(str, Path(torch, "lib").glob("libgomp*.so*")), "-fopenmp")
        self.spawn([*self.cxx, "-shared", "-o", target, *map(str, objects), openmp, *lib])


SOURCES = [*Path("csrc").glob("*/*.cpp"), *Path("csrc").glob("*/*.cu")]
setup(
    ext_modules=[Extension(f"{NAME}._C", sorted(map(str, SOURCES)))],
    cmdclass={"build_ext": BuildKernels},
)
