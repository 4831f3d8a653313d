"""Stores in codes against what their documentation says: bytes, errors, zeros, blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import optstate
from optstate import updates
from optstate.kernels import Noise, dynamic_map, linear_map
from optstate.spec import Region
from optstate.stores import AxisMax, Block4, Block8, Factored, Float8, Full, Grouped, Store
from tests.support.models import assert_same
from tests.support.stored import (
    BF16,
    COMMON,
    FP32,
    RANK1,
    Shape,
    bits_of,
    chunk_of,
    least_of_axes,
    noise,
    read_back,
    spec_of,
    stored,
    uniform,
)

pytestmark = pytest.mark.slow


LARGEST = torch.finfo(FP32).max


BLOCKS = [2, 8, 128, 256, 4096]


SMALLEST_SCALE = 2.0**-120
"""Of a block, a row or a column of zeros."""


ROUNDING = 1 + 2.0**-21
"""Scaling and its inverse in fp32 round a few times by 2**-24."""


def fitted(store: Any, signed: bool) -> Store:
    """The store as an optimizer uses it for a large matrix."""
    return store.resolve(spec_of((4096, 4096)), signed)[0]


def of_every_size(shape: Shape, seed: int, signed: bool) -> Tensor:
    """Nine decades evenly, some zeros, one scale for all."""
    value = 10 ** uniform(shape, seed, -9, 0) * (uniform(shape, seed + 1) > 0.05)
    value = value * 10 ** float(uniform((1,), seed + 2, -25, 30))
    return value * noise(shape, seed + 3).sign() if signed else value


def maxima_of_blocks(value: Tensor, block: int) -> Tensor:
    """For every element its block's largest magnitude, float64."""
    parts = value.view(-1).double().abs().split(block)
    return torch.cat([part.amax().expand(len(part)) for part in parts]).view(value.shape)


# --- bytes -----------------------------------------------------------------------------------------------------------


M, N = 512, 1024


