"""Checkpoints: read safely, load strictly, save atomically, and find the last whole one of a run."""

import fcntl
import hashlib
import os
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from classification.errors import UserError
from classification.models import VARIANTS, SpatialMamba

LATEST, BEST, BEST_EMA = "latest.pth", "best.pth", "best_ema.pth"
SAFETENSORS, DAMAGED = ".safetensors", ".damaged"
# What stands in for the name in a pickle: the safe unpickler fills no subclass of dict but this one.
CFG_NODE = (OrderedDict, "yacs.config.CfgNode")
HEAD = ("head.weight", "head.bias")
StateDict = dict[str, Tensor]
StandIn = tuple[object, str]


class DamagedCheckpointError(UserError):
    """A file that is not what was written."""


def read_checkpoint(
    path: str | Path,
    map_location: str | torch.device = "cpu",
    stand_ins: Sequence[StandIn] = (CFG_NODE,),
    others: Callable[[str], object] | None = None,
) -> dict:
    """The content of a checkpoint file, unpickling nothing but tensors and containers.

    A yacs CfgNode, as in the published checkpoints, is read as an OrderedDict. What torch.save has written carries
    checksums, which are compared. A .safetensors file is read as a bare state dict, and its digest compared if it has
    one (see `classification.convert`).

    Args:
        path: the file.
        map_location: where the tensors go.
        stand_ins: what takes the place of further names in the pickle, which may then be called with what it holds.
        others: gives that for a name which is not among these; without it such a name is an error.

    Raises:
        UserError: no such file, or not a checkpoint that can be read safely.
        DamagedCheckpointError: truncated, altered, or no checkpoint at all.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    if path.suffix == SAFETENSORS:
        return _read_safetensors(path)
    _compare_checksums(path)
    known = [name for _, name in stand_ins]
    refused = [name for name in _unsafe_names(path) if name not in known]
    if others is not None:
        stand_ins = [*stand_ins, *((others(name), name) for name in refused)]
    try:
        with torch.serialization.safe_globals(list(stand_ins)):
            content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a file that is no checkpoint can fail anywhere in the unpickler
        if refused:
            names = ", ".join(refused[:5])
            raise UserError(f"{path}: holds pickled objects, which are not loaded for safety: {names}") from error
        raise _damaged(path) from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint or state dict")
    return content


def _damaged(path: Path) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{path}: is not a checkpoint saved by torch.save, or is damaged")


def _compare_checksums(path: Path) -> None:
    """torch.load does not; a bit that has flipped would be another weight."""
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":  # PyTorch's format before 1.6 has no checksums
                return
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    try:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
    except Exception as error:  # a damaged directory can send zipfile anywhere
        raise _damaged(path) from error
    if altered:
        raise DamagedCheckpointError(f"{path}: is damaged: {altered} in it does not match its checksum")


def tensors_digest(tensors: StateDict) -> str:
    """SHA-256 of names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_safetensors(path: Path) -> StateDict:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            digest = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}: is not a safetensors file, or is damaged ({error})") from error
    if digest is not None and digest != tensors_digest(tensors):
        raise DamagedCheckpointError(f"{path}: is damaged: its tensors do not match its digest")
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


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
        dense = isinstance(value, Tensor) and value.layout == torch.strided
        if not (isinstance(key, str) and dense and not value.is_quantized and not value.is_meta):
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
    if other_head and not differences(own, state, ignore=HEAD):
        if not new_head:
            raise UserError(
                f"{path}: its head has {theirs or 'no'} classes, but {ours} are wanted; "
                "use data with its classes, or fine-tune it (--finetune puts a new head in place)"
            )
        state = {**state, **{key: own[key] for key in HEAD}}
    if found := differences(own, state):
        raise UserError(f"{path}: its weights are of another model: {found}{_hint(state)}")
    model.load_state_dict(state)
    return other_head


def like(own: Tensor, value: object, name: str) -> Tensor:
    """What a file holds for `own`, as a new tensor of its layout, dtype and device.

    A file's tensor can have any strides, overlapping ones too, or be no ordinary tensor at all.

    Raises:
        ValueError: not of its shape, not dense, not of its kind of number, or not finite.
    """
    if fault := _fault(value):
        raise ValueError(f"{name} {fault}")
    if value.shape != own.shape and not value.numel() == own.numel() == 1:
        raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(own.shape)}")
    if value.is_floating_point() != own.is_floating_point():
        raise ValueError(f"{name} is of dtype {_name(value.dtype)}, not {_name(own.dtype)}")
    result = torch.empty_like(own, requires_grad=False).copy_(value.detach().reshape(own.shape))
    if result.is_floating_point() and not result.isfinite().all():
        raise ValueError(f"{name} is not finite")
    return result


