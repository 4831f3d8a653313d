"""Tensors as C code gets them: addresses of what is plainly in memory, and the layout of products and boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from optstate.kernels import native
from optstate.kernels.backend import compiled_functions
from optstate.kernels.native import BoxOperand, ProductOperand
from optstate.kernels.product import Product, Scalar
from optstate.kernels.rehearsal import device_type, rehearsing
from optstate.spec import Region

__all__ = ["Functions", "box_of", "functions_reading", "has_address", "hold_room", "number_at_hand", "product_operand"]

Functions = Mapping[str, Callable[..., Any]]

ShapeAndStrides = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides."""


def has_address(tensor: Tensor) -> bool:
    """Return whether C code may be given the address of a tensor: a real one on the CPU, which no graph records."""
    kind = type(tensor)
    if (kind is not Tensor and kind is not nn.Parameter) or tensor.device.type != "cpu" or tensor.is_neg():
        return False
    return not (tensor.requires_grad and torch.is_grad_enabled())


def functions_reading(*tensors: Tensor) -> Functions | None:
    """Return the compiled functions if they are to be used, and can read and write these tensors without gaps."""
    functions = compiled_functions()
    if functions is None:
        return None
    for tensor in tensors:
        if not (has_address(tensor) and tensor.is_contiguous() and tensor.dtype in native.NUMBERS):
            return None
    return functions


def number_at_hand(value: Scalar) -> float | None:
    """Return a number that the host has, as a float; None if only a device knows it, or a graph records it."""
    if isinstance(value, Tensor):
        return float(value) if has_address(value) and value.numel() == 1 else None
    return float(value)


def product_operand(product: Product) -> ProductOperand | None:
    """Return a product as C code reads it; None if C code cannot."""
    dense, factors = product.dense, product.factors
    count, scale = dense.numel(), product.scale if type(product.scale) is float else number_at_hand(product.scale)
    if product.finite is not None or scale is None or not count or len(factors) > native.MOST_FACTORS:
        return None
    operand = ProductOperand(
        dense=dense.data_ptr(),
        rows=1,
        cols=count,
        type=native.NUMBERS[dense.dtype],
        factors=len(factors),
        bound=math.inf if product.bound is None else product.bound,
        scale=scale,
    )
    if factors:
        for factor in factors:
            if factor.dtype != torch.float32 or not has_address(factor):
                return None
        found = _joined(tuple(dense.shape), tuple((tuple(f.shape), f.stride()) for f in factors))
        if found is None:
            return None
        operand.rows, operand.cols, strides = found
        operand.strides[: len(strides)] = strides
        operand.factor[: len(factors)] = [factor.data_ptr() for factor in factors]
    return operand


@lru_cache(maxsize=1 << 12)
def _joined(shape: Sequence[int], factors: Sequence[ShapeAndStrides]) -> tuple[int, int, list[int]] | None:
    """Join the dimensions along which all factors run alike; None if more than three are left.

    Returns:
        The sizes of the last two dimensions, and three strides for every factor.
    """
    left: list[tuple[int, list[int]]] = []  # of each dimension: its size, and the stride of every factor
    for d, size in enumerate(shape):
        if any(len(of) != len(shape) or of[d] not in (1, size) for of, _ in factors):
            return None
        strides = [0 if of[d] == 1 else stride[d] for of, stride in factors]
        if size == 1:
            continue
        if left and left[-1][1] == [size * stride for stride in strides]:
            left[-1] = (left[-1][0] * size, strides)
        else:
            left.append((size, strides))
    if len(left) > 3:
        return None
    left = [(1, [0] * len(factors))] * (3 - len(left)) + left
    return left[1][0], left[2][0], [left[d][1][k] for k in range(len(factors)) for d in range(3)]


@lru_cache(maxsize=1 << 10)
def box_of(region: Region) -> BoxOperand | None:
    """Return a part of a tensor as C code sees it; None if it has too many dimensions.

    A dimension that is whole here is joined with the one before it, so that runs of elements are as long as they are.
    """
    left: list[tuple[int, int, int]] = []
    for shape, offset, whole in zip(region.shape, region.offset, region.whole, strict=True):
        if left and shape == whole:
            left[-1] = tuple(whole * number for number in left[-1])  # type: ignore[assignment]
        else:
            left.append((shape, offset, whole))
    if len(left) > native.MOST_DIMENSIONS or not left:
        return None
    box = BoxOperand(dims=len(left))
    for d, (shape, offset, whole) in enumerate(left):
        box.shape[d], box.offset[d], box.whole[d] = shape, offset, whole
    return box


BUFFERS = 6
"""How many fp32 buffers a slice of a chain needs at once, about."""


def hold_room(param: Tensor, elements: int) -> Tensor | None:
    """Return a tensor that keeps the memory of slices in the process while the tensor is alive; None if none does.

    The C library gives memory at the end of its heap back to the system as soon as little is in use there, and gets it
    again, page by page, for the next slice: that takes as long as the work. Memory below a buffer that is in use stays.
    Pages of the buffer itself are never touched.

    Args:
        param: what is stepped.
        elements: of a slice.
    """
    if not (has_address(param) or (rehearsing() and device_type(param.device) == "cpu")):
        return None
    room = [torch.empty(elements, dtype=torch.float32, device="cpu") for _ in range(BUFFERS)]
    return room[0] if rehearsing() else max(room, key=Tensor.data_ptr)
