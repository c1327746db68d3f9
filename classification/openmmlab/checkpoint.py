"""Checkpoints in mmengine's layout, read without unpickling anything but tensors, arrays and containers.

mmengine 0.10.7 calls `torch.load` plainly. Since PyTorch 2.6 that refuses mmengine's own checkpoints, in testing and in
resuming, for their log is HistoryBuffers of NumPy arrays.
"""

from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from classification.checkpoint import CFG_NODE, StandIn, StateDict, read_checkpoint
from classification.errors import UserError

_DTYPES = (np.dtypes.BoolDType, *(type(np.dtype(c)) for c in "bhilqBHILQefdFD"))


def _numpy() -> list[StandIn]:
    """Arrays and scalars of numbers, as NumPy 1 and 2 pickle them."""
    (rebuild, _, _), (scalar, _) = np.empty(0).__reduce__(), np.float64(0).__reduce__()
    names = [(np.ndarray, "numpy.ndarray"), (np.dtype, "numpy.dtype")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names += [(rebuild, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    return names + [(dtype, f"numpy.dtypes.{dtype.__name__}") for dtype in dict.fromkeys(_DTYPES)]


class _Inert:
    """Stands for an object of a class that is not loaded: takes whatever it was made of, and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _History(HistoryBuffer):
    """Fills a HistoryBuffer without the functions that mmengine pickles with it and would call."""

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["_log_history"], state["_count_history"], state["max_length"])
        self.__class__ = HistoryBuffer


STAND_INS = (CFG_NODE, (_History, "mmengine.logging.history_buffer.HistoryBuffer"), *_numpy())


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str, map_location: str | torch.device | None = None) -> dict:
    """mmengine's loader of files, from when this module is imported on.

    Objects of classes that a checkpoint's weights and log do not need become inert.

    Raises:
        UserError: no such file, or damaged, or no checkpoint.
    """
    return read_checkpoint(Path(filename).expanduser(), map_location or "cpu", STAND_INS, others=lambda name: _Inert)


def weights_of(content: dict, path: str | Path) -> StateDict:
    """A toolchain model's state dict in a checkpoint.

    Raises:
        UserError: it holds none.
    """
    state = content.get("state_dict", content)
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        keys = ", ".join(map(str, list(content)[:8]))
        raise UserError(f"{path}: holds no weights under 'state_dict' and is no state dict; its keys are {keys}")
    return {key.removeprefix("module."): value for key, value in state.items()}
