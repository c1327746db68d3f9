"""Checkpoints written by hand, that claim more than they hold."""

import pickle
import zipfile
from pathlib import Path


def pickled(path: Path, program: bytes, records: dict[str, bytes] | None = None, name: str = "data.pkl") -> Path:
    """A checkpoint in PyTorch's archive whose pickle is `program`."""
    with zipfile.ZipFile(path, "w") as archive:
        for key, content in {name: program, "byteorder": b"little", "version": b"3", **(records or {})}.items():
            archive.writestr(f"archive/{key}", content)
    return path


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def storage(elements: int, kind: bytes = b"Float", old: bool = False) -> bytes:
    """A storage in a pickle that is said to have that many elements; `old` is the format before 1.6."""
    name = b"(X\7\0\0\0storagectorch\n" + kind + b"Storage\n"
    return name + b"X\1\0\0\x000X\3\0\0\0cpu" + number(elements) + (b"N" if old else b"") + b"tQ"


def tensor_of(elements: int, size: int | None = None, stride: int = 1, old: bool = False) -> bytes:
    """A float tensor whose storage is said to have that many elements, and itself `size` of them."""
    shape = b"K\0" + number(elements if size is None else size) + b"\x85K%c\x85" % stride
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(elements, old=old) + shape + hooks + b"tR"


def weights_of(tensor: bytes) -> bytes:
    """{'model': {'w': tensor}}."""
    return b"\x80\2}X\5\0\0\0model}X\1\0\0\0w" + tensor + b"ss."


def storage_of(elements: int) -> bytes:
    return weights_of(tensor_of(elements))


def before_1_6(path: Path, content: bytes, keys: bytes) -> Path:
    """A checkpoint in PyTorch's format before 1.6, which names its storages in a last pickle; one of 16 bytes."""
    head = b"".join(pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    path.write_bytes(head + content + keys + (4).to_bytes(8, "little") + bytes(16))
    return path


def with_second_directory(path: Path, other: Path) -> Path:
    """The archive at `path` behind that at `other`, of the same layout.

    zipfile takes the directory before the end, which is the former's; PyTorch that at the offset which the end says.
    """
    path.write_bytes(other.read_bytes()[:-22] + path.read_bytes())
    return path


BOMBS = {
    "bytearray": b"\x80\2}K\0c__builtin__\nbytearray\nJ\0\0\0\x70\x85Rs.",
    "bytearray made": b"\x80\2}K\0c__builtin__\nbytearray\nJ\0\0\0\x70\x85\x81s.",
    "tensor": b"\x80\2}K\0ctorch\nTensor\nJ\0\0\0\x70\x85Rs.",
    "array": b"\x80\2}K\0cnumpy\nndarray\nJ\0\0\0\x70\x85Rs.",
    "hexadecimal": b"\x80\2}K\0" + b"c_codecs\nencode\n" * 30 + b"X\1\0\0\0aX\6\0\0\0latin1\x86R"
    + b"X\3\0\0\0hex\x86R" * 29 + b"s.",
    "another type": b"\x80\2}K\0ctorch._tensor\n_rebuild_from_type_v2\nc__builtin__\nbytearray\n(K\0JJJJJt\x86Rs.",
    "references": b"\x80\2}K\0" + b"K\0" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(60)) + b"s.",
    "depth": b"\x80\2}K\0" + b"]" * 30_000 + b"a" * 29_999 + b"s.",
    "itself": b"\x80\2}q\0K\0h\0s.",
    "device": weights_of(
        b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n("
        + tensor_of(4, 2**26, stride=0) + b"ctorch\nfloat64\nX\3\0\0\0cpu\x89tR"
    ),
    "quantized": weights_of(
        b"ctorch._utils\n_rebuild_qtensor\n(" + storage(16, b"QInt8") + b"K\0K\4\x85K\1\x85"
        b"(ctorch\nper_tensor_affine\nG?\xf0\0\0\0\0\0\0K\0t\x89ccollections\nOrderedDict\n)RtR"
    ),
    "sparse": weights_of(
        b"ctorch._utils\n_rebuild_sparse_tensor\n(ctorch.serialization\n_get_layout\nX\x10\0\0\0torch.sparse_coo\x85R("
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(2, b"Long") + b"K\0K\1" + number(2**26) + b"\x86K\1K\0\x86"
        b"\x89ccollections\nOrderedDict\n)RtR" + tensor_of(4, 2**26, stride=0) + b"K\5\x85ttR"
    ),
    "copies": b"\x80\2}K\0(X\0\0\1\0" + b"a" * 2**16 + b"q\0X\6\0\0\0latin1q\1"
    + b"c_codecs\nencode\nh\0h\1\x86R" * 2**12 + b"ts.",
    "a key of tuples": b"\x80\2}K\0" + b"q\0h\0\x86" * 45 + b"K\1s.",
    "keys of one hash": b"\x80\2}(" + b"".join(
        b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"K\0" for i in range(1, 5000)
    ) + b"u.",
    "filled later": b"\x80\2}K\0(c__builtin__\nset\nq\0]q\1\x85q\2Rh\1(" + b"".join(
        b"J" + i.to_bytes(4, "little") for i in range(10_000)
    ) + b"e" + b"h\0h\2R" * 12_000 + b"ts.",
    "made, then filled": b"\x80\2}K\0(ccollections\nOrderedDict\nq\0)Rq\1(" + b"".join(
        b"J" + i.to_bytes(4, "little") + b"K\0" for i in range(10_000)
    ) + b"u" + b"h\0h\1\x85R" * 1500 + b"ts.",
}  # fmt: skip
