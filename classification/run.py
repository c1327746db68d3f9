"""This process among the others: its rank, device, precision, output folder and log; and what they agree on."""

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
    """What keeps the processes from finding each other, in one line."""
    try:
        yield
    except (dist.DistError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = str(error).splitlines()[0]
        hint = "; the port is in use, choose another --master_port" if "EADDRINUSE" in str(error) else ""
        raise UserError(f"the processes do not find each other at {place} ({why}){hint}") from error


# What gloo and NCCL say where a process is gone that others wait for.
_GONE = ("gloo/transport", "remote process exited")


def lost_another(error: RuntimeError) -> str:
    """One line for what is not this process's fault: another one has ended, perhaps for want of memory; else ""."""
    if not any(text in str(error) for text in _GONE):
        return ""
    why = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0])[:200]  # without the line of source
    return (
        f"another process has ended or does not answer ({why}); what it has said, or its machine's log, has the cause"
    )


class Run:
    """The place of this process among the others, its device and its output folder."""

    def __init__(self, config: CfgNode):
        gpus = torch.cuda.device_count()
        # The rank on this node: a node's GPUs are counted from 0 whatever the number of nodes.
        local_rank = check_environment()
        if gpus and local_rank >= gpus:
            raise UserError(f"more processes than GPUs on this node: it has {gpus}; lower --nproc_per_node")
        with meeting():
            info = init_distributed_device_so("cuda" if gpus else "cpu")
        self.rank, self.world_size = info["global_rank"], info["world_size"]
        self.device = torch.device(info["device"])
        # What is agreed on goes over the network, beside what the device is at.
        self.group = dist.new_group(backend="gloo") if self.world_size > 1 else None
        self.folder = Path(config.OUTPUT, config.MODEL.NAME, config.TAG)
        self.is_main = self.rank == 0
        amp = {"float16": torch.float16, "bfloat16": torch.bfloat16, "off": None}[config.TRAIN.AMP]
        # float16 has no fast kernels on a CPU, and needs none of its memory.
        self.amp_dtype = None if self.device.type == "cpu" and amp is torch.float16 else amp

    def place(self, model: nn.Module) -> nn.Module:
        """`model` on this process's device, with a CPU's modules on a CPU."""
        model = model.to(self.device)
        return optimise_for_cpu(model) if self.device.type == "cpu" else model

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def from_main(self, call: Callable[[], T]) -> T:
        """What `call` returns in the first process, for all; or its UserError."""
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
        """What `call` returns here; or the UserError of one process, in all of them, so that none waits."""
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
        """
        Raises:
            UserError: in all processes, where one has other facts than the first: another disk, or other arguments.
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
        """`value` of every process, by rank, in all of them; tensors go over the network as they are on a CPU."""
        if self.group is None:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def open_log(self, to_file: bool = True) -> None:
        """Console and log.txt in the first process, where log.txt also gets every printed step; warnings in all."""
        logger.setLevel(logging.DEBUG if self.is_main else logging.WARNING)
        console = logging.StreamHandler(sys.stdout)
        # On a terminal the progress bar shows the steps.
        console.setLevel(logging.INFO if sys.stderr.isatty() else logging.DEBUG)
        handlers = [console]
        if self.is_main and to_file:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                handlers.append(_LogFile(self.folder / "log.txt", encoding="utf-8", errors="backslashreplace"))
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
        return printable(super().format(record))


class _LogFile(logging.FileHandler):
    """One line on the console, once, where the file cannot be written any more: the run goes on."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            print(printable(f"{self.baseFilename}: cannot be written to ({sys.exc_info()[1]})"), file=sys.stderr)


WHOLE_NUMBERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
)


def whole_numbers() -> dict[str, int]:
    """Those of the variables of launchers that are set; MASTER_PORT only where there are several processes.

    Raises:
        UserError: one is no whole number.
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
    """What the launcher says of this process, before anything waits for the others. Returns its rank on this node.

    Raises:
        UserError: a variable is missing, no number, or contradicts another.
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
    if not 0 <= values.get(rank, 0) < max(values[size], 1):
        raise UserError(f"{rank} is {values[rank]}, but {size} is {values[size]}: ranks are 0 to {values[size] - 1}")
    return values.get("LOCAL_RANK", values.get("SLURM_LOCALID", 0))


class Preempted(Exception):
    """A signal asked the run to stop; `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Preemption:
    """Signals that ask the run to stop, looked at between steps.

    SIGTERM and SIGUSR1, with which clusters announce that they are about to kill a job; Ctrl-C, which ends the run at
    once the second time; and SIGHUP, which a terminal sends that is closed. Used as a context manager, which puts the
    handlers back.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    SAME_SECOND = 1.0  # a launcher passes on the Ctrl-C that the terminal has sent to all

    def __init__(self, run: Run):
        self.group = run.group
        self.received = 0
        self.interrupted = 0.0
        self.flag = torch.zeros(1, dtype=torch.int64)
        self.pending: dist.Work | None = None

    def __enter__(self) -> "Preemption":
        ignored = {number for number in self.SIGNALS if signal.getsignal(number) == signal.SIG_IGN}  # by nohup
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
        """Called by all processes alike; what one of them has received ends them all, one call later.

        So that the processes need not wait for each other, a call looks at what the last one has exchanged.

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
        """Wait for the last exchange, before the processes part."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
