"""The package installed as users install it, each time into an environment of its own, and what it says of itself."""

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
leaf = u.clone().requires_grad_()
ours = selective_scan.selective_scan_state(leaf, u, A, B, delta_softplus=True)
ours.sum().backward()
torch.testing.assert_close(ours, torch.stack(states, -1))
assert leaf.grad.isfinite().all()
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
leaf = h.clone().requires_grad_()
ours = dwconv2d.state_fusion_output(leaf, *weights, alpha, C, D, x)
ours.sum().backward()
torch.testing.assert_close(ours, fused * C + D[:, None, None] * x)
assert leaf.grad.isfinite().all()
for name, state in dwconv2d.backends(h).items():
    print(f"{name}: {state}")
"""
SCRIPTS = {"selective_scan": SCAN, "dwconv2d": FUSION}
WITHOUT_NVCC = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")


@pytest.fixture
def package() -> str:
    return "selective_scan"


@pytest.fixture
def source(tmp_path, package) -> Path:
    """A copy of the package's folder as it is in a checkout: nothing built, and links followed."""
    ignored = shutil.ignore_patterns("*.so", "build*", "*.egg-info")
    return Path(shutil.copytree(ROOT / "kernels" / package, tmp_path / "checkout" / package, ignore=ignored))


def hide_nvcc(source: Path) -> str:
    """As on a machine without it: changes the source's setup.py, and returns the PATH to run it with."""
    text = (source / "setup.py").read_text()
    assert '"/usr/local/cuda/bin/nvcc"' in text
    (source / "setup.py").write_text(text.replace('"/usr/local/cuda/bin/nvcc"', '"/nowhere/nvcc"'))
    return WITHOUT_NVCC


both_packages = pytest.mark.parametrize("package", list(SCRIPTS))


class Environment:
    """A new virtual environment in which PyTorch is installed, which is ours, and nothing else."""

    def __init__(self, folder: Path, *options: str, torch: bool = True):
        subprocess.run([sys.executable, "-m", "venv", *options, folder], check=True)
        self.python = folder / "bin/python"
        if not torch:
            return
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "torch.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read: not editable

    def run(self, *arguments, cwd, path=os.environ["PATH"], **environment) -> subprocess.CompletedProcess:
        environment = {"CUDA_HOME": "", "CUDA_PATH": "", "CXX": "", "FORCE_ONLY_CPU": "", **environment}
        environment = {**{k: v for k, v in os.environ.items() if k not in environment}, **environment}
        environment = {k: v for k, v in environment.items() if v} | {"PATH": f"{self.python.parent}{os.pathsep}{path}"}
        return subprocess.run(
            [self.python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200
        )

    def install(self, source: Path, **environment) -> subprocess.CompletedProcess:
        """What the README says: `pip install .` in the folder."""
        return self.run("-m", "pip", "install", "--no-deps", ".", cwd=source, **environment)

    def try_out(self, folder: Path, package: str = "selective_scan") -> tuple[dict[str, str], str]:
        """The backends that a script finds which compares an operator with plain PyTorch, and its warnings."""
        done = self.run("-c", SCRIPTS[package], cwd=folder)
        assert done.returncode == 0, done.stderr
        return dict(line.split(": ", 1) for line in done.stdout.splitlines()), done.stderr


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "venv")


# ----- the three situations


