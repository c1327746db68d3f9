"""This process among the others: its rank, device, precision, output folder and log; and what they agree on."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so
from yacs.config import CfgNode

from classification.errors import UserError
from classification.memory import keep_freed_memory

logger = logging.getLogger("spatialmamba")
T = TypeVar("T")


class Run:
    """The place of this process among the others, its device and its output folder."""

    def __init__(self, config: CfgNode):
        gpus = torch.cuda.device_count()
        # The rank on this node: a node's GPUs are counted from 0 whatever the number of nodes.
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
        if gpus and local_rank >= gpus:
            raise UserError(f"more processes than GPUs on this node: it has {gpus}; lower --nproc_per_node")
        info = init_distributed_device_so("cuda" if gpus else "cpu")
        self.rank, self.world_size = info["global_rank"], info["world_size"]
        self.device = torch.device(info["device"])
        # What is agreed on goes over the network, beside what the device is at.
        self.group = dist.new_group(backend="gloo") if self.world_size > 1 else None
        if self.device.type == "cpu":
            keep_freed_memory()
        self.folder = Path(config.OUTPUT, config.MODEL.NAME, config.TAG)
        self.is_main = self.rank == 0
        amp = {"float16": torch.float16, "bfloat16": torch.bfloat16, "off": None}[config.TRAIN.AMP]
        # float16 has no fast kernels on a CPU, and needs none of its memory.
        self.amp_dtype = None if self.device.type == "cpu" and amp is torch.float16 else amp

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
                handlers.append(logging.FileHandler(self.folder / "log.txt"))
            except OSError as error:
                raise UserError(f"{self.folder}: cannot be written to ({error}); choose another --output") from error
        for handler in handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.handlers = handlers

    def describe(self) -> str:
        amp = "float32" if self.amp_dtype is None else f"autocast {str(self.amp_dtype).removeprefix('torch.')}"
        if self.device.type == "cpu":
            return f"{self.world_size} process(es), CPU with {torch.get_num_threads()} thread(s) each, {amp}"
        return f"{self.world_size} process(es), {torch.cuda.get_device_name(self.device)}, {amp}"


class Preempted(Exception):
    """A signal asked the run to stop; `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Preemption:
    """SIGTERM and SIGUSR1, with which clusters announce that they are about to kill a job, asked for between steps.

    Used as a context manager, which puts the handlers back.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, run: Run):
        self.group = run.group
        self.received = 0
        self.flag = torch.zeros(1, dtype=torch.int64)
        self.pending: dist.Work | None = None

    def __enter__(self) -> "Preemption":
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = number

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
