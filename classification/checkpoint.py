"""Checkpoint files: read safely, load strictly, save atomically. Those of a run are in `checkpoint_folder.py`."""

import hashlib
import json
import logging
import os
import pickle
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from classification.checkpoint_archive import (
    DamagedCheckpointError,
    check_archive,
    damaged,
    first_line,
    is_momentary,
    unreadable_now,
    unsafe_names,
)
from classification.digests import DIGESTS, changed_parts, digests_of
from classification.errors import UserError, check_utf8, is_file, printable
from classification.models import VARIANTS, SpatialMamba

logger = logging.getLogger("spatialmamba")

COUNT = "num_batches_tracked"  # of a batch norm
CLASSES = "classes"  # names, in the order of the head
SAFETENSORS = ".safetensors"
# The stand-in for CfgNode in a pickle: OrderedDict is the only subclass of dict that the safe unpickler fills.
CFG_NODE = (OrderedDict, "yacs.config.CfgNode")
HEAD = ("head.weight", "head.bias")
StateDict = dict[str, Tensor]
StandIn = tuple[object, str]


def read_checkpoint(
    path: str | Path,
    map_location: str | torch.device = "cpu",
    stand_ins: Sequence[StandIn] = (CFG_NODE,),
    others: Callable[[str], object] | None = None,
    warn: Callable[[str], object] = logger.warning,
) -> dict:
    """Read a checkpoint file; unpickle only tensors and containers.

    A yacs CfgNode, as in the published checkpoints, becomes a dict, as does every other subclass of dict. Files of
    torch.save carry checksums, which are compared; of our checkpoints, digests of the parts too, and a part that was
    changed and saved again is a warning. No object becomes larger than the data that the file holds for it. A
    .safetensors file is read as a bare state dict; or, if it also holds the names of its classes or a config, as
    {"model": state dict, "classes": names, "config": text}. If it has a digest (see `classification.convert`), the
    digest is compared.

    Args:
        path: the file.
        map_location: where the tensors go.
        stand_ins: replacements for further names in the pickle; the pickle may call each with arguments of its choice.
        others: returns the replacement for any other name; without it such a name is an error.
        warn: receives the warning, once for each file.

    Raises:
        UserError: the file is missing, cannot be read now, or is not a checkpoint that can be read safely.
        DamagedCheckpointError: the file is truncated, altered, or no checkpoint at all.
    """
    path = Path(path)
    if not is_file(path):
        is_address = re.match(r"(?!file:)\w\w+:/", str(path))  # of whose two slashes Path leaves one
        raise UserError(f"{path}: no such checkpoint file" + "; download it first" * bool(is_address))
    try:
        return _read_file(path, map_location, stand_ins, others, warn)
    except DamagedCheckpointError:  # a damaged file fails twice; a disk or a network may fail once
        return _read_file(path, map_location, stand_ins, others, warn)


def _read_file(
    path: Path,
    map_location: str | torch.device,
    stand_ins: Sequence[StandIn],
    others: Callable[[str], object] | None,
    warn: Callable[[str], object],
) -> dict:
    with _reading(path):
        if path.suffix == SAFETENSORS:
            return _read_safetensors(path)
        has_checksums = check_archive(path)
        known = [name for _, name in stand_ins]
        refused = [name for name in unsafe_names(path) if name not in known]
        if others is not None:
            stand_ins = [*stand_ins, *((others(name), name) for name in refused)]
        try:
            with torch.serialization.safe_globals(list(stand_ins)), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about other pickle protocols, which can be read
                content = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # a file that is no checkpoint can fail anywhere in the unpickler
            if is_momentary(error):
                raise
            if refused:
                names = ", ".join(refused[:5])
                raise UserError(f"{path}: holds pickled objects, which are not loaded for safety: {names}") from error
            if has_checksums:  # undamaged, but not a checkpoint that can be read
                raise UserError(f"{path}: is not a checkpoint that can be read ({_refusal(error)})") from error
            raise damaged(path) from error
        content = plain(content, path, _without_attributes)
        if not isinstance(content, dict) or not content:
            raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint or state dict")
        if changed := changed_parts(content, path.stat().st_size):
            parts = printable(", ".join(changed))
            _warn_once(warn, f"{path}: a tool has changed what was saved in it ({parts}), so numbers may be others")
    content.pop(DIGESTS, None)
    return content


