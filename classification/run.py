"""This process among all processes: its rank, device, precision, output folder and log; and how processes agree."""

import logging
import os
import re
import reprlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so
from torch import nn
from yacs.config import CfgNode

from classification.errors import UserError, printable
from classification.models import optimise_for_cpu

logger = logging.getLogger("spatialmamba")
T = TypeVar("T")


@contextmanager
def meeting() -> Iterator[None]:
    """Turn an error that keeps the processes from finding each other into a UserError of one line."""
    try:
        yield
    except (dist.DistError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = str(error).splitlines()[0]
        hint = "; the port is in use, choose another --master_port" if "EADDRINUSE" in str(error) else ""
        raise UserError(f"the processes do not find each other at {place} ({why}){hint}") from error


# Parts of the errors of gloo and NCCL when other processes wait for a process that has ended.
_GONE = ("gloo/transport", "remote process exited")


def lost_another(error: RuntimeError) -> str:
    """Return one line if the error means that another process has ended, for example out of memory; else ""."""
    if not any(text in str(error) for text in _GONE):
        return ""
    why = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0])[:200]  # without the source line
    return (
        f"another process has ended or does not answer ({why}); what it has said, or its machine's log, has the cause"
    )


class Run:
    """The place of this process among the others, its device and its output folder."""

    def __init__(self, config: CfgNode):
        gpus = torch.cuda.device_count()
        # The rank on this node: GPUs are numbered from 0 on each node.
        local_rank = check_environment()
        if gpus and local_rank >= gpus:
            raise UserError(f"more processes than GPUs on this node: it has {gpus}; lower --nproc_per_node")
        with meeting():
            info = init_distributed_device_so("cuda" if gpus else "cpu")
        self.rank, self.world_size = info["global_rank"], info["world_size"]
        self.device = torch.device(info["device"])
        # Agreements use gloo, so that they do not wait for work on the device.
        self.group = dist.new_group(backend="gloo") if self.world_size > 1 else None
        self.folder = Path(config.OUTPUT, config.MODEL.NAME, config.TAG)
        self.is_main = self.rank == 0
        amp = {"float16": torch.float16, "bfloat16": torch.bfloat16, "off": None}[config.TRAIN.AMP]
        # float16 is off on a CPU: it has no fast kernels there, and a CPU does not need to save that memory.
        self.amp_dtype = None if self.device.type == "cpu" and amp is torch.float16 else amp

    def place(self, model: nn.Module) -> nn.Module:
        """Move `model` to this process's device; on a CPU, also use the modules optimised for CPUs."""
        model = model.to(self.device)
        return optimise_for_cpu(model, prepack_weights=True) if self.device.type == "cpu" else model

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def from_main(self, call: Callable[[], T]) -> T:
        """Run `call` in the first process; return its result, or raise its UserError, in all processes."""
        outcome: list = [None, None]
        if self.is_main:
            try:
                outcome[0] = call()
            except UserError as error:
                outcome[1] = error
        if self.group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def together(self, call: Callable[[], T]) -> T:
        """Run `call` in every process and return this process's result.

        If a process raises a UserError, raise it in all processes, so that no process waits.
        """
        outcome: list = [None, None]
        try:
            outcome[0] = call()
        except UserError as error:
            outcome[1] = error
        for error in self.gather(outcome[1]):
            if error is not None:
                raise error
        return outcome[0]

    def check_alike(self, facts: dict[str, object]) -> None:
        """Check that all processes have the same facts.

        Raises:
            UserError: in all processes, if a process has other facts than the first: another disk or other arguments.
        """
        first, *others = self.gather(facts)
        for rank, theirs in enumerate(others, start=1):
            for name, fact in first.items():
                if theirs[name] != fact:
                    there, here = _first_difference(theirs[name], fact)
                    raise UserError(
                        f"process {rank} has other {name} than process 0: {reprlib.repr(there)}, not "
                        f"{reprlib.repr(here)}; give all processes the same data and arguments"
                    )

    def gather(self, value: T) -> list[T]:
        """Return, in every process, the `value` of all processes by rank; pass tensors that are on the CPU."""
        if self.group is None:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def open_log(self, to_file: bool = True) -> None:
        """Log to the console and, in the first process, to log.txt; other processes log only warnings and errors.

        log.txt gets every reported step; a terminal shows the steps in its progress bar instead.
        """
        logger.setLevel(logging.DEBUG if self.is_main else logging.WARNING)
        console = logging.StreamHandler(sys.stdout)
        console.setLevel(logging.INFO if sys.stderr.isatty() else logging.DEBUG)
        handlers = [console]
        if self.is_main and to_file:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                handlers.append(
                    logging.FileHandler(self.folder / "log.txt", encoding="utf-8", errors="backslashreplace")
                )
            except OSError as error:
                raise UserError(f"{self.folder}: cannot be written to ({error}); choose another --output") from error
        for handler in handlers:
            handler.setFormatter(_Printable("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.handlers = handlers

    def describe(self) -> str:
        amp = "float32" if self.amp_dtype is None else f"autocast {str(self.amp_dtype).removeprefix('torch.')}"
        if self.device.type == "cpu":
            return f"{self.world_size} process(es), CPU with {torch.get_num_threads()} thread(s) each, {amp}"
        return f"{self.world_size} process(es), {torch.cuda.get_device_name(self.device)}, {amp}"


def _first_difference(there: object, here: object) -> tuple[object, object]:
    if isinstance(there, list) and isinstance(here, list):
        return next(pair for pair in zip_longest(there, here) if pair[0] != pair[1])
    return there, here


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=getattr(record, "lines", False))


WHOLE_NUMBERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
)


