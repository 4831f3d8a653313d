"""The loops that every chain uses, compiled on a CPU where they can be, else in eager PyTorch, with the same arguments.

What C code cannot read goes to eager PyTorch: tensors that are not on the CPU, not contiguous, of subclasses, without
values, in fp64, or recorded for gradients. Sums do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from optstate.kernels import eager, native
from optstate.kernels.addresses import box_of, functions_reading, has_address, number_at_hand, product_operand
from optstate.kernels.native import WeightOperand, WriteKind
from optstate.kernels.product import Product, Scalar
from optstate.kernels.rounding import Noise, noise_key, round_bf16
from optstate.kernels.weight_codec import CompiledCodec, WeightCodec

__all__ = [
    "FP32_ON_CPU",
    "add_weight",
    "all_finite",
    "apply_update",
    "ema",
    "ema_of_square",
    "inverse_root",
    "moved",
    "moved_to_square",
    "multiply_out",
    "note_written",
    "rounded_bf16",
    "sum_of_squares",
    "sums",
    "sums_of_difference",
    "sums_of_rows",
    "values",
    "weight_sum_of_squares",
]

YES, NO = torch.tensor(True, device="cpu"), torch.tensor(False, device="cpu")
"""Answers, which nobody writes to: making a tensor costs more than reading a small gradient."""

CHEAP = 4
"""How many times as many elements a loop of a few operations needs as a whole step does, to be worth a thread."""

FP32_ON_CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def all_finite(grad: Tensor, largest: float = math.inf) -> Tensor:
    """Return a 0-d bool tensor: whether no element of `grad` is infinite, NaN, or beyond `largest` in magnitude.

    The tensor is read once. In eager PyTorch elements so large that their sum overflows count as infinite, too.
    """
    functions = functions_reading(grad)
    if functions is None:
        return eager.all_finite_by_sums(grad, largest)
    within, address = functions["within"], grad.data_ptr()
    kind, count = native.NUMBERS[grad.dtype], grad.numel()
    if count < native.WORTH_SHARING:
        return YES if within(address, kind, largest, 0, count) else NO
    outside: list[int] = []

    def check(begin: int, end: int) -> None:
        if not within(address, kind, largest, begin, end):
            outside.append(begin)

    native.share(check, (), count, native.TILE, count)
    return NO if outside else YES


# --- sums -----------------------------------------------------------------------------------------------------------


def sums(product: Product) -> tuple[Tensor, Tensor]:
    """Return the row sums and the column sums of the squared value; see `eager.sums`."""
    found = _sums(product, None)
    return eager.sums(product) if found is None else found


def sums_of_difference(product: Product, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row sums and the column sums of `(value - other)**2`; see `eager.sums_of_difference`."""
    found = _sums(product, other)
    return eager.sums_of_difference(product, other) if found is None else found


def _sums(product: Product, minus: Tensor | None) -> tuple[Tensor, Tensor] | None:
    dense = product.dense
    functions = functions_reading(dense) if minus is None else functions_reading(dense, minus)
    fits = minus is None or (minus.shape == dense.shape and minus.dtype == torch.float32)
    operand = product_operand(product) if functions is not None and fits and dense.ndim >= 2 else None
    if functions is None or operand is None:
        return None
    *batch, m, n = dense.shape
    matrices = math.prod(batch)
    parts = native.parts_of(m, n) if matrices == 1 else matrices
    rows, cols = torch.empty((*batch, m, 1), **FP32_ON_CPU), torch.empty((parts, n), **FP32_ON_CPU)
    address = None if minus is None else minus.data_ptr()
    where = native.SquareSums(matrices, m, n, parts, rows.data_ptr(), cols.data_ptr(), address)
    of = ctypes.byref(operand), ctypes.byref(where)
    native.share(functions["sum_squares"], of, parts, 1, dense.numel())
    if matrices == 1:
        functions["join_columns"](of[1])
        cols = cols[0] if parts == 1 else cols[0].clone()  # the others are not needed any more
    return rows, cols.view(*batch, 1, n)


def sums_of_rows(product: Product) -> Tensor:
    """Return the sum of the squared value at each index of the first dimension; see `eager.sums_of_rows`."""
    dense = product.dense
    functions = functions_reading(dense)
    operand = product_operand(product) if functions is not None and dense.ndim else None
    if functions is None or operand is None:
        return eager.sums_of_rows(product)
    rows = torch.empty((dense.shape[0], *(1,) * (dense.ndim - 1)), **FP32_ON_CPU)
    of = ctypes.byref(operand), dense.numel() // dense.shape[0], rows.data_ptr()
    native.share(functions["sum_rows"], of, dense.shape[0], 1, dense.numel())
    return rows


