"""Calling the compiled steps by hand, as the whole steps do with what an optimizer planned."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from optstate.kernels import native
from optstate.kernels.native import StepRule, WriteKind

needs_compiled_steps = pytest.mark.skipif(bool(native.why_missing()), reason=native.why_missing())


def write_weight(
    param: Tensor, value: Tensor, how: WriteKind, extra: Tensor | None = None, start: int = 0, key: int = 0
) -> None:
    """Make `value`, fp32, the value of a parameter of zeros, by a step of size -1 along it.

    Args:
        param: zeros; written.
        value: of the same size.
        how: the way of writing.
        extra: what is kept beside the parameter, zeros; written.
        start: flat index, in the whole parameter, of the first element.
        key: of the random bits.
    """
    step = _descent(param, value, how, extra, start, key)
    step.step = -1.0
    native.function("step_elementwise")(ctypes.byref(step), 0, param.numel())


def step_by_nothing(param: Tensor, how: WriteKind, extra: Tensor | None = None, key: int = 0) -> None:
    """Make a step of size zero along a gradient of zeros: read every weight and write it back."""
    step = _descent(param, torch.zeros(param.numel()), how, extra, 0, key)
    native.function("step_elementwise")(ctypes.byref(step), 0, param.numel())


def _descent(
    param: Tensor, grad: Tensor, how: WriteKind, extra: Tensor | None, start: int, key: int
) -> native.Elementwise:
    address = None if extra is None else extra.data_ptr()
    weight = native.WeightOperand(param.data_ptr(), address, start, native.NUMBERS[param.dtype], how, key)
    gradient = native.GradientOperand(grad.data_ptr(), native.NUMBERS[grad.dtype], float("inf"), 1.0, 0.0)
    return native.Elementwise(weight=weight, grad=gradient, rule=StepRule.DESCENT, keep=1.0, alive=(param, grad, extra))


def every_pattern(dtype: torch.dtype) -> Tensor:
    """Return all 65,536 numbers of a dtype of 16 bits, in the order of their patterns."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


def hard_numbers(dtype: torch.dtype) -> Tensor:
    """Return fp32 numbers that are hard to round to a dtype of 16 bits.

    They are its numbers, what lies half-way between two of them, the fp32 neighbours of those, and 2**18 random
    patterns, NaN and infinities among them.
    """
    numbers = every_pattern(dtype).double()
    numbers = torch.unique(numbers[numbers.isfinite()])
    half = ((numbers[:-1] + numbers[1:]) / 2).float()
    ends = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38, 65519.9, 65520.0, 1e-45])
    patterns = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=torch.Generator().manual_seed(0))
    up, down = (torch.nextafter(half, torch.full_like(half, end)) for end in (torch.inf, -torch.inf))
    return torch.cat([numbers.float(), half, up, down, ends, patterns.to(torch.int32).view(torch.float32)])


def assert_equal_numbers(left: Tensor, right: Tensor) -> None:
    """Assert that two tensors are equal to the bit, NaN of any payload and sign being equal to NaN."""
    assert left.dtype == right.dtype
    assert torch.equal(left.isnan(), right.isnan())
    integers = torch.int16 if left.element_size() == 2 else torch.int32
    left, right = left.nan_to_num(0.0, torch.inf, -torch.inf), right.nan_to_num(0.0, torch.inf, -torch.inf)
    different = (left.contiguous().view(integers) != right.contiguous().view(integers)).nonzero()
    assert not different.numel(), f"{len(different)} differ, first at {different[0].tolist()}"
