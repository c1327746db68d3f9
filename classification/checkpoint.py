"""Checkpoints: read safely, load strictly, save atomically, and find a run's last undamaged checkpoint."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO, TextIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from classification.errors import UserError, is_file
from classification.models import VARIANTS, SpatialMamba
from classification.pickles import RefusedPickleError, Scan

logger = logging.getLogger("spatialmamba")

LATEST, BEST, BEST_EMA = "latest.pth", "best.pth", "best_ema.pth"
ORDER_FILE = "checkpoints.txt"
CLASSES = "classes"  # names, in the order of the head
SAFETENSORS, DAMAGED, REPLACED = ".safetensors", ".damaged", ".replaced"
# The stand-in for CfgNode in a pickle: OrderedDict is the only subclass of dict that the safe unpickler fills.
CFG_NODE = (OrderedDict, "yacs.config.CfgNode")
HEAD = ("head.weight", "head.bias")
StateDict = dict[str, Tensor]
StandIn = tuple[object, str]


class DamagedCheckpointError(UserError):
    """A file that provably differs from the file that was written."""


def read_checkpoint(
    path: str | Path,
    map_location: str | torch.device = "cpu",
    stand_ins: Sequence[StandIn] = (CFG_NODE,),
    others: Callable[[str], object] | None = None,
) -> dict:
    """Read a checkpoint file; unpickle only tensors and containers.

    A yacs CfgNode, as in the published checkpoints, becomes a dict, as does every other subclass of dict. Files of
    torch.save carry checksums, which are compared. No object becomes larger than the data that the file holds for it. A
    .safetensors file is read as a bare state dict; or, if it also holds the names of its classes or a config, as
    {"model": state dict, "classes": names, "config": text}. If it has a digest (see `classification.convert`), the
    digest is compared.

    Args:
        path: the file.
        map_location: where the tensors go.
        stand_ins: replacements for further names in the pickle; the pickle may call each with arguments of its choice.
        others: returns the replacement for any other name; without it such a name is an error.

    Raises:
        UserError: the file is missing, cannot be read now, or is not a checkpoint that can be read safely.
        DamagedCheckpointError: the file is truncated, altered, or no checkpoint at all.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"{path}: no such checkpoint file")
    with _reading(path):
        if path.suffix == SAFETENSORS:
            return _read_safetensors(path)
        has_checksums = _check_archive(path)
        known = [name for _, name in stand_ins]
        refused = [name for name in _unsafe_names(path) if name not in known]
        if others is not None:
            stand_ins = [*stand_ins, *((others(name), name) for name in refused)]
        try:
            with torch.serialization.safe_globals(list(stand_ins)), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about other pickle protocols, which can be read
                content = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # a file that is no checkpoint can fail anywhere in the unpickler
            if _is_momentary(error):
                raise
            if refused:
                names = ", ".join(refused[:5])
                raise UserError(f"{path}: holds pickled objects, which are not loaded for safety: {names}") from error
            if has_checksums:  # undamaged, but not a checkpoint that can be read
                raise UserError(f"{path}: is not a checkpoint that can be read ({_first_line(error)})") from error
            raise _damaged(path) from error
        content = plain(content, path, _without_attributes)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint or state dict")
    return content


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn a momentary error, which is no fault of the file, into a UserError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not _is_momentary(error):
            raise
        raise UserError(f"{path}: cannot be read now ({_first_line(error)}); it was left as it is") from error


def _is_momentary(error: BaseException | None) -> bool:
    """Return whether memory, the disk or the network caused the error.

    EINVAL does not count: the system reports EINVAL when a damaged file holds wrong offsets.
    """
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


_NO_MEMORY = ("DefaultCPUAllocator", "allocate memory", "CUDA out of memory")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _damaged(path: Path) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{path}: is not a checkpoint saved by torch.save, or is damaged")


