"""The hot loops in eager PyTorch: chunk by chunk, in fp32 buffers that are reused, on any device.

Each loop reads a parameter-sized operand once and leaves nothing parameter-sized behind. Converting a bf16
chunk inside a buffer, never the whole tensor, is what keeps scratch independent of the largest parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from optstate.kernels.chunking import chunk_elements, chunks, slice_elements
from optstate.kernels.product import Product, Scalar
from optstate.kernels.rehearsal import worth_running
from optstate.kernels.weight_codec import WeightCodec
from optstate.spec import accumulator_dtype

__all__ = [
    "add_weight",
    "all_finite_by_sums",
    "apply_update",
    "ema",
    "ema_of_square",
    "is_as_it_is",
    "multiply_out",
    "sum_of_squares",
    "sums",
    "sums_of_difference",
    "sums_of_rows",
    "weight_sum_of_squares",
]


def all_finite_by_sums(grad: Tensor, largest: float = math.inf) -> Tensor:
    """Return a 0-d bool tensor: whether no element of `grad` is infinite, NaN, or beyond `largest` in magnitude.

    `grad` is read once. Without `largest` the elements are summed, in half the time in bf16: a sum is finite only if
    every element is. Elements so large that their sum overflows then count as infinite. fp16 is summed in fp32.
    """
    if largest == math.inf or not grad.numel():
        return torch.isfinite(grad.sum(dtype=torch.float32) if grad.dtype == torch.float16 else grad.sum())
    limit = min(largest, torch.finfo(grad.dtype).max)
    # aminmax() copies what is not contiguous: chunk by chunk that is little.
    parts = [grad] if grad.is_contiguous() else [part for (part,) in chunks((grad,), chunk_elements(grad.device))]
    found = [torch.aminmax(part) for part in parts]  # NaN if any element is, and compares as False
    within = [(most <= limit) & (least >= -limit) for least, most in found]
    return within[0] if len(within) == 1 else torch.stack(within).all()


def sums(product: Product) -> tuple[Tensor, Tensor]:
    """Return the row sums and the column sums of the squared value of a product of shape `[..., m, n]`.

    Returns:
        Sums over the last dimension, `[..., m, 1]`, and over the one before it, `[..., 1, n]`; fp32 (fp64 for fp64
        operands).
    """
    dense = product.dense
    dtype = accumulator_dtype(dense.dtype)
    limit = chunk_elements(dense.device)
    if 0 < dense.numel() <= limit:
        x, scale = _square(product), product.scale
        if not isinstance(scale, float) or scale != 1.0:
            x.mul_(scale * scale)
        return x.sum(-1, keepdim=True), x.sum(-2, keepdim=True)
    rows = dense.new_zeros((*dense.shape[:-1], 1), dtype=dtype)
    cols = dense.new_zeros((*dense.shape[:-2], 1, dense.shape[-1]), dtype=dtype)
    value, square = _Buffer(dense, limit), _Buffer(dense, limit)
    ones = dense.new_ones(min(limit, dense.shape[-2]), dtype=dtype)
    for part, row, col, *factors in _rounds((dense, rows, cols, *product.factors), limit):
        x = _multiply(part, factors, product, value)
        x = torch.mul(x, x, out=square.like(part))
        if x.ndim == 2 and row.shape[0] == x.shape[0] and x.shape[1] == dense.shape[-1]:
            torch.sum(x, -1, keepdim=True, out=row)  # whole rows, each seen once
        else:
            row.add_(x.sum(-1, keepdim=True))
        if x.ndim == 2:  # a matrix-vector product sums columns faster than a strided reduction
            # Chunk by chunk: added straight to the totals, every row would round against the sum of all before it.
            col[0].add_(torch.mv(x.t(), ones[: x.shape[0]]))
        else:  # a piece of one row adds straight to the columns it covers
            col.add_(x if x.ndim == 1 else x.sum(-2, keepdim=True))
    if not _is_one(product.scale):
        square_scale = product.scale * product.scale
        rows, cols = rows.mul_(square_scale), cols.mul_(square_scale)
    return rows, cols


def sums_of_rows(product: Product) -> Tensor:
    """Return the sum of the squared value at each index of the first dimension: `[m, 1, ...]`, fp32 or fp64."""
    dense = product.dense
    rows = dense.new_zeros((dense.shape[0], *(1,) * (dense.ndim - 1)), dtype=accumulator_dtype(dense.dtype))
    limit = chunk_elements(dense.device)
    value, square = _Buffer(dense, limit), _Buffer(dense, limit)
    for part, row, *factors in _rounds((dense, rows, *product.factors), limit):
        x = _multiply(part, factors, product, value)
        row.add_(torch.mul(x, x, out=square.like(part)).sum_to_size(row.shape))
    return rows if _is_one(product.scale) else rows.mul_(product.scale * product.scale)


def sums_of_difference(product: Product, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row sums and the column sums of `(value - other)**2`, shaped as those of `sums`.

    Args:
        product: of shape `[..., m, n]`.
        other: a tensor of the same shape, fp32 (fp64 for fp64 operands).
    """
    dense = product.dense
    rows = other.new_zeros((*dense.shape[:-1], 1))
    cols = other.new_zeros((*dense.shape[:-2], 1, dense.shape[-1]))
    factors, scale = _fold_scale(product)
    limit = chunk_elements(dense.device)
    value, square = _Buffer(dense, limit), _Buffer(dense, limit)
    for part, o, row, col, *fs in _rounds((dense, other, rows, cols, *factors), limit):
        x = _multiply(part, fs, product, value)
        difference = torch.mul(x, scale, out=square.like(part)) if not _is_one(scale) else square.like(part).copy_(x)
        difference.sub_(o).square_()
        row.add_(difference.sum_to_size(row.shape))
        col.add_(difference.sum_to_size(col.shape))
    return rows, cols


