"""Batches in shared memory, through which a data loader's workers hand them over."""

import os
import sys
from collections.abc import Callable
from multiprocessing.queues import Queue

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

LARGE = 2**12  # bytes; each tensor that is shared has a file descriptor until its batch is taken, so boxes are left out


class SharingCollate:
    """A collate function that moves the large tensors of its batches, images and maps, to shared memory.

    Otherwise a thread of the worker does. If /dev/shm is too small, that thread prints its error and goes on without
    the batch, for which the run waits for ever. Here, the error ends the run. If a small tensor does not fit, or a
    batch cannot be pickled, the worker says so and ends, and the run with it.
    """

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, samples: list) -> object:
        batch = self.collate(samples)
        if get_worker_info():
            Queue._on_queue_feeder_error = staticmethod(_end)  # in this worker; its thread begins with the first batch
            _share(batch)
        return batch


def _end(error: Exception, batch: object) -> None:
    text = " ".join(str(error).split())
    print(f"a worker cannot hand over a batch: {type(error).__name__}: {text}", file=sys.stderr, flush=True)
    os._exit(1)


def _share(part: object) -> None:
    if isinstance(part, Tensor):
        if part.layout == torch.strided and part.nbytes >= LARGE:
            part.share_memory_()
    elif isinstance(part, dict):
        _share(list(part.values()))
    elif isinstance(part, list | tuple):
        for one in part:
            _share(one)
    elif isinstance(part, BaseDataElement):
        _share(part.all_values())


def end_workers(*loops: object) -> None:
    """End the workers of mmengine's loops, which may be None; those of `persistent_workers` wait for another epoch.

    If garbage collection did it, the threads that feed them would close their files a second time, and print errors.
    """
    for loop in loops:
        if loop is not None:
            vars(loop).pop("dataloader_iterator", None)  # of training by iterations
        if isinstance(getattr(loop, "dataloader", None), DataLoader):
            loop.dataloader._iterator = None


def sharing(build: Callable[..., DataLoader]) -> Callable[..., DataLoader]:
    """Return mmengine's `build_dataloader`, but for loaders whose batches are shared so."""

    def build_dataloader(*args, **kwargs) -> DataLoader:
        loader = build(*args, **kwargs)
        loader.collate_fn = SharingCollate(loader.collate_fn)
        return loader

    return build_dataloader