def _check_archive(path: Path) -> bool:
    """Compare the checksums, which torch.load ignores, and the claimed sizes with the data.

    A flipped bit would be another weight.

    Returns:
        Whether the file has checksums. PyTorch's format before 1.6 has none.

    Raises:
        DamagedCheckpointError: a checksum or a size does not match.
        UserError: the file is packed as torch.save does not pack it, or without checksums.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            _check_old_format(path)
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if packing := _packing(path, archive):
                raise UserError(
                    f"{path}: is an archive {packing}, as torch.save does not pack it; if you trust it, "
                    "torch.save(torch.load(CKPT, weights_only=True), CKPT) packs it anew"
                )
            names = {entry.filename.lower() for entry in entries}  # as PyTorch's reader takes them
            claimed = sum(entry.file_size for entry in entries)
            odd = [e for e in entries if e.external_attr & DIRECTORY or e.compress_size != e.file_size]
            crowded = len(names) < len(entries) or claimed > path.stat().st_size
            if odd or crowded or not _has_one_directory(path, archive):
                raise DamagedCheckpointError(
                    f"{path}: is packed as torch.save does not, or damaged: its directory is not that of what it holds"
                )
            if entries and not any(entry.CRC for entry in entries):
                raise UserError(
                    f"{path}: was saved without checksums (torch.serialization.set_crc32_options), so it cannot be "
                    "told whether it is whole; if you trust it, torch.save(torch.load(CKPT, weights_only=True), CKPT) "
                    "adds them"
                )
            corrupt = archive.testzip()
    except Exception as error:  # a damaged directory can send zipfile anywhere
        if isinstance(error, UserError) or _is_momentary(error):
            raise
        raise _damaged(path) from error
    if corrupt:
        raise DamagedCheckpointError(f"{path}: is damaged: {corrupt} in it does not match its checksum")
    _check_claims(path, entries)
    return True


def _packing(path: Path, archive: zipfile.ZipFile) -> str:
    """Say how a tool has packed the archive anew; "" if no tool has.

    The header of each entry must agree with the directory; otherwise the directory is damaged.

    Raises:
        DamagedCheckpointError: an entry's header and the directory disagree.
    """
    packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED or _encrypted(entry)]
    with path.open("rb") as file:
        for entry in packed:
            file.seek(entry.header_offset + 6)  # flags and method in the entry's own header
            flags, method = (int.from_bytes(file.read(2), "little") for _ in range(2))
            if (flags & ENCRYPTED, method) != (_encrypted(entry), entry.compress_type):
                raise _damaged(path)
    if packed:
        method = "deflated" if packed[0].compress_type == zipfile.ZIP_DEFLATED else "compressed"
        return f"whose entries are {'encrypted' if _encrypted(packed[0]) else method} ({packed[0].filename})"
    return "with a comment" if archive.comment else ""


ENCRYPTED = 1  # a bit of an entry's flags
DIRECTORY = 0x10  # a bit of an entry's attributes: PyTorch's reader does not fill a tensor's memory from such an entry


def _encrypted(entry: zipfile.ZipInfo) -> int:
    return entry.flag_bits & ENCRYPTED


END, END_64, LOCATOR_64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"  # where the last 22, 98 and 42 bytes begin


def _has_one_directory(path: Path, archive: zipfile.ZipFile) -> bool:
    """Return whether all readers find the same directory: it must end where the archive's end records begin."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 98))
        tail = file.read().rjust(98, b"\0")

    def number(at: int, length: int) -> int:
        return int.from_bytes(tail[at : at + length], "little")

    begins = size - 22
    entries, length, offset = number(-12, 2), number(-10, 4), number(-6, 4)
    if tail[-42:-38] == LOCATOR_64:
        begins = size - 98
        if tail[-98:-94] != END_64 or number(-34, 8) != begins:
            return False
        entries, length, offset = number(-66, 8), number(-58, 8), number(-50, 8)
    here = offset + length == begins and offset == archive.start_dir
    return tail[-22:-18] == END and here and entries == len(archive.infolist())


