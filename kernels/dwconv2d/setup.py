"""Builds csrc/ into one shared library of PyTorch operators, if there are a compiler and an installed PyTorch.

selective_scan and dwconv2d each have a copy of this file; tests/kernels/test_install.py checks that they are equal. The
package's name comes from pyproject.toml.

Without a compiler or PyTorch, the package installs without kernels. With both, a failed build is an error. The CUDA
kernels are built for the GPUs that PyTorch sees, and are left out if it sees none. FORCE_CUDA=1 and
TORCH_CUDA_ARCH_LIST build them with or without a GPU. FORCE_ONLY_CPU=1 leaves them out. The build writes what it leaves
out, and why, to _not_compiled.txt for `backends()`. CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS work as for
PyTorch's own extensions.
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
OLDEST_TORCH = (2, 4)
LAST_OF_CXX17 = (2, 11)  # the headers of 2.14 need C++20
PROBE = """
import json, torch
try:
    gpus = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
except RuntimeError:
    gpus = []  # none that works
print(json.dumps([*torch.__path__, torch.__version__, torch.version.cuda, torch.compiled_with_cxx11_abi(), gpus]))
"""
X86 = platform.machine() in ("x86_64", "AMD64")
VECTORS = {"_avx2": "-mavx2 -mfma", "_avx512": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma"}
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
ARCHITECTURES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def switched_on(variable):
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off")


@functools.cache
def find_torch():
    """Find PyTorch in the environment that pip installs into, even if pip builds in an isolated environment."""
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    probes = (run(sys.executable, "-c", PROBE, env=env) for env in (None, outside))
    found = next((json.loads(p.stdout.splitlines()[-1]) for p in probes if p.returncode == 0), None)
    if found and tuple(map(int, re.findall(r"\d+", found[1])[:2])) < OLDEST_TORCH:
        sys.exit(f"{NAME}: needs PyTorch 2.4 or newer, but {found[1]} is installed: pip install --upgrade torch")
    return found


@functools.cache
def plan_cuda():
    """Return (nvcc, flags for the architectures, None), or (None, [], reason) if no CUDA kernels are to be built."""
    _, _, torch_cuda, _, gpus = find_torch()
    asked = next((name for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST") if switched_on(name)), None)
    if switched_on("FORCE_ONLY_CPU"):
        return None, [], "FORCE_ONLY_CPU is set"
    if not asked and not gpus:
        return None, [], "PyTorch sees no GPU, and neither FORCE_CUDA=1 nor TORCH_CUDA_ARCH_LIST asks for CUDA"
    nvcc, fault = find_nvcc(torch_cuda)
    flags = [] if fault else list(gencode(nvcc, gpus))
    if not fault and not flags:
        fault = f"{nvcc} knows none of the GPUs here, of compute capability {gpus}"
    if fault and asked:
        sys.exit(f"{NAME}: {asked} asks for CUDA kernels, but {fault}; fix that or unset {asked}")
    return (None, [], fault) if fault else (nvcc, flags, None)


def find_nvcc(torch_cuda):
    """Look where PyTorch looks: in CUDA_HOME or CUDA_PATH, or else in PATH, or else in the usual place.

    The nvcc in PATH may be a wrapper. Returns (nvcc, None), or (None, what is wrong).
    """
    if not torch_cuda:
        return None, "PyTorch is built without CUDA"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(Path(home, "bin/nvcc")) if home else shutil.which("nvcc") or shutil.which(USUAL_NVCC)
    if not nvcc:
        return None, f"{home}, which CUDA_HOME names, has no bin/nvcc" if home else "there is no nvcc"
    try:
        version = re.search(r"release (\d+)", run(nvcc, "--version").stdout)
        top = re.search(r"TOP=(.+)", run(nvcc, "-v", "--dryrun", "x.cu").stderr)
    except OSError:
        version = top = None
    if not version or not top:
        return None, f"{nvcc} --version does not work"
    if version[1] != torch_cuda.split(".")[0]:
        return None, (
            f"{nvcc} is of CUDA {version[1]}, and PyTorch of CUDA {torch_cuda}: "
            "set CUDA_HOME to a toolkit of PyTorch's version"
        )
    return Path(top[1], "bin/nvcc").resolve(), None


def gencode(nvcc, gpus):
    """Yield nvcc's flags for TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX".

    Without it, yield flags for the GPUs here, or for ARCHITECTURES if there are none, with PTX of the newest.
    """
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not names:
        known = [divmod(int(n), 10) for n in re.findall(r"compute_(\d+)\s", run(nvcc, "--list-gpu-arch").stdout)]
        # A GPU that nvcc does not know runs code for the newest older architecture that nvcc knows.
        fitting = ([k for k in known if k <= tuple(gpu)] for gpu in gpus)
        chosen = {max(older) for older in fitting if older} if gpus else set(known) & set(ARCHITECTURES)
        names = ["{}.{}".format(*arch) for arch in sorted(chosen)]
        names[-1:] = [f"{name}+PTX" for name in names[-1:]]
    for name in names:
        arch, ptx = name.removesuffix("+PTX").replace(".", ""), name.endswith("+PTX")
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            sys.exit(f"{NAME}: TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', but has {name!r}")
        yield f"-gencode=arch=compute_{arch},code={f'[sm_{arch},compute_{arch}]' if ptx else f'sm_{arch}'}"


class BuildKernels(build_ext):
    def run(self):
        self.cxx = shlex.split(os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "")
        needs = {"Linux": sys.platform == "linux", "a C++ compiler": self.cxx, "an installed PyTorch": find_torch()}
        why = next((f"they need {need}" for need, there in needs.items() if not there), None)
        if why:
            self.extensions = []
        missing = {"cpu": why, "cuda": why or plan_cuda()[2]}
        missing = {part: why for part, why in missing.items() if why}
        for part, why in missing.items():
            print(f"{NAME}: warning: compiles no kernels for {part}: {why}", file=sys.stderr)
        for old in Path(self.build_lib, NAME).glob("_C_torch*.so"):
            old.unlink()  # otherwise the library for another PyTorch would be installed again
        super().run()
        for folder in (Path(self.build_lib, NAME), *([Path(NAME)] if self.inplace else [])):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_not_compiled.txt").write_text("".join(f"{part}: {why}\n" for part, why in missing.items()))

    def get_ext_filename(self, name):
        """Put PyTorch's version into the library's name, so that another PyTorch does not load it."""
        if not find_torch():
            return super().get_ext_filename(name)
        return f"{name.replace('.', '/')}_torch{'_'.join(find_torch()[1].split('.')[:2])}.so"

    def build_extension(self, extension):
        torch, version, _, cxx11_abi, _ = find_torch()
        nvcc, architectures, _ = plan_cuda()
        include, lib = [f"-isystem{torch}/include"], [f"-L{torch}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
        if nvcc:
            lib += ["-ltorch_cuda", "-lc10_cuda", f"-L{nvcc.parents[1]}/lib64", "-lcudart"]
        common = ["-O3", *(["-DKERNELS_X86"] if X86 else [])]
        newer = tuple(map(int, re.findall(r"\d+", version)[:2])) > LAST_OF_CXX17
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={cxx11_abi:d}"
        host = [*self.cxx, *common, f"-std=c++{20 if newer else 17}", "-fPIC", "-fopenmp", "-Wall", abi]
        device = [nvcc, *common, "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", *architectures]
        steps, objects = [], []
        for source in map(Path, extension.sources):
            vectors = next((flags for suffix, flags in VECTORS.items() if source.stem.endswith(suffix)), None)
            if (vectors and not X86) or (source.parent.name == "cuda" and not nvcc):
                continue
            compiler = device if source.suffix == ".cu" else [*host, *include, *(vectors or "").split()]
            if source.parent.name == "cuda" and source.suffix == ".cpp":
                compiler.append(f"-isystem{nvcc.parents[1]}/include")
            objects.append(Path(self.build_temp, source.parent.name, source.name + ".o"))
            steps.append([*compiler, "-c", source, "-o", objects[-1]])
            self.mkpath(str(objects[-1].parent))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            list(pool.map(lambda step: self.spawn(list(map(str, step))), steps))
        target = self.get_ext_fullpath(extension.name)
        self.mkpath(os.path.dirname(target))
        # Link PyTorch's own OpenMP if it brings one, because a second OpenMP would start threads of its own.
        openmp = next(map(str, Path(torch, "lib").glob("libgomp*.so*")), "-fopenmp")
        self.spawn([*self.cxx, "-shared", "-o", target, *map(str, objects), openmp, *lib])


SOURCES = [*Path("csrc").rglob("*.cpp"), *Path("csrc").rglob("*.cu")]
setup(
    ext_modules=[Extension(f"{NAME}._C", sorted(map(str, SOURCES)))],
    cmdclass={"build_ext": BuildKernels},
)
