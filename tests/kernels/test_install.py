"""The packages installed as users install them, each time into an environment of its own, and what they say of it.

Every installation is from a copy of the package's folder alone, as a checkout without symbolic links has it.
"""

import filecmp
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch
from running import ROOT, run_command

PACKAGE = ROOT / "kernels/selective_scan"
# Each prints the backends of a package whose operator it has compared with plain PyTorch.
SCAN = """
import torch, selective_scan
u, B = torch.rand(2, 5, 49), torch.rand(2, 1, 49)
A, dt, h = -torch.rand(5, 1), torch.nn.functional.softplus(u), torch.zeros(2, 5, 1)
states = [h := torch.exp(dt[..., t, None] * A) * h + dt[..., t, None] * B[:, None, :, t] * u[..., t, None]
          for t in range(49)]
ours = selective_scan.selective_scan_state(u, u, A, B, delta_softplus=True)
torch.testing.assert_close(ours, torch.stack(states, -1))
def leaf(*shape):
    return torch.rand(*shape, dtype=torch.float64, requires_grad=True)
scan = leaf(1, 2, 3), leaf(1, 2, 3), (-leaf(2, 1)).detach().requires_grad_(), leaf(1, 1, 3), leaf(2)
assert torch.autograd.gradcheck(selective_scan.selective_scan_state, scan)
assert torch.autograd.gradcheck(selective_scan.norm_gate, (leaf(1, 4, 2, 1), leaf(1, 2, 1, 4), leaf(4), leaf(4)))
for name, state in selective_scan.backends(u).items():
    print(f"{name}: {state}")
"""
FUSION = """
import torch, dwconv2d
from torch.nn.functional import conv2d, pad
h, x, C, D = torch.rand(2, 5, 9, 7), torch.rand(2, 5, 9, 7), torch.rand(2, 1, 9, 7), torch.rand(5)
weights, alpha = [torch.rand(5, 1, 3, 3) for _ in range(3)], torch.rand(3)
fused = sum(a * conv2d(pad(h, (k,) * 4, mode="replicate"), w, dilation=k, groups=5)
            for a, w, k in zip(alpha, weights, (1, 3, 5)))
ours = dwconv2d.state_fusion_output(h, *weights, alpha, C, D, x)
torch.testing.assert_close(ours, fused * C + D[:, None, None] * x)
def leaf(*shape):
    return torch.rand(*shape, dtype=torch.float64, requires_grad=True)
plane, kernel = (1, 2, 2, 3), (2, 1, 3, 3)
fusion = leaf(*plane), leaf(*kernel), leaf(*kernel), leaf(*kernel), leaf(3), leaf(1, 1, 2, 3), leaf(2), leaf(*plane)
assert torch.autograd.gradcheck(dwconv2d.state_fusion_output, fusion)
tokens = leaf(1, 2, 3, 2), leaf(*kernel), leaf(2)
assert torch.autograd.gradcheck(dwconv2d.depthwise_silu, tokens)
norm = *tokens, leaf(2), leaf(2), 1e-2, leaf(1, 2, 3, 2), torch.rand(1, dtype=torch.float64)
assert torch.autograd.gradcheck(dwconv2d.depthwise_residual_norm, norm)
assert torch.autograd.gradcheck(dwconv2d.mlp, (leaf(3, 2), leaf(5, 2), leaf(5), leaf(2, 5), leaf(2)))
for name, state in dwconv2d.backends(h).items():
    print(f"{name}: {state}")
"""
SCRIPTS = {"selective_scan": SCAN, "dwconv2d": FUSION}
# Written once, in selective_scan, and the same in dwconv2d, so that each folder stands alone.
SHARED = [
    "setup.py",
    "MANIFEST.in",
    "selective_scan/__main__.py",
    "selective_scan/launching.py",
    "selective_scan/loading.py",
    "csrc/autograd.h",
    "csrc/cpu/host.h",
    "csrc/cpu/simd.h",
    "csrc/cuda/device.cuh",
    "csrc/cuda/elements.cuh",
    "csrc/cuda/launch.cuh",
    "csrc/cuda/types.h",
]
# In place of c++: compiles without optimising, which takes a tenth of the time, and what was compiled before in this
# session, from the same sources by the same command, is copied. All other tests run what `make install` has optimised.
COMPILER = """
import hashlib, os, pathlib, shutil, subprocess, sys
command = [{compiler!r}, *("-O0" if argument == "-O3" else argument for argument in sys.argv[1:])]
if "-c" not in command:
    os.execvp(command[0], command)
target = command.index("-o") + 1
texts = [path.read_text() for path in sorted(pathlib.Path("csrc").rglob("*.*"))]
key = "\\0".join([*command[:target], *command[target + 1 :], *texts])
kept = pathlib.Path({folder!r}, hashlib.sha256(key.encode()).hexdigest())
if not kept.exists():
    subprocess.run(command, check=True)
    shutil.copy(command[target], f"{{kept}}.{{os.getpid()}}")
    os.replace(f"{{kept}}.{{os.getpid()}}", kept)
shutil.copy(kept, command[target])
"""
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")