def _check_claims(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Scan the pickle that PyTorch's own reader finds, and compare the sizes that the pickle claims with the entries.

    Raises:
        UserError: the pickle is refused, or claims more bytes for a tensor than the file holds.
    """
    try:
        with path.open("rb") as file:
            reader = torch._C.PyTorchFileReader(file)
            names, pickled = reader.get_all_records(), reader.get_record("data.pkl")
    except (RuntimeError, ValueError) as error:
        if _is_momentary(error):
            raise
        if "reading zip archive" in str(error):  # the directory, which `zipfile` checks less strictly
            raise _damaged(path) from error
        raise UserError(f"{path}: is not a checkpoint that can be read ({_first_line(error)})") from error
    folder = entries[0].filename.partition("/")[0]
    sizes = {entry.filename: entry.file_size for entry in entries}
    if {f"{folder}/{name}" for name in names} != sizes.keys():
        raise UserError(f"{path}: is packed as torch.save does not: its entries are not in one folder")
    for key, size in _scan(pickled, len(pickled), path).storages.items():
        held = sizes.get(f"{folder}/data/{key}")
        if held != size:
            raise UserError(f"{path}: claims {size} bytes for a tensor of which it holds {held or 0}")


OLD_FORMAT = 0x1950A86A20F9469CFC6C  # its magic number
# Files of other kinds, which are not damaged: how they begin.
OTHER_KINDS = {
    "one packed by gzip, bzip2, xz, zstd or 7-Zip; unpack it": rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf",
    "a pointer of Git LFS; get the file itself by git lfs pull": rb"version https://git-lfs",
    "a safetensors file; let its name end in .safetensors": rb"(?s).{8}\{\"",
    "a page that a browser shows; download the file itself": rb"(?i)\s*<(!doctype|html)",
}


def _check_old_format(path: Path) -> None:
    """Check a file of PyTorch's format before 1.6.

    The file holds five pickles, then the storages. The fourth pickle is the content; the last names the storages.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if kind := next((kind for kind, begins in OTHER_KINDS.items() if re.match(begins, head)), None):
            raise UserError(f"{path}: is no checkpoint but {kind}")
        file.seek(0)
        try:
            if Scan(file, size).stack != [OLD_FORMAT]:
                raise ValueError("another magic number")
            claimed = sum(held for _ in range(4) for held in _scan(file, size, path).storages.values())
        except UserError:
            raise
        except Exception as error:
            if _is_momentary(error):
                raise
            raise _damaged(path) from error
    if claimed > size:
        raise _damaged(path)


def _scan(pickled: bytes | BinaryIO, size: int, path: Path) -> Scan:
    try:
        return Scan(pickled, size)
    except RefusedPickleError as error:
        raise UserError(f"{path}: holds pickled objects, which are not loaded for safety: {error}") from error
    except (IndexError, KeyError, ValueError) as error:
        raise _damaged(path) from error


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
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_safetensors(path: Path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            metadata = file.metadata() or {}
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
    if "model" in named and not isinstance(content.get("model_ema"), dict | None):
        raise UserError(f"{path}: its 'model_ema' is of type {type(content['model_ema']).__name__}, not weights")
    if not named and all(isinstance(value, Tensor) for value in content.values()):
        named = {"model": content}
    if "model" not in named:
        keys = ", ".join(map(str, list(content)[:8]))
        raise UserError(f"{path}: holds no weights under 'model' and is no state dict; its keys are {keys}")
    for state in named.values():
        check_weights(state, path)
    return named


def check_weights(state: dict, path: str | Path, counts: str = "num_batches_tracked", tied: bool = False) -> None:
    """Check that a state dict holds usable weights.

    Args:
        counts: how the names of the tensors of whole numbers end.
        tied: whether several names may share the same numbers, as in the heads of some detectors.

    Raises:
        UserError: an entry is not a name and a dense tensor of finite real numbers, or is larger than the data that the
            file holds for it.
    """
    held: dict[int, int] = {}
    claimed = 0
    for key, value in state.items():
        fault = _fault(value) if isinstance(key, str) and key.isprintable() else "is not a name"
        if not fault and not value.is_floating_point() and not key.endswith(counts):
            fault = f"is of dtype {_dtype_name(value.dtype)}, not of floating point"
        if fault:
            raise UserError(f"{path}: its weights hold {key!r}, which {fault}")
        storage = value.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        size = value.numel() * value.element_size()
        if tied and size > storage.nbytes():
            raise UserError(f"{path}: its weights hold {key!r}, which claims {size} bytes of {storage.nbytes()}")
        claimed += 0 if tied else size
    if claimed > sum(held.values()):
        raise UserError(f"{path}: its weights claim {claimed} bytes, of which the file holds {sum(held.values())}")
    for key, value in state.items():
        if not _finite(value):
            raise UserError(f"{path}: its weights hold {key!r}, which is not finite; they are not usable")


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
    try:
        # A plain dict, without the file's _metadata.
        weights = {key: in_layout_of(value, state[key], key) for key, value in own.items()}
    except ValueError as error:
        raise UserError(f"{path}: its weights hold what is no weight: {error}") from error
    model.load_state_dict(weights)
    return other_head


def in_layout_of(own: Tensor, value: object, name: str) -> Tensor:
    """Copy `value`, which a file holds for `own`, to a new tensor of the layout, dtype and device of `own`.

    A tensor in a file can have any strides, even overlapping ones, or be no ordinary tensor at all.

    Raises:
        ValueError: `value` has another shape or kind of number than `own`, or is not dense or not finite.
    """
    if fault := _fault(value):
        raise ValueError(f"{name} {fault}")
    if value.shape != own.shape and not value.numel() == own.numel() == 1:
        raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(own.shape)}")
    if value.is_floating_point() != own.is_floating_point():
        raise ValueError(f"{name} is of dtype {_dtype_name(value.dtype)}, not {_dtype_name(own.dtype)}")
    result = torch.empty_like(own, requires_grad=False).copy_(value.detach().reshape(own.shape))
    if not _finite(result):
        raise ValueError(f"{name} is not finite")
    return result


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return True
    return bool((value if value.element_size() > 1 else value.float()).isfinite().all())


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
    return ""


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a whole file or nothing: write to a file beside `path`, flush it to disk, then rename it to `path`.

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
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind its own error
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path}: cannot be written ({cause})") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def save_checkpoint(content: dict, path: Path) -> None:
    """Save like `torch.save`, but write the whole file or nothing; see `write_atomically`."""
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


