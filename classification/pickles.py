"""Looks at what a checkpoint's pickle would do before PyTorch does it: what it calls, and how much it claims to hold.

PyTorch's restricted unpickler runs nothing but a list of functions. Some of them make gigabytes of a few bytes, and
none compares the size that a pickle gives to a storage with what the file has for it.
"""

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import BinaryIO

import torch

# What may be called of PyTorch's, beside what rebuilds a tensor. Other names are refused by it, or have stand-ins.
CALLED = ("torch.Size", "torch.device", "torch.serialization._get_layout")
REBUILT = "torch._utils._rebuild_"
ENCODE = "_codecs.encode"  # how bytes stand in pickles of protocol 2
OPAQUE = object()


class RefusedPickleError(ValueError):
    """A pickle that does what no checkpoint's does."""


class _Name(str):
    """A class or function that the pickle names."""

    __slots__ = ()


class _Made(str):
    """What a call of that name has returned."""

    __slots__ = ()


class Scan:
    """One pickle, gone through without making anything of it.

    Attributes:
        storages: bytes that it claims for each storage, by key.
    """

    def __init__(self, file: BinaryIO | bytes):
        """
        Raises:
            RefusedPickleError: it calls what it should not, or claims different sizes for a storage.
            Exception: whatever `pickletools` raises on what is no pickle.
        """
        self.storages: dict[str, int] = {}
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        for opcode, argument, _ in pickletools.genops(file):
            self._step(opcode.name, argument)

    def _step(self, name: str, argument: object) -> None:
        if name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name == "GLOBAL":
            self.stack.append(_name(*argument.split(" ", 1)))
        elif name in _TUPLES:
            count = _TUPLES[name]
            self.stack.append(tuple(self._pop(len(self.stack) - count if count is not None else self.marks.pop())))
        elif name in ("REDUCE", "NEWOBJ"):
            callee, arguments = self._pop(len(self.stack) - 2)
            _check_call(callee, arguments, new=name == "NEWOBJ")
            self.stack.append(_Made(callee))
        elif name == "BUILD":
            built, _ = self._pop(len(self.stack) - 2)
            if not isinstance(built, _Made) or built.startswith("torch."):
                raise RefusedPickleError("it changes the state of what it has not made")
            self.stack.append(built)
        elif name == "BINPERSID":
            self._note_storage(self.stack.pop())
            self.stack.append(OPAQUE)
        elif name in ("APPEND", "SETITEM"):
            self._pop(len(self.stack) - (1 if name == "APPEND" else 2))
        elif name in ("APPENDS", "SETITEMS"):
            self._pop(self.marks.pop())
        elif name in _CONSTANTS:
            self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}.get(name, argument))
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            self.stack.append(OPAQUE)
        elif name not in ("PROTO", "STOP"):
            raise RefusedPickleError(f"it has the instruction {name}, which PyTorch does not write")

    def _pop(self, start: int) -> list[object]:
        if start < 0:
            raise IndexError("the pickle takes more than it has")
        taken, self.stack[start:] = self.stack[start:], []
        return taken

    def _note_storage(self, pid: object) -> None:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and type(pid[4]) is int):
            raise RefusedPickleError("it names a storage as PyTorch does not")
        _, kind, key, _, elements = pid[:5]
        size = _item_size(kind) * elements
        if size < 0 or self.storages.setdefault(str(key), size) != size:
            raise RefusedPickleError(f"it claims different sizes for storage {key}")


def _name(module: str, name: str) -> _Name:
    """By Python 3's name, as PyTorch takes it; protocol 2 has Python 2's."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return _Name(f"{module}.{name}")


_TUPLES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "EMPTY_TUPLE": 0}
_CONSTANTS = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
    "SHORT_BINSTRING",
}


def _check_call(callee: object, arguments: object, new: bool) -> None:
    if isinstance(callee, _Made):
        raise RefusedPickleError(f"what {callee} returns is called")
    if not isinstance(callee, _Name) or not isinstance(arguments, tuple):
        raise RefusedPickleError("it calls what it does not name")
    text = len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1"
    allowed = not new and (callee in CALLED or callee.startswith(REBUILT) or (callee == ENCODE and text))
    if callee.startswith(("torch.", "_codecs.", "builtins.bytearray")) and not allowed:
        raise RefusedPickleError(callee)


def _item_size(kind: object) -> int:
    name = str(kind).removeprefix("torch.").removeprefix("storage.")
    if name == "UntypedStorage":
        return 1
    dtype = getattr(getattr(torch, name, None), "_dtype", None) if name.endswith("Storage") else None
    if not isinstance(kind, _Name) or not isinstance(dtype, torch.dtype):
        raise RefusedPickleError(f"it names a storage of type {kind}")
    return dtype.itemsize
