"""Count what an eager step launches and moves: every operator that PyTorch dispatches, on tensors without values.

A launch is one operator that runs a kernel on the device. Views, metadata and allocations run none; an operator on
lists of tensors runs as many as its multi-tensor kernel needs. Bytes are those of the operands: each distinct tensor
that an operator reads counts once, each that the operator writes once. What a cache saves between operators is unknown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

VALUE = "aten::_local_scalar_dense"
"""Brings a number to the host, which waits for the device."""

NO_KERNEL = {
    "aten::_local_scalar_dense",
    "aten::_unsafe_view",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::is_same_size",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::resize_",
    "aten::set_",
}
OVERWRITES = {"aten::copy_", "aten::fill_", "aten::normal_", "aten::random_", "aten::uniform_", "aten::zero_"}
"""Operators that write their first operand in place without reading it."""

LIKE = {"full_like", "new_full", "new_ones", "new_zeros", "ones_like", "rand_like", "randn_like", "zeros_like"}
"""Operators that take shape and dtype of their first operand, and no values."""

LOOKS_UP = {"aten::embedding", "aten::gather", "aten::index", "aten::index_select", "aten::take"}
"""Operators that read no more elements of their first operand than they return."""

READ_ONLY = {
    ("aten::_fused_adam_", "grads"),
    ("aten::_fused_adamw_", "grads"),
    ("aten::_fused_sgd_", "grads"),
    ("bitsandbytes::optimizer_update_32bit", "g"),
    ("bitsandbytes::optimizer_update_8bit_blockwise", "g"),
}
"""Gradients that are declared as written, and are written by no kernel: PyTorch's only where a scale is given."""

CHUNK, BLOCKS = 65536, 320
LISTED = (110, 64, 48, 36, 30)
"""Limits of one launch of a multi-tensor kernel: elements of a block, blocks, and tensors in each of 1 to 5 lists."""


@dataclass(frozen=True)
class Cost:
    """What a step costs on any device: kernel launches, bytes read and written, and times the host waits."""

    launches: int = 0
    bytes: int = 0
    waits: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.launches + other.launches, self.bytes + other.bytes, self.waits + other.waits)

    def __mul__(self, number: int) -> Cost:
        return Cost(self.launches * number, self.bytes * number, self.waits * number)


class DispatchCounter(TorchDispatchMode):
    """A mode that counts the operators run under it, and answers what a value is with 1, as there are none.

    Attributes:
        cost: of all operators so far.
        launches, bytes: the same by operator.
    """

    def __init__(self, on_host: Iterable[Tensor] = ()) -> None:
        """on_host: 0-d tensors that stay on the host where the others are on a device."""
        super().__init__()
        self.cost = Cost()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._on_host = {id(tensor): tensor for tensor in on_host}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors([*args, *kwargs.values()]))
        if any(is_traceable_wrapper_subclass(tensor) for tensor in tensors):
            return NotImplemented  # the class of the tensor takes the operator apart, and its parts come here
        name = func._schema.name
        is_on_host = any(id(t) in self._on_host for t in tensors) and all(t.ndim == 0 for t in tensors)
        if name == VALUE:
            self.cost += Cost(waits=0 if is_on_host else 1)
            return True if args[0].dtype == torch.bool else 1 if not args[0].is_floating_point() else 1.0
        # What returns nothing makes no tensor, so that there is nothing to run: fakes of long lists are slow.
        result = func(*args, **kwargs) if func._schema.returns else None
        if is_on_host:
            self._on_host |= {id(tensor): tensor for tensor in _tensors(result)}
        elif runs_kernel(func):
            cost = cost_of(func, args, kwargs, result)
            self.cost += cost
            self.launches[name] += cost.launches
            self.bytes[name] += cost.bytes
        return result


def runs_kernel(func: Any) -> bool:
    """Return whether an operator does work on the device: neither a view nor an allocation."""
    returns = [each.alias_info for each in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returns)
    is_work = func.namespace not in ("prim", "profiler") and func._schema.name not in NO_KERNEL
    return is_work and not is_view


def cost_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Cost:
    """Return launches and bytes of one operator that runs a kernel."""
    name, reads, writes = func._schema.name, dict[Any, int](), dict[Any, int]()
    of_result = {_place(tensor): _nbytes(tensor) for tensor in _tensors(result)}
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
        found = {_place(tensor): _nbytes(tensor) for tensor in _tensors(value)}
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written and (name, argument.name) not in READ_ONLY:
            writes |= found
        is_read = not argument.is_out and not (i == 0 and (name in OVERWRITES or name.partition("::")[2] in LIKE))
        if is_read:
            if i == 0 and name in LOOKS_UP:
                found = {place: min(nbytes, sum(of_result.values())) for place, nbytes in found.items()}
            reads |= found
    writes |= {place: nbytes for place, nbytes in of_result.items() if place not in writes}
    return Cost(_launches(func, args), sum(reads.values()) + sum(writes.values()))


def _launches(func: Any, args: Sequence[Any]) -> int:
    if not func._schema.name.startswith(("aten::_foreach_", "aten::_fused_")):
        return 1
    lists = [[t.numel() for t in _tensors(each)] for each in args if isinstance(each, list | tuple)]
    lists = [sizes for sizes in lists if sizes and sizes == lists[0]]
    makes_new = all(each.alias_info is None for each in func._schema.arguments)
    return multi_tensor_launches(lists[0], len(lists) + makes_new)


def multi_tensor_launches(sizes: Sequence[int], lists: int) -> int:
    """Return how often a multi-tensor kernel is launched for tensors of these sizes, given the number of lists.

    A launch is full when either its blocks are used up or its tensors are, the last one to its end.
    """
    launches = blocks = tensors = 0
    for size in sizes:
        left = math.ceil(size / CHUNK)
        tensors += left > 0
        while left:
            taken = min(left, BLOCKS - blocks)
            left, blocks = left - taken, blocks + taken
            if blocks == BLOCKS or (not left and tensors == LISTED[lists - 1]):
                launches, blocks, tensors = launches + 1, 0, int(left > 0)
    return launches + (blocks > 0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor's elements lie, to know the same operand again."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes of the elements that are there: those of a dimension that was expanded count once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in pairs if stride or not size) * tensor.element_size()