BYTES: list[tuple[Store, float, bool]] = [  # as documented, per element; whether for signed statistics too
    (Full(), 4, True),
    (Full("bfloat16"), 2, True),
    (Block8(), 1 + 4 / 256, True),
    (Block8(2), 1 + 4 / 2, True),
    (Block8(4096), 1 + 4 / 4096, True),
    (Block4(), 0.5 + 4 / 128, True),
    (Block4(8), 0.5 + 4 / 8, True),
    (RANK1, 0.5 + 4 * (M + N) / (M * N), True),
    (Float8(), 1 + 4 / 256, True),
    (Float8(128), 1 + 4 / 128, True),
    (Factored(), 4 * (M + N) / (M * N), False),
    (AxisMax(), 4 * (M + N) / (M * N), False),
    (Grouped("row"), 4 * M / (M * N), False),
    (Grouped("head"), 4 * (M // 64) / (M * N), False),
    (Grouped("tensor"), 4 / (M * N), False),
    (Grouped(8), 4 * (M // 8) / (M * N), False),
]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    ("store", "per_element", "signed"), BYTES, ids=lambda x: str(x) if isinstance(x, Store) else ""
)
def test_a_statistic_has_the_documented_bytes(
    store: Store, per_element: float, signed: bool, dtype: torch.dtype
) -> None:
    """In `fields()`, in the plan, and in the memory of a real optimizer's state; whatever the parameter's dtype."""
    documented = per_element * M * N
    second = updates.scale_by_rms(store, decay=updates.constant(0.99))
    for transform, kind in [(second, False), *([(updates.momentum(store), True)] if signed else [])]:
        param = nn.Parameter(torch.zeros(M, N, dtype=dtype))
        optimizer = optstate.Optimizer([{"params": [("p", param)], "head_size": 64}], transform)
        used = store.resolve(spec_of((M, N), dtype, head_size=64), kind)[0]
        assert sum(f.nbytes for f in used.fields(spec_of((M, N), dtype), kind).values()) == documented
        assert optimizer.plan().nbytes == optimizer.state_nbytes() == documented
        tensors = [t for t in optimizer.state[param].values() if isinstance(t, Tensor)]
        assert sum(t.untyped_storage().nbytes() for t in tensors) == documented


@pytest.mark.parametrize("shape", [(3, 50, 60), (8, 4, 12, 12)], ids=str)
@pytest.mark.parametrize("store", [AxisMax(), RANK1], ids=str)
def test_every_dimension_has_a_vector(store: Store, shape: Shape) -> None:
    used = store.resolve(spec_of(shape), False)[0]
    codes = math.prod(shape) // 2 if store == RANK1 else 0
    assert sum(field.nbytes for field in used.fields(spec_of(shape), False).values()) == codes + 4 * sum(shape)


@pytest.mark.parametrize("store", [Block8(), Block4(), RANK1, Float8()], ids=str)
@pytest.mark.parametrize("shape", [(63, 65), (4095,), (3, 5, 7, 39)], ids=str)
def test_under_4096_elements_in_all_the_statistic_is_kept_in_full_and_the_plan_says_so(
    store: Store, shape: Shape
) -> None:
    optimizer = optstate.Optimizer([("p", nn.Parameter(torch.zeros(shape)))], updates.scale_by_adam(store, store))
    (plan,) = optimizer.plan()
    assert {slot.store for slot in plan.slots.values()} == {Full()}
    assert str(optimizer.plan()).count("under 4096 elements: kept in full") == 2
    # Decided on the global shape, so a shard of 2048 elements of 4096 is compressed.
    whole = spec_of((64, 64), region=Region((64, 64), (0, 0), (32, 64), (2, 1)))
    assert not isinstance(store.resolve(whole, True)[0], Full)


@pytest.mark.parametrize("store", [Block8(), Block4(), Float8()], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (4096,), (4, 4, 16, 16)], ids=str)
def test_from_4096_elements_on_it_is_compressed(store: Any, shape: Shape) -> None:
    optimizer = optstate.Optimizer([("p", nn.Parameter(torch.zeros(shape)))], updates.scale_by_adam(store, store))
    (plan,) = optimizer.plan()
    assert {name: slot.store for name, slot in plan.slots.items()} == {
        "exp_avg": replace(store, signed=True),
        "exp_avg_sq": replace(store, signed=False),
    }
    assert not plan.notes


@pytest.mark.parametrize("kind", [Block8, Block4, Float8])
@pytest.mark.parametrize("block", [0, 1, -2, 3, 255, 2.0, True, "256"])
def test_a_block_is_an_even_number_of_elements(kind: Any, block: Any) -> None:
    with pytest.raises(ValueError, match="a block is an even number of elements") as error:
        kind(block)
    assert repr(block) in str(error.value)


# --- errors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What a docstring says of elements whose magnitude is from `low` to `high` of their scale, a block's maximum.

    bound: of the error, as a share of the scale, or of the element where `relative`.
    """

    store: Any
    signed: bool
    bound: float
    low: float = 0.0
    high: float = 1.0
    relative: bool = False

    def share(self, value: Tensor, read: Tensor, scale: Tensor) -> float:
        """The worst error as a share of the bound; 0 where no element is concerned."""
        value, error = value.double().abs(), (read.double() - value.double()).abs()
        scale = scale.clamp(min=SMALLEST_SCALE)
        concerned = (value >= self.low * scale) & (value <= self.high * scale) & (value > 0 if self.relative else True)
        errors = (error / (value if self.relative else scale))[concerned]
        return float(errors.max()) / self.bound if len(errors) else 0.0

    def __str__(self) -> str:
        sign, what = "signed" if self.signed else "unsigned", "relative" if self.relative else "absolute"
        return f"{self.store} {sign} {what} {self.low:g} to {self.high:g}"


def decades(store: Store, signed: bool, *bounds: float) -> list[Claim]:
    return [Claim(store, signed, b, 10.0 ** -(i + 1), 10.0**-i, relative=True) for i, b in enumerate(bounds)]


CLAIMS = [
    Claim(Block8(), True, 0.0071),
    *decades(Block8(), True, 0.062, 0.11, 0.22, 0.44),
    Claim(Block8(), False, 0.0036),
    *decades(Block8(), False, 0.033, 0.062, 0.124, 0.248),
    Claim(Block4(), True, 0.12),
    Claim(Block4(), False, 1 / 16),
    Claim(Block4(), False, 1 / 32, low=1 / 16),
    Claim(RANK1, True, 0.12),
    Claim(RANK1, False, 1 / 16),
    Claim(RANK1, False, 1 / 32, low=1 / 16),
    Claim(Float8(), True, 0.0625, low=3.5e-5, relative=True),
    Claim(Float8(), False, 0.0625, low=3.5e-5, relative=True),
    Claim(Float8(), True, 2.2e-6, high=3.5e-5),
    Claim(Float8(), False, 4.4e-6, high=3.5e-5),
]


def pairs(claim: Claim, scale: float) -> Tensor:
    """Two elements a row: one of every size within the claim, in small steps, and one that is the scale."""
    ends = torch.linspace(claim.low, claim.high, 20_000), torch.logspace(-10, 0, 20_000).clamp(claim.low, claim.high)
    value = torch.cat([*ends, torch.ones(1)])
    rows = torch.stack([value, torch.ones_like(value)], dim=1)
    if claim.signed:
        rows = torch.cat([rows * torch.tensor([a, b]) for a in (1, -1) for b in (1, -1)])
    return rows * scale


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_the_worst_error_is_the_documented_one(claim: Claim) -> None:
    """Not more, and at least half of it: the documented number says something."""
    store = fitted(claim.store, claim.signed)
    store = store if claim.store == RANK1 else replace(store, block=2)
    for scale in (1.0, 3e-20, 7e25):
        value = pairs(claim, scale)
        share = claim.share(value, read_back(store, value, claim.signed), value.abs().max().double())
        assert 0.5 < share <= ROUNDING


@pytest.mark.parametrize(("store", "signed"), dict.fromkeys((c.store, c.signed) for c in CLAIMS), ids=str)
@COMMON
@given(st.integers(0, 999), st.sampled_from(BLOCKS))
def test_no_error_exceeds_the_documented_one(store: Any, signed: bool, seed: int, block: int) -> None:
    """Elements of nine decades in blocks of every size, the last one short."""
    value, used = of_every_size((37, 131), seed, signed), fitted(store, signed)
    if store == RANK1:
        scale = least_of_axes(value)
    else:
        used, scale = replace(used, block=block), maxima_of_blocks(value, block)
    read = read_back(used, value, signed)
    for claim in CLAIMS:
        if (claim.store, claim.signed) == (store, signed):
            assert claim.share(value, read, scale) <= ROUNDING, str(claim)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize(("stochastic", "bound"), [(False, 2.0**-8), (True, 2.0**-7)])
def test_bf16_rounds_by_the_documented_share(stochastic: bool, bound: float, size: float) -> None:
    value = uniform((1 << 18,), 0, 1, 2) * size
    value = value * noise(value.shape, 1).sign()
    (read,) = Full("bfloat16", stochastic).encode(value.clone(), Noise("p/exp_avg", 1)).values()
    worst = float(((read.bfloat16().double() - value.double()) / value.double()).abs().max())
    assert 0.5 * bound < worst <= bound
    assert torch.equal(read_back(Full(), value, True), value)


def test_a_block_whose_largest_element_is_negative_loses_what_the_maps_lack() -> None:
    """No -1 in the signed maps: 0.7 % of the largest in 8 bits, 11 % in 4; 8-bit floats and positive ones lose none."""
    value = torch.full((32, 256), 0.25)
    value[:, 7] = torch.tensor([1.0, -1.0]).repeat(16)
    for store, lost in ((Block8(), 0.0071), (Block4(), 0.12), (Block4(256), 0.12), (Float8(), 0.0)):
        largest = read_back(fitted(store, True), value, True)[:, 7]
        assert (largest[::2] == 1).all()
        assert ((largest[1::2] + 1).abs() <= lost).all()
        assert ((largest[1::2] + 1).abs() >= 0.9 * lost).all()


def test_small_first_moments_become_zero_in_4_bits() -> None:
    """Below 0.3 % of the block's maximum: 0.00275 is half of the smallest value."""
    value = torch.cat([torch.logspace(-9, math.log10(0.00274), 127), torch.ones(1)])
    assert not read_back(fitted(Block4(), True), value, True)[:-1].any()
    assert read_back(fitted(Block4(), True), value.clamp(min=0.003), True).all()


def test_second_moments_are_at_least_a_sixteenth_of_the_maximum_in_4_bits() -> None:
    value = torch.cat([torch.zeros(60), torch.logspace(-9, math.log10(1 / 16), 67), torch.full((1,), 8.0)])
    assert (read_back(fitted(Block4(), False), value, False)[:-1] == 0.5).all()


# --- zero, tiny, infinite --------------------------------------------------------------------------------------------


KEEP_ZERO = [(Block8(), True), (Block8(), False), (Block4(), True), (Float8(), True), (Float8(), False)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("store", "signed"), KEEP_ZERO, ids=str)
def test_zero_stays_zero_beside_anything(store: Any, signed: bool, block: int) -> None:
    for size in (1e-45, 1e-38, 1.0, 3e38):
        value = torch.zeros(9000)
        value[::3] = uniform((3000,), 0, 0.5, 1) * size
        assert not read_back(replace(store, signed=signed, block=block), value, signed)[value == 0].any()


@pytest.mark.parametrize("shape", [(5000,), (67, 131)], ids=str)
@pytest.mark.parametrize("store", [Block8(), Block4(), RANK1, Float8()], ids=str)
def test_a_statistic_that_begins_as_zeros_reads_as_zero(store: Store, shape: Shape) -> None:
    """State is allocated as zeros, codes too: the first average must start from nothing whatever code 0 stands for."""
    for signed in (True, False):
        used = store.resolve(spec_of(shape), signed)[0]
        fields = {k: torch.zeros(f.shape, dtype=f.dtype) for k, f in used.fields(spec_of(shape), signed).items()}
        assert not used.read(fields, shape).any()


def extreme_second_moments() -> dict[str, Tensor]:
    tiny = torch.tensor([1e-45, 3e-44, 1e-40, 1.2e-38, 1e-37, 1e-36])
    return {
        "beside the largest number": torch.cat([tiny, torch.full((1,), LARGEST)]).repeat(600)[:4097],
        "a ratio of 1e30 in every block": torch.logspace(-20, 10, 17).repeat(241),
        "subnormal maxima": torch.cat([tiny[:4]]).repeat(1025)[:4097],
        "the smallest number alone": torch.full((4097,), 1e-45),
        "one of the smallest among zeros": torch.zeros(4097).index_fill(0, torch.arange(0, 4097, 8), 1e-45),
        "random": 10 ** uniform((4097,), 0, -44, 38),
    }


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("case", extreme_second_moments())
@pytest.mark.parametrize("store", [Block8(), Block4(), Float8()], ids=str)
def test_a_second_moment_above_zero_never_reads_as_zero(store: Any, case: str, block: int) -> None:
    value = extreme_second_moments()[case]
    read = read_back(replace(store, signed=False, block=block), value, False)
    assert (read[value > 0] > 0).all()
    assert read.isfinite().all()
    assert (read >= 0).all()


@pytest.mark.parametrize("case", extreme_second_moments())
def test_nor_with_scales_by_rows_and_columns(case: str) -> None:
    value = extreme_second_moments()[case][:4096].view(64, 64)
    read = read_back(fitted(RANK1, False), value, False)
    assert (read > 0).all()  # no zero in this map at all
    assert read.isfinite().all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("store", [Block8(), Block8(2), Block4(), Float8(), RANK1], ids=str)
def test_an_infinite_value_is_kept_as_the_largest_number(store: Store, signed: bool) -> None:
    """Squares of gradients above 1.8e19 overflow: such a second moment must not wrap around to a small number."""
    value = uniform((67, 131), 0)
    value[3, 5], value[40, 2] = math.inf, -math.inf if signed else math.inf
    read = read_back(fitted(store, signed), value, signed)
    assert read.isfinite().all()
    assert read[3, 5] == LARGEST
    assert (-read[40, 2] if signed else read[40, 2]) >= 0.88 * LARGEST
    used = fitted(store, signed)
    fields = stored(used, value, signed)
    used.write(fields, uniform((67, 131), 1))
    assert used.read(fields, (67, 131)).max() <= 1  # and does not stay


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("count", [4097, 4099, 8192, 8193, 5000])
@pytest.mark.parametrize(("store", "signed"), [*KEEP_ZERO, (Block4(), False)], ids=str)
def test_blocks_are_kept_independently_of_each_other(store: Any, signed: bool, count: int, block: int) -> None:
    """The last one is short, of one element at 4097 and 8193; and fields are as large as that needs."""
    value, store = of_every_size((count,), count, signed), replace(store, signed=signed, block=block)
    fields = stored(store, value, signed)
    assert fields["absmax"].shape == (math.ceil(count / block),)
    assert fields["codes"].numel() == (math.ceil(count / 2) if isinstance(store, Block4) else count)
    first, last = value.split(block)[0], value.split(block)[-1]
    read = store.read(fields, (count,))
    assert torch.equal(read[:block], read_back(store, first, signed))
    assert torch.equal(read[-len(last) :], read_back(store, last, signed))
    if len(last) == 1 and last > 0:
        assert read[-1] == last


@pytest.mark.parametrize("block", [2, 6, 128, 4096])
@pytest.mark.parametrize("limit", [64, 1000, 6000])
@pytest.mark.parametrize(("store", "signed"), [*KEEP_ZERO, (Block4(), False)], ids=str)
def test_codes_made_in_pieces_are_the_same(store: Any, signed: bool, limit: int, block: int) -> None:
    value, store = of_every_size((67, 131), 5, signed), replace(store, signed=signed, block=block)
    fields = stored(store, value, signed)
    read = store.read(fields, value.shape)
    with chunk_of(limit):
        assert_same(bits_of(stored(store, value, signed)), bits_of(fields))
        assert torch.equal(store.read(fields, value.shape), read)


# --- scales by rows and columns --------------------------------------------------------------------------------------


RANK_ONE_SHAPES = [(70, 90), (1, 4097), (4097, 1), (5, 29, 31), (8, 4, 12, 12)]


@pytest.mark.parametrize("limit", [64, 1 << 19])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", RANK_ONE_SHAPES, ids=str)
def test_rank_1_reads_code_times_the_smallest_of_the_axes(shape: Shape, signed: bool, limit: int) -> None:
    """Any codes and any maxima, decoded in float64 by their indices; one rounding to fp32 at the end."""
    count = math.prod(shape)
    names = [f"axis{i}" for i in range(len(shape) - 2)] + ["row", "col"]
    fields = {name: uniform((size,), i, 0.1, 3) for i, (name, size) in enumerate(zip(names, shape, strict=True))}
    codes = (uniform((count + count % 2,), 9) * 16).to(torch.uint8)
    fields["codes"] = codes[::2] * 16 + codes[1::2]
    book = torch.tensor(dynamic_map(True, 4) if signed else linear_map(4)).double()
    want = book[codes[:count].long()].view(shape) * reduce(
        torch.minimum,
        [fields[name].double().view([-1 if d == i else 1 for d in range(len(shape))]) for i, name in enumerate(names)],
    )
    with chunk_of(limit):
        assert torch.equal(fitted(RANK1, signed).read(fields, shape), want.float())


@pytest.mark.parametrize("limit", [64, 1 << 19])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", RANK_ONE_SHAPES, ids=str)
def test_rank_1_writes_maxima_and_nearest_codes(shape: Shape, signed: bool, limit: int) -> None:
    value = of_every_size(shape, 3, signed)
    with chunk_of(limit):
        fields = stored(fitted(RANK1, signed), value, signed)
    names = [f"axis{i}" for i in range(len(shape) - 2)] + ["row", "col"]
    for dim, name in enumerate(names):
        others = [d for d in range(len(shape)) if d != dim]
        assert torch.equal(fields[name], value.abs().amax(others).clamp(min=SMALLEST_SCALE))
    book = torch.tensor(dynamic_map(True, 4) if signed else linear_map(4)).double()
    scaled = (value.double() / least_of_axes(value).clamp(min=SMALLEST_SCALE)).view(-1)
    distance = (scaled[:, None] - book).abs()
    codes = torch.stack([fields["codes"] >> 4, fields["codes"] & 15], dim=1).view(-1)[: value.numel()]
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    # The quotient is rounded to fp32 before its code is looked up: either code is right that close to a midpoint.
    assert (chosen <= distance.amin(1) + 2.0**-23 * scaled.abs()).all()


def test_rank_1_is_finer_than_blocks_where_sizes_follow_rows_and_columns() -> None:
    """The reason for it (arXiv 2309.01507, section 4.2): rows and columns of very different sizes."""
    value = 10 ** (uniform((64, 1), 0, -4, 0) + uniform((1, 256), 1, -4, 0))
    error = {
        rank1: ((read_back(fitted(Block4(rank1=rank1), False), value, False) - value).abs() / value).median()
        for rank1 in (True, False)
    }
    assert 10 * error[True] < error[False]


@pytest.mark.parametrize("shape", [(5000,), (4096,)], ids=str)
def test_vectors_have_no_rows_and_columns_and_the_plan_says_so(shape: Shape) -> None:
    optimizer = optstate.Optimizer([nn.Parameter(torch.zeros(shape))], updates.momentum(RANK1))
    (plan,) = optimizer.plan()
    assert plan.slots["exp_avg"].store == Block4()
    assert "exp_avg: a vector has no rows and columns: blocks" in plan.notes