def sum_of_squares(product: Product) -> Tensor:
    """Return the sum of the squared value over all elements: 0-d; see `eager.sum_of_squares`."""
    functions = functions_reading(product.dense)
    operand = None if functions is None else product_operand(product)
    if functions is None or operand is None:
        return eager.sum_of_squares(product)
    return _total(functions["measure_product"], operand, product.dense.numel())


def weight_sum_of_squares(param: Tensor, codec: WeightCodec | None) -> Tensor:
    """Return the 0-d sum of squares of a parameter's value; see `eager.weight_sum_of_squares`."""
    functions, count = functions_reading(param), param.numel()
    weight = _weight_operand(param, codec, 0) if functions is not None and count else None
    if functions is None or weight is None:
        return eager.weight_sum_of_squares(param, codec)
    return _total(functions["measure_weight"], weight[0], count)


def _total(measure: Any, operand: ctypes.Structure, count: int) -> Tensor:
    """Add up parts that do not depend on the number of threads."""
    parts = native.parts_of(count, 1)
    totals = (ctypes.c_double * parts)()
    native.share(measure, (ctypes.byref(operand), totals, count, parts), parts, 1, count)
    return torch.tensor(math.fsum(totals) if math.isfinite(sum(totals)) else sum(totals), **FP32_ON_CPU)


# --- values ---------------------------------------------------------------------------------------------------------


def multiply_out(product: Product) -> Tensor:
    """Multiply a product out into a new contiguous tensor; see `eager.multiply_out`."""
    dense = product.dense
    functions = functions_reading(dense)
    operand = None if functions is None else product_operand(product)
    if functions is None or operand is None:
        return eager.multiply_out(product)
    value, count = torch.empty(dense.shape, **FP32_ON_CPU), dense.numel()
    native.share(
        functions["multiply_out"], (ctypes.byref(operand), value.data_ptr()), count, native.TILE, count // CHEAP
    )
    return value


def values(product: Product) -> Tensor:
    """Return what `multiply_out` returns, or `dense` itself, not to be written, where the two are equal."""
    return product.dense if eager.is_as_it_is(product) else multiply_out(product)


def ema(target: Tensor, product: Product, weight: Scalar) -> None:
    """Move a tensor in place towards a product's value; see `eager.ema`."""
    if _move(target, product, weight, None, target) is None:
        eager.ema(target, product, weight)


def ema_of_square(target: Tensor, product: Product, weight: Scalar, eps: float = 0.0) -> None:
    """Move a tensor in place towards a product's square; see `eager.ema_of_square`."""
    if _move(target, product, weight, eps, target) is None:
        eager.ema_of_square(target, product, weight, eps)


def moved(current: Tensor, product: Product, weight: Scalar) -> Tensor:
    """Return a new tensor: `current`, fp32 or fp64, moved by `weight` of the way to the value."""
    new = _move(current, product, weight, None)
    return torch.lerp(current, values(product), weight) if new is None else new


def moved_to_square(current: Tensor, product: Product, weight: Scalar, eps: float) -> Tensor:
    """Return a new tensor: `current`, fp32 or fp64, moved by `weight` of the way to `value**2 + eps`."""
    new = _move(current, product, weight, eps)
    if new is not None:
        return new
    square = values(product).square()
    return torch.lerp(current, square if eps == 0 else square.add_(eps), weight)


def _move(
    current: Tensor, product: Product, weight: Scalar, eps: float | None, new: Tensor | None = None
) -> Tensor | None:
    """Return `current`, moved towards the value, or with `eps` towards its square; None if C code cannot move it.

    new: where the result is written; None for a new tensor.
    """
    dense = product.dense
    functions = functions_reading(dense, current) if new is not None or current.dtype == torch.float32 else None
    share = None if functions is None or dense.shape != current.shape else number_at_hand(weight)
    operand = None if share is None else product_operand(product)
    if functions is None or share is None or operand is None:
        return None
    new = torch.empty_like(current) if new is None else new
    count, squared = dense.numel(), eps is not None
    addresses = ctypes.byref(operand), current.data_ptr(), new.data_ptr(), native.NUMBERS[new.dtype]
    native.share(
        functions["move_towards"], (*addresses, squared, share, eps or 0.0), count, native.TILE, count // CHEAP
    )
    note_written(new)
    return new


