"""The pickle inside a torch.save file, made of plain data without pickle and without torch.

What it says about a tensor, and how, is what torch's own pickles say (2.13), so that `torch.load` reads it with
`weights_only=True` as well.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from optstate.checkpoint.files.dtypes import BITS, STORAGE_CLASSES, TORCH_NAMES
from optstate.text import shown

__all__ = ["Constant", "NewTensor", "Subclass", "pickle_tree"]

MOST_LEVELS = 100  # of containers in each other: far above any checkpoint, far below Python's limit


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor whose bytes come later, under `key`. `dtype` is the safetensors format's name ("F32", "BF16" ...).

    The same object wherever it stands in the tree is one storage in the file.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Constant:
    """A small tensor with its bytes.

    The same object wherever it stands in the tree is one storage in the file, as bitsandbytes writes its maps. Equal
    objects are not: an optimizer that adds one to a step in place would add to every step that shares its storage.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Subclass:
    """A tensor of a class that wraps other tensors, such as "torchao.optim.subclass_8bit.OptimState8bit".

    dtype, shape: what the wrapper shows. state: its attributes, with tensors among them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    state: Mapping[str, Any]


def pickle_tree(tree: Any) -> tuple[bytes, list[NewTensor | Constant]]:
    """Return the pickle of a tree, and its storages: the one at index n is the record `data/<n>` of the file.

    The tree is made of dicts, lists, tuples, sets, strings, bytes, integers, floats, booleans, None and the classes of
    this module. A container that stands in several places is written several times.

    Raises:
        TypeError: something else.
        ValueError: two tensors of one key, a dtype that torch has no name for, a shape that is not one of counts,
            data that do not fill it, a class name that is none, containers that contain themselves.
    """
    pickler = _Pickler()
    pickler.value(tree, 0)
    return b"\x80\x02" + b"".join(pickler.parts) + b".", pickler.storages


@dataclass
class _Pickler:
    """Collects the opcodes of protocol 2, of which `weights_only=True` knows all that are used here."""

    parts: list[bytes] = field(default_factory=list)
    storages: list[NewTensor | Constant] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)  # of the storages, by the id() of their tensors
    keys: set[str] = field(default_factory=set)

    def value(self, value: Any, level: int) -> None:
        if level > MOST_LEVELS:
            raise ValueError(f"containers in each other deeper than {MOST_LEVELS} levels, or one that contains itself")
        if isinstance(value, NewTensor | Constant):
            self.tensor(value)
        elif isinstance(value, Subclass):
            self.subclass(value, level)
        elif type(value) in (dict, list, tuple, set):
            self.container(value, level)
        else:
            self.parts.append(_plain(value))

    def container(self, value: Any, level: int) -> None:
        if isinstance(value, dict):
            self.parts.append(b"}(")
            self.values((part for item in value.items() for part in item), level)
            self.parts.append(b"u")
        elif isinstance(value, list):
            self.parts.append(b"](")
            self.values(value, level)
            self.parts.append(b"e")
        elif isinstance(value, tuple):
            self.parts.append(b"(")
            self.values(value, level)
            self.parts.append(b"t")
        else:
            members = sorted(map(_plain, value))  # the order of a set of strings is another in every process
            self.parts += [_global("__builtin__.set"), b"](", *members, b"e\x85R"]

    def values(self, values: Iterable[Any], level: int) -> None:
        for value in values:
            self.value(value, level + 1)

    def number(self, tensor: NewTensor | Constant) -> int:
        """Return the number of a tensor's storage: storages are counted as they occur, as the layout wants it."""
        if id(tensor) not in self.numbers:
            if isinstance(tensor, NewTensor):
                if tensor.key in self.keys:
                    raise ValueError(f"two tensors have the key '{shown(tensor.key)}'")
                self.keys.add(tensor.key)
            self.numbers[id(tensor)] = len(self.storages)
            self.storages.append(tensor)
        return self.numbers[id(tensor)]

    def tensor(self, tensor: NewTensor | Constant) -> None:
        _check(tensor)
        number = self.number(tensor)
        typed = tensor.dtype in STORAGE_CLASSES
        storage = f"torch.{STORAGE_CLASSES[tensor.dtype]}" if typed else "torch.storage.UntypedStorage"
        count = prod(tensor.shape) if typed else tensor.nbytes
        self.parts += [
            _global("torch._utils._rebuild_tensor_v2" if typed else "torch._utils._rebuild_tensor_v3"),
            b"((",
            *(_string("storage"), _global(storage), _string(str(number)), _string("cpu"), _integer(count)),
            b"tQ",  # a tuple that the reader gives a storage for
            *(_integer(0), _counts(tensor.shape), _counts(_strides(tensor.shape)), _plain(False), _HOOKS),
            b"" if typed else _global(f"torch.{TORCH_NAMES[tensor.dtype]}"),
            b"tR",
        ]

    def subclass(self, tensor: Subclass, level: int) -> None:
        _check(tensor)
        parts = tensor.name.split(".")
        if len(parts) < 2 or not tensor.name.isascii() or not all(part.isidentifier() for part in parts):
            raise ValueError(f"'{shown(tensor.name)}' is not the full name of a class")
        self.parts += [
            _global("torch._tensor._rebuild_from_type_v2"),
            b"(",
            _global("torch._utils._rebuild_wrapper_subclass"),
            _global(tensor.name),
            b"(",
            *(_global(tensor.name), _global(f"torch.{TORCH_NAMES[tensor.dtype]}")),
            *(_counts(tensor.shape), _counts(_strides(tensor.shape)), _integer(0)),
            *(_global("torch.serialization._get_layout"), _string("torch.strided"), b"\x85R"),
            *(_global("torch.device"), _string("cpu"), b"\x85R"),
            _plain(False),
            b"t",
        ]
        self.value(dict(tensor.state), level + 1)
        self.parts.append(b"tR")