def sum_of_squares(product: Product) -> Tensor:
    """Return the sum of the squared value over all elements: 0-d, fp32 (fp64 for fp64 operands).

    With row factors a and column factors b the sum is the bilinear form `a^2 . (dense*dense) b^2`, so the factored
    update is never built. Otherwise squares are summed pairwise: `torch.linalg.vector_norm` adds them up one by
    one in fp32 and loses 1e-3 of the sum at ten million elements.
    """
    dense, factors = product.dense, product.factors
    limit = chunk_elements(dense.device)
    bilinear = _are_rows_and_cols(factors, dense)
    if 0 < dense.numel() <= limit and not (bilinear and product.finite is not None):
        total = _bilinear(dense, factors[0], factors[1].square(), product) if bilinear else _square(product).sum()
        scale = product.scale
        return total if isinstance(scale, float) and scale == 1.0 else total * (scale * scale)
    parts = [dense.new_zeros((), dtype=accumulator_dtype(dense.dtype))]
    value, square = _Buffer(dense, limit), _Buffer(dense, limit)
    if bilinear and product.finite is None:
        for part, a, b in chunks((dense, factors[0], factors[1].square()), limit):
            parts.append(_bilinear(part, a, b, product, value, square))
    else:
        for part, *fs in chunks((dense, *factors), limit):
            x = _multiply(part, fs, product, value)
            parts.append(torch.mul(x, x, out=square.like(part)).sum())
    total = torch.stack(parts).sum()
    return total if _is_one(product.scale) else total * (product.scale * product.scale)


def multiply_out(product: Product) -> Tensor:
    """Multiply a product out into a new contiguous tensor of its whole shape, fp32 (fp64 for fp64 operands)."""
    dense = product.dense
    result = torch.empty(dense.shape, dtype=accumulator_dtype(dense.dtype), device=dense.device)
    factors, scale = _fold_scale(product)
    for part, out, *fs in _rounds((dense, result, *factors), chunk_elements(dense.device)):
        x = _multiply(part, fs, product, out)
        if x is not out:
            out.copy_(x)
        if not _is_one(scale):
            out.mul_(scale)
    return result


def is_as_it_is(product: Product) -> bool:
    """Return whether a product is its dense tensor, in the dtype of arithmetic."""
    dense = product.dense
    as_is = not product.factors and product.bound is None and product.finite is None and _is_one(product.scale)
    return as_is and dense.dtype == accumulator_dtype(dense.dtype)


def ema(target: Tensor, product: Product, weight: Scalar) -> None:
    """Move a tensor in place towards a product's value: `target += weight * (value - target)`.

    The arithmetic is fp32 (fp64 for fp64 operands), with one rounding to `target`'s dtype.
    """

    def step(current: Tensor, x: Tensor) -> None:
        current.lerp_(x, weight)

    _update(target, product, step)


def ema_of_square(target: Tensor, product: Product, weight: Scalar, eps: float = 0.0) -> None:
    """Move a tensor in place towards a product's square: `target += weight * (value**2 + eps - target)`.

    The arithmetic is fp32 (fp64 for fp64 operands), with one rounding to `target`'s dtype.
    """

    def step(current: Tensor, x: Tensor) -> None:
        current.lerp_(torch.addcmul(torch.full_like(current, eps), x, x), weight)

    _update(target, product, step)