def inverse_root(x: Tensor, correction: float, eps: float) -> Tensor:
    """Return `1 / (sqrt(x) / correction + eps)`, a new tensor, for fp32 or fp64 `x`."""
    functions = functions_reading(x) if x.dtype == torch.float32 else None
    if functions is None:
        return x.sqrt().div_(correction).add_(eps).reciprocal_()
    new, count = torch.empty(x.shape, **FP32_ON_CPU), x.numel()
    addresses = x.data_ptr(), new.data_ptr(), correction, eps
    native.share(functions["invert_roots"], addresses, count, native.TILE, count // CHEAP)
    return new


# --- weights --------------------------------------------------------------------------------------------------------


def apply_update(
    param: Tensor, product: Product, decay: Scalar = 0.0, codec: WeightCodec | None = None, start: int = 0
) -> None:
    """Write a step into a parameter, in place: `param <- param * (1 - decay) - value`; see `eager.apply_update`."""
    dense = product.dense
    functions = functions_reading(param, dense)
    operand = product_operand(product) if functions is not None and dense.shape == param.shape else None
    keep = number_at_hand(1 - decay) if operand is not None else None
    weight = None if keep is None else _weight_operand(param, codec, start)
    if functions is None or operand is None or weight is None:
        eager.apply_update(param, product, decay, codec, start)
        return
    count = param.numel()
    addresses = ctypes.byref(operand), ctypes.byref(weight[0]), weight[1], keep
    native.share(functions["apply_product"], addresses, count, native.TILE, count)
    note_written(param)
    if codec is not None and codec.compiled is not None and codec.compiled.extra is not None:
        note_written(codec.compiled.extra)


def add_weight(target: Tensor, param: Tensor, scale: Scalar, codec: WeightCodec | None, start: int) -> None:
    """Add a multiple of a parameter's value to a tensor, in place; see `eager.add_weight`."""
    functions = functions_reading(target, param)
    number = number_at_hand(scale) if functions is not None and target.dtype == torch.float32 else None
    fits = number is not None and target.shape == param.shape
    weight = _weight_operand(param, codec, start) if fits and param.numel() else None
    if functions is None or weight is None:
        eager.add_weight(target, param, scale, codec, start)
        return
    addresses, count = (ctypes.byref(weight[0]), target.data_ptr(), number), param.numel()
    native.share(functions["add_weight"], addresses, count, native.TILE, count // CHEAP)
    note_written(target)


def rounded_bf16(value: Tensor, noise: Noise) -> Tensor:
    """Return fp32 numbers rounded to bf16 stochastically: bf16, or fp32 with numbers that bf16 holds exactly.

    Args:
        value: fp32 and contiguous; may be overwritten.
        noise: the random bits.
    """
    functions = functions_reading(value) if value.dtype == torch.float32 else None
    new = torch.empty(value.shape, dtype=torch.bfloat16, device=value.device) if functions is not None else value
    weight = None if functions is None else _operand_of(new, CompiledCodec(WriteKind.STOCHASTIC, noise=noise), 0)
    if functions is None or weight is None:
        return round_bf16(value, noise.bits16(value.numel(), value.device).view(value.shape))
    addresses, count = (value.data_ptr(), ctypes.byref(weight[0]), weight[1]), value.numel()
    native.share(functions["store_weight"], addresses, count, native.TILE, count)
    return new


WeightInBox = tuple[WeightOperand, Any]
"""A parameter as C code reads and writes it, and the address of the box that it is in the whole one, or None."""


def _weight_operand(param: Tensor, codec: WeightCodec | None, start: int) -> WeightInBox | None:
    """Return a parameter as C code reads and writes it; None if C code does not know the codec's way."""
    if codec is None:
        return WeightOperand(param.data_ptr(), type=native.NUMBERS[param.dtype], how=WriteKind.PLAIN), None
    way = codec.compiled
    return None if way is None else _operand_of(param, way, start)


def _operand_of(param: Tensor, way: CompiledCodec, start: int) -> WeightInBox | None:
    """Return a parameter as C code writes it in a known way; None where C code cannot reach what is kept beside it."""
    operand = WeightOperand(param.data_ptr(), type=native.NUMBERS[param.dtype], how=way.how)
    extra, noise, box = way.extra, way.noise, None
    if param.dtype == torch.float32:
        return None
    if extra is not None:
        if not (has_address(extra) and extra.is_contiguous() and start + param.numel() <= extra.numel()):
            return None
        operand.extra = extra.data_ptr() + start * extra.element_size()
    if noise is not None:
        region, operand.start = noise.region, noise.start + start
        operand.key = noise_key(noise.name, noise.step, noise.seed)
        if region is not None and region.start is not None:
            operand.start += region.start
        elif region is not None:
            box = box_of(region)
            if box is None:
                return None
    return operand, None if box is None else ctypes.byref(box)


def note_written(tensor: Tensor) -> None:
    """Move the version of a tensor, as operators of PyTorch do: a graph that needs the old values is refused then."""
    if not tensor.is_inference():
        increment_version(tensor)
