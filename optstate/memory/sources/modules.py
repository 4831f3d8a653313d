"""Modules without memory: their parameters and buffers, and copies of them on fake tensors."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from optstate.memory.errors import SourceError, in_words
from optstate.memory.model import ParamShape
from optstate.spec import can_be_stepped, is_fake
from optstate.text import shown

__all__ = ["buffer_bytes", "copied", "default_dtype", "families", "in_fake_mode", "parameters_of", "probe"]


M = TypeVar("M", bound=nn.Module)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make floating-point tensors in this dtype unless told otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def probe(build: Callable[[], M], dtype: torch.dtype) -> M:
    """Build the module on fake tensors, in a mode of its own: to be looked at, not to be run."""
    with FakeTensorMode(), default_dtype(dtype):
        return build()


def parameters_of(module: nn.Module) -> tuple[ParamShape, ...]:
    """Return the shape of every parameter once, in the module's order.

    Raises:
        SourceError: if there is no parameter, or one that trains and that no optimizer of this library steps.
    """
    found = []
    for name, param in module.named_parameters():
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise SourceError(f"parameter '{shown(name)}' has no shape yet: run the lazy module once before")
        dtype = str(param.dtype).removeprefix("torch.")
        if param.requires_grad and not can_be_stepped(param.dtype):
            raise SourceError(
                f"parameter '{shown(name)}' is {dtype} and not frozen: weights of this dtype are not stepped"
            )
        found.append(ParamShape(name, tuple(param.shape), dtype, param.requires_grad))
    if not found:
        raise SourceError(f"the module, a {type(module).__name__}, has no parameters")
    return tuple(found)


def buffer_bytes(module: nn.Module) -> int:
    """Return the bytes of all buffers, each counted once."""
    return sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())


# --- identical layers ---------------------------------------------------------------------------------------------

NUMBERED = re.compile(r"(?P<list>.+?)\.(?P<index>\d+)\.(?P<rest>.+)")


def families(parameters: Sequence[ParamShape]) -> dict[str, list[list[ParamShape]]]:
    """Return the parameters of every numbered list of modules, by its name: "model.layers" -> those of layer 0, 1 ...

    The outermost numbers count: experts within layers are no list of their own.
    """
    found: dict[str, dict[int, list[ParamShape]]] = {}
    for param in parameters:
        match = NUMBERED.fullmatch(param.name)
        if match:
            found.setdefault(match["list"], {}).setdefault(int(match["index"]), []).append(param)
    return {name: [layers[i] for i in sorted(layers)] for name, layers in found.items()}


# --- copies -------------------------------------------------------------------------------------------------------


def in_fake_mode() -> bool:
    """Return whether tensors made now are fake."""
    return is_fake(torch.empty(0))


def copied(module: nn.Module) -> nn.Module:
    """Copy a module; under FakeTensorMode with new tensors of the same shapes, strides and dtypes on the CPU.

    Tied parameters stay tied. Hooks on modules are copied; under FakeTensorMode gradients and hooks on parameters are
    not.

    Raises:
        SourceError: if something in the module cannot be copied.
    """
    try:
        if not in_fake_mode():
            return copy.deepcopy(module)
        made: dict[int, Any] = {id(p): nn.Parameter(_like(p), p.requires_grad) for p in module.parameters()}
        with _NewTensors():
            return copy.deepcopy(module, made)
    except SourceError:
        raise
    except Exception as error:
        reason = f"the module, a {type(module).__name__}, cannot be copied ({in_words(error)})"
        raise SourceError(f"{reason}: give a function that makes it") from error


def _like(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided:
        raise SourceError(f"a tensor of the module is {str(tensor.layout).removeprefix('torch.')}: only dense ones run")
    spanned = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if math.prod(tensor.shape) and spanned != tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")  # expanded or cut out of a larger one
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


class _NewTensors(TorchFunctionMode):
    """A mode in which `copy.deepcopy` makes new tensors instead of copying values; its memo holds the parameters."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            return _like(args[0]).requires_grad_(args[0].requires_grad and args[0].is_leaf)
        return func(*args, **(kwargs or {}))
