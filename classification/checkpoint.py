"""Checkpoints: read safely, load strictly, save atomically."""

import os
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from classification.errors import UserError
from classification.models import VARIANTS, SpatialMamba

# What stands in for the name in a pickle: the safe unpickler fills no subclass of dict but this one.
CFG_NODE = (OrderedDict, "yacs.config.CfgNode")
HEAD = ("head.weight", "head.bias")
StateDict = dict[str, Tensor]


def read_checkpoint(path: str | Path) -> dict:
    """The content of a checkpoint file, on the CPU, unpickling nothing but tensors and containers.

    A yacs CfgNode, as in the published checkpoints, is read as an OrderedDict.

    Raises:
        UserError: no such file, or not a checkpoint that can be read safely.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        with torch.serialization.safe_globals([CFG_NODE]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no checkpoint can fail anywhere in the unpickler
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(path) if _is_torch_zip(path) else []
        refused = [name for name in refused if name != CFG_NODE[1]]
        if refused:
            reason = f"holds pickled objects, which are not loaded for safety: {', '.join(refused[:5])}"
        else:
            reason = "is not a checkpoint saved by torch.save, or is damaged"
        raise UserError(f"{path}: {reason}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint or state dict")
    return content


def state_dicts(content: dict, path: str | Path) -> dict[str, StateDict]:
    """The weights in a checkpoint: `model`, and `model_ema` if there; a bare state dict counts as `model`.

    Raises:
        UserError: there are no weights.
    """
    named = {key: content[key] for key in ("model", "model_ema") if isinstance(content.get(key), dict)}
    if not named and all(isinstance(value, Tensor) for value in content.values()):
        named = {"model": content}
    if "model" not in named:
        keys = ", ".join(map(str, list(content)[:8]))
        raise UserError(f"{path}: holds no weights under 'model' and is no state dict; its keys are {keys}")
    for key, value in (item for state in named.values() for item in state.items()):
        if not (isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided):
            raise UserError(f"{path}: its weights hold {key!r}, which is not a name and a dense tensor")
    return named


def num_classes(state: StateDict) -> int | None:
    """Size of the head in a state dict, or None without one."""
    weight = state.get("head.weight")
    return weight.shape[0] if weight is not None and weight.ndim == 2 else None


def load_weights(model: SpatialMamba, state: StateDict, path: str | Path, new_head: bool = False) -> bool:
    """Load strictly. With `new_head`, a head of another size is left as initialised; returns whether it was.

    Raises:
        UserError: keys or shapes differ; the message says how and, if one of our sizes fits, which.
    """
    own = model.state_dict()
    theirs, ours = num_classes(state), num_classes(own)
    other_head = theirs != ours
    if other_head and not _differences(own, state, ignore=HEAD):
        if not new_head:
            raise UserError(
                f"{path}: its head has {theirs or 'no'} classes, but {ours} are wanted; "
                "use data with its classes, or fine-tune it (--finetune puts a new head in place)"
            )
        state = {**state, **{key: own[key] for key in HEAD}}
    if differences := _differences(own, state):
        raise UserError(f"{path}: its weights are of another model: {differences}{_hint(state)}")
    model.load_state_dict(state)
    return other_head


def save_checkpoint(content: dict, path: Path) -> None:
    """Write whole or not at all: to a file beside it, flushed to disk, then renamed over `path`.

    Raises:
        UserError: the file cannot be written, or the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _is_torch_zip(path: Path) -> bool:
    try:
        torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # whatever a damaged file raises, the answer is no
        return False
    return True


def _differences(own: StateDict, state: StateDict, ignore: tuple[str, ...] = ()) -> str:
    missing = [key for key in own if key not in state and key not in ignore]
    unexpected = [key for key in state if key not in own and key not in ignore]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and key not in ignore and state[key].shape != own[key].shape
    ]
    parts = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    return "; ".join(parts)


def _hint(state: StateDict) -> str:
    for name, sizes in VARIANTS.items():
        with torch.device("meta"):
            candidate: nn.Module = SpatialMamba(num_classes=num_classes(state) or 0, **sizes)
        if not _differences(candidate.state_dict(), state):
            return f"; it is a {name}, pass that model's --cfg"
    return ""
