"""Batches in shared memory, through which a data loader's workers hand them over."""

from collections.abc import Callable

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

LARGE = 2**12  # bytes; each tensor that is shared has a file descriptor until its batch is taken, so boxes are left out


class SharingCollate:
    """A collate function that moves the large tensors of its batches, images and maps, to shared memory.

    Otherwise a thread of the worker does. If /dev/shm is too small, no one hears of that thread's error, and the run
    waits for ever. Here, the error ends the run.
    """

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, samples: list) -> object:
        batch = self.collate(samples)
        if get_worker_info():
            _share(batch)
        return batch


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


def sharing(build: Callable[..., DataLoader]) -> Callable[..., DataLoader]:
    """Return mmengine's `build_dataloader`, but for loaders whose batches are shared so."""

    def build_dataloader(*args, **kwargs) -> DataLoader:
        loader = build(*args, **kwargs)
        loader.collate_fn = SharingCollate(loader.collate_fn)
        return loader

    return build_dataloader
