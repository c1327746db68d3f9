"""Checkpoints in mmengine's layout, read without unpickling anything but tensors, arrays and containers.

mmengine 0.10.7 calls `torch.load` with its defaults. Since PyTorch 2.6, this refuses mmengine's own checkpoints in
testing and resuming, because they hold logs as HistoryBuffers of NumPy arrays.
"""

import logging
import re
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import get_external_models, get_mmcls_models, get_torchvision_models

from classification.checkpoint import CFG_NODE, StateDict, check_weights, plain, read_checkpoint
from classification.checkpoint_archive import is_momentary
from classification.download import SCHEMES, discard, download
from classification.errors import UserError
from classification.openmmlab.messages import print_log


class _DType:
    """Stands for `numpy.dtype`: accepts types of numbers alone. NumPy's own trusts a pickle, down to its pointers."""

    def __init__(self, code: str, *_: object):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", code):
            raise ValueError(f"NumPy type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


class _Array:
    """Stands for the result of `numpy._core.multiarray._reconstruct`: holds the array that a pickle describes.

    The array is a view of the pickle's bytes, for thousands of arrays can name the same bytes.
    """

    def __init__(self, *_: object):
        self.array = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, data = state
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran_order else "C")


def _no_bytes() -> bytes:
    return b""


def _scalar(dtype: _DType, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype.dtype)[0]


class _History(HistoryBuffer):
    """Fills a HistoryBuffer, but does not call the functions that mmengine pickles with it."""

    def __setstate__(self, state: dict) -> None:
        logs, counts, length = state["_log_history"].array, state["_count_history"].array, state["max_length"]
        self.__init__(logs[:0], counts[:0], length)
        if len(logs) != len(counts):
            raise ValueError("a log has not as many counts as values")
        self._log_history, self._count_history = logs[-length:], counts[-length:]  # no copies; an update makes new ones
        self.__class__ = HistoryBuffer


class _Inert:
    """Stands for an object of a class that is not loaded: accepts any arguments and state, and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Arrays:
    """Returns the arrays of a checkpoint, each copied once; any other value as it is.

    Raises:
        UserError: the arrays and logs, each copied, would come to four times the bytes of their file.
    """

    def __init__(self, path: Path):
        self.path, self.left, self.seen = path, 4 * path.stat().st_size, {}

    def __call__(self, value: object) -> object:
        if not isinstance(value, _Array | HistoryBuffer):
            return value
        if id(value) not in self.seen:
            arrays = value.data if isinstance(value, HistoryBuffer) else [value.array]
            self.left -= sum(array.nbytes for array in arrays)
            if self.left < 0:
                raise UserError(f"{self.path}: its arrays claim more bytes than the file holds")
            self.seen[id(value)] = value if isinstance(value, HistoryBuffer) else value.array.copy()
        return self.seen[id(value)]


class _ArrayType:
    """Stands for `numpy.ndarray`. Honest pickles name it without a call. A call would take any amount of memory."""

    def __new__(cls, *args: object) -> "_ArrayType":
        raise ValueError("numpy.ndarray is called")


STAND_INS = (
    CFG_NODE,
    (_History, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_ArrayType, "numpy.ndarray"),
    (_DType, "numpy.dtype"),
    (_no_bytes, "builtins.bytes"),  # of an array without elements
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),  # of NumPy 1 and 2
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
)


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str, map_location: str | torch.device | None = None) -> dict:
    """Load a file. mmengine's loader from the import of this module on.

    It reads logs and arrays of numbers. Objects of other classes become inert. A pickle that does more with such an
    object than create it is refused.

    Raises:
        UserError: no such file, or damaged, or no checkpoint.
    """
    path = Path(filename).expanduser()
    content = read_checkpoint(path, map_location or "cpu", STAND_INS, others=lambda name: _Inert, warn=_warn)
    content = plain(content, path, _Arrays(path))
    if "param_schedulers" in content:
        content["param_schedulers"] = _without_functions(content["param_schedulers"])
    if isinstance(content.get("meta"), dict):
        content["meta"].pop("config", None)  # resuming, mmengine would run it as Python; its own checkpoints have `cfg`
    # mmengine would skip entries that are no weights. EMAHook's are those that training goes on from.
    for key in ("state_dict", "ema_state_dict"):
        if isinstance(content.get(key), dict):
            check_weights(content[key], path, counts="", tied=True)
    return content


def _warn(message: str) -> None:
    print_log(message, logger="current", level=logging.WARNING)


def _without_functions(state: object) -> object:
    """Return the state of schedules without functions, which OneCycleLR's has. They keep those of the config."""
    if isinstance(state, list):
        return [_without_functions(value) for value in state]
    if not isinstance(state, dict):
        return state
    inert = [key for key, value in state.items() if value is _Inert or isinstance(value, _Inert)]
    return {key: _without_functions(value) for key, value in state.items() if key not in inert}


# ----- by address: mmengine would have torch.hub unpickle any file


@CheckpointLoader.register_scheme(prefixes=SCHEMES, force=True)
def load_from_http(filename: str, map_location: str | torch.device | None = None) -> dict:
    """Download a file in the first process, and where that one's folder is not shared; load it by `load_from_local`."""
    if get_dist_info()[0] == 0:
        download(filename)
    barrier()
    path = download(filename)  # it is there, but on a machine that does not share the folder
    try:
        return load_from_local(str(path), map_location)
    except UserError as error:  # as of half a file, if the server does not tell how much is to come, or a login page
        if is_momentary(error):
            raise
        raise discard(filename, error) from error


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
    """Return the state dict of a toolchain's model from a checkpoint.

    Raises:
        UserError: the checkpoint has none.
    """
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not state or not any(isinstance(v, torch.Tensor) for v in state.values()):
        keys = ", ".join(map(str, list(content)[:8]))
        raise UserError(f"{path}: holds no weights under 'state_dict' and is no state dict; its keys are {keys}")
    check_weights(state, path, counts="")
    found = {key.removeprefix("module."): value for key, value in state.items()}
    if len(found) < len(state):
        twice = next(key for key in state if f"module.{key}" in state)
        raise UserError(f"{path}: its weights hold {twice!r} and 'module.{twice}', which are one parameter; remove one")
    return found
