"""Check what a checkpoint's pickle would do before PyTorch runs it: what it calls, and how much it claims to hold.

PyTorch's restricted unpickler runs only a list of allowed functions. Some of these functions make gigabytes from a few
bytes, and none compares the size that a pickle claims for a storage with the bytes that the file holds for it.
"""

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import BinaryIO

import torch

# PyTorch functions that a pickle may call. Other allowed functions of PyTorch can make more than the file holds:
# quantized tensors need only a size, tensors of other devices are copied from expanded tensors, and sparse and nested
# tensors are read index by index.
CALLED = ("torch.Size", "torch.device", "torch.serialization._get_layout")
DENSE = tuple(f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
META = "torch._utils._rebuild_meta_tensor_no_storage"
WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")  # types that a tensor with attributes may have
ENCODE, BYTEARRAY = "_codecs.encode", "builtins.bytearray"  # calls that make bytes in pickles of protocol 2
COPIED = 2**26  # bytes that calls may copy, in addition to 16 times the size of the file
ITEM = 64  # approximate bytes of an object in a container
NESTED = 10**4  # objects in nested tuples, each counted wherever it occurs, because a tuple's hash visits all of them
LARGE, MOST_LARGE = 2**61 - 1, 1000  # whole numbers from here on can share a hash, which makes dicts slow; their limit


class RefusedPickleError(ValueError):
    """A pickle does something that no checkpoint's pickle does."""


class _Name(str):
    """A class or function that the pickle names."""

    __slots__ = ()


class _Made(str):
    """The result of a call of that name; `held` is about the number of bytes that it was made from."""

    held: int


class _Tuple(tuple):
    nested: int


class _Container:
    """A list, dict or set."""

    def __init__(self) -> None:
        self.held = 0


class _Storage:
    def __init__(self, size: int, itemsize: int):
        self.size, self.itemsize, self.held = size, itemsize, ITEM


def _held(value: object) -> int:
    """Return about how many bytes a copy of `value` takes now; a call copies its arguments, but not nested objects."""
    if isinstance(value, _Made | _Container | _Storage):
        return value.held
    if isinstance(value, _Tuple):
        return ITEM + sum(ITEM + (len(one) if isinstance(one, str | bytes) else 0) for one in value)
    return ITEM + (len(value) if isinstance(value, str | bytes) else 0)


class Scan:
    """Read one pickle without making any of its objects.

    Attributes:
        storages: bytes that the pickle claims for each storage, by key.
    """

    def __init__(self, file: BinaryIO | bytes, size: int):
        """
        Args:
            file: the pickle, or a file positioned at its start; afterwards the file is positioned behind the pickle.
            size: bytes of the file.

        Raises:
            RefusedPickleError: the pickle calls a function that it must not call, or claims more than it holds.
            Exception: any error that `pickletools` raises on data that is not a pickle.
        """
        self.storages: dict[str, int] = {}
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.may_copy = COPIED + 16 * size
        self.large = 0
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
            made = _Tuple(self._pop(len(self.stack) - count if count is not None else self.marks.pop()))
            made.nested = 1 + sum(one.nested if isinstance(one, _Tuple) else 1 for one in made)
            if made.nested > max(NESTED, 2 * len(made)):
                raise RefusedPickleError("it nests tuples without end")
            self.stack.append(made)
        elif name in ("REDUCE", "NEWOBJ"):
            callee, arguments = self._pop(len(self.stack) - 2)
            _check_call(callee, arguments, new=name == "NEWOBJ")
            made = _Made(callee)
            made.held = self._copy(*arguments)
            self.stack.append(made)
        elif name == "BUILD":
            built, state = self._pop(len(self.stack) - 2)
            if not isinstance(built, _Made) or built.startswith("torch."):
                raise RefusedPickleError("it changes the state of what it has not made")
            self._copy(state)
            self.stack.append(built)
        elif name == "BINPERSID":
            self.stack.append(self._storage(self.stack.pop()))
        elif name in ("APPEND", "SETITEM"):
            self._fill(len(self.stack) - (1 if name == "APPEND" else 2))
        elif name in ("APPENDS", "SETITEMS"):
            self._fill(self.marks.pop())
        elif name in _CONSTANTS:
            if name == "SHORT_BINSTRING" and not argument.isascii():
                raise RefusedPickleError("it has a string of Python 2 beyond ASCII")
            self.large += isinstance(argument, int) and abs(argument) >= LARGE
            if self.large > MOST_LARGE:
                raise RefusedPickleError("it has thousands of whole numbers beyond 61 bits")
            self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}.get(name, argument))
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            self.stack.append(_Container())
        elif name not in ("PROTO", "STOP"):
            raise RefusedPickleError(f"it has the instruction {name}, which PyTorch does not write")

    def _pop(self, start: int) -> list[object]:
        if start < 0:
            raise IndexError("the pickle takes more than it has")
        taken, self.stack[start:] = self.stack[start:], []
        return taken

    def _fill(self, start: int) -> None:
        taken = self._pop(start)
        if isinstance(self.stack[-1], _Container | _Made):
            self.stack[-1].held += ITEM * len(taken)

    def _copy(self, *values: object) -> int:
        """Count the bytes of a copy of `values`, and return them.

        An object that a pickle names again and again takes no bytes in the file, but each copy takes memory.

        Raises:
            RefusedPickleError: all copies together are too large.
        """
        held = ITEM + sum(map(_held, values))
        self.may_copy -= held
        if self.may_copy < 0:
            raise RefusedPickleError("it copies the same things again and again")
        return held

    def _storage(self, pid: object) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and type(pid[4]) is int):
            raise RefusedPickleError("it names a storage as PyTorch does not")
        _, kind, key, _, elements = pid[:5]
        itemsize = _item_size(kind)
        size = itemsize * elements
        if size < 0 or self.storages.setdefault(str(key), size) != size:
            raise RefusedPickleError(f"it claims different sizes for storage {key}")
        return _Storage(size, itemsize)


