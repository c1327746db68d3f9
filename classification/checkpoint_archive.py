"""Checks that torch.load lacks: whether a file is as it was saved, and claims no more than it holds."""

import errno
import os
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from classification.errors import UserError
from classification.pickles import RefusedPickleError, Scan


class DamagedCheckpointError(UserError):
    """A file that provably differs from the file that was written."""


class UnreadableNowError(UserError):
    """Memory, the disk or the network prevents the reading of a file, which may be whole."""


def is_momentary(error: BaseException | None) -> bool:
    """Return whether memory, the disk or the network caused the error.

    EINVAL does not count: the system reports EINVAL when a damaged file holds wrong offsets. See `damaged`.
    """
    while error is not None:
        if isinstance(error, MemoryError | UnreadableNowError) or (
            isinstance(error, OSError) and error.errno != errno.EINVAL
        ):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _MOMENTARY):
            return True
        error = error.__cause__ or error.__context__
    return False


_MOMENTARY = ("DefaultCPUAllocator", "allocate memory", "CUDA out of memory", "Too many open files")


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def unreadable_now(path: str | Path, error: BaseException) -> UnreadableNowError:
    return UnreadableNowError(f"{path}: cannot be read now ({first_line(error)}); it was left as it is")


def damaged(path: Path) -> UserError:
    """Return the error for a damaged file, a DamagedCheckpointError; another if the file cannot be read to its end."""
    try:
        with path.open("rb") as file:
            while file.read(2**20):
                pass
    except (MemoryError, OSError) as error:  # EINVAL, which may also come from the system
        return unreadable_now(path, error)
    return DamagedCheckpointError(f"{path}: is not a checkpoint saved by torch.save, or is damaged")


def check_archive(path: Path) -> bool:
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
        if isinstance(error, UserError) or is_momentary(error):
            raise
        raise damaged(path) from error
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
                raise damaged(path)
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
        if is_momentary(error):
            raise
        if "reading zip archive" in str(error):  # the directory, which `zipfile` checks less strictly
            raise damaged(path) from error
        raise UserError(f"{path}: is not a checkpoint that can be read ({first_line(error)})") from error
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
            if is_momentary(error):
                raise
            raise damaged(path) from error
    if claimed > size:
        raise damaged(path)


def _scan(pickled: bytes | BinaryIO, size: int, path: Path) -> Scan:
    try:
        return Scan(pickled, size)
    except RefusedPickleError as error:
        raise UserError(f"{path}: holds pickled objects, which are not loaded for safety: {error}") from error
    except (IndexError, KeyError, ValueError) as error:
        raise damaged(path) from error


def unsafe_names(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch.load reports whatever error a damaged file causes
        return []
