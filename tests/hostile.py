"""Checkpoints written by hand, that claim more than they hold."""

import zipfile
from pathlib import Path


def pickled(path: Path, program: bytes, records: dict[str, bytes] | None = None, compressed: bool = False) -> Path:
    """A checkpoint in PyTorch's archive whose pickle is `program`."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in {"data.pkl": program, "byteorder": b"little", "version": b"3", **(records or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def storage_of(elements: int) -> bytes:
    """{'model': {'w': a float tensor}} whose storage is said to have that many elements."""
    number = b"J" + elements.to_bytes(4, "little", signed=True)
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu" + number + b"tQ"
    size = b"K\0" + number + b"\x85K\1\x85\x89ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + size + b"tR"
    return b"\x80\2}X\5\0\0\0model}X\1\0\0\0w" + tensor + b"ss."


BOMBS = {
    "bytearray": b"\x80\2}K\0c__builtin__\nbytearray\nJ\0\0\0\x70\x85Rs.",
    "bytearray made": b"\x80\2}K\0c__builtin__\nbytearray\nJ\0\0\0\x70\x85\x81s.",
    "tensor": b"\x80\2}K\0ctorch\nTensor\nJ\0\0\0\x70\x85Rs.",
    "array": b"\x80\2}K\0cnumpy\nndarray\nJ\0\0\0\x70\x85Rs.",
    "hexadecimal": b"\x80\2}K\0" + b"c_codecs\nencode\n" * 30 + b"X\1\0\0\0aX\6\0\0\0latin1\x86R"
    + b"X\3\0\0\0hex\x86R" * 29 + b"s.",
    "another type": b"\x80\2}K\0ctorch._tensor\n_rebuild_from_type_v2\nc__builtin__\nbytearray\n(K\0JJJJJt\x86Rs.",
    "references": b"\x80\2}K\0" + b"K\0" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(60)) + b"s.",
    "depth": b"\x80\2}K\0" + b"]" * 100_000 + b"a" * 99_999 + b"s.",
    "itself": b"\x80\2}q\0K\0h\0s.",
}  # fmt: skip