# ----- the checkpoints of a run: epoch_E.pth after E epochs, epoch_E_step_S.pth S batches later, and further names


def lock_folder(folder: Path, elsewhere: str, beside: str) -> tuple[TextIO, str | None]:
    """Make a folder, and keep other runs out of it until the returned file is closed.

    Args:
        folder: the run's folder.
        elsewhere: the option that names another folder, if this one cannot be written to.
        beside: the option that names another folder, if this one is taken.

    Returns:
        the open file, and a note if the file system has no locks.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error}); choose another {elsewhere}") from error
    try:
        fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            lock_file.close()
            raise UserError(
                f"{folder}: another process is training in it; wait for that one to end, or pass another {beside}"
            ) from error
        return lock_file, f"{folder}: its file system has no locks; start one run in it at a time ({error})"
    return lock_file, None


class CheckpointFolder:
    """The checkpoints in a run's folder.

    Each checkpoint is written once, as epoch_E.pth or epoch_E_step_S.pth. latest.pth, best.pth and best_ema.pth are
    further names of a checkpoint: hard links, or copies if the file system has no hard links. The folder keeps the last
    `keep` numbered checkpoints of the run. checkpoints.txt lists them in the order in which they were written; unlike
    file times, this order does not depend on clocks or copying.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.damage_messages: list[str] = []  # messages about damaged files
        self.notes: list[str] = []  # other messages for the log
        self.to_set_aside: set[str] = set()  # names whose present files are set aside before new files take the names
        self.lock_file: TextIO | None = None
        self.files_at_start: dict[str, tuple[int, int]] | None = None

    def numbered(self) -> list[Path]:
        """Return the numbered checkpoints in the order in which they were written.

        A run may have gone on from an earlier checkpoint, so this is not the order of epochs. Checkpoints that
        checkpoints.txt does not list come first, by epoch and step.
        """
        found = {p: re.fullmatch(r"epoch_(\d+)(?:_step_(\d+))?\.pth", p.name) for p in self.folder.glob("epoch_*.pth")}
        places = {path: (int(m[1]), int(m[2] or 0)) for path, m in found.items() if m and path.is_file()}
        listed = {name: i for i, name in enumerate(self._read_order())}
        return sorted(places, key=lambda path: (listed.get(path.name, -1), places[path]))

    def _read_order(self) -> list[str]:
        try:
            return (self.folder / ORDER_FILE).read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            return []

    def save(self, content: dict, epochs: int, step: int, names: list[str]) -> Path:
        """Write a checkpoint and give it `names`; then remove the oldest listed checkpoints.

        A file that checkpoints.txt does not list, such as a copy from elsewhere, is never removed; if it has the name
        of the new checkpoint, it is set aside.

        Raises:
            UserError: the checkpoint cannot be written; the present files stay.
        """
        path = self.folder / (f"epoch_{epochs}_step_{step}.pth" if step else f"epoch_{epochs}.pth")
        listed = self._read_order()
        if path.name not in listed:
            if path.exists():  # somebody else has put the file there
                logger.warning("%s: is none of this run's; set aside as %s", path, _set_aside(path, REPLACED).name)
            self._write_order([path.name, *listed])  # first: a run killed in between must know its own file
        save_checkpoint(content, path)
        own = [old for old in self.numbered() if old.name in listed and old != path]
        order = [*own, path]
        self._write_order([kept.name for kept in order[-self.keep :]])
        for name in names:
            if name in self.to_set_aside and (self.folder / name).exists():
                logger.warning("%s: set aside as %s", self.folder / name, _set_aside(self.folder / name, REPLACED).name)
            self.to_set_aside.discard(name)
            self._link(path, self.folder / name)
        for old in order[: -self.keep]:
            with suppress(OSError):
                old.unlink()
        return path

    def _write_order(self, names: list[str]) -> None:
        text = "".join(f"{name}\n" for name in names)
        write_atomically(self.folder / ORDER_FILE, lambda file: file.write(text.encode()))

    def _link(self, path: Path, name: Path) -> None:
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
        """Keep other runs out of the folder for as long as this process lives, if the file system has locks.

        Raises:
            UserError: another process holds the lock, or has trained in the folder since `has_run`; or the folder
                cannot be written to.
        """
        if self.lock_file is not None:  # opening and closing the file again would release the lock
            return
        self.lock_file, note = lock_folder(self.folder, "--output", "--tag")
        self.notes += [note] if note else []
        if self.files_at_start is not None and self.files_at_start != self._present():
            raise UserError(
                f"{self.folder}: another process has trained in it meanwhile; the same command goes on from there"
            )

    def has_run(self) -> bool:
        """Return whether the folder holds checkpoints, even damaged ones: then a run has begun.

        Remember the files that are there now, which `lock` compares.
        """
        self.files_at_start = self._present()
        return bool(self.files_at_start)

    def _present(self) -> dict[str, tuple[int, int]]:
        named = [self.folder / name for name in (LATEST, BEST, BEST_EMA)]
        files = [*self.folder.glob("epoch_*.pth"), *named, *self.folder.glob(f"*{DAMAGED}*")]
        found = {}
        for file in files:
            try:
                status = file.stat()
            except (FileNotFoundError, NotADirectoryError):
                if file.is_symlink():  # perhaps to a disk that is not mounted now
                    raise UserError(
                        f"{file}: is a link to {os.readlink(file)}, which is not there; mend or remove it, or pass "
                        "another --tag"
                    ) from None
                continue
            except OSError as error:
                raise UserError(f"{file}: cannot be looked at ({error.strerror}); choose another --output") from error
            found[file.name] = status.st_ino, status.st_size
        return found

    def remove_partial(self) -> None:
        """Remove the files that a killed process left half-written."""
        for path in self.folder.glob(".*.partial"):
            path.unlink(missing_ok=True)

    def read_last(self, check: Callable[[dict, Path], object]) -> tuple[dict, Path]:
        """Return the newest undamaged checkpoint that passes `check`, and its path.

        A damaged checkpoint is renamed to NAME.damaged and noted in `damage_messages`.

        Raises:
            UserError: all checkpoints are damaged, or `check` refuses an undamaged one.
        """
        for path in [self.folder / LATEST, *reversed(self.numbered())]:
            if not path.is_file():
                continue
            try:
                content = read_checkpoint(path)
                check(content, path)
                return content, path
            except DamagedCheckpointError as error:
                self.damage_messages.append(f"{error}; set aside as {_set_aside(path).name}")
        found = "; ".join(self.damage_messages) or ", ".join(sorted(f.name for f in self.folder.glob(f"*{DAMAGED}*")))
        best = [name for name in (BEST, BEST_EMA) if (self.folder / name).is_file()]
        if best and not found:
            raise UserError(
                f"{self.folder}: holds {' and '.join(best)}, but neither {LATEST} nor epoch_*.pth to go on from; pass "
                f"--resume {self.folder / best[0]} to go on from that one, or another --tag to start over"
            )
        further = f"; {' and '.join(best)} can be passed to --resume" if best else ""
        raise UserError(
            f"{self.folder}: no checkpoint is whole, so training cannot go on; pass another --tag to start over, or "
            f"--resume CKPT to go on from another checkpoint ({found}{further})"
        )


def _set_aside(path: Path, suffix: str = DAMAGED) -> Path:
    """Rename a file to NAME plus `suffix`, with a number at the end if that name is taken. Return the new path."""
    names = (path.with_name(f"{path.name}{suffix}{i or ''}") for i in count())
    aside = next(name for name in names if not name.exists())
    try:
        path.replace(aside)
    except OSError as error:
        raise UserError(f"{path}: cannot be set aside as {aside.name} ({error})") from error
    return aside


def _unsafe_names(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch.load reports whatever error a damaged file causes
        return []


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
