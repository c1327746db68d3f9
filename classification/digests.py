"""Digests of a checkpoint's parts, which tell that a file was changed after training saved it.

The checksums of torch.save do not: whoever loads a checkpoint, changes it and saves it again gets new ones.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

DIGESTS = "sha256"  # the key under which a checkpoint keeps them, by the names of its parts


def digests_of(content: dict, parts: Iterable[str] | None = None) -> dict[str, str]:
    """Return the SHA-256 of each part of a checkpoint, but for parts that hold other things than numbers and texts.

    Args:
        content: the checkpoint.
        parts: the names of the parts; by default all.
    """
    found = {}
    for name in [name for name in content if name != DIGESTS] if parts is None else parts:  # in one order
        try:
            found[name] = _digest(content[name])
        except TypeError:
            continue
    return found


def changed_parts(content: dict, size: int) -> list[str]:
    """Return the names of the parts that are not those of which a checkpoint has digests, of those that it still has.

    Args:
        content: the checkpoint, made of plain containers.
        size: the bytes of its file. Many names may share the same numbers, but the time to read them has a bound.
    """
    saved = content.get(DIGESTS)
    if not isinstance(saved, dict):
        return []
    changed, left = [], [16 * size + 2**20]  # texts can be shared, too
    for name in sorted(name for name in saved.keys() & content.keys() if isinstance(name, str)):
        try:
            same = _digest(content[name], left) == saved[name]
        except TypeError:
            same = False
        if not same:
            changed.append(name)
    return changed


def _digest(content: object, left: list[int] | None = None) -> str:
    """Return the SHA-256 of nested containers, whatever the order of their keys and the layout of their tensors.

    Args:
        content: the containers.
        left: the bytes that may be read, which become fewer; by default any number.

    Raises:
        TypeError: they hold anything but numbers, texts and dense tensors, or more bytes than may be read.
    """
    digest = hashlib.sha256()

    def count(size: int) -> None:
        if left is not None:
            left[0] -= size
            if left[0] < 0:
                raise TypeError("more than the file can hold")

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            dense = value.layout == torch.strided and not (value.is_nested or value.is_meta or value.is_quantized)
            size = value.numel() * value.element_size() if dense else 0
            if not dense or size > value.untyped_storage().nbytes():
                raise TypeError("not a dense tensor")
            count(size)
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            numbers = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            digest.update(numbers.view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            if not all(isinstance(key, str | int) for key in value):
                raise TypeError("a key that is neither a name nor a number")
            digest.update(f"dict {len(value)}".encode())
            for key in sorted(value, key=lambda key: (isinstance(key, str), key)):
                add(key)
                add(value[key])
        elif isinstance(value, list | tuple):
            digest.update(f"list {len(value)}".encode())
            for item in value:
                add(item)
        elif isinstance(value, float):
            digest.update(float(value).hex().encode())
        elif value is None or isinstance(value, bool):
            digest.update(f"{value} ".encode())
        elif isinstance(value, int | str):
            text = f"{len(value)} {value}" if isinstance(value, str) else f"{value:x} "  # Python bounds decimal digits
            count(len(text))
            digest.update(text.encode(errors="surrogatepass"))
        else:
            raise TypeError(f"a {type(value).__name__}")

    add(content)
    return digest.hexdigest()
