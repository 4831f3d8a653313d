"""Stochastic rounding: unbiased, between two neighbours, and a function of seed, name, step and index alone.

The random bits are a fixed function, so the statistical tests below either always pass or always fail. Their limits
are five standard deviations of what independent bits would give: chance alone would fail one in two million.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import optstate
from optstate import kernels, stores, updates, weights
from optstate.kernels import Noise, Product
from optstate.kernels.rounding import random_bits16
from optstate.memory import peak_extra_bytes
from optstate.spec import ParamSpec, Region
from optstate.weights import Plain, StochasticRounding, as_weights

chunking = importlib.import_module("optstate.kernels.chunking")  # `kernels.chunks` itself is the function

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CPU = torch.device("cpu")
SIGMAS = 5.0
N = 1 << 18

each_dtype = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])


def spec_of(dtype: torch.dtype, name: str = "p", shape: tuple[int, ...] = (N,)) -> ParamSpec:
    return ParamSpec(name=name, shape=shape, dtype=dtype)


def rounded(value: Tensor, dtype: torch.dtype, *, seed: int = 0, name: str = "p", step: int = 1, start: int = 0):
    """fp32 `value` written to a parameter of `dtype` whose chunk begins at flat index `start`."""
    param = torch.full(value.shape, 7.0, dtype=dtype)
    StochasticRounding(seed).codec(spec_of(dtype, name), step, {}).write(param, value.clone(), start)
    return param


@contextmanager
def bits_of(uniform: Tensor) -> Iterator[None]:
    """Round with these numbers of 0 .. 65535 instead of random ones."""
    bits = (uniform - (1 << 15)).to(torch.int16)
    eager = mock.patch("optstate.kernels.backend._functions_of", return_value=None)  # compiled loops make their own
    with eager, mock.patch("optstate.kernels.rounding.random_bits16", return_value=bits):
        yield


@contextmanager
def chunk_of(limit: int) -> Iterator[None]:
    with mock.patch.object(chunking, "CPU_CHUNK", limit):
        yield


def every_number(dtype: torch.dtype) -> Tensor:
    """All 65536 bit patterns of a 16-bit format, as fp32."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).float()


