"""The published layout, golden values, and the weights and images they were made with.

A tensor's values follow from its name and shape through NumPy's legacy generator, whose stream is frozen. The recipe
is the one that `golden_tiny.npz` was made with.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
LAYOUT = json.loads((DATA / "checkpoint_layout.json").read_text())  # name and shape of every state-dict entry
GOLDEN = np.load(DATA / "golden_tiny.npz")

# (scale, offset) of a standard normal, by the last part of the name
BY_NAME = {
    "running_mean": (0.1, 0.0),
    "A_logs": (0.3, 0.0),
    "Ds": (0.2, 1.0),
    "alpha": (0.2, 0.5),
    "kernel_3": (0.15, 0.15),
    "kernel_3_1": (0.15, 0.15),
    "kernel_3_2": (0.15, 0.15),
    "dt_projs_bias": (0.5, -2.0),
}


def fill(model: nn.Module) -> nn.Module:
    """Set every parameter and floating-point buffer in place; returns the model."""
    state = {k: _values(k, v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model


def image(batch: int, height: int, width: int, seed: int = 7) -> Tensor:
    """Standard normal images (batch, 3, height, width)."""
    normal = np.random.RandomState(seed).standard_normal((batch, 3, height, width))
    return torch.from_numpy(normal.astype(np.float32))


def _values(key: str, like: Tensor) -> Tensor:
    generator = np.random.RandomState(zlib.crc32(key.encode()))
    normal = torch.from_numpy(np.asarray(generator.standard_normal(tuple(like.shape)), dtype=np.float32))
    leaf = key.rpartition(".")[2]
    if leaf == "running_var":
        return 1 + 0.2 * normal.abs()
    if leaf in BY_NAME:
        scale, offset = BY_NAME[leaf]
    elif like.ndim == 1:
        scale, offset = (0.2, 1.0) if leaf == "weight" else (0.1, 0.0)
    else:
        scale, offset = like[0].numel() ** -0.5, 0.0
    return scale * normal + offset
