"""Tensors as the pickle of a torch file describes them, made into places in the file. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from optstate.checkpoint.errors import shown
from optstate.checkpoint.header import BITS, MAX_COUNT
from optstate.checkpoint.inert import Global, Object, PickleError, called
from optstate.checkpoint.stored import Stored
from optstate.checkpoint.torch_names import DTYPES

__all__ = ["REBUILD", "Storage"]

MOST_DIMENSIONS = 64  # torch's own limit


@dataclass(frozen=True, slots=True)
class Storage(Stored):
    """A storage: a flat tensor, of which the tensors of the file are parts."""

    key: str = ""


def _part(storage: Any, offset: Any, size: Any, stride: Any, dtype: str) -> Stored:
    """The tensor of this shape and these strides, from element `offset` of a storage on."""
    if not isinstance(storage, Storage):
        raise PickleError(f"a malformed file: a tensor of {called(storage)} instead of a storage")
    for counts in ((offset,), size, stride):
        if not isinstance(counts, tuple) or not all(type(n) is int and 0 <= n <= MAX_COUNT for n in counts):
            raise PickleError("a malformed file: a tensor whose shape, strides or place are no counts")
    if len(size) > MOST_DIMENSIONS or len(stride) != len(size):
        raise PickleError(f"a malformed file: a tensor with {len(size)} dimensions and {len(stride)} strides")
    where = f"a tensor of shape {size} in storage '{shown(storage.key)}'"
    width, elements = BITS[dtype] // 8, prod(size)
    there = storage.nbytes // width
    if not elements:
        return Stored(storage.path, storage.start, dtype, size, source=storage.source)
    if elements > there:
        raise PickleError(f"{where} has {elements} elements, more than the {there} that are stored")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= there:
        raise PickleError(f"{where} reaches to element {last} of {there}")
    start = storage.start + offset * width
    strides = None if _is_contiguous(size, stride) else stride
    return Stored(storage.path, start, dtype, size, strides, storage.source)


def _is_contiguous(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for n, actual in zip(reversed(size), reversed(stride), strict=True):
        if n != 1 and actual != step:
            return False
        step *= n
    return True


def _dtype(dtype: Any) -> str:
    """The safetensors format's name of a dtype of torch."""
    if not isinstance(dtype, Global):
        raise PickleError(f"a malformed file: {called(dtype)} instead of a dtype")
    if dtype.name not in DTYPES:
        raise PickleError(f"a tensor of {dtype.name}, which the safetensors format has no name for")
    return DTYPES[dtype.name]


def _no_bits(metadata: Any) -> None:
    if metadata:
        raise PickleError("a tensor stored as its conjugate or negative; save it after resolve_conj and resolve_neg")


# The functions that torch's pickles name, with their arguments; where a tensor was, and its gradient, is passed over.


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> Stored:
    return _part(storage, offset, size, stride, getattr(storage, "dtype", ""))


def _tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Stored:
    _no_bits(metadata)
    return _tensor(storage, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Stored:
    _no_bits(metadata)
    return _part(storage, offset, size, stride, _dtype(dtype))


def _parameter(data: Any, requires_grad: Any = True, hooks: Any = None, state: Any = None) -> Stored | Object:
    if not isinstance(data, Stored | Object):
        raise PickleError(f"a malformed file: a parameter of {called(data)}")
    return data


def _moved(data: Any, dtype: Any, device: Any, requires_grad: Any) -> Stored:
    """A tensor of a device that torch has no storages for, saved as one of the CPU."""
    if not isinstance(data, Stored) or data.dtype != _dtype(dtype):
        raise PickleError(f"a tensor of {called(dtype)} stored as one of another dtype")
    return data


def _wrapper(
    kind: Any, dtype: Any, size: Any, stride: Any, offset: Any, layout: Any, device: Any, requires_grad: Any
) -> Object:
    """A tensor of a subclass that has other tensors as its attributes."""
    if not isinstance(kind, Global):
        raise PickleError(f"a malformed file: a tensor of class {called(kind)}")
    return Object(kind.name, (kind, dtype, size, stride, offset, layout, device, requires_grad))


def _of_type(function: Any, kind: Any, args: Any, state: Any) -> Stored | Object:
    """A tensor of a subclass, or one with attributes: what `function` makes, with a state."""
    name = function.name if isinstance(function, Global) else ""
    if name not in _MAKERS or not isinstance(kind, Global) or not isinstance(args, tuple):
        raise PickleError(f"a malformed file: a tensor made by {called(function)}")
    made = _MAKERS[name](*args)
    if isinstance(made, Object):
        made.state = state
        return made
    return made if kind.name in _PLAIN_CLASSES else Object(kind.name, (made,), state=state)


def _size(items: Any = ()) -> tuple[Any, ...]:
    if not isinstance(items, tuple | list):
        raise PickleError(f"a malformed file: a torch.Size of {called(items)}")
    return tuple(items)


def _refused(what: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise PickleError(f"{what}, which optstate does not read")

    return refuse


_PLAIN_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")

_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _moved,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
    "torch._utils._rebuild_meta_tensor_no_storage": _refused("a tensor on the meta device, without numbers"),
    "torch._utils._rebuild_sparse_tensor": _refused("a sparse tensor"),
    "torch._utils._rebuild_nested_tensor": _refused("a nested tensor"),
    "torch._utils._rebuild_qtensor": _refused("a quantized tensor"),
    "torch._utils._rebuild_device_tensor_from_numpy": _refused("a tensor written as a NumPy array"),
}

REBUILD: dict[str, Callable[..., Any]] = {
    **_MAKERS,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Size": _size,
}
"""What is called in the place of torch's functions and classes, by their names."""