@cache
def _warn_once(warn: Callable[[str], object], message: str) -> None:
    warn(message)


def _refusal(error: Exception) -> str:
    """Return the cause that PyTorch's unpickler gives, without its advice to read the file unsafely."""
    cause = str(error).partition("WeightsUnpickler error:")[2].strip()
    return first_line(pickle.UnpicklingError(cause)) if cause else first_line(error)


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Turn a momentary error, which is no fault of the file, into a UserError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and not is_momentary(error):
            raise damaged(Path(path)) from error
        if isinstance(error, UserError) or not is_momentary(error):
            raise
        raise unreadable_now(path, error) from error


MOST_TIED = 64  # names for the same numbers, on average; a detector has one for each layer of its decoder
DEEPEST, MOST = 64, 10**7  # levels of containers; objects in them, where each object counts wherever it occurs


def plain(content: object, path: str | Path, leaf: Callable[[object], object] = lambda value: value) -> object:
    """Return `content` with every container as a plain dict, list or tuple, and `leaf(value)` for every other value.

    A subclass of dict can have attributes that replace its methods, or that load_state_dict obeys.

    Raises:
        UserError: containers are nested too deeply, or a few bytes stand for gigabytes of objects.
    """
    made: dict[int, tuple[object, int]] = {}

    def walk(value: object, depth: int) -> tuple[object, int]:
        if not isinstance(value, dict | list | tuple) or isinstance(value, torch.Size):
            return leaf(value), 1
        if id(value) not in made:
            if depth > DEEPEST:
                raise UserError(f"{path}: is nested too deeply to be a checkpoint")
            if isinstance(value, dict):
                found = {key: walk(item, depth + 1) for key, item in dict.items(value)}
                result = {key: item for key, (item, _) in found.items()}, 1 + sum(n for _, n in found.values())
            else:
                found = [walk(item, depth + 1) for item in value]
                kind = list if isinstance(value, list) else tuple
                result = kind(item for item, _ in found), 1 + sum(n for _, n in found)
            if result[1] > MOST:
                raise UserError(f"{path}: comes to more than {MOST} things, which no checkpoint holds")
            made[id(value)] = result
        return made[id(value)]

    return walk(content, 0)[0]


def _without_attributes(value: object) -> object:
    """Return a tensor without its attributes and names of dimensions; any other value as it is.

    Attributes of a tensor can replace its methods, and few methods work on a tensor with named dimensions.
    """
    if not isinstance(value, Tensor):
        return value
    return Tensor.detach(Tensor.rename(value, None) if Tensor.has_names(value) else value)