def _check(tensor: NewTensor | Constant | Subclass) -> None:
    if isinstance(tensor, NewTensor):
        what = f"tensor '{shown(tensor.key)}'"
    else:
        what = "a constant" if isinstance(tensor, Constant) else f"a tensor of class '{shown(tensor.name)}'"
    if tensor.dtype not in TORCH_NAMES:
        raise ValueError(f"{what}: torch files hold no {tensor.dtype!r}, known: {', '.join(TORCH_NAMES)}")
    if any(type(n) is not int or n < 0 for n in tensor.shape):
        raise ValueError(f"{what}: impossible shape {tensor.shape}")
    if isinstance(tensor, Constant) and len(tensor.data) != tensor.nbytes:
        raise ValueError(f"{what}: {len(tensor.data)} bytes for {tensor.dtype} of shape {tensor.shape}")


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements between neighbours along each dimension, in C order; torch counts an empty dimension as one."""
    return tuple(prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


def _plain(value: Any) -> bytes:
    """Return the opcodes of a value that is no container, or of a tuple of such values."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    kind = type(value)
    if kind is int:
        return _integer(value)
    if kind is float:
        return b"G" + struct.pack(">d", value)
    if kind is str:
        return _string(value)
    if kind is bytes:  # as Python writes bytes in protocol 2, which has no opcode for them
        return _global("_codecs.encode") + _string(value.decode("latin1")) + _string("latin1") + b"\x86R"
    if kind is tuple:
        return b"(" + b"".join(map(_plain, value)) + b"t"
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__} cannot be written")


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -1 << 31 <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    size = value.bit_length() // 8 + 1
    if size > 255:
        raise ValueError(f"an integer of {size} bytes cannot be written, 255 can")
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def _string(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def _counts(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode("ascii")


_HOOKS = _global("collections.OrderedDict") + b")R"  # the hooks of a tensor: none
