"""What the pickle of a torch file calls, in its place: tensors become places in the file, NumPy's numbers Python's.

Imports neither torch nor NumPy.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from optstate.checkpoint.files.dtypes import BITS, MAX_COUNT, SAFETENSORS_NAMES
from optstate.checkpoint.files.pickle_objects import Global, Object, PickleError, Stranger, Unread, called
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.files.torch_types import KNOWN
from optstate.text import shown

__all__ = ["REBUILD", "StoredStorage", "make_scalar", "only_element"]

MOST_DIMENSIONS = 64  # torch's own limit


Read = Stored | Object | Stranger | Unread
"""What a tensor in a pickle can become."""


@dataclass(frozen=True, slots=True)
class StoredStorage(Stored):
    """A storage: a flat tensor, of which the tensors of the file are parts."""

    key: str = ""


def _part(storage: Any, offset: Any, size: Any, stride: Any, dtype: str | Unread) -> Stored | Unread:
    """Return the tensor of this shape and these strides, from element `offset` of a storage on."""
    if isinstance(storage, Unread):
        return storage
    if isinstance(dtype, Unread):
        return dtype
    if not isinstance(storage, StoredStorage):
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


def _dtype(dtype: Any) -> str | Unread:
    """Return the safetensors format's name of a dtype of torch."""
    if not isinstance(dtype, Global):
        raise PickleError(f"a malformed file: {called(dtype)} instead of a dtype")
    return SAFETENSORS_NAMES.get(dtype.name) or Unread(f"a tensor of {shown(dtype.name)}")


_BITS = Unread("a tensor stored as its conjugate or negative (resolve_conj and resolve_neg write its numbers out)")


# The functions that torch's pickles name, with their arguments; where a tensor was, and its gradient, is passed over.


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> Stored | Unread:
    return _part(storage, offset, size, stride, getattr(storage, "dtype", ""))


def _tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Stored | Unread:
    found = _tensor(storage, offset, size, stride)
    return _BITS if metadata else found


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Stored | Unread:
    found = _part(storage, offset, size, stride, _dtype(dtype))
    return _BITS if metadata else found


def _parameter(data: Any, requires_grad: Any = True, hooks: Any = None, state: Any = None) -> Read:
    if not isinstance(data, Stored | Object | Stranger | Unread):
        raise PickleError(f"a malformed file: a parameter of {called(data)}")
    return data


def _moved(data: Any, dtype: Any, device: Any, requires_grad: Any) -> Stored | Unread:
    """Return a tensor of a device that torch has no storages for, saved as one of the CPU."""
    if isinstance(data, Unread):
        return data
    if not isinstance(data, Stored) or data.dtype != _dtype(dtype):
        raise PickleError(f"a tensor of {called(dtype)} stored as one of another dtype")
    return data


def _wrapper(
    kind: Any, dtype: Any, size: Any, stride: Any, offset: Any, layout: Any, device: Any, requires_grad: Any
) -> Object | Stranger:
    """Return a tensor of a subclass that has other tensors as its attributes."""
    if not isinstance(kind, Global):
        raise PickleError(f"a malformed file: a tensor of class {called(kind)}")
    return _of_class(kind)(kind.name, (kind, dtype, size, stride, offset, layout, device, requires_grad))


def _of_type(function: Any, kind: Any, args: Any, state: Any) -> Read:
    """Return a tensor of a subclass, or one with attributes: what `function` makes, with a state."""
    if not isinstance(function, Global) or not isinstance(kind, Global) or not isinstance(args, tuple):
        raise PickleError(f"a malformed file: a tensor made by {called(function)}")
    if function.name not in _MAKERS:
        return Stranger(kind.name, args, state=state)
    made = _MAKERS[function.name](*args)
    if isinstance(made, Object | Stranger):
        made.state = state
        return made
    return made if kind.name in _PLAIN_CLASSES else _of_class(kind)(kind.name, (made,), state=state)


def _of_class(kind: Global) -> type[Object] | type[Stranger]:
    """Return what stands for the instances of a class."""
    return Object if kind.name in KNOWN else Stranger


def _size(items: Any = ()) -> tuple[Any, ...]:
    if not isinstance(items, tuple | list):
        raise PickleError(f"a malformed file: a torch.Size of {called(items)}")
    return tuple(items)


def _unread(what: str) -> Callable[..., Unread]:
    def make(*args: Any, **kwargs: Any) -> Unread:
        return Unread(what)

    return make


# --- numbers of NumPy, as Python's own ------------------------------------------------------------------------------

DTYPE = "numpy.dtype"


ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")


_FORMS = {
    "b1": "?",
    "i1": "b",
    "u1": "B",
    "i2": "h",
    "u2": "H",
    "i4": "i",
    "u4": "I",
    "i8": "q",
    "u8": "Q",
    "f2": "e",
    "f4": "f",
    "f8": "d",
}
"""NumPy's codes of kind and size, and those of `struct`."""


def make_scalar(dtype: Any, data: Any = b"") -> Any:
    """Return a number of NumPy by its dtype and bytes as Python's; of other dtypes, such as dates, a `Stranger`."""
    number = _number(dtype, data)
    return Stranger("numpy.generic", (dtype, data)) if number is None else number


def only_element(value: Any) -> int | float | bool | None:
    """Return the only element of a NumPy array that has one; None for anything else."""
    if not isinstance(value, Object) or value.name not in ARRAYS or not isinstance(value.state, tuple):
        return None
    return _number(value.state[2], value.state[4]) if len(value.state) == 5 else None


def _number(dtype: Any, data: Any) -> int | float | bool | None:
    if not isinstance(dtype, Object) or dtype.name != DTYPE or not dtype.args or not isinstance(data, bytes):
        return None
    form = _FORMS.get(dtype.args[0]) if isinstance(dtype.args[0], str) else None
    if form is None or len(data) != struct.calcsize(f"<{form}"):
        return None
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "<"
    number: int | float | bool = struct.unpack(f"{'>' if order == '>' else '<'}{form}", data)[0]
    return number


_PLAIN_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")

_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _moved,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
    "torch._utils._rebuild_meta_tensor_no_storage": _unread("a tensor on the meta device, without numbers"),
    "torch._utils._rebuild_sparse_tensor": _unread("a sparse tensor"),
    "torch._utils._rebuild_nested_tensor": _unread("a nested tensor"),
    "torch._utils._rebuild_qtensor": _unread("a quantized tensor"),
    "torch._utils._rebuild_device_tensor_from_numpy": _unread("a tensor written as a NumPy array"),
}

REBUILD: dict[str, Callable[..., Any]] = {
    **_MAKERS,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Size": _size,
    "numpy.core.multiarray.scalar": make_scalar,
    "numpy._core.multiarray.scalar": make_scalar,
}
"""What is called in the place of torch's functions and classes, by their names."""