@pytest.fixture
def package() -> str:
    return "selective_scan"


@pytest.fixture
def source(tmp_path, package) -> Path:
    """The package's folder alone, as it is in a checkout on a system without links: nothing built."""
    ignored = shutil.ignore_patterns("*.so", "_not_compiled.txt", "build*", "*.egg-info", "__pycache__")
    copy = tmp_path / "checkout" / package
    shutil.copytree(ROOT / "kernels" / package, copy, symlinks=True, ignore=ignored)
    for link in (path for path in copy.rglob("*") if path.is_symlink()):
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)  # as git does
    return copy


VARIABLES = ("CUDA_HOME", "CUDA_PATH", "CXX", "FORCE_CUDA", "FORCE_ONLY_CPU", "TORCH_CUDA_ARCH_LIST")
both_packages = pytest.mark.parametrize(
    "package",
    ["selective_scan", pytest.param("dwconv2d", marks=pytest.mark.long)],  # which are built alike
)


class Environment:
    """A new virtual environment in which PyTorch is installed, which is ours, and nothing else."""

    def __init__(self, folder: Path, compiler: str, empty: Path, torch: bool = True, system: bool = False):
        shutil.copytree(empty, folder, symlinks=True)
        if system:
            config = folder / "pyvenv.cfg"
            config.write_text(config.read_text().replace("site-packages = false", "site-packages = true"))
        self.python, self.compiler = folder / "bin/python", compiler
        if not torch:
            return
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "torch.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read: not editable

    def run(self, *arguments, cwd, path=os.environ["PATH"], **environment) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | environment
        environment |= {"PATH": f"{self.python.parent}{os.pathsep}{path}", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [self.python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200
        )

    def install(self, source: Path, *options: str, **environment) -> subprocess.CompletedProcess:
        """What the README says: `pip install .` in the folder."""
        environment = {"CXX": self.compiler, **environment}
        return self.run("-m", "pip", "install", *(options or "."), "--no-deps", cwd=source, **environment)

    def try_out(self, folder: Path, package: str = "selective_scan") -> tuple[dict[str, str], str]:
        """The backends that a script finds which compares an operator with plain PyTorch, and its warnings."""
        done = self.run("-c", SCRIPTS[package], cwd=folder)
        assert done.returncode == 0, done.stderr
        return dict(line.split(": ", 1) for line in done.stdout.splitlines()), done.stderr


@pytest.fixture(scope="session")
def compiler(tmp_path_factory) -> str:
    """What CXX is to be, so that the installations of a session compile each source once."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"
    folder.mkdir(exist_ok=True)
    script = folder / f"compiler_{os.getpid()}.py"
    script.write_text(COMPILER.format(compiler=shutil.which("c++") or shutil.which("g++"), folder=str(folder)))
    return f"{sys.executable} {script}"


@pytest.fixture(scope="session")
def empty(tmp_path_factory) -> Path:
    """A virtual environment with pip alone, to copy: that is quicker than to make one."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def environment(tmp_path, compiler, empty) -> Environment:
    return Environment(tmp_path / "venv", compiler, empty)


# ----- the three situations


@needs_nvcc
@pytest.mark.long
@pytest.mark.parametrize("package", list(SCRIPTS))
def test_with_nvcc(environment, source, tmp_path, package):
    done = environment.install(source, TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 0, done.stdout + done.stderr
    found, warnings = environment.try_out(tmp_path, package)
    assert found["cpu"].startswith("available")
    assert found["cuda"] == "compiled, but no GPU is found"
    assert found["selected"] == "cpu"
    assert "slowly" not in warnings


@both_packages
def test_without_a_gpu(environment, source, tmp_path, package):
    """Whether there is an nvcc or not."""
    done = environment.install(source)
    assert done.returncode == 0, done.stdout + done.stderr
    found, warnings = environment.try_out(tmp_path, package)
    assert found["cpu"].startswith("available")
    assert found["cuda"].startswith("not compiled (PyTorch sees no GPU, and neither FORCE_CUDA=1 nor")
    assert "pip install --force-reinstall" in found["cuda"]
    assert found["selected"] == "cpu"
    assert "slowly" not in warnings


@both_packages
def test_without_a_compiler(environment, source, tmp_path, package):
    """Installs, and says so: when it is used, in `backends()`, and in the log of a verbose installation.

    What `build/` has for another PyTorch, whose advice is to install again, is not installed once more.
    """
    stale = source / "build" / f"lib.linux-{platform.machine()}-cpython-{sys.version_info[0]}{sys.version_info[1]}"
    (stale / package).mkdir(parents=True)
    (stale / package / "_C_torch1_0.so").write_bytes(b"")
    done = environment.run("-m", "pip", "install", "-v", "--no-deps", ".", cwd=source, path="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: compiles no kernels for cpu: they need a C++ compiler" in done.stdout + done.stderr
    found, warnings = environment.try_out(tmp_path, package)
    assert found["cpu"].startswith("not compiled (they need a C++ compiler): pip install")
    assert found["selected"] == "reference"
    assert warnings.count("plain PyTorch, slowly, on cpu") == 1


def test_without_pytorch(source, tmp_path, compiler, empty):
    """Whatever builds a wheel or an archive of the source need not have PyTorch."""
    environment = Environment(tmp_path / "venv", compiler, empty, torch=False)
    done = environment.install(source)
    assert done.returncode == 0, done.stdout + done.stderr
    environment.run("-m", "pip", "install", "--upgrade", "setuptools", cwd=tmp_path)
    done = environment.run("setup.py", "sdist", cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as content:
        assert any(name.endswith("csrc/cpu/simd.h") for name in content.getnames())


@pytest.mark.parametrize("file", SHARED)
def test_what_both_packages_have_is_the_same(file):
    ours = ROOT / "kernels/selective_scan" / file
    copy = ROOT / "kernels/dwconv2d" / file.replace("selective_scan", "dwconv2d")
    assert not copy.is_symlink()
    assert filecmp.cmp(ours, copy, shallow=False), f"edit the first, then cp {ours} {copy}"


def test_no_link_is_needed():
    """`git -c core.symlinks=false clone`, which is what Windows does, has all there is."""
    folders = [ROOT / name for name in ("classification", "detection", "kernels", "segmentation", "tests")]
    links = [
        path for folder in folders for path in folder.rglob("*") if path.is_symlink() and ".venv" not in path.parts
    ]
    assert not links


# ----- other ways in


def test_setup_py_install_user(tmp_path, source, compiler, empty):
    environment = Environment(tmp_path / "venv", compiler, empty, system=True)
    base = {"PYTHONUSERBASE": str(tmp_path / "user")}
    done = environment.run("setup.py", "install", "--user", cwd=source, CXX=compiler, **base)
    assert done.returncode == 0, done.stdout + done.stderr
    done = environment.run("-c", SCAN, cwd=tmp_path, **base)
    assert done.returncode == 0, done.stderr
    assert "cpu: available" in done.stdout
    assert "cuda: not compiled (PyTorch sees no GPU" in done.stdout
    assert list((tmp_path / "user").rglob("_C_torch*.so"))


def test_editable_install_without_build_isolation(environment, source, tmp_path):
    """For those who build against a PyTorch that is not in the environment by pip's lights."""
    environment.run("-m", "pip", "install", "--upgrade", "setuptools", cwd=tmp_path)
    done = environment.install(source, "--no-build-isolation", "-e", ".", FORCE_ONLY_CPU="1")
    assert done.returncode == 0, done.stdout + done.stderr
    found, _ = environment.try_out(tmp_path)
    assert found["selected"] == "cpu"
    assert found["cuda"].startswith("not compiled (FORCE_ONLY_CPU is set)")


# ----- what is compiled, decided with compilers and a PyTorch that only pretend

PYTORCH = """
__version__ = {version!r}
compiled_with_cxx11_abi = lambda: True
class version:
    cuda = {cuda!r}
class cuda:
    device_count = lambda: {count}
    get_device_capability = {gpus!r}.__getitem__
"""
NVCC = """#!/bin/sh
case "$1" in
--version) echo 'Cuda compilation tools, release {release}, V{release}.1' ;;
-v) echo '#$ TOP={top}' >&2 ;;
--list-gpu-arch) printf 'compute_%s\\n' 75 80 86 87 89 90 100 103 110 120 121 ;;
*) echo "$@" >>{log} ; while [ "$1" != -o ]; do shift; done; touch "$2" ;;
esac
"""
CC = """#!/bin/sh
while [ "$1" != -o ]; do shift; done; touch "$2"
"""
AMPERE, HOPPER, UNKNOWN, VOLTA = (8, 6), (9, 0), (13, 5), (7, 0)
SEES_NONE = "PyTorch sees no GPU"
ALL = {"75": "sm_75", "80": "sm_80", "86": "sm_86", "89": "sm_89", "90": "sm_90", "100": "sm_100"}


@pytest.fixture
def decide(source, tmp_path):
    """Builds with a PyTorch that sees `gpus`, and an nvcc of CUDA `release`, or a broken or no one.

    Returns how the build ended, the architectures it compiled CUDA sources for and what it noted as not compiled.
    """

    def run(gpus=(), torch="2.11.0", torch_cuda="13.0", release="13.0", **environment):
        toolkit, fake = tmp_path / "cuda", tmp_path / "fake"
        for folder in (toolkit / "bin", fake / "torch"):
            folder.mkdir(parents=True)
        module = PYTORCH.format(version=torch, cuda=torch_cuda, gpus=list(gpus), count=len(gpus))
        (fake / "torch/__init__.py").write_text(module)
        nvcc = NVCC.format(release=release, top=toolkit, log=tmp_path / "log")
        for tool, text in ((toolkit / "bin/nvcc", nvcc if release != "broken" else "no program"), (fake / "cc", CC)):
            tool.write_text(text)
            tool.chmod(0o755 if release else 0o644)
        (fake / "cc").chmod(0o755)
        variables = {"CUDA_HOME": str(toolkit), "CXX": str(fake / "cc"), "PYTHONPATH": str(fake), **environment}
        environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | variables
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
        found = dict(re.findall(r"arch=compute_(\w+),code=(\S+)", log))
        note = source / "lib/selective_scan/_not_compiled.txt"
        return done, found, note.read_text() if note.exists() else ""

    return run


@pytest.mark.parametrize(
    ("situation", "architectures"),
    [
        (dict(gpus=[AMPERE]), {"86": "[sm_86,compute_86]"}),
        (dict(gpus=[HOPPER, AMPERE, HOPPER]), {"86": "sm_86", "90": "[sm_90,compute_90]"}),
        (dict(gpus=[UNKNOWN]), {"121": "[sm_121,compute_121]"}),
        (dict(gpus=[AMPERE], TORCH_CUDA_ARCH_LIST="8.0;9.0a"), {"80": "sm_80", "90a": "sm_90a"}),
        (dict(TORCH_CUDA_ARCH_LIST="9.0+PTX"), {"90": "[sm_90,compute_90]"}),
        (dict(FORCE_CUDA="1"), {**ALL, "120": "[sm_120,compute_120]"}),
        (dict(gpus=[AMPERE], FORCE_CUDA="1"), {"86": "[sm_86,compute_86]"}),
        (dict(gpus=[AMPERE], torch_cuda="13.2"), {"86": "[sm_86,compute_86]"}),
    ],
    ids=str,
)
def test_cuda_kernels_are_for_the_gpus_there_are(decide, situation, architectures):
    done, found, noted = decide(**situation)
    assert done.returncode == 0, done.stderr
    assert found == architectures
    assert noted == ""
    assert "warning: compiles no" not in done.stderr


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (dict(), SEES_NONE),
        (dict(FORCE_CUDA="0"), SEES_NONE),
        (dict(release="broken"), SEES_NONE),
        (dict(gpus=[AMPERE], FORCE_ONLY_CPU="1"), "FORCE_ONLY_CPU is set"),
        (dict(TORCH_CUDA_ARCH_LIST="9.0", FORCE_ONLY_CPU="1"), "FORCE_ONLY_CPU is set"),
        (dict(gpus=[VOLTA]), "knows none of the GPUs here, of compute capability [[7, 0]]"),
        (dict(gpus=[AMPERE], torch_cuda=None), "PyTorch is built without CUDA"),
        (dict(gpus=[AMPERE], release="12.4"), "bin/nvcc is of CUDA 12, and PyTorch of CUDA 13.0"),
        (dict(gpus=[AMPERE], release="broken"), "bin/nvcc --version does not work"),
        (dict(gpus=[AMPERE], release=None), "which CUDA_HOME names, has no bin/nvcc"),
    ],
    ids=str,
)
def test_without_cuda_kernels_unless_asked_for(decide, situation, reason):
    """A warning and a note with the reason; an error where CUDA kernels were asked for and cannot be had."""
    done, found, noted = decide(**situation)
    assert done.returncode == 0, done.stderr
    assert not found
    assert noted.startswith("cuda: ")
    assert reason in noted
    assert done.stderr.count("warning: compiles no kernels for cuda: ") == 1
    assert reason in done.stderr


@pytest.mark.parametrize("asked", [dict(FORCE_CUDA="1"), dict(TORCH_CUDA_ARCH_LIST="9.0")], ids=str)
@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (dict(torch_cuda=None), "PyTorch is built without CUDA"),
        (dict(gpus=[AMPERE], release="11.8"), "bin/nvcc is of CUDA 11, and PyTorch of CUDA 13.0"),
        (dict(release="broken"), "bin/nvcc --version does not work"),
        (dict(release=None), "which CUDA_HOME names, has no bin/nvcc"),
        (dict(CUDA_HOME="", CUDA_PATH="/nonexistent"), "/nonexistent, which CUDA_HOME names, has no bin/nvcc"),
    ],
    ids=str,
)
def test_cuda_kernels_that_are_asked_for_and_cannot_be_had_are_an_error(decide, situation, reason, asked):
    done, found, _ = decide(**situation, **asked)
    assert done.returncode != 0
    assert not found
    (variable,) = asked
    assert re.search(rf"selective_scan: {variable} asks for CUDA kernels, but .*{reason}", done.stderr)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict(CXX="no-such-compiler"), "no-such-compiler"),
        (dict(TORCH_CUDA_ARCH_LIST="Hopper"), "TORCH_CUDA_ARCH_LIST must be like '8.0;9.0+PTX', but has 'Hopper'"),
    ],
    ids=str,
)
def test_variables_that_make_no_sense(decide, variables, message):
    done, _, _ = decide(**variables)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_pytorch_that_is_too_old(decide, tmp_path):
    done, _, _ = decide(torch="2.3.1")
    assert done.returncode != 0
    assert "selective_scan: needs PyTorch 2.4 or newer, but 2.3.1 is installed" in done.stderr
    script = "import torch; torch.__version__ = '2.3.1'; import selective_scan"
    done = run_command(sys.executable, "-c", script, cwd=tmp_path)
    assert "ImportError: selective_scan needs PyTorch 2.4 or newer, this is 2.3.1" in done.stderr


