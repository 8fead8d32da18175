"""The pickle inside torch's files, read and written as data: no class is looked up and no function is called.

A pickle is a program for a stack machine. This machine knows the instructions that `torch.save` writes for a dict of
tensors, and takes a class or function for what it is here: a name. Everything else is refused.
"""

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from sdconvert.io.stored_tensor import DATA_TYPES, StoredTensor

_REBUILD = "torch._utils _rebuild_tensor_v2"
_REBUILD_NEW = "torch._utils _rebuild_tensor_v3"  # its type is an argument, for its storage is bytes
_STORAGES = {f"torch {data_type.storage}": data_type.name for data_type in DATA_TYPES.values() if data_type.storage}
_UNTYPED = ("torch.storage UntypedStorage", "torch UntypedStorage")
_TYPES = {f"torch {name}": name for name in DATA_TYPES}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
_AXES = 64  # numpy's and torch's limit
_NEW: Mapping[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}


class PickleRefused(ValueError):
    """The pickle is damaged, or does something else than describe tensors; becomes a `CheckpointError` of its file."""


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle mentions, as `module name`."""

    name: str


@dataclass(frozen=True)
class PickledStorage:
    """A storage that lies outside the pickle.

    Args:
        key: Of its record.
        dtype: Of its elements; bytes for newer types.
        count: Of its elements.
    """

    key: str
    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.count * DATA_TYPES[self.dtype].nbytes


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage; offset and strides count elements."""

    storage: PickledStorage
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


def read_pickle(file: BinaryIO) -> Any:
    """Read one pickle: dicts, lists, tuples, text, numbers, and tensors as `PickledTensor`.

    Args:
        file: Stands behind the pickle afterwards.

    Raises:
        PickleRefused: See there; the message says why.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, PickleRefused) else PickleRefused(f"damaged pickle: {error!r:.200}") from error
    raise PickleRefused("its pickle ends early")


@dataclass
class _Machine:
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _NEW:
            self.stack.append(_NEW[name]())
        elif name in _FROM_MARK:
            items, self.stack = self.stack, self.marks.pop()
            _FROM_MARK[name](self.stack, items)
        elif name in _ON_STACK:
            _ON_STACK[name](self.stack)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(Name(argument))
        elif name == "MARK":
            self.marks.append(self.stack)
            self.stack = []
        elif name != "PROTO":
            raise PickleRefused(f"its pickle has the instruction {name}, which no state dict needs")


def _join(stack: list[Any], count: int) -> None:
    stack[-count:] = [tuple(stack[-count:])]


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise PickleRefused("it sets items of something else than a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | None):
            raise PickleRefused(f"a dict has a {type(key).__name__} as key")
        if key in target:
            raise PickleRefused(f"a dict has the key {key!r:.80} twice")
        target[key] = value


def _append(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise PickleRefused("it appends to something else than a list")
    target.extend(items)


def _load_storage(stack: list[Any]) -> None:
    stack.append(_storage(stack.pop()))


def _call(stack: list[Any]) -> None:
    arguments, function = stack.pop(), stack.pop()
    stack.append(_rebuilt(function, arguments))


def _set_state(stack: list[Any]) -> None:
    # What hangs on a state dict beside its items, `_metadata`, is versions of modules.
    stack.pop()
    if not isinstance(stack[-1], OrderedDict):
        raise PickleRefused("it sets the state of an object")


def _storage(reference: Any) -> PickledStorage:
    kind, storage_class, key, _, count, *view = reference
    if kind != "storage" or any(part is not None for part in view):
        raise PickleRefused(f"it refers to {str(reference)[:80]}")
    dtype = "uint8" if storage_class.name in _UNTYPED else _STORAGES.get(storage_class.name)
    if dtype is None:
        raise PickleRefused(f"its storages are of class `{storage_class.name}`")
    if not (isinstance(key, str) and _is_natural(count)):
        raise PickleRefused(f"storage {key!r:.40} has {count!r:.40} elements")
    return PickledStorage(key, dtype, count)


def _rebuilt(function: Any, arguments: tuple[Any, ...]) -> Any:
    name = function.name if isinstance(function, Name) else type(function).__name__
    if name == "collections OrderedDict" and not arguments:
        return OrderedDict()
    if name == "torch._utils _rebuild_parameter" and isinstance(arguments[0], PickledTensor):
        return arguments[0]
    if name not in (_REBUILD, _REBUILD_NEW):
        raise PickleRefused(f"it calls `{name.replace(' ', '.')}`; nothing was executed")
    storage, offset, shape, strides = arguments[:4]
    dtype = storage.dtype if name == _REBUILD else _TYPES.get(arguments[6].name)
    if dtype is None:
        raise PickleRefused(f"a tensor is of type `{arguments[6].name}`")
    if not (_is_natural(offset) and len(shape) == len(strides) <= _AXES and all(map(_is_natural, (*shape, *strides)))):
        raise PickleRefused(f"a tensor has shape {shape!r:.40}, strides {strides!r:.40}, offset {offset!r:.40}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    if 0 not in shape and last * DATA_TYPES[dtype].nbytes > storage.nbytes:
        raise PickleRefused(f"a tensor of shape {shape!r:.40} ends behind its storage of {storage.nbytes} bytes")
    return PickledTensor(storage, dtype, tuple(shape), offset, tuple(strides))


def _is_natural(value: Any) -> bool:
    return type(value) is int and value >= 0


_FROM_MARK: Mapping[str, Callable[[list[Any], list[Any]], None]] = {
    "TUPLE": lambda stack, items: stack.append(tuple(items)),
    "SETITEMS": lambda stack, items: _set_items(stack[-1], items),
    "APPENDS": lambda stack, items: _append(stack[-1], items),
}
_ON_STACK: Mapping[str, Callable[[list[Any]], None]] = {
    "TUPLE1": lambda stack: _join(stack, 1),
    "TUPLE2": lambda stack: _join(stack, 2),
    "TUPLE3": lambda stack: _join(stack, 3),
    "SETITEM": lambda stack: _set_items(stack[-3], [stack.pop(-2), stack.pop()]),
    "APPEND": lambda stack: _append(stack[-2], [stack.pop()]),
    "BINPERSID": _load_storage,
    "REDUCE": _call,
    "BUILD": _set_state,
}


def write_pickle(tensors: Iterable[tuple[StoredTensor, str, int]]) -> bytes:
    """Pickle a dict of tensors as `torch.save` would, for `torch.load(weights_only=True)`.

    Args:
        tensors: Each with the key of its storage's record, and the storage's length in bytes.
    """
    program = bytearray(b"\x80\x02}(")  # protocol 2, empty dict, mark
    for tensor, key, nbytes in tensors:
        data_type = DATA_TYPES[tensor.dtype]
        storage = f"torch\n{data_type.storage}" if data_type.storage else "torch.storage\nUntypedStorage"
        count = nbytes // data_type.nbytes if data_type.storage else nbytes
        rebuild = _REBUILD if data_type.storage else _REBUILD_NEW
        program += _text(tensor.name) + _global(rebuild.replace(" ", "\n"))
        program += b"((" + _text("storage") + _global(storage) + _text(key) + _text("cpu") + _integer(count) + b"tQ"
        program += _integer(tensor.offset) + _integers(tensor.shape) + _integers(tensor.strides)
        program += b"\x89" + _global("collections\nOrderedDict") + b")R"  # requires_grad, no backward hooks
        program += (b"" if data_type.storage else _global(f"torch\n{tensor.dtype}")) + b"tR"
    return bytes(program + b"u.")


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _global(name: str) -> bytes:
    return b"c" + name.encode() + b"\n"


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    length = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