def _name(module: str, name: str) -> _Name:
    """Return the name in Python 3, as PyTorch's unpickler does; pickles of protocol 2 hold the names of Python 2."""
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
    if callee.startswith(("torch.", "_codecs.", BYTEARRAY)) and (new or not _is_allowed(callee, arguments)):
        of_tensors = callee.startswith(("torch._utils._rebuild", "torch._tensor"))
        raise RefusedPickleError(f"{callee}{'; of tensors, plain dense ones are read' if of_tensors else ''}")
    if callee in DENSE:
        _check_extent(callee, arguments)


def _is_allowed(callee: str, arguments: tuple) -> bool:
    if callee == ENCODE:
        return len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] in ("latin1", "latin-1")
    if callee == BYTEARRAY:
        encoded = len(arguments) == 1 and isinstance(arguments[0], _Made) and arguments[0] == ENCODE
        return not arguments or encoded or _is_allowed(ENCODE, arguments)
    if callee == WITH_ATTRIBUTES and len(arguments) == 4:
        function, kind, inner, _ = arguments
        if not isinstance(function, _Name) or function not in (*DENSE, *PARAMETERS) or kind not in TYPES:
            return False
        _check_call(function, inner, new=False)
        return True
    return callee in (*CALLED, *DENSE, *PARAMETERS, META)


def _check_extent(callee: str, arguments: tuple) -> None:
    """Check that a tensor lies within its storage.

    For files of PyTorch before 1.6, PyTorch would enlarge a storage to the size that the tensor claims.
    """
    storage, offset, size, stride = arguments[:4]
    typed = callee == DENSE[2]  # its dtype is an argument and need not be the storage's
    numbers = isinstance(size, _Tuple) and isinstance(stride, _Tuple) and len(size) == len(stride)
    if not isinstance(storage, _Storage) or not numbers or any(type(n) is not int for n in (offset, *size, *stride)):
        raise RefusedPickleError("it makes a tensor as PyTorch does not")
    itemsize = _dtype_size(arguments[6]) if typed else storage.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or (0 not in size and (last + 1) * itemsize > storage.size):
        raise RefusedPickleError(f"it claims a tensor of {list(size)} of {storage.size} bytes")


def _dtype_size(name: object) -> int:
    dtype = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, _Name) else None
    if not isinstance(dtype, torch.dtype):
        raise RefusedPickleError(f"it makes a tensor of type {name}")
    return dtype.itemsize


def _item_size(kind: object) -> int:
    name = str(kind).removeprefix("torch.").removeprefix("storage.")
    if name == "UntypedStorage":
        return 1
    dtype = getattr(getattr(torch, name, None), "_dtype", None) if name.endswith("Storage") else None
    if not isinstance(kind, _Name) or not isinstance(dtype, torch.dtype):
        raise RefusedPickleError(f"it names a storage of type {kind}")
    return dtype.itemsize
