"""Weights of linear layers in 8 bits: about a byte per weight while training, written back with stochastic rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optstate.kernels import Noise, WeightCodec
from optstate.roles import declare_roles
from optstate.spec import ParamSpec, can_be_stepped
from optstate.store_layouts import FEWEST_CODED
from optstate.weights.base import Weights

__all__ = ["Quantized", "QuantizedWeight", "quantize_linear"]

LARGEST_CODE = 127
SMALLEST_SCALE = 1e-30
"""The scale of a block of zeros."""

NEARLY_WHOLE = 2.0**-15
"""What is nearer to a code than this is that code: the error of a quotient in fp32, so that what is unchanged stays."""

LEAST_BLOCK, LARGEST_BLOCK = 16, 1024
LARGEST_ROW = 1 << 17
"""A chunk of a step begins at a multiple of this many elements of a row that is longer."""

aten = torch.ops.aten


class QuantizedWeight(Tensor):
    """The weight of a linear layer as int8 codes, with one fp32 scale per block of a row.

    To autograd and to an optimizer the weight is a parameter of its dtype and shape, whose gradient is dense; a fused
    backward pass frees the gradient at once. `nn.functional.linear` multiplies by the values; any other function gets
    them as a new dense tensor, and none may write into them but `copy_`, which rounds to nearest.

    codes: int8, in the weight's shape. scales: fp32, `[rows, row / block]`. dtype: of the values.
    """

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype, requires_grad: bool = False) -> QuantizedWeight:
        made: QuantizedWeight = Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=dtype, device=codes.device, requires_grad=requires_grad
        )
        made.codes, made.scales = codes, scales
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def block(self) -> int:
        """Number of weights that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """Return the values as a new dense tensor."""
        values = self.codes.view(len(self.codes), -1, self.block) * self.scales.unsqueeze(-1)
        return values.view(self.codes.shape).to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({tuple(self.shape)}, {self.dtype}, block={self.block}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scales"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], dtype: Any, size: Any, stride: Any) -> QuantizedWeight:
        return cls(parts["codes"], parts["scales"], dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return multiply(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, QuantizedWeight):
            if func in (aten.detach.default, aten.alias.default):
                return first.map(lambda tensor: tensor)
            if func is aten.clone.default:
                return first.map(torch.clone)
            if func is aten._to_copy.default:
                dtype, device = kwargs.get("dtype") or first.dtype, kwargs.get("device")
                return first.map(lambda tensor: tensor.to(device=device, copy=True), dtype)
            if func is aten.copy_.default:
                return first.take(args[1])
            if func._schema.is_mutable:
                raise TypeError(f"{func.__name__} cannot write into 8-bit weights: copy_() whole ones, or dequantize()")
        plain = torch.utils._pytree.tree_map_only(QuantizedWeight, QuantizedWeight.dequantize, (args, kwargs))
        return func(*plain[0], **plain[1])

    def map(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> QuantizedWeight:
        """Return a weight whose codes and scales are made of these."""
        return QuantizedWeight(change(self.codes), change(self.scales), dtype or self.dtype)

    def take(self, values: Tensor) -> QuantizedWeight:
        """Become a copy of another weight, or of dense values, rounded to nearest, in place."""
        if isinstance(values, QuantizedWeight) and values.scales.shape == self.scales.shape:
            self.codes.copy_(values.codes)
            self.scales.copy_(values.scales)
            return self
        dense = values.dequantize() if isinstance(values, QuantizedWeight) else values
        dense = dense.detach().to(self.device, torch.float32).expand(self.shape)
        write_codes(dense, self.scales, self.codes, None)
        return self


def write_codes(value: Tensor, scales: Tensor, codes: Tensor, noise: Noise | None) -> None:
    """Write codes and scales that stand for a value of whole blocks; without noise rounded to nearest."""
    block = value.numel() // scales.numel()
    rows = value.reshape(-1, block)
    scale = rows.abs().amax(1, keepdim=True).div_(LARGEST_CODE).clamp_(min=SMALLEST_SCALE)
    exact = rows / scale
    nearest = exact.round()
    if noise is not None:
        bits = noise.bits16(value.numel(), value.device).view(rows.shape)
        drawn = (exact + bits.float().add_(32768.5).div_(65536.0)).floor_()
        nearest = torch.where((exact - nearest).abs() < NEARLY_WHOLE, nearest, drawn)
    codes.copy_(nearest.clamp_(-LARGEST_CODE, LARGEST_CODE).view(codes.shape))
    scales.copy_(scale.view(scales.shape))


class _Multiply(torch.autograd.Function):
    """A linear layer, which makes the values of its weight anew in the backward pass instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.dequantize().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        to_x = grad @ weight.dequantize().to(grad.dtype) if ctx.needs_input_grad[0] else None
        rows = grad.reshape(-1, grad.shape[-1])
        to_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def multiply(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `nn.functional.linear` does, with a weight in 8 bits."""
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        return cast(Tensor, _Multiply.apply(input, weight, bias))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Quantized(Weights):
    """How a `QuantizedWeight` is written: with new scales in every step, and codes rounded up or down at random.

    The mean of many roundings is the exact value, so that steps far below the spacing of the codes still count. What
    makes such weights is `quantize_linear`; this class says in plans and files how they were written.

    block: number of weights that share a scale. seed: of the random bits, as in `StochasticRounding`.
    """

    block: int = 256
    seed: int = 0

    is_random: ClassVar[bool] = True

    @property
    def alignment(self) -> int:
        return self.block

    def resolve(self, spec: ParamSpec) -> Weights:
        raise ValueError(f"{spec.name!r} has no 8-bit weight: make the weights of a model so with quantize_linear()")

    def codec(self, spec: ParamSpec, step: int, fields: Mapping[str, Tensor]) -> WeightCodec:
        return _Codes(Noise(spec.name, step, self.seed), fields["scales"].view(-1), self.block)


@dataclass(frozen=True)
class _Codes(WeightCodec):
    """The codec of `Quantized`: chunks of codes are whole blocks."""

    noise: Noise
    scales: Tensor
    block: int

    adds_bits = True

    def read(self, param: Tensor, start: int, out: Tensor) -> Tensor:
        blocks = out.view(-1, self.block).copy_(param.reshape(-1, self.block))
        blocks.mul_(self._of(param, start).unsqueeze(1))
        return out

    def write(self, param: Tensor, value: Tensor, start: int) -> None:
        write_codes(value, self._of(param, start), param, self.noise.at(start))

    def _of(self, param: Tensor, start: int) -> Tensor:
        return self.scales[start // self.block : (start + param.numel()) // self.block]


def quantize_linear(model: nn.Module, block: int = 256) -> list[str]:
    """Make the weights of a model's linear layers 8-bit, in place; return the names of these weights.

    A weight then takes `1 + 4 / block` bytes, as int8 codes with an fp32 scale for every `block` weights of a row; the
    layer computes with the values the codes stand for, and hands on a gradient of the weight's dtype. Optimizers of
    this library write the weight back with stochastic rounding (Q-GaLore, arXiv 2407.08296, section 3.4); fused, the
    gradient of one layer at a time is alive. Build the optimizer afterwards. `copy_`, `load_state_dict` and `to` work
    on such weights; FSDP and tensor parallelism do not.

    Left as they are: output heads and weights that are an embedding, too, as `declare_roles` finds them; weights of
    fewer than 4096 elements; and rows that have no divisor of 16 to `block`.

    Args:
        model: of any dtype that can be trained.
        block: number of weights that share a scale, at most. In a layer whose rows this does not divide, the largest
            divisor below.

    Raises:
        ValueError: for a block below 16 or above 1024.
    """
    if isinstance(block, bool) or not isinstance(block, int) or not LEAST_BLOCK <= block <= LARGEST_BLOCK:
        raise ValueError(f"block={block!r}: give a whole number of weights, {LEAST_BLOCK} to {LARGEST_BLOCK}")
    kept = {
        id(p) for group in declare_roles(model) if group["role"] in ("head", "embedding") for _, p in group["params"]
    }
    made: dict[int, nn.Parameter] = {}
    names = []
    for prefix, module in model.named_modules():
        if type(module) is not nn.Linear or isinstance(module.weight, QuantizedWeight):
            continue
        weight, size = module.weight, find_block(module.in_features, block)
        if id(weight) in kept or weight.numel() < FEWEST_CODED or not size or not can_be_stepped(weight.dtype):
            continue
        if id(weight) not in made:
            codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
            scales = torch.empty(len(weight), module.in_features // size, device=weight.device)
            quantized = QuantizedWeight(codes, scales, weight.dtype).take(weight.detach())
            made[id(weight)] = nn.Parameter(quantized, requires_grad=weight.requires_grad)
            names.append(f"{prefix}.weight" if prefix else "weight")
        module.weight = made[id(weight)]
    return names


def find_block(row: int, most: int) -> int:
    """Return the largest number of weights up to `most` that divides a row into blocks; 0 if there is none."""
    for size in range(min(most, row), LEAST_BLOCK - 1, -1):
        if row % size == 0 and (row <= LARGEST_ROW or LARGEST_ROW % size == 0):
            return size
    return 0
