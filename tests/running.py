"""How the tests run commands, on what config."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLASSIFICATION = ROOT / "classification"
MICRO = CLASSIFICATION / "configs/spatialmamba/spatialmamba_micro_digits.yaml"
# Small steps on the small folder: what is learnt does not matter, that it is the same does.
QUICK = ["TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "0", "DATA.BATCH_SIZE", "8", "PRINT_FREQ", "2"]


def run_command(*command, cwd=CLASSIFICATION, **environment) -> subprocess.CompletedProcess:
    """A command as a user types it, on this interpreter, one thread a process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", **environment}
    env.pop("TRITON_INTERPRET", None)  # of the tests in this process
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=1200)


AT_EXIT = """
import atexit, os, pathlib

def write():
    names = [(task / "comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
    pathlib.Path(__file__).with_name(f"rank{os.environ['RANK']}.txt").write_text("".join(sorted(names)))

if "RANK" in os.environ:
    atexit.register(write)
"""


def note_threads(folder: Path) -> dict[str, str]:
    """Variables of an environment in which each rank writes at its end what threads it has left; see `threads_left`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(AT_EXIT)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def threads_left(folder: Path) -> list[list[str]]:
    """By rank. If one of gloo's is left, and drops a tensor while the interpreter ends, the process aborts."""
    return [path.read_text().splitlines() for path in sorted(folder.glob("rank*.txt"))]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