@needs_nvcc
@both_packages
def test_with_nvcc(environment, source, tmp_path, package):
    done = environment.install(source, TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 0, done.stdout + done.stderr
    found, warnings = environment.try_out(tmp_path, package)
    assert found["cpu"].startswith("available")
    assert found["cuda"] == ("available" if torch.cuda.is_available() else "compiled, but no GPU is found")
    assert found["selected"] == "cpu"
    assert "slowly" not in warnings


@both_packages
def test_without_nvcc(environment, source, tmp_path, package):
    done = environment.install(source, path=hide_nvcc(source))
    assert done.returncode == 0, done.stdout + done.stderr
    found, warnings = environment.try_out(tmp_path, package)
    assert found["cpu"].startswith("available")
    assert found["cuda"].startswith("not compiled: pip install")
    assert found["selected"] == "cpu"
    assert "slowly" not in warnings


@both_packages
def test_without_a_compiler(environment, source, tmp_path, package):
    """Installs, and says so: when it is used, in `backends()`, and in the log of a verbose installation."""
    done = environment.run("-m", "pip", "install", "-v", "--no-deps", ".", cwd=source, path="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compiles no kernels" in done.stdout + done.stderr
    found, warnings = environment.try_out(tmp_path, package)
    assert found["cpu"].startswith("not compiled: pip install")
    assert found["selected"] == "reference"
    assert warnings.count("plain PyTorch, slowly, on cpu") == 1


def test_without_pytorch(source, tmp_path):
    """Whatever builds a wheel or an archive of the source need not have PyTorch."""
    environment = Environment(tmp_path / "venv", torch=False)
    done = environment.install(source)
    assert done.returncode == 0, done.stdout + done.stderr
    environment.run("-m", "pip", "install", "--upgrade", "setuptools", cwd=tmp_path)
    done = environment.run("setup.py", "sdist", cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as content:
        assert any(name.endswith("csrc/cpu/simd.h") for name in content.getnames())


# ----- other ways in


def test_setup_py_install_user(tmp_path, source):
    environment = Environment(tmp_path / "venv", "--system-site-packages")
    base = {"PYTHONUSERBASE": str(tmp_path / "user")}
    done = environment.run("setup.py", "install", "--user", cwd=source, path=hide_nvcc(source), **base)
    assert done.returncode == 0, done.stdout + done.stderr
    done = environment.run("-c", SCAN, cwd=tmp_path, **base)
    assert done.returncode == 0, done.stderr
    assert "cpu: available" in done.stdout
    assert list((tmp_path / "user").rglob("_C_torch*.so"))


def test_editable_install_without_build_isolation(environment, source, tmp_path):
    """For those who build against a PyTorch that is not in the environment by pip's lights."""
    environment.run("-m", "pip", "install", "--upgrade", "setuptools", cwd=tmp_path)
    options = ("--no-build-isolation", "--no-deps", "-e", ".")
    done = environment.run("-m", "pip", "install", *options, cwd=source, FORCE_ONLY_CPU="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert environment.try_out(tmp_path)[0]["selected"] == "cpu"


def test_reinstalling_drops_what_was_built_before(environment, source, tmp_path):
    """The advice that a library for another PyTorch comes with: `build/` still has that library."""
    stale = source / "build" / f"lib.linux-{platform.machine()}-cpython-{sys.version_info[0]}{sys.version_info[1]}"
    (stale / "selective_scan").mkdir(parents=True)
    (stale / "selective_scan" / "_C_torch1_0.so").write_bytes(b"")
    done = environment.run("-m", "pip", "install", "--no-deps", ".", cwd=source, path="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert environment.try_out(tmp_path)[0]["selected"] == "reference"


# ----- broken builds


def test_source_that_does_not_compile_is_an_error(environment, source, tmp_path):
    (source / "csrc/cpu/scan.cpp").write_text("#error broken on purpose\n")
    done = environment.install(source, path=hide_nvcc(source))
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr
    assert environment.run("-c", "import selective_scan", cwd=tmp_path).returncode != 0


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict(CXX="no-such-compiler"), "no-such-compiler"),
        pytest.param(dict(TORCH_CUDA_ARCH_LIST="Hopper"), "TORCH_CUDA_ARCH_LIST must be like", marks=needs_nvcc),
        (dict(CUDA_HOME="/nonexistent"), "/nonexistent, which CUDA_HOME names, has no bin/nvcc"),
        (dict(CUDA_PATH="/nonexistent"), "has no bin/nvcc"),
    ],
    ids=["CXX", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"],
)
def test_variables_that_make_no_sense(environment, source, variables, message):
    done = environment.install(source, **variables)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


@pytest.mark.parametrize("cuda", ["11.8", "12.4"])
def test_nvcc_of_another_cuda_than_pytorch(environment, source, tmp_path, cuda):
    toolkit = tmp_path / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "bin/nvcc").write_text(
        f"#!/bin/sh\necho 'Cuda compilation tools, release {cuda}, V{cuda}.1'\necho '#$ TOP=/' >&2\n"
    )
    (toolkit / "bin/nvcc").chmod(0o755)
    done = environment.install(source, CUDA_HOME=str(toolkit))
    assert done.returncode != 0
    assert f"{toolkit}/bin/nvcc is of CUDA {cuda.split('.')[0]}" in done.stdout + done.stderr
    assert "FORCE_ONLY_CPU=1" in done.stdout + done.stderr


def loaded(tmp_path, library: str, content: bytes) -> str:
    """What `import selective_scan` says when this is its compiled library."""
    folder = tmp_path / "selective_scan"
    shutil.copytree(PACKAGE / "selective_scan", folder, ignore=shutil.ignore_patterns("*.so"))
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


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability):
    """The comparisons with float64 again, as on a lesser processor; PyTorch chooses once, when it is imported."""
    if capability.upper() == torch.backends.cpu.get_cpu_capability():
        pytest.skip("this processor's own")
    done = run_command(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("tests/kernels/test_selective_scan.py", "tests/kernels/test_dwconv2d.py"),
        *(
            "-k",
            "cpu and (sizes or options or decays or softplus or views or random or repeatable or planes or kernels)",
        ),
        cwd=ROOT,
        ATEN_CPU_CAPABILITY=capability,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d\d+ passed", done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
@pytest.mark.parametrize(("fence", "capability"), [("start", None), ("end", None), ("end", "avx2"), ("end", "default")])
def test_no_kernel_reaches_beyond_its_tensors(fence, capability, tmp_path):
    """The random and the wide comparisons again, each tensor next to memory that may not be touched."""
    library = tmp_path / "fenced_memory.so"
    source = Path(__file__).with_name("fenced_memory.c")
    subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", source, "-o", library, "-ldl"], check=True)
    done = run_command(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--random-cases=60"),
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