def _fault(value: object) -> str:
    """What keeps `value` from being a weight or a count; empty if nothing does."""
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}, not a tensor"
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        return "is not a dense tensor"
    if value.is_meta:
        return "is a tensor without values (on the meta device)"
    if value.is_complex() or value.dtype == torch.bool:
        return f"is of dtype {_name(value.dtype)}, not of floating point"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write whole or not at all: to a file beside it, flushed to disk, then renamed over `path`.

    Raises:
        UserError: the file cannot be written, or the disk is full.
    """
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save covers it with one of its own
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: cannot be written ({cause})") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def save_checkpoint(content: dict, path: Path) -> None:
    """`torch.save` that writes whole or not at all; see `write_atomically`."""
    write_atomically(path, lambda file: torch.save(content, file))


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _flush_folder(folder: Path) -> None:
    """Make a rename outlast a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ----- the checkpoints of a run: epoch_E.pth after E epochs, epoch_E_step_S.pth S batches further, and names for some


class CheckpointFolder:
    """The checkpoints in a run's folder.

    Each is written once, as epoch_E.pth or epoch_E_step_S.pth; latest.pth, best.pth and best_ema.pth are further names
    of one of them (hard links, or copies where the file system has none). `keep` numbered ones are kept.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.set_aside: list[str] = []  # what was found damaged

    def numbered(self) -> list[Path]:
        """The numbered ones in the order in which they were written: a run may have gone on from an earlier one."""
        found = [p for p in self.folder.glob("epoch_*.pth") if re.fullmatch(r"epoch_\d+(_step_\d+)?\.pth", p.name)]
        return sorted(filter(Path.is_file, found), key=lambda path: path.stat().st_mtime_ns)

    def save(self, content: dict, epochs: int, step: int, names: list[str]) -> Path:
        """Write a checkpoint and give it `names`; then remove the oldest ones.

        Raises:
            UserError: it cannot be written; what was there stays.
        """
        path = self.folder / (f"epoch_{epochs}_step_{step}.pth" if step else f"epoch_{epochs}.pth")
        save_checkpoint(content, path)
        for name in names:
            self._name(path, self.folder / name)
        for old in self.numbered()[: -self.keep]:
            if old != path:  # a clock can be behind
                old.unlink()
        return path

    def _name(self, path: Path, name: Path) -> None:
        partial = _partial(name)
        partial.unlink(missing_ok=True)
        try:
            try:
                os.link(path, partial)
            except OSError:
                shutil.copyfile(path, partial)
            partial.replace(name)
            _flush_folder(self.folder)
        except OSError as error:
            raise UserError(f"{name}: cannot be written ({error})") from error

    def lock(self) -> None:
        """Keep other runs out of the folder for as long as this process lives, where the file system has locks.

        Raises:
            UserError: another process has done so.
        """
        try:
            self.lock_file = (self.folder / ".lock").open("a")
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"{self.folder}: another process is training in it, or it is not yours to write; wait for that one to "
                "end, or pass another --tag"
            ) from error
        except OSError:
            return

    def remove_partial(self) -> None:
        """What a killed process left half-written."""
        for path in self.folder.glob(".*.partial"):
            path.unlink(missing_ok=True)

    def exists(self) -> bool:
        """Whether there are any, be they damaged: a run that has begun."""
        return bool(self.numbered()) or (self.folder / LATEST).is_file() or any(self.folder.glob(f"*{DAMAGED}*"))

    def read_last(self, check: Callable[[dict, Path], object]) -> tuple[dict, Path]:
        """The newest checkpoint that is whole and passes `check`.

        A damaged one is renamed to NAME.damaged and noted in `set_aside`.

        Raises:
            UserError: none is whole; or what `check` raises on one that is.
        """
        for path in [self.folder / LATEST, *reversed(self.numbered())]:
            if not path.is_file():
                continue
            try:
                content = read_checkpoint(path)
                check(content, path)
                return content, path
            except DamagedCheckpointError as error:
                self.set_aside.append(f"{error}; set aside as {_set_aside(path).name}")
        found = "; ".join(self.set_aside) or ", ".join(sorted(f.name for f in self.folder.glob(f"*{DAMAGED}*")))
        raise UserError(
            f"{self.folder}: no checkpoint is whole, so training cannot go on; pass another --tag to start over, or "
            f"--resume CKPT to go on from a checkpoint elsewhere ({found})"
        )


def _set_aside(path: Path) -> Path:
    """Rename to NAME.damaged, or with a number after it if that is taken."""
    names = (path.with_name(f"{path.name}{DAMAGED}{i or ''}") for i in count())
    aside = next(name for name in names if not name.exists())
    try:
        path.replace(aside)
    except OSError as error:
        raise UserError(f"{path}: is damaged, and cannot be set aside ({error})") from error
    return aside


def _unsafe_names(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # whatever a damaged file raises, torch.load says it too
        return []


def differences(own: StateDict, state: StateDict, ignore: tuple[str, ...] = ()) -> str:
    """What differs in names and shapes, for a message; empty if nothing does."""
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
    name = variant_of(state)
    return f"; it is a {name}, pass that model's --cfg" if name else ""


def variant_of(state: StateDict) -> str | None:
    """Which of `VARIANTS` a classifier's or a backbone's weights are."""

    def trunk(names: StateDict) -> StateDict:
        return {k: v for k, v in names.items() if k.startswith(("patch_embed.", "layers."))}

    for name, sizes in VARIANTS.items():
        with torch.device("meta"):
            candidate = SpatialMamba(num_classes=0, **sizes)
        if not differences(trunk(candidate.state_dict()), trunk(state)):
            return name
    return None
