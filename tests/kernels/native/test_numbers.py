"""Rounding in the compiled steps: against torch's own casts, and to the bit against the codecs in eager PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optstate.kernels import noise_key
from optstate.kernels.native import WriteKind
from optstate.spec import ParamSpec, Region
from optstate.weights import Kahan, Split, StochasticRounding, Weights
from tests.support.compiled import (
    assert_equal_numbers,
    every_pattern,
    hard_numbers,
    needs_compiled_steps,
    step_by_nothing,
    write_weight,
)

pytestmark = needs_compiled_steps

LOW = [torch.bfloat16, torch.float16]
KEPT: list[tuple[Weights, WriteKind, torch.dtype, str]] = [
    (Kahan(), WriteKind.KAHAN, torch.bfloat16, "compensation"),
    (Kahan(), WriteKind.KAHAN, torch.float16, "compensation"),
    (Split(16), WriteKind.SPLIT16, torch.bfloat16, "correction"),
    (Split(8), WriteKind.SPLIT8, torch.bfloat16, "correction"),
]
"""The ways that keep something beside the parameter, and the name of what they keep."""


def spec_of(dtype: torch.dtype, count: int, region: Region | None = None) -> ParamSpec:
    return ParamSpec(name="p", shape=(count,) if region is None else region.whole, dtype=dtype, region=region)


def kept_beside(way: Weights, dtype: torch.dtype, count: int, field: str) -> Tensor:
    return torch.zeros(count, dtype=way.fields(spec_of(dtype, count))[field].dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_rounding_to_nearest_is_torchs_cast(dtype: torch.dtype) -> None:
    """Subnormal numbers, ties, overflow, NaN and infinities among them; 0 minus -0 is 0, whose sign is not compared."""
    value = hard_numbers(dtype)
    param = torch.zeros(len(value), dtype=dtype)
    write_weight(param, value, WriteKind.PLAIN)
    assert_equal_numbers(param, (value + 0.0).to(dtype))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("how", [WriteKind.PLAIN, WriteKind.STOCHASTIC])
def test_a_step_of_size_zero_changes_no_weight(how: WriteKind, dtype: torch.dtype) -> None:
    param = every_pattern(dtype).clone()
    step_by_nothing(param, how, key=7)
    expected = every_pattern(dtype)
    loses_sign = how == WriteKind.STOCHASTIC and dtype == torch.float16  # of zero, in the eager codec as well
    assert_equal_numbers(param, expected + 0.0 if loses_sign else expected)


@pytest.mark.parametrize(("way", "how", "dtype", "field"), KEPT, ids=str)
def test_a_step_of_size_zero_changes_no_weight_nor_what_is_kept(
    way: Weights, how: WriteKind, dtype: torch.dtype, field: str
) -> None:
    param = every_pattern(dtype).clone()
    extra = kept_beside(way, dtype, len(param), field)
    step_by_nothing(param, how, extra)
    expected = every_pattern(dtype)
    assert_equal_numbers(param, expected + 0.0 if how == WriteKind.KAHAN else expected)  # -0 + 0 is 0
    zero = kept_beside(way, dtype, len(param), field)
    assert torch.equal(extra[~expected.isnan()], zero[~expected.isnan()])


@pytest.mark.parametrize(("way", "how", "dtype", "field"), KEPT, ids=str)
def test_what_is_kept_beside_a_weight_is_what_the_eager_codec_keeps(
    way: Weights, how: WriteKind, dtype: torch.dtype, field: str
) -> None:
    value = hard_numbers(dtype) + 0.0
    param, extra = torch.zeros(len(value), dtype=dtype), kept_beside(way, dtype, len(value), field)
    expected, beside = param.clone(), extra.clone()
    write_weight(param, value, how, extra)
    way.codec(spec_of(dtype, len(value)), 1, {field: beside}).write(expected, value.clone(), 0)
    assert_equal_numbers(param, expected)
    assert torch.equal(extra, beside)
    step_by_nothing(param, how, extra)  # read with what is kept, and written back
    finite = expected.isfinite()
    assert torch.equal(param[finite], expected[finite])
    assert torch.equal(extra[finite], beside[finite])


@pytest.mark.parametrize("bits", [8, 16])
def test_a_correction_from_before_a_weight_was_overwritten_is_read_as_the_codec_reads_it(bits: int) -> None:
    """Every pattern of a weight beside random corrections, which never meet in a parameter that was stepped."""
    way, how = Split(bits), WriteKind.SPLIT16 if bits == 16 else WriteKind.SPLIT8
    param, generator = every_pattern(torch.bfloat16).clone(), torch.Generator().manual_seed(0)
    extra = kept_beside(way, torch.bfloat16, len(param), "correction")
    extra.copy_(torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (len(param),), generator=generator))
    expected, beside = param.clone(), extra.clone()
    codec = way.codec(spec_of(torch.bfloat16, len(param)), 1, {"correction": beside})
    codec.write(expected, codec.read(expected, 0, torch.empty(len(param))) + 0.0, 0)
    step_by_nothing(param, how, extra)
    finite = ~expected.isnan()
    assert torch.equal(param.view(torch.int16)[finite], expected.view(torch.int16)[finite])
    assert torch.equal(param.isnan(), expected.isnan())
    assert torch.equal(extra[finite], beside[finite])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("start", [0, 1, 12345, 2**33 - 1111, 2**34 + 7])
def test_stochastic_rounding_uses_the_random_bits_of_the_place_in_the_whole_parameter(
    dtype: torch.dtype, start: int
) -> None:
    """Equal to the bit to the eager codec, also where the index passes 2**33, and its half 32 bits."""
    value = hard_numbers(dtype)[-5000:] if start else hard_numbers(dtype)
    count = len(value)
    region = Region((2 * (start + count),), (start,), (count,), (2,))
    param, expected = torch.zeros(count, dtype=dtype), torch.zeros(count, dtype=dtype)
    write_weight(param, value, WriteKind.STOCHASTIC, start=start, key=noise_key("p", 3, 5))
    StochasticRounding(5).codec(spec_of(dtype, count, region), 3, {}).write(expected, value + 0.0, 0)
    assert_equal_numbers(param, expected)


def test_stochastic_rounding_is_right_on_average() -> None:
    """A number a quarter of the way between two of bf16 is rounded up in a quarter of the places: binomial."""
    value = torch.full((1 << 18,), 1.0 + 2.0**-9)
    param = torch.zeros(len(value), dtype=torch.bfloat16)
    write_weight(param, value, WriteKind.STOCHASTIC, key=noise_key("p", 1))
    share = float((param > 1.0).double().mean())
    assert set(param.tolist()) == {1.0, 1.0 + 2.0**-7}
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(value))  # five standard deviations


def test_small_numbers_of_fp16_are_read_where_subnormal_numbers_are_flushed() -> None:
    """fp16's subnormal numbers are normal in fp32; a program may have the processor flush what is subnormal there."""
    param = every_pattern(torch.float16).clone()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        step_by_nothing(param, WriteKind.PLAIN)
    finally:
        torch.set_flush_denormal(False)
    assert_equal_numbers(param, every_pattern(torch.float16))