def neighbours(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest number of `dtype` not above and the smallest not below each finite fp32 value."""
    grid = every_number(dtype)
    grid = grid[grid.isfinite()].double().unique().numpy()
    x = value.double().numpy()
    below = np.searchsorted(grid, x, side="right") - 1
    above = np.searchsorted(grid, x, side="left")
    return torch.from_numpy(grid[below]), torch.from_numpy(grid[above])


def gaussians(seed: int, size: int = N) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def sample(dtype: torch.dtype) -> Tensor:
    """fp32 values over the whole range of the format, its subnormal numbers included."""
    low, high = (-132, 126) if dtype == BF16 else (-27, 15)
    exponent = torch.linspace(low, high, N)
    return gaussians(0).sign() * torch.exp2(exponent.double()).float()


# --- where a value can go ------------------------------------------------------------------------------------------


@each_dtype
def test_the_result_is_one_of_the_two_neighbours(dtype):
    value = torch.cat([sample(dtype), gaussians(1)])
    got = rounded(value, dtype).double()
    below, above = neighbours(value, dtype)
    assert ((got == below) | (got == above)).all()
    between = below != above
    # Both happen, for positive and negative numbers: a quarter of the values at the least.
    for side in (value > 0, value < 0):
        assert (got == below)[between & side].float().mean() > 0.25
        assert (got == above)[between & side].float().mean() > 0.25


@each_dtype
def test_numbers_the_format_holds_stay_whatever_the_bits(dtype):
    value = every_number(dtype)
    value = value[value.isfinite()]
    for bits in (0, 1, 7, 8, 1 << 15, 65527, 65528, 65534, 65535):
        with bits_of(torch.full(value.shape, bits)):
            got = rounded(value, dtype).float()
        assert torch.equal(got, value), f"bits {bits} moved {value[got != value][:3].tolist()}"


@each_dtype
def test_infinities_and_nan_stay(dtype):
    # The second NaN is the one that NVIDIA's processors compute, all ones; the last two have only low bits set.
    patterns = [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF]
    nans = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all()
    value = torch.cat([torch.tensor([math.inf, -math.inf, 1.0]), nans]).repeat(1000)
    got = rounded(value, dtype).float()
    torch.testing.assert_close(got, value, rtol=0, atol=0, equal_nan=True)


@each_dtype
def test_bits_decide_between_down_and_up_in_proportion_to_the_distance(dtype):
    # Every one of the 65536 possible numbers, for a few values: counts are exact, up to the bits that are used.
    digits, unit = (16, 2.0**-7) if dtype == BF16 else (13, 2.0**-10)
    for share in (0.0, 1 / 8, 0.5, 1 - 1 / 8, 2.0**-digits, 1 - 2.0**-digits):
        for sign in (1.0, -1.0):
            value = torch.full((1 << 16,), sign * (1 + share * unit))
            with bits_of(torch.arange(1 << 16)):
                away = rounded(value, dtype).double().abs() > 1
            assert away.double().mean().item() == share


@pytest.mark.parametrize("units", [0.3, 5.5, 200.25, 700.5, 1023.9375])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_same_for_the_subnormal_numbers_of_fp16(units, sign):
    value = torch.full((1 << 16,), sign * units * 2.0**-24)
    with bits_of(torch.arange(1 << 16)):
        got = rounded(value, FP16).double() * 2.0**24
    assert set(got.unique().tolist()) == {math.floor(sign * units), math.floor(sign * units) + 1}
    # The docstring's 2**-13 of the spacing: an average over all bits may be off by that and no more.
    assert got.mean().item() == pytest.approx(sign * units, abs=2.0**-13)


@pytest.mark.parametrize(("value", "dtype"), [(1e6, FP16), (-1e6, FP16), (3.4e38, BF16)])
def test_what_is_beyond_the_format_becomes_infinite_as_in_rounding_to_nearest(value, dtype):
    got = rounded(torch.full((1000,), value), dtype).float()
    nearest = torch.tensor(value).to(dtype).float()
    assert nearest.isinf()
    largest = torch.finfo(dtype).max
    assert ((got == nearest) | (got == math.copysign(largest, value))).all()


# --- unbiased ------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_value_rounds_away_from_zero_as_often_as_it_should(dtype, share, sign):
    unit = 2.0**-7 if dtype == BF16 else 2.0**-10
    value = torch.full((N,), sign * (1 + share * unit))
    exact = (abs(value[0].item()) - 1) / unit
    away = (rounded(value, dtype).double().abs() > 1).sum().item()
    # A binomial count: five standard deviations, and the last digits of the bits.
    assert abs(away - N * exact) < SIGMAS * math.sqrt(N * exact * (1 - exact)) + N * 2.0**-13


@each_dtype
@pytest.mark.parametrize("where", ["normal", "subnormal"])
def test_the_mean_error_of_many_values_is_zero(dtype, where):
    smallest = {BF16: 2.0**-133, FP16: 2.0**-24}[dtype]
    value = gaussians(2) if where == "normal" else gaussians(2) * 100 * smallest
    below, above = neighbours(value, dtype)
    spacing = above - below
    used = spacing > 0
    share = ((value.double() - below) / spacing)[used]
    error = ((rounded(value, dtype).double() - value.double()) / spacing)[used]
    # Each error has mean 0 and variance share * (1 - share), in units of the spacing.
    deviation = (share * (1 - share)).sum().sqrt().item()
    assert abs(error.sum().item()) < SIGMAS * deviation + used.sum().item() * 2.0**-13


def test_steps_far_below_the_spacing_move_bf16_weights_on_average():
    param = torch.nn.Parameter(torch.ones(1 << 16, dtype=BF16))
    plain = torch.nn.Parameter(torch.ones(1 << 16, dtype=BF16))
    for p, kind in ((param, StochasticRounding()), (plain, Plain())):
        opt = optstate.Optimizer([("p", p)], optstate.chain(), lr=1e-4, weights=kind)
        for _ in range(20):
            p.grad = torch.ones_like(p)
            opt.step()
    assert (plain == 1).all()
    # 20 independent roundings to a spacing of 2**-8, each of variance s (1 - s) with s = 1e-4 * 2**8.
    share = 1e-4 * 2**8
    deviation = math.sqrt(20 * share * (1 - share)) * 2.0**-8 / math.sqrt(param.numel())
    assert abs(param.double().mean().item() - (1 - 20e-4)) < SIGMAS * deviation


# --- a function of what is rounded ---------------------------------------------------------------------------------


@each_dtype
def test_a_slice_rounds_as_it_does_within_the_whole(dtype):
    value = gaussians(3, 1000)
    whole = rounded(value, dtype)
    for start, stop in ((0, 1), (1, 2), (1, 1000), (6, 17), (7, 18), (500, 500), (999, 1000)):
        assert torch.equal(rounded(value[start:stop], dtype, start=start), whole[start:stop])


@pytest.mark.parametrize("chain", [
    optstate.chain(),
    updates.scale_by_adam(),
    optstate.chain(updates.scale_by_rms(stores.Factored()), updates.clip_by_rms(1.0), updates.scale_by_param_rms()),
], ids=["gradient", "adam", "adalomo"])  # fmt: skip
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@each_dtype
def test_the_bits_do_not_depend_on_chunks_or_strides(chain, layout, dtype):
    def steps(limit: int, transposed: bool) -> tuple[Tensor, Tensor, int]:
        param = torch.nn.Parameter(gaussians(4, 210).view(14, 15).to(dtype))
        if transposed:
            param = torch.nn.Parameter(param.detach().t().contiguous().t())
        opt = optstate.Optimizer([("p", param)], chain, lr=1e-2)
        opt.use_backend("eager")
        pieces: list[Tensor] = []

        def recorded(key: int, start: int, count: int, device: torch.device) -> Tensor:
            pieces.append(random_bits16(key, start, count, device))
            return pieces[-1]

        with chunk_of(limit), mock.patch("optstate.kernels.rounding.random_bits16", recorded):
            for step in range(3):
                param.grad = gaussians(5 + step, 210).view(14, 15).to(dtype)
                opt.step()
        return param.detach(), torch.cat(pieces), len(pieces)

    whole, bits, count = steps(1 << 18, transposed=False)
    assert count == 3
    for limit in (4, 28, 64):
        param, pieces, count = steps(limit, transposed=layout == "transposed")
        assert count > 3
        assert torch.equal(pieces, bits)
        # Sums over the parameter round differently in pieces: an element may then fall to the other side.
        assert (param != whole).sum() <= (0 if chain.elementwise else 3)


@each_dtype
def test_another_seed_name_or_step_rounds_otherwise(dtype):
    value = torch.full((1000,), 1 + 0.5 * (2.0**-7 if dtype == BF16 else 2.0**-10))
    base = rounded(value, dtype)
    assert torch.equal(base, rounded(value, dtype))
    others = [{"seed": 1}, {"seed": -1}, {"name": "q"}, {"name": "p.weight"}, {"step": 2}, {"step": 1 << 20}]
    for other in others:
        changed = (rounded(value, dtype, **other) != base).float().mean().item()
        assert abs(changed - 0.5) < SIGMAS * 0.5 / math.sqrt(1000)


def test_seed_and_step_are_not_interchangeable():
    value = torch.full((1000,), 1 + 2.0**-8)
    assert not torch.equal(rounded(value, BF16, seed=1, step=2), rounded(value, BF16, seed=2, step=1))
    assert not torch.equal(rounded(value, BF16, seed=3, step=3), rounded(value, BF16, seed=5, step=5))


def test_torchs_own_generator_is_left_alone():
    param = torch.nn.Parameter(gaussians(6, 100).bfloat16())
    opt = optstate.Optimizer([("p", param)], updates.scale_by_adam(), lr=1e-2, weights=StochasticRounding(3))
    param.grad = torch.ones_like(param)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    opt.step()
    assert torch.equal(torch.get_rng_state(), before)
    after = param.detach().clone()
    param.data = gaussians(6, 100).bfloat16()
    torch.manual_seed(1)  # another state of the generator, the same bits
    again = optstate.Optimizer([("p", param)], updates.scale_by_adam(), lr=1e-2, weights=StochasticRounding(3))
    again.step()
    assert torch.equal(param, after)


# --- the bits ------------------------------------------------------------------------------------------------------


def finalized(x: int) -> int:
    """MurmurHash3's 32-bit finalizer, from its author's description."""
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def bits_at(key: int, index: int) -> int:
    high, low = divmod(index // 2, 2**32)
    word = finalized(low ^ finalized(key ^ high))
    half = word >> 16 if index % 2 else word & 0xFFFF
    return half - 2**16 if half >= 2**15 else half


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(
    st.integers(0, 2**32 - 1),
    st.one_of(
        st.integers(0, 100),
        st.integers(2**31 - 40, 2**31 + 5),
        st.integers(2**32 - 40, 2**32 + 5),
        st.integers(2**33 - 40, 2**33 + 5),  # two elements per 32-bit word: here the word's index outgrows 32 bits
        st.integers(2**36, 2**62),
    ),
    st.integers(0, 40),
)
def test_each_pair_of_elements_shares_one_hash_of_key_and_index(key, start, count):
    got = random_bits16(key, start, count, CPU)
    assert got.dtype == torch.int16
    assert got.tolist() == [bits_at(key, start + i) for i in range(count)]


STREAMS = [(0, 0), (1, 0), (0xDEADBEEF, 0), (12345, 2**32 + 1), (12345, 2**33 - N // 2), (99, 2**40 + 7)]


@pytest.mark.parametrize(("key", "start"), STREAMS)
def test_the_bits_are_uniform(key, start):
    bits = random_bits16(key, start, N, CPU).int() + (1 << 15)
    for part in (bits >> 8, bits & 0xFF, bits >> 4 & 0xFF):
        counts = torch.bincount(part, minlength=256).double()
        chi_square = ((counts - N / 256) ** 2 / (N / 256)).sum().item()
        # 255 degrees of freedom: mean 255, standard deviation sqrt(2 * 255) = 22.6. Too even is as wrong as too odd.
        assert abs(chi_square - 255) < SIGMAS * math.sqrt(2 * 255)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.double().numpy(), b.double().numpy())[0, 1])


@pytest.mark.parametrize(("key", "start"), STREAMS)
def test_neighbours_are_not_correlated(key, start):
    bits = random_bits16(key, start, N, CPU)
    for lag in (1, 2, 3, 4, 64, 1024, 4096):
        assert abs(correlation(bits[:-lag], bits[lag:])) < SIGMAS / math.sqrt(N - lag)
        same = (bits[:-lag] == bits[lag:]).sum().item()
        expected = (N - lag) / 65536
        assert abs(same - expected) < SIGMAS * math.sqrt(expected) + 1


@pytest.mark.parametrize("how", ["step", "seed", "name"])
def test_streams_of_consecutive_steps_seeds_and_names_are_not_correlated(how):
    value = torch.full((N,), 1 + 2.0**-8)  # half-way: up or down by the highest bit
    variants = [{how: f"layers.{i}" if how == "name" else i + 1} for i in range(6)]
    ups = [(rounded(value, BF16, **variant) > 1).double() for variant in variants]
    for i, a in enumerate(ups):
        for b in ups[:i]:
            assert abs(correlation(a, b)) < SIGMAS / math.sqrt(N)
        for b in ups[:i]:  # and not the same stream shifted by a little
            assert abs(correlation(a[1:], b[:-1])) < SIGMAS / math.sqrt(N - 1)


# --- which way a parameter is written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "dtype", "used"),
    [
        ("auto", FP32, Plain()),
        ("auto", FP64, Plain()),
        ("auto", BF16, StochasticRounding()),
        ("auto", FP16, StochasticRounding()),
        (StochasticRounding(3), BF16, StochasticRounding(3)),
        (StochasticRounding(3), FP16, StochasticRounding(3)),
        (StochasticRounding(3), FP32, Plain()),
        (StochasticRounding(3), FP64, Plain()),
        (Plain(), BF16, Plain()),
        (Plain(), FP32, Plain()),
    ],
    ids=str,
)
def test_auto_rounds_low_precision_stochastically_and_nothing_else(given, dtype, used):
    assert as_weights(given, spec_of(dtype)) == used
    opt = optstate.Optimizer([("p", torch.nn.Parameter(torch.zeros(3, dtype=dtype)))], optstate.chain(), weights=given)
    assert opt.plan().params[0].weights == used
    assert f" {used}" in str(opt.plan())


@pytest.mark.parametrize("bad", ["stochastic", None, StochasticRounding, 16])
def test_other_ways_are_refused_by_value(bad):
    with pytest.raises(TypeError, match='give "auto"') as error:
        optstate.Optimizer([torch.nn.Parameter(torch.zeros(3))], optstate.chain(), weights=bad)
    assert repr(bad) in str(error.value)


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(TypeError, match="must be a whole number") as error:
        weights.StochasticRounding(seed)
    assert repr(seed) in str(error.value)


def test_fp32_parameters_in_a_mixed_model_are_written_plainly_and_the_plan_says_so():
    full, low = torch.nn.Parameter(torch.ones(1000)), torch.nn.Parameter(torch.ones(1000, dtype=BF16))
    opt = optstate.Optimizer([("full", full), ("low", low)], optstate.chain(), lr=1e-3, weights=StochasticRounding(1))
    for param in (full, low):
        param.grad = torch.ones_like(param)
    opt.step()
    assert (full == torch.tensor(1.0) - 1e-3).all()
    assert set(low.float().tolist()) == {1.0, 1 - 2.0**-8}
    lines = {line.split()[0]: line for line in str(opt.plan()).splitlines() if line.startswith(("full", "low"))}
    assert "Plain()" in lines["full"]
    assert "StochasticRounding(seed=1)" in lines["low"]


def test_rounding_needs_little_scratch_whatever_the_parameter():
    param, grad = torch.ones(6 << 20, dtype=BF16), torch.ones(6 << 20, dtype=BF16)  # 25 MB in fp32
    codec = StochasticRounding().codec(spec_of(BF16), 1, {})
    assert peak_extra_bytes(lambda: kernels.apply_update(param, Product(grad, scale=1e-3), 0.1, codec)) <= 8_000_000


@each_dtype
def test_plain_rounds_to_nearest(dtype):
    param = torch.nn.Parameter(gaussians(7, 1000).to(dtype))
    grad = gaussians(8, 1000).to(dtype)
    want = (param.detach().float() - 0.25 * grad.float()).to(dtype)
    opt = optstate.Optimizer([("p", param)], optstate.chain(), lr=0.25, weights=Plain())
    param.grad = grad
    opt.step()
    assert torch.equal(param, want)


@pytest.mark.parametrize(
    ("whole", "offset", "shape", "parts"),
    [
        ((6, 10), (0, 3), (6, 4), (1, 3)),
        ((6, 11), (3, 0), (3, 11), (2, 1)),
        ((7, 11), (4, 5), (3, 6), (2, 2)),
        ((3, 5, 7), (0, 2, 3), (3, 3, 4), (1, 2, 2)),
        ((1 << 17, 1 << 17), (65535, 5), (3, 9), (2, 1 << 14)),
    ],
    ids=str,
)
def test_random_bits_of_a_part_are_those_of_the_whole_wherever_it_lies(
    whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], parts: tuple[int, ...]
) -> None:
    """The last case crosses element 2**33, where the hash's upper 32 bits change."""
    region = Region(whole, offset, shape, parts)
    noise = Noise("p", step=3)
    bits = noise_of_part(noise, region)
    places = itertools.product(*(range(start, start + size) for start, size in zip(offset, shape, strict=True)))
    for got, place in zip(bits, places, strict=True):
        flat = 0
        for i, size in zip(place, whole, strict=True):
            flat = flat * size + i
        assert got == noise.at(flat).bits16(1, CPU).item()


def noise_of_part(noise: Noise, region: Region) -> list[int]:
    """Taken in two slices, as a step does."""
    mine = replace(noise, region=region)
    cut = region.numel // 3
    first, rest = mine.bits16(cut, CPU), mine.at(cut).bits16(region.numel - cut, CPU)
    return torch.cat([first, rest]).tolist()