def apply_update(
    param: Tensor, product: Product, decay: Scalar = 0.0, codec: WeightCodec | None = None, start: int = 0
) -> None:
    """Write a step into a parameter, in place: `param <- param * (1 - decay) - value`.

    The arithmetic is fp32 (fp64 for fp64 parameters), with one rounding to the parameter's dtype. The two operations
    keep this form and order because the official AdaLomo and LOMO code rounds so.

    Args:
        param: the parameter, or a flat or row-major slice of one.
        product: the step, times the learning rate.
        decay: share of the parameter that the weight decay takes away.
        codec: reads and writes the value of the parameter, chunks in row-major order; None to read plainly and round
            to nearest.
        start: flat index of `param`'s first element, which `codec` is told.
    """
    dense = product.dense
    factors, scale = _fold_scale(product)
    keep = None if isinstance(decay, float) and decay == 0.0 else 1 - decay
    as_is = product.bound is None and product.finite is None and dense.dtype == param.dtype
    if not factors and keep is None and codec is None and as_is and isinstance(scale, float):
        if param.dtype == accumulator_dtype(param.dtype):
            param.add_(dense, alpha=-scale)
        else:
            # PyTorch reads both into fp32 and rounds once, without a temporary. `add_(dense, alpha=-scale)` would
            # round alpha to the parameter's dtype first: in bf16 a learning rate of 0.1 became 0.1001.
            param.addcmul_(dense, dense.new_ones(()), value=-scale)
        return
    in_place = codec is None and param.dtype == accumulator_dtype(param.dtype)
    limit = chunk_elements(param.device) if codec is None else slice_elements(param.device)
    is_one_chunk = dense.numel() <= limit
    value, new = (None, None) if is_one_chunk else (_Buffer(dense, limit), _Buffer(param, limit))
    for part, p, *fs in _rounds((dense, param, *factors), limit):
        if codec is not None:
            target = codec.read(p, start, _room(p, new))
        elif in_place:
            target = p
        else:
            target = _room(p, new).copy_(p)
        if keep is not None:
            target.mul_(keep)
        if fs and product.finite is None:
            target.addcmul_(_multiply(part, fs[:-1], product, value), fs[-1], value=-1)
        elif isinstance(scale, float):
            target.add_(_multiply(part, fs, product, value), alpha=-scale)
        else:
            target.addcmul_(_multiply(part, fs, product, value), scale, value=-1)
        if codec is not None:
            codec.write(p, target, start)
        elif not in_place:
            p.copy_(target)
        start += p.numel()


def add_weight(target: Tensor, param: Tensor, scale: Scalar, codec: WeightCodec | None, start: int) -> None:
    """Add a multiple of a parameter's value to a tensor, in place: `target += scale * value`.

    Args:
        target: contiguous, in the shape of `param`, fp32 (fp64 for fp64 parameters).
        param: the parameter, or a slice of one.
        scale: the multiple.
        codec: reads the value of the parameter; None to take what `param` holds.
        start: flat index of `param`'s first element, which `codec` is told.
    """
    limit = slice_elements(param.device)
    new = _Buffer(param, limit)
    for out, p in _rounds((target, param), limit):
        exact = codec is not None and codec.adds_bits
        value = codec.read(p, start, new.like(p)) if codec is not None and exact else new.like(p).copy_(p)
        out.add_(value.mul_(scale))
        start += p.numel()


def weight_sum_of_squares(param: Tensor, codec: WeightCodec | None) -> Tensor:
    """Return the 0-d sum of squares of a parameter's value, with the bits that a codec keeps beside the parameter."""
    if codec is None or not codec.adds_bits:
        return sum_of_squares(Product(param))
    limit = chunk_elements(param.device)  # as for an fp32 parameter: the same sum to the last bit
    new, parts, start = _Buffer(param, limit), [param.new_zeros((), dtype=torch.float32)], 0
    for (p,) in chunks((param,), limit):
        parts.append(codec.read(p, start, new.like(p)).square_().sum())
        start += p.numel()
    return torch.stack(parts).sum()


def _update(target: Tensor, product: Product, step: Callable[[Tensor, Tensor], None]) -> None:
    """Call `step(chunk of target, chunk of value)` on every chunk; a low-precision target goes through a buffer."""
    dense = product.dense
    factors, scale = _fold_scale(product)
    limit = chunk_elements(target.device)
    value, new = _Buffer(dense, limit), _Buffer(dense, limit)
    in_place = product.finite is None and target.dtype == accumulator_dtype(dense.dtype)
    for part, t, *fs in _rounds((dense, target, *factors), limit):
        x = _multiply(part, fs, product, value)
        if not _is_one(scale):
            x = torch.mul(x, scale, out=value.like(part))
        current = t if in_place else new.like(t).copy_(t)
        step(current, x)
        if not in_place:
            # A weight of zero does not keep the target: its distance from a square that overflows is infinite.
            t.copy_(current if product.finite is None else torch.where(product.finite, current, t))


