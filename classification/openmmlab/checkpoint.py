"""Checkpoints in mmengine's layout, read without unpickling anything but tensors, arrays and containers.

mmengine 0.10.7 calls `torch.load` plainly. Since PyTorch 2.6 that refuses mmengine's own checkpoints, in testing and in
resuming, for their log is HistoryBuffers of NumPy arrays.
"""

import os
import re
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import get_external_models, get_mmcls_models, get_torchvision_models

from classification.checkpoint import CFG_NODE, StateDict, read_checkpoint
from classification.errors import UserError


class _DType:
    """What a pickle says of a NumPy type, if it is one of numbers. NumPy's own trusts it, down to its pointers."""

    def __init__(self, code: str, *_: object):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", code):
            raise ValueError(f"NumPy type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


class _Array:
    """Takes what a pickle says of a NumPy array, in place of `numpy._core.multiarray._reconstruct`'s result."""

    def __init__(self, *_: object):
        self.array = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, data = state
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran_order else "C").copy()


def _no_bytes() -> bytes:
    return b""


def _scalar(dtype: _DType, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype.dtype)[0]


class _History(HistoryBuffer):
    """Fills a HistoryBuffer without the functions that mmengine pickles with it and would call."""

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["_log_history"].array, state["_count_history"].array, state["max_length"])
        self.__class__ = HistoryBuffer


class _Inert:
    """Stands for an object of a class that is not loaded: takes whatever it was made of, and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


STAND_INS = (
    CFG_NODE,
    (_History, "mmengine.logging.history_buffer.HistoryBuffer"),
    (np.ndarray, "numpy.ndarray"),  # named, not called
    (_DType, "numpy.dtype"),
    (_no_bytes, "builtins.bytes"),  # of an array without elements
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),  # of NumPy 1 and 2
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
)


def _unwrapped(value: object) -> object:
    """With arrays for what holds them."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _unwrapped(item)
    elif type(value) in (list, tuple):
        return type(value)(_unwrapped(item) for item in value)
    return value


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str, map_location: str | torch.device | None = None) -> dict:
    """mmengine's loader of files, from when this module is imported on.

    Logs and arrays of numbers are read; objects of other classes become inert, or, where the pickle does more with them
    than make them, are refused.

    Raises:
        UserError: no such file, or damaged, or no checkpoint.
    """
    path = Path(filename).expanduser()
    return _unwrapped(read_checkpoint(path, map_location or "cpu", STAND_INS, others=lambda name: _Inert))


# ----- by address: mmengine has torch.hub unpickle whatever it gets


@CheckpointLoader.register_scheme(prefixes=("http://", "https://"), force=True)
def load_from_http(filename: str, map_location: str | torch.device | None = None) -> dict:
    """A file that is downloaded once, to torch.hub's folder, and read as `load_from_local` reads it."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / os.path.basename(urlparse(filename).path)
    if get_dist_info()[0] == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(filename, str(path))
        except OSError as error:
            raise UserError(f"{filename}: cannot be downloaded ({error})") from error
    barrier()
    return load_from_local(str(path), map_location)


def _load_named(filename: str, addresses: dict[str, str], map_location: str | torch.device | None) -> dict:
    name = filename.partition("://")[2]
    if name not in addresses:
        raise UserError(f"{filename}: mmengine knows no checkpoint of that name")
    return load_from_http(addresses[name], map_location)


@CheckpointLoader.register_scheme(prefixes=("modelzoo://", "torchvision://"), force=True)
def load_from_torchvision(filename: str, map_location: str | torch.device | None = None) -> dict:
    return _load_named(filename, get_torchvision_models(), map_location)


@CheckpointLoader.register_scheme(prefixes=("open-mmlab://", "openmmlab://"), force=True)
def load_from_openmmlab(filename: str, map_location: str | torch.device | None = None) -> dict:
    return _load_named(filename, get_external_models(), map_location)


@CheckpointLoader.register_scheme(prefixes="mmcls://", force=True)
def load_from_mmcls(filename: str, map_location: str | torch.device | None = None) -> dict:
    return _load_named(filename, get_mmcls_models(), map_location)


def weights_of(content: dict, path: str | Path) -> StateDict:
    """A toolchain model's state dict in a checkpoint.

    Raises:
        UserError: it holds none.
    """
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        keys = ", ".join(map(str, list(content)[:8]))
        raise UserError(f"{path}: holds no weights under 'state_dict' and is no state dict; its keys are {keys}")
    return {key.removeprefix("module."): value for key, value in state.items()}
