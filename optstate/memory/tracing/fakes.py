"""Fake modules and tensors, which have shapes but no values, all on one stand-in device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = [
    "HOME",
    "OnOneDevice",
    "converting_modules",
    "fake_mode",
    "kernels_of_accelerators",
    "refuse_mixture",
    "without_values",
]

HOME = torch.device("cpu")
"""The device of all fake tensors: on another one, a backward pass ends the process if PyTorch is not built for it."""

ATTENTION: Callable[..., Tensor] = F.scaled_dot_product_attention
DROPOUT_P = 4
"""The place of `dropout_p` among the arguments of `ATTENTION`."""

aten = torch.ops.aten
PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.mv.default,
        aten.addmv.default,
        aten.dot.default,
        aten.convolution.default,
    }
)
"""Operators that take tensors of one dtype only; their kernels for fake tensors do not look."""


def fake_mode() -> FakeTensorMode:
    """Return a mode in which tensors are made without memory, and operators take tensors with values as shapes."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def refuse_mixture(func: Any, args: tuple[Any, ...]) -> None:
    """Raise TypeError for a product of tensors of several dtypes, as its kernel does where there are values."""
    if func not in PRODUCTS:
        return
    dtypes = list(dict.fromkeys(str(arg.dtype) for arg in args if isinstance(arg, Tensor)))
    if len(dtypes) > 1:
        both = " and ".join(dtype.removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"a product of {both} tensors, which PyTorch refuses: give inputs of the dtype of the weights")


class OnOneDevice(TorchFunctionMode):
    """A mode in which code that asks for another device gets the stand-in; only the meta device stays."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if "device" in kwargs:
            kwargs["device"] = _home(kwargs["device"])
        if func is Tensor.to:
            args = (args[0], *(_home(arg) if isinstance(arg, str | torch.device) else arg for arg in args[1:]))
        return func(*args, **kwargs)


def _home(device: Any) -> Any:
    if device is None or torch.device(device).type == "meta":
        return device
    return HOME


def _without_dropout(*args: Any, **kwargs: Any) -> Tensor:
    """Compute attention without dropout."""
    if len(args) > DROPOUT_P:
        args = (*args[:DROPOUT_P], 0.0, *args[DROPOUT_P + 1 :])
    else:
        kwargs["dropout_p"] = 0.0
    return ATTENTION(*args, **kwargs)


class _FusedAttention(TorchFunctionMode):
    """A mode in which attention called by an older reference to the function is without dropout, too."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return (_without_dropout if func is ATTENTION else func)(*args, **(kwargs or {}))


@contextmanager
def kernels_of_accelerators() -> Iterator[None]:
    """Let operators keep the tensors that an accelerator's kernels keep, where the CPU chooses other kernels.

    `scaled_dot_product_attention` with dropout: fused kernels draw the mask again from its seed, so they keep what they
    do without dropout. The CPU has none with dropout and writes out probabilities and masks, batch x heads x length x
    length. Recurrent layers: oneDNN's kernel hides what it keeps, so they run step by step.
    """
    setattr(F, "scaled_dot_product_attention", _without_dropout)  # noqa: B010, modes do not see calls within PyTorch's
    try:
        with torch.backends.mkldnn.flags(enabled=False), _FusedAttention():
            yield
    finally:
        setattr(F, "scaled_dot_product_attention", ATTENTION)  # noqa: B010


@contextmanager
def converting_modules() -> Iterator[None]:
    """Let `module.to(...)` and its like replace fake parameters, which stay tied.

    PyTorch would swap their contents, which fails while a weak reference to a parameter exists, as in a fake mode.
    """
    original: Any = nn.Module._apply
    converted: dict[int, tuple[Any, nn.Parameter]] = {}
    """By id, a parameter and its replacement; the parameter is kept so that no other gets its id."""

    def replacing(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if not any(isinstance(param, FakeTensor) for param in self._parameters.values()):
            original(self, fn, recurse)
            return self
        children: Any = self.children() if recurse else ()
        for child in children:
            child._apply(fn)
        for name, param in self._parameters.items():
            if param is not None and id(param) not in converted:
                with torch.no_grad():
                    converted[id(param)] = (param, nn.Parameter(fn(param), requires_grad=param.requires_grad))
            if param is not None:
                self._parameters[name] = converted[id(param)][1]
        self._buffers.update({name: fn(buffer) for name, buffer in self._buffers.items() if buffer is not None})
        return self

    setattr(nn.Module, "_apply", replacing)  # noqa: B010, mypy refuses to assign methods
    try:
        yield
    finally:
        setattr(nn.Module, "_apply", original)  # noqa: B010


@contextmanager
def without_values(module: nn.Module) -> Iterator[None]:
    """Replace the module's parameters and buffers by fake ones, in training mode; to be used inside a fake mode.

    Tied tensors stay tied. Afterwards the module is as it was.
    """
    made: dict[int, Tensor] = {}
    held: list[tuple[dict[str, Any], dict[str, Any]]] = []
    modes = [(part, part.training) for part in module.modules()]
    for part in module.modules():
        for tensors in cast("list[dict[str, Any]]", [part._parameters, part._buffers]):
            held.append((tensors, dict(tensors)))
            for name, tensor in tensors.items():
                if tensor is not None and not (isinstance(tensor, FakeTensor) and tensor.device == HOME):
                    tensors[name] = made.setdefault(id(tensor), _shape_of(tensor))
    try:
        module.train()
        yield
    finally:
        for tensors, before in held:
            tensors.update(before)
        for part, training in modes:
            part.training = training


def _shape_of(tensor: Tensor) -> Tensor:
    made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=HOME)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made