def tensors_digest(tensors: StateDict, text: str = "") -> str:
    """Return the SHA-256 of `text` (class names and config) and of the tensors' names, shapes, dtypes and values."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].resolve_neg().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_safetensors(path: Path) -> dict:
    check_utf8(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            metadata = file.metadata() or {}
        _check_header(path)
    except (SafetensorError, ValueError) as error:
        raise DamagedCheckpointError(f"{path}: is not a safetensors file, or is damaged ({error})") from error
    digest, text = metadata.get("sha256"), metadata.get(CLASSES, "") + metadata.get("config", "")
    # The first version wrote the digest without the texts.
    if digest is not None and digest not in (tensors_digest(tensors, text), tensors_digest(tensors)):
        raise DamagedCheckpointError(f"{path}: is damaged: its tensors, classes or config do not match its digest")
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    if CLASSES not in metadata and "config" not in metadata:
        return tensors
    config = {"config": metadata["config"]} if "config" in metadata else {}
    try:
        return {"model": tensors, CLASSES: json.loads(metadata.get(CLASSES, "null")), **config}
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: its names of classes are not a JSON list ({error})") from error


def _check_header(path: Path) -> None:
    """Check that each name occurs once in a safetensors header, as its format demands; its reader takes the last.

    Raises:
        ValueError: a name occurs twice.
    """

    def once(pairs: list[tuple[str, object]]) -> dict:
        name, times = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 0)
        if times > 1:
            raise ValueError(f"its header has {name!r} {times} times")
        return dict(pairs)

    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=once)


def class_names_of(content: dict, path: str | Path) -> list[str] | None:
    """Return the names of a checkpoint's classes in the order of its head; None if it has none, as published ones.

    Raises:
        UserError: the names are not a list of different strings, or not as many as the head has classes.
    """
    names = content.get(CLASSES)
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
        raise UserError(f"{path}: its {CLASSES!r} is not a list of names, each of its own")
    classes = num_classes(content["model"]) if isinstance(content.get("model"), dict) else None
    if classes not in (None, len(names)):
        raise UserError(f"{path}: its {CLASSES!r} has {len(names)} names, but its head has {classes} classes")
    return names


def state_dicts(content: dict, path: str | Path) -> dict[str, StateDict]:
    """Return the weights in a checkpoint: `model`, and `model_ema` if present; a bare state dict counts as `model`.

    Raises:
        UserError: there are no weights, or they are not dense tensors of real numbers.
    """
    named = {key: content[key] for key in ("model", "model_ema") if isinstance(content.get(key), dict)}
    if not named.get("model_ema"):  # it may be empty
        named.pop("model_ema", None)
    if "model" in named and not isinstance(content.get("model_ema"), dict | None):
        raise UserError(f"{path}: its 'model_ema' is of type {type(content['model_ema']).__name__}, not weights")
    if not named and all(isinstance(value, Tensor) for value in content.values()):
        named = {"model": content}
    if "model" not in named:
        keys = ", ".join(map(str, list(content)[:8]))
        raise UserError(f"{path}: holds no weights under 'model' and is no state dict; its keys are {keys}")
    if not named["model"]:
        raise UserError(f"{path}: its 'model' holds no weights")
    for state in named.values():
        check_weights(state, path)
    return named


def check_weights(state: dict, path: str | Path, counts: str = COUNT, tied: bool = False) -> None:
    """Check that a state dict holds usable weights.

    Args:
        counts: how the names of the tensors of whole numbers end. A layer's `.weight` and `.bias` are none.
        tied: whether several names may share the same numbers, as in the heads of some detectors.

    Raises:
        UserError: an entry is not a name and a dense tensor of finite real numbers, or is larger than the data that the
            file holds for it.
    """
    held: dict[int, int] = {}
    claimed = 0
    for key, value in state.items():
        fault = _fault(value) if isinstance(key, str) and key.isprintable() else "is not a name"
        if not fault and not value.is_floating_point() and not _is_count(key, value, state, counts):
            fault = f"is of dtype {_dtype_name(value.dtype)}, not of floating point"
        if fault:
            raise UserError(f"{path}: its weights hold {key!r}, which {fault}")
        storage = value.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        size = value.numel() * value.element_size()
        if tied and size > storage.nbytes():
            raise UserError(f"{path}: its weights hold {key!r}, which claims {size} bytes of {storage.nbytes()}")
        claimed += size
    if claimed > sum(held.values()) * (MOST_TIED if tied else 1):
        raise UserError(f"{path}: its weights claim {claimed} bytes, of which the file holds {sum(held.values())}")
    with _reading(path):  # copies of the largest weights may be too much for the memory that is left
        for key, value in state.items():
            if not _finite(value.float() if value.is_floating_point() else value):  # the numbers of a model
                if key.endswith(COUNT):  # .half() on all tensors
                    kind = _dtype_name(value.dtype)
                    raise UserError(f"{path}: {key!r} is a count that {kind} cannot hold; convert only the weights")
                raise UserError(f"{path}: its weights hold {key!r}, which is not finite; they are not usable")
            if key.endswith("running_var") and (value.float() < 0).any():  # float8 has no comparison
                raise UserError(f"{path}: its weights hold {key!r}, a variance below 0; they are not usable")


def _is_count(key: str, value: Tensor, state: StateDict, counts: str) -> bool:
    """Return whether an entry may be of whole numbers. A loss can keep such weights in a `weight` without `bias`."""
    layer, _, name = key.rpartition(".")
    if name in ("weight", "bias") and {f"{layer}.weight", f"{layer}.bias"} <= state.keys():
        return False
    return (
        key.endswith(counts)
        and not {name, ".".join(key.split(".")[-2:])} & NO_COUNTS
        and not (name == "weight" and value.ndim > 1)
    )


NO_COUNTS = {"A_logs", "Ds", "dt_projs_bias", "dt_projs_weight", "x_proj_weight"}  # of our blocks
NO_COUNTS |= {"kernel_3", "kernel_3_1", "kernel_3_2", "state_fusion.alpha"}
NO_COUNTS |= {"in_proj_bias", "in_proj_weight", "running_mean", "running_var"}  # of PyTorch's layers


def num_classes(state: StateDict) -> int | None:
    """Return the number of classes of the head in a state dict, or None without a head."""
    weight = state.get("head.weight")
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else None


def load_weights(
    model: SpatialMamba, state: StateDict, path: str | Path, new_head: bool = False, other_classes: bool = False
) -> bool:
    """Load weights strictly. With `new_head`, keep the model's head if the file's has another size or other classes.

    Returns:
        Whether the model kept its own head.

    Raises:
        UserError: keys or shapes differ; the message says how they differ and which of our sizes fits, if any.
    """
    own = model.state_dict()
    theirs, ours = num_classes(state), num_classes(own)
    other_head = theirs != ours or (new_head and other_classes)
    if other_head and not differences(own, state, ignore=HEAD):
        if not new_head:
            raise UserError(
                f"{path}: its head has {theirs or 'no'} classes, but {ours} are wanted; "
                "use data with its classes, or fine-tune it (--finetune puts a new head in place)"
            )
        state = {**state, **{key: own[key] for key in HEAD}}
    if found := differences(own, state):
        raise UserError(f"{path}: its weights are of another model: {found}{_hint(state)}")
    with _reading(path):
        try:
            # A plain dict, without the file's _metadata.
            weights = {key: in_layout_of(value, state[key], key) for key, value in own.items()}
        except ValueError as error:
            raise UserError(f"{path}: its weights hold what is no weight: {error}") from error
    model.load_state_dict(weights)
    return other_head


def in_layout_of(own: Tensor, value: object, name: str) -> Tensor:
    """Copy `value`, which a file holds for `own`, to a new tensor of the layout, dtype and device of `own`.

    A tensor in a file can have any strides, even overlapping ones, or be no ordinary tensor at all. Whole numbers of
    floating point become integers: whoever calls `.half()` or `.double()` on all tensors converts the counts of batch
    norms too.

    Raises:
        ValueError: `value` has another shape or kind of number than `own`, or is not dense or not finite.
    """
    if fault := _fault(value):
        raise ValueError(f"{name} {fault}")
    if value.shape != own.shape and not value.numel() == own.numel() == 1:
        raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(own.shape)}")
    if value.is_floating_point() != own.is_floating_point() and not (value.is_floating_point() and _whole(value)):
        raise ValueError(f"{name} is of dtype {_dtype_name(value.dtype)}, not {_dtype_name(own.dtype)}")
    result = torch.empty_like(own, requires_grad=False).copy_(value.detach().reshape(own.shape))
    if not _finite(result):
        raise ValueError(f"{name} is not finite")
    return result


def moment_like(own: Tensor, value: object, name: str) -> Tensor:
    """Copy an optimizer's moment or step count from a file, as `in_layout_of` does.

    Raises:
        ValueError: as there, or `value` is of a coarser dtype than `own`. Means of squared gradients are far below what
            float16 holds, and after a mean of 0 the next update is a leap.
    """
    result = in_layout_of(own, value, name)
    if is_coarser(value.dtype, own.dtype):
        there, here = _dtype_name(value.dtype), _dtype_name(own.dtype)
        raise ValueError(f"{name} is of dtype {there}, which loses small numbers of {here}")
    return result


def is_coarser(dtype: torch.dtype, than: torch.dtype) -> bool:
    """Return whether `dtype` rounds the numbers of `than`, or holds fewer small ones."""
    if not (dtype.is_floating_point and than.is_floating_point):
        return False
    there, here = torch.finfo(dtype), torch.finfo(than)
    return there.eps > here.eps or there.tiny > here.tiny


def rounded_weights(own: StateDict, state: StateDict) -> str:
    """Say that training goes on from weights that a file rounds; "" if it goes on from those that it had."""
    coarser = [value.dtype for name, value in state.items() if name in own and is_coarser(value.dtype, own[name].dtype)]
    if not coarser:
        return ""
    return f"its weights are rounded to {_dtype_name(coarser[0])}, so training does not go on as it would have"


def squares_are_lost(mean: Tensor, square: Tensor) -> bool:
    """Return whether a mean of squared gradients is 0 beside a mean of gradients that is not, as after float16."""
    return bool(((square == 0) & (mean.abs() > 1e-6)).any())


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return True
    return bool((value if value.element_size() > 1 else value.float()).isfinite().all())


def _whole(value: Tensor) -> bool:
    value = value.double()  # float8 cannot be rounded
    return bool(((value.abs() < 2**62) & (value == value.round())).all())


def _fault(value: object) -> str:
    """Say why `value` cannot be a weight or a count; "" if it can."""
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}, not a tensor"
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        return "is not a dense tensor"
    if value.is_meta:
        return "is a tensor without values (on the meta device)"
    if value.is_complex() or value.dtype == torch.bool:
        return f"is of dtype {_dtype_name(value.dtype)}, not of floating point"
    if _dtype_name(value.dtype).startswith("float4"):
        return f"is of dtype {_dtype_name(value.dtype)}, which PyTorch cannot convert"
    return ""


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a whole file or nothing: write to a file beside `path`, flush it to disk, then rename it to `path`.

    Raises:
        UserError: the file cannot be written, or the disk is full.
    """
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind its own error
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: cannot be written ({cause})") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def save_checkpoint(content: dict, path: Path) -> None:
    """Save like `torch.save`, with digests of the parts; write the whole file or nothing; see `write_atomically`."""
    content = {**content, DIGESTS: digests_of(content)}
    write_atomically(path, lambda file: torch.save(content, file))


def partial_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def flush_folder(folder: Path) -> None:
    """Make a rename outlast a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def differences(own: StateDict, state: StateDict, ignore: tuple[str, ...] = ()) -> str:
    """Describe, for a message, how names and shapes differ; "" if they do not."""
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


def variant_of(state: StateDict, in_chans: int = 3) -> str | None:
    """Return the name in `VARIANTS` that a classifier's or backbone's weights fit, for `in_chans` channels, or None."""

    def trunk(names: StateDict) -> StateDict:
        return {k: v for k, v in names.items() if k.startswith(("patch_embed.", "layers."))}

    for name, sizes in VARIANTS.items():
        with torch.device("meta"):
            candidate = SpatialMamba(in_chans, num_classes=0, **sizes)
        if not differences(trunk(candidate.state_dict()), trunk(state)):
            return name
    return None