# ----- broken builds


def test_source_that_does_not_compile_is_an_error(environment, source, tmp_path):
    for file in (source / "csrc").rglob("*.c*"):
        file.unlink()  # what would compile
    (source / "csrc/cpu/scan.cpp").write_text("#error broken on purpose\n")
    done = environment.install(source, CXX="c++")
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr
    assert environment.run("-c", "import selective_scan", cwd=tmp_path).returncode != 0


def loaded(tmp_path, library: str, content: bytes) -> str:
    """What `import selective_scan` says when this is its compiled library."""
    folder = tmp_path / "selective_scan"
    shutil.copytree(PACKAGE / "selective_scan", folder, ignore=shutil.ignore_patterns("*.so", "*.txt"))
    (folder / library).write_bytes(content)
    done = run_command(sys.executable, "-c", "import selective_scan", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    return done.stderr


def test_library_for_another_pytorch_is_an_error(tmp_path):
    said = loaded(tmp_path, "_C_torch1_0.so", b"")
    assert "ImportError: selective_scan has _C_torch1_0.so" in said
    assert f"this is torch {torch.__version__}" in said
    assert "pip install --force-reinstall" in said


def test_library_that_does_not_load_is_an_error(tmp_path):
    name = "_C_torch{}_{}.so".format(*torch.__version__.split(".")[:2])
    said = loaded(tmp_path, name, b"not a library")
    assert re.search(rf"ImportError: .*{name} does not load", said)
    assert "pip install --force-reinstall" in said


# ----- what it says of itself


def test_module_prints_the_backends(tmp_path):
    done = run_command(sys.executable, "-m", "selective_scan", cwd=tmp_path)
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["cpu", "cuda", "triton", "reference"]


def test_backends_of_a_device_without_kernels():
    from selective_scan import backends

    assert backends(torch.empty(1, device="meta"))["selected"] == "reference"


# What the operators refuse and how PyTorch sees them is the same on any processor.
NOT_OF_KERNELS = "bad_input or arguments or devices or fit or refused or module or backends"
NOT_OF_KERNELS += " or autocast or compile or opcheck or meta or export"


@pytest.mark.parametrize("capability", ["avx2", pytest.param("default", marks=pytest.mark.long)])
def test_other_instruction_sets(capability):
    """The comparisons with float64 again, as on a lesser processor; PyTorch chooses once, when it is imported."""
    if capability.upper() == torch.backends.cpu.get_cpu_capability():
        pytest.skip("this processor's own")
    done = run_command(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--random-cases=24"),
        *("tests/kernels/test_selective_scan.py", "tests/kernels/test_dwconv2d.py"),
        *("-k", f"cpu and not ({NOT_OF_KERNELS})"),
        cwd=ROOT,
        ATEN_CPU_CAPABILITY=capability,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d\d+ passed", done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
@pytest.mark.parametrize(
    ("fence", "capability"),
    [
        ("end", None),
        ("end", "avx2"),
        pytest.param("start", None, marks=pytest.mark.long),
        pytest.param("end", "default", marks=pytest.mark.long),
    ],
)
def test_no_kernel_reaches_beyond_its_tensors(fence, capability, tmp_path):
    """The random and the wide comparisons again, each tensor next to memory that may not be touched."""
    library = tmp_path / "fenced_memory.so"
    source = Path(__file__).with_name("fenced_memory.c")
    subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", source, "-o", library, "-ldl"], check=True)
    done = run_command(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--random-cases=24"),
        *("tests/kernels/test_selective_scan.py", "tests/kernels/test_dwconv2d.py"),
        *("-k", "cpu and (wide or random)"),
        cwd=ROOT,
        LD_PRELOAD=library,
        FENCE=fence,
        **({"ATEN_CPU_CAPABILITY": capability} if capability else {}),
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d\d+ passed", done.stdout)


def test_benchmark(tmp_path):
    """The README's command on a small shape; every backend is timed, which means that it agrees with float64."""
    out = tmp_path / "rows.json"
    arguments = (
        "--device=cpu",
        "--shapes",
        "T/7 batch 1",
        "--dtypes",
        "float32",
        "bfloat16",
        "--threads",
        1,
        "--json",
        out,
    )
    done = run_command(sys.executable, "kernels/benchmark.py", *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "NOT TIMED" not in done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {(r["op"], r["backend"], r["direction"], r["dtype"]) for r in rows} == {
        (op, backend, direction, dtype)
        for op in ("scan", "fusion", "dwconv")
        for backend in ("cpu", "reference", "naive")
        for direction in ("forward", "backward")
        for dtype in ("float32", "bfloat16")
    }
    assert all(r["milliseconds"] > 0 and r["times_naive"] > 0 for r in rows)


def test_benchmark_does_not_time_what_is_wrong(tmp_path):
    script = (ROOT / "kernels/benchmark.py").read_text()
    found = 'found["naive"] = (self.naive, '
    assert found in script
    wrong = script.replace(found, 'found["naive"] = (lambda **k: 1.0001 * self.naive(**k), ')
    (tmp_path / "benchmark.py").write_text(wrong)
    done = run_command(
        sys.executable, "benchmark.py", "--ops", "scan", "--shapes", "T/7 batch 1", "--backends", "naive", cwd=tmp_path
    )
    assert "NOT TIMED: scan T/7 batch 1 float32 naive disagrees with float64 in value" in done.stderr
    assert "| naive |" not in done.stdout