def whole_numbers() -> dict[str, int]:
    """Return the launchers' variables that are set; MASTER_PORT only if there are several processes.

    Raises:
        UserError: a variable is not a whole number.
    """
    values = {name: _whole_number(name) for name in WHOLE_NUMBERS if name in os.environ}
    if "MASTER_PORT" in os.environ and max(values.get("WORLD_SIZE", 1), values.get("SLURM_NTASKS", 1)) > 1:
        text = os.environ["MASTER_PORT"]
        if "://" in text:
            raise UserError(
                f"MASTER_PORT is {text!r}, which Kubernetes sets for a service called master: set it to the port's "
                "number, or call the service otherwise"
            )
        values["MASTER_PORT"] = _whole_number("MASTER_PORT")
        if values["MASTER_PORT"] > 65535:
            raise UserError(f"MASTER_PORT is {values['MASTER_PORT']}, but ports end at 65535")
    return values


def _whole_number(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise UserError(f"{name} is {reprlib.repr(text)}, not a whole number; a launcher such as torchrun sets it")
    return int(text)


def check_environment() -> int:
    """Check the launcher's variables before this process waits for other processes; return its rank on this node.

    Raises:
        UserError: a variable is missing, is not a number, or contradicts another variable.
    """
    values = whole_numbers()
    if "WORLD_SIZE" in values:
        rank, size, names = "RANK", "WORLD_SIZE", ("RANK", "MASTER_ADDR", "MASTER_PORT")
    elif values.get("SLURM_NTASKS", 1) > 1:
        rank, size, names = "SLURM_PROCID", "SLURM_NTASKS", ("SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT")
        if "SLURM_STEP_NUM_TASKS" not in os.environ:
            raise UserError(
                f"SLURM_NTASKS is {values[size]}, but srun has not started this process, which would wait for "
                "the others: start it by tools/slurm_train.sh, srun or torchrun, or unset SLURM_NTASKS"
            )
    elif several := [name for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if values.get(name, 1) > 1]:
        raise UserError(f"{several[0]} is {values[several[0]]}: mpirun is not known here; start by torchrun or srun")
    elif values.get("RANK", 0):
        raise UserError(f"RANK is {values['RANK']}, but WORLD_SIZE is not set; start the processes by torchrun")
    else:
        return values.get("LOCAL_RANK", 0)
    missing = [name for name in names if name not in os.environ]
    if values[size] > 1 and missing:
        raise UserError(
            f"{size} is {values[size]}, but {', '.join(missing)} is not set: start the processes by torchrun, or unset "
            f"{size} for a single one"
        )
    if values[size] < 1:
        raise UserError(f"{size} is {values[size]}: it is the number of processes, at least 1")
    if not 0 <= values.get(rank, 0) < values[size]:
        raise UserError(f"{rank} is {values[rank]}, but {size} is {values[size]}: ranks are 0 to {values[size] - 1}")
    return values.get("LOCAL_RANK", values.get("SLURM_LOCALID", 0))


class Preempted(Exception):
    """A signal asked the run to stop; `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Preemption:
    """A context manager that notes signals which ask the run to stop; `check` looks at them between steps.

    The signals are SIGTERM and SIGUSR1, with which clusters announce that they are about to kill a job; Ctrl-C, which
    ends the run at once the second time; and SIGHUP, which a terminal sends when it is closed. Leaving the context
    restores the previous handlers.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    SAME_SECOND = 1.0  # within it, a second Ctrl-C is the first one again, which a launcher passes on

    def __init__(self, run: Run):
        self.group = run.group
        self.received = 0
        self.interrupted = 0.0
        self.flag = torch.zeros(1, dtype=torch.int64)
        self.pending: dist.Work | None = None

    def __enter__(self) -> "Preemption":
        ignored = {number for number in self.SIGNALS if signal.getsignal(number) == signal.SIG_IGN}  # nohup does so
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS if number not in ignored}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = number
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted and now - self.interrupted > self.SAME_SECOND:
                raise KeyboardInterrupt
            self.interrupted = self.interrupted or now

    def check(self) -> None:
        """Stop the run if any process has received a signal. All processes must call this equally often.

        Each call looks at the result of the previous call's exchange, so that the processes do not wait for each other.
        A signal therefore takes effect one call later.

        Raises:
            Preempted: in all processes, in the same call.
        """
        if self.group is None:
            agreed = self.received
        else:
            if self.pending is not None:
                self.pending.wait()
            agreed = int(self.flag)
            self.flag = torch.tensor([self.received])
            self.pending = None if agreed else dist.all_reduce(self.flag, dist.ReduceOp.MAX, self.group, async_op=True)
        if agreed:
            raise Preempted(agreed)

    def settle(self) -> None:
        """Wait for the last exchange before the process groups are destroyed."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
