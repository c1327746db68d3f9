"""Kills a training run again and again and compares what it comes to with a run that was left alone.

    python tests/kill_and_resume.py --kills 30

Processes train on digits, with EMA, MESA and mixup, and save after every update. All get a signal at random times: in
turn SIGKILL, Ctrl-C, SIGKILL as soon as a checkpoint is seen half-written, and SIGHUP; what can be caught has the run
saved. The same command goes on each time. In the end weights, EMA and optimizer must be those of the undisturbed run,
bit for bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from running import CLASSIFICATION, MICRO, free_port

from classification.checkpoint import read_checkpoint
from classification.data.digits import write_digits

PATIENCE = 300.0  # seconds that a run may take
FOLDER = "spatialmamba_micro/default"


def start(data: Path, output: Path, epochs: int, count: int) -> list[subprocess.Popen]:
    """The processes of a run, as torchrun would start them, but all of them ours to kill."""
    port = free_port()
    options = [
        *("TRAIN.EPOCHS", epochs, "TRAIN.WARMUP_EPOCHS", 1, "TRAIN.ACCUMULATION_STEPS", 2, "SAVE_STEPS", 1),
        *("TRAIN.MESA.START", 0.0, "DATA.BATCH_SIZE", 32, "MODEL.DROP_PATH_RATE", 0.1, "AUG.REPROB", 0.25),
        *("DATA.NUM_WORKERS", 1),
    ]
    command = [sys.executable, "main.py", "--cfg", MICRO, "--data-path", data, "--output", output, "--opts", *options]
    processes = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        environment = {k: str(v) for k, v in {**place, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}.items()}
        log = (output / f"process_{rank}.txt").open("a")
        processes.append(
            subprocess.Popen(
                list(map(str, command)),
                cwd=CLASSIFICATION,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_heed_signals,
            )
        )
    return processes


def _heed_signals() -> None:
    """In the background of a shell, or under nohup, they are ignored, and so they would be in what is started."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait(processes: list[subprocess.Popen], output: Path) -> None:
    """Until all of them are done.

    Raises:
        RuntimeError: one failed; the message is the end of its output.
    """
    for rank, process in enumerate(processes):
        if process.wait(PATIENCE):
            raise RuntimeError((output / f"process_{rank}.txt").read_text()[-3000:])


SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGHUP)
DURING_SAVE = 2  # the one of these that waits for a checkpoint to be half-written


def kill(
    processes: list[subprocess.Popen], folder: Path, rng: random.Random, number: signal.Signals, during_save: bool
) -> str:
    """A signal to all, at a random moment after the run has begun to train again; returns where it was."""
    before = {f: f.stat().st_mtime_ns for f in folder.glob("*.pth")}
    deadline = time.monotonic() + PATIENCE
    while {f: _modified(f) for f in folder.glob("*.pth")} == before:  # it has not made an update yet
        if any(p.poll() is not None for p in processes) or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.6))
    while during_save and not any(folder.glob(".*.partial")) and all(p.poll() is None for p in processes):
        if time.monotonic() > deadline:
            break
    training = all(p.poll() is None for p in processes)  # and not about to end, its epochs done
    for process in processes:
        process.send_signal(number)
    statuses = [process.wait(PATIENCE) for process in processes]
    if training and number != signal.SIGKILL and not set(statuses) <= {128 + number, 0}:
        raise RuntimeError(f"{number.name} ended the processes with {statuses}, and not after saving")
    partial = "half-written, " if any(folder.glob(".*.partial")) else ""
    newest = max(folder.glob("epoch_*.pth"), key=_modified, default=None)
    return f"{number.name}, {partial}newest {newest.name if newest else 'none'}"


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # removed since it was listed
        return 0


def differences(a: object, b: object, where: str = "") -> list[str]:
    """Places where two checkpoints' contents are not the same to the bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{where}/{key}")]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")]
    else:
        same = a == b
    return [] if same else [where]


def compare(undisturbed: Path, killed: Path) -> list[str]:
    """Differences between the last checkpoints of two runs, but for the config, which names their folders."""
    contents = [read_checkpoint(root / FOLDER / "latest.pth") for root in (undisturbed, killed)]
    for content in contents:
        del content["config"]
    return differences(*contents)


def run(kills: int, epochs: int, root: Path, processes: int = 2, seed: int = 0, most: int | None = None) -> list[str]:
    """Returns the differences; prints each kill. No class has more than `most` images."""
    data, rng = root / "digits", random.Random(seed)
    write_digits(data)
    for folder in data.glob("*/*"):
        for image in sorted(folder.iterdir())[most:] if most else ():
            image.unlink()
    outputs = {name: root / name for name in ("undisturbed", "killed")}
    for output in outputs.values():
        output.mkdir()
    wait(start(data, outputs["undisturbed"], epochs, processes), outputs["undisturbed"])
    folder = outputs["killed"] / FOLDER
    for i in range(kills):
        running = start(data, outputs["killed"], epochs, processes)
        which = i % len(SIGNALS)
        place = kill(running, folder, rng, SIGNALS[which], which == DURING_SAVE)
        print(f"kill {i + 1}: {place}", flush=True)
    wait(start(data, outputs["killed"], epochs, processes), outputs["killed"])
    resumed = (folder / "log.txt").read_text().count("resuming from")
    print(f"{kills} kills, {resumed} times resumed")
    return compare(outputs["undisturbed"], outputs["killed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=12, help="of 22 batches each with two processes, so 11 updates")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        found = run(args.kills, args.epochs, Path(root), args.processes, args.seed)
    print("the same to the bit" if not found else f"{len(found)} differences: {', '.join(found[:5])}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