def _rounds(tensors: Sequence[Tensor], limit: int) -> Iterable[tuple[Tensor, ...]]:
    """Return the chunks of a loop whose chunks are independent: each writes its own elements, or adds to a total."""
    if 0 < tensors[0].numel() <= limit:
        return ((*tensors,),)
    return worth_running(chunks(tensors, limit), lambda parts: parts[0].numel())


class _Buffer:
    """One chunk of scratch memory in the accumulator dtype, viewed in the shape of the chunk at hand."""

    def __init__(self, like: Tensor, limit: int) -> None:
        self._like, self._limit = like, limit
        self._flat: Tensor | None = None
        self._view: Tensor | None = None

    def like(self, part: Tensor) -> Tensor:
        if self._view is not None and self._view.shape == part.shape:
            return self._view
        if self._flat is None:
            size = min(self._limit, self._like.numel())
            self._flat = self._like.new_empty(size, dtype=accumulator_dtype(self._like.dtype))
        self._view = self._flat[: part.numel()].view(part.shape)
        return self._view


def _room(part: Tensor, buffer: _Buffer | Tensor | None) -> Tensor:
    """Return scratch memory in the shape of the chunk at hand: from the buffer, or new where there is no buffer."""
    if buffer is None:
        return part.new_empty(part.shape, dtype=accumulator_dtype(part.dtype))
    return buffer if isinstance(buffer, Tensor) else buffer.like(part)


def _load(part: Tensor, product: Product, buffer: _Buffer | Tensor | None) -> Tensor:
    """Return the chunk clamped and in the accumulator dtype: in the buffer, or `part` itself if nothing changes."""
    if product.bound is None and product.finite is None and part.dtype == accumulator_dtype(part.dtype):
        return part
    out = _room(part, buffer)
    out.copy_(part)
    if product.bound is not None:
        out.clamp_(-product.bound, product.bound)
    return out if product.finite is None else out.nan_to_num_(0.0, 0.0, 0.0)


def _multiply(part: Tensor, factors: Sequence[Tensor], product: Product, buffer: _Buffer | Tensor | None) -> Tensor:
    """Return the chunk times its factors, without the scale: in the buffer, or `part` itself, not to be written."""
    x = _load(part, product, buffer)
    if not factors:
        return x
    out = x if buffer is None and x is not part else _room(part, buffer)
    for factor in factors:
        x = torch.mul(x, factor, out=out)
    return x if product.finite is None else x.nan_to_num_(0.0, 0.0, 0.0)


def _square(product: Product) -> Tensor:
    """Return the square of a product of at most one chunk, without the scale: a new tensor."""
    x = _multiply(product.dense, product.factors, product, None)
    return x.square() if x is product.dense else x.square_()


def _bilinear(
    part: Tensor,
    a: Tensor,
    b: Tensor,
    product: Product,
    value: _Buffer | None = None,
    square: _Buffer | None = None,
) -> Tensor:
    """Return the 0-d sum of squares of a chunk times row factors `a` and column factors, without the scale.

    `b` holds the squares of the column factors.
    """
    x = _load(part, product, value)
    x = torch.mul(x, x, out=x.new_empty(x.shape) if square is None else square.like(part))  # contiguous in any case
    # The root first: a row without gradient has a factor whose square may overflow, and inf * 0 is NaN.
    root = torch.mv(x, b[0]).sqrt_().mul_(a[:, 0]) if x.ndim == 2 else x.mul_(b).sqrt_().mul_(a).view(-1)
    return root.square_().sum()


def _fold_scale(product: Product) -> tuple[tuple[Tensor, ...], Scalar]:
    """Return the factors and the scale, the scale multiplied into the smallest factor if there is a factor."""
    if not product.factors or _is_one(product.scale):
        return product.factors, product.scale
    factors = list(product.factors)
    sizes = list(map(torch.numel, factors))
    smallest = sizes.index(min(sizes))
    factors[smallest] = factors[smallest] * product.scale
    return tuple(factors), 1.0


def _are_rows_and_cols(factors: Sequence[Tensor], dense: Tensor) -> bool:
    """Return whether there are two factors: one number per row, then one number per column."""
    if len(factors) != 2 or dense.ndim < 2:
        return False
    rows, cols = (*dense.shape[:-1], 1), (*dense.shape[:-2], 1, dense.shape[-1])
    return factors[0].shape == rows and factors[1].shape == cols


def _is_one(scale: Scalar) -> bool:
    return isinstance(scale, float) and scale == 1.0
