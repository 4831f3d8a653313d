"""Stores that keep maxima or means of several elements, and where these may not stand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import optstate
from optstate import recipes, updates
from optstate.kernels import Noise, Product
from optstate.spec import ParamSpec
from optstate.stores import AxisMax, Factored, Full, Grouped, Guard, Statistic, Store, run_alone
from tests.support.stored import COMMON, SIGNED_SLOTS, Shape, least_of_axes, noise, read_back, spec_of, uniform

pytestmark = pytest.mark.slow


# --- maxima of axes --------------------------------------------------------------------------------------------------


@COMMON
@given(st.sampled_from([(5, 7), (1, 6), (6, 1), (3, 4, 5), (2, 3, 4, 5)]), st.integers(0, 99))
def test_axis_maxima_bound_from_above_and_are_exact_where_nothing_larger_is_beside(shape: Shape, seed: int) -> None:
    value = 10 ** uniform(shape, seed, -5, 5)
    read = read_back(AxisMax(), value, False)
    assert (read >= value).all()
    assert torch.equal(read.double(), least_of_axes(value))
    exact = torch.zeros(shape, dtype=torch.bool)
    for dim in range(len(shape)):
        exact |= value == value.amax([d for d in range(len(shape)) if d != dim], keepdim=True)
    assert torch.equal(read[exact], value[exact])
    assert exact.any()
    again = read_back(AxisMax(), read, False)
    assert torch.equal(again, read)


def test_sums_of_squares_are_bounded_from_above_all_the_way() -> None:
    """Between Adagrad's sums and the smaller of the row's and column's summed maxima (arXiv 1901.11150, claim 2)."""
    spec, shape = spec_of((6, 7)), (6, 7)
    fields = {"row": torch.zeros(6), "col": torch.zeros(7)}
    exact = torch.zeros(shape, dtype=torch.float64)
    rows, cols = torch.zeros(6, 1, dtype=torch.float64), torch.zeros(1, 7, dtype=torch.float64)
    rounding = 2e-6  # of twenty additions, 6e-8 each
    for step in range(20):
        gradient = noise(shape, step) * 10 ** uniform((6, 1), step, -2, 0)
        statistic = Statistic(AxisMax(), fields, spec, checked())
        run_alone(statistic.add_square(Product(gradient)))
        square = gradient.double() ** 2
        exact, rows, cols = exact + square, rows + square.amax(1, keepdim=True), cols + square.amax(0, keepdim=True)
        assert (statistic.read() >= exact * (1 - rounding)).all()
        assert (statistic.read() <= torch.minimum(rows, cols) * (1 + rounding)).all()
        statistic.commit()
    assert (statistic.read() > 1.1 * exact).any()


def checked(finite: bool = True, deferred: bool = False) -> Guard:
    guard = Guard("p", torch.zeros(()), deferred)
    guard.check(torch.tensor(finite))
    return guard


# --- means of groups -------------------------------------------------------------------------------------------------


GROUPS: list[tuple[str | int, Shape, int | None, int]] = [  # by, shape, declared head size, rows of one group
    ("row", (6, 8), None, 1),
    ("row", (6, 4, 5), None, 1),
    ("row", (4, 3, 2, 2), None, 1),
    ("head", (12, 5), 4, 4),
    ("head", (12, 5), 1, 1),
    ("head", (12, 5), 12, 12),
    ("head", (12,), 3, 3),
    ("tensor", (6, 8), None, 6),
    ("tensor", (7,), None, 7),
    ("tensor", (3, 4, 5), None, 3),
    (3, (6, 8), None, 3),
    (1, (6, 8), None, 1),
    (2, (8,), None, 2),
]


@pytest.mark.parametrize(("by", "shape", "head_size", "rows"), GROUPS)
def test_a_group_is_its_mean_exactly_and_averages_are_too(
    by: str | int, shape: Shape, head_size: int | None, rows: int
) -> None:
    spec = ParamSpec(name="p", shape=shape, dtype=torch.float64, head_size=head_size)
    store, note = Grouped(by).resolve(spec, False)
    assert note == ""
    fields = {k: torch.zeros(f.shape, dtype=f.dtype) for k, f in store.fields(spec, False).items()}
    exact = torch.zeros(shape, dtype=torch.float64)
    for step in range(5):
        x = noise(shape, step).double()
        statistic = Statistic(store, fields, spec, checked())
        run_alone(statistic.ema_of_square(Product(x, scale=0.5), 0.3, eps=1e-3))
        statistic.commit()
        exact = exact + 0.3 * ((0.5 * x) ** 2 + 1e-3 - exact)
    means = torch.cat([part.mean().view(1).expand(len(part)) for part in exact.split(rows)])
    want = means.view(-1, *(1,) * (len(shape) - 1)).expand(shape)
    # fp64: sums of at most sixty positive numbers and five averages, each off by some 1e-16.
    torch.testing.assert_close(Statistic(store, fields, spec, checked()).read(), want, rtol=1e-13, atol=0)
    assert fields["mean"].numel() == math.ceil(shape[0] / rows)
    written = store.encode(exact.clone(), Noise("", 0))["mean"].view(-1)
    torch.testing.assert_close(written, means[::rows], rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(), (7,)], ids=str)
@pytest.mark.parametrize("by", ["row", 1])
def test_groups_of_one_element_are_kept_in_full_and_the_plan_says_so(by: str | int, shape: Shape) -> None:
    (plan,) = optstate.Optimizer([nn.Parameter(torch.zeros(shape))], updates.scale_by_rms(Grouped(by))).plan()
    assert plan.slots["exp_avg_sq"].store == Full()
    assert f"exp_avg_sq: {len(shape)}-D: every element is a group, kept in full" in plan.notes


@pytest.mark.parametrize("by", ["rows", "column", 0, -1, 2.0, True, None])
def test_other_groups_are_refused(by: Any) -> None:
    with pytest.raises(ValueError, match='give "row", "head", "tensor" or a number of rows') as error:
        Grouped(by)
    assert repr(by) in str(error.value)


@pytest.mark.parametrize(
    ("by", "group", "message"),
    [
        ("head", {}, "'q' is to be grouped by head, but its head size is not known"),
        ("head", {"head_size": 5}, "'q' has 12 rows, which its head size 5 does not divide"),
        (8, {}, "'q' has 12 rows, which its group size 8 does not divide"),
    ],
)
def test_groups_that_do_not_fit_are_refused_when_the_optimizer_is_built(
    by: str | int, group: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        optstate.Optimizer(
            [{"params": [("q", nn.Parameter(torch.zeros(12, 4)))], **group}], updates.scale_by_rms(Grouped(by))
        )


# --- what is refused when a chain is built ---------------------------------------------------------------------------


UNSIGNED_ONLY = [Factored(), AxisMax(), Grouped("row"), Grouped("head"), Grouped("tensor"), Grouped(4)]


@pytest.mark.parametrize("slot", SIGNED_SLOTS)
@pytest.mark.parametrize("store", UNSIGNED_ONLY, ids=str)
def test_what_can_be_negative_does_not_go_into_means_and_maxima(store: Store, slot: str) -> None:
    with pytest.raises(ValueError, match=r"never negative.* Full\(\)"):
        SIGNED_SLOTS[slot](store)


@pytest.mark.parametrize("build", [recipes.AdamFactor, recipes.AdamMini, recipes.CAME])
def test_nor_in_a_recipe(build: Any) -> None:
    with pytest.raises(ValueError, match="never negative"):
        build([nn.Parameter(torch.zeros(4, 4))], first=Factored())
