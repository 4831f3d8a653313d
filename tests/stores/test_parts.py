"""A parameter cut into parts for several devices, in every store, beside the same parameter in one piece.

The devices are simulated: their steps run in lock-step in this process, and the test adds up what they ask for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import optstate
from optstate import kernels, stores, updates
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores import Store
from optstate.testing.devices import CutParameter
from tests.support.ranks import RECIPES

STEPS = 5


class Cut(CutParameter):
    """A parameter in one piece and in parts, trained alike, and compared."""

    def train(self, steps: int = STEPS) -> None:
        super().train(steps)

    def check(self, state_bits: bool, **close: float) -> None:
        param, state = self.joined()
        torch.testing.assert_close(param, self.whole.detach(), **close)
        for key, want in self.optimizer.state[self.whole].items():
            if key == "step":
                continue
            if state_bits:
                assert torch.equal(state[key], want), key
            else:
                largest = float(want.double().abs().max()) if want.numel() else 0.0  # sums of products cancel
                torch.testing.assert_close(state[key], want, rtol=1e-5, atol=max(1e-7, 1e-5 * largest))


def adam(store: Store) -> Callable[..., optstate.Optimizer]:
    chain = optstate.chain(updates.scale_by_adam(store, store))
    return lambda params: optstate.Optimizer(params, chain, lr=1e-2)


def second_moment(store: Store) -> Callable[..., optstate.Optimizer]:
    chain = optstate.chain(updates.scale_by_rms(store, eps=1e-12))
    return lambda params: optstate.Optimizer(params, chain, lr=1e-2)


EXACT = {"rtol": 0.0, "atol": 0.0}
"""The largest of largest values is the largest, and codes are made element by element: not a bit may differ."""

CUTS = [
    ((40, 512), (3, 1)),  # rows of two blocks each; parts of 14, 14 and 12 rows
    ((60, 100), (2, 1)),  # blocks end anywhere in a row
    ((61, 100), (4, 1)),  # the same, in parts of 16, 16, 16 and 13 rows
    ((3, 2000), (4, 1)),  # more devices than rows
    ((16, 1024), (1, 2)),  # columns of whole blocks
    ((16, 520), (1, 2)),  # columns that cut blocks
    ((15, 520), (2, 2)),
    ((16, 256), (1, 2)),  # rows of whole blocks, of which a part has a half
    ((16, 512), (1, 4)),
    ((40, 512), (2, 4)),
    ((2, 8, 256), (1, 1, 2)),
    ((6, 4, 260), (2, 1, 2)),
    ((4, 30, 60), (1, 4, 1)),
    ((5000,), (2,)),
    ((5000,), (6,)),
]
BLOCKS = [stores.Block8(), stores.Block8(64), stores.Float8(), stores.Block4()]


@pytest.mark.parametrize(("shape", "parts"), CUTS, ids=str)
@pytest.mark.parametrize("store", BLOCKS, ids=str)
def test_blocks_of_a_parameter_in_parts_are_those_of_the_whole(store: Store, shape: Any, parts: Any) -> None:
    both = Cut(adam(store), shape, parts)
    assert both.plan.stores == {"exp_avg": str(store), "exp_avg_sq": str(store)}
    both.train()
    both.check(True, **EXACT)


@pytest.mark.parametrize(
    ("block", "shape", "parts", "shared", "asks"),
    [
        (256, (40, 512), (3, 1), False, 0),
        (256, (60, 100), (2, 1), True, 1),
        (256, (16, 1024), (1, 2), False, 0),
        (256, (16, 520), (1, 2), True, 1),
        (64, (16, 512), (1, 2), False, 0),
    ],
    ids=str,
)
def test_devices_agree_on_maxima_only_where_they_share_blocks(block, shape, parts, shared, asks):
    both = Cut(adam(stores.Block8(block)), shape, parts)
    both.train()
    assert both.rounds == [asks] * STEPS
    entries = {part.state["exp_avg.absmax"].numel() for part in both.devices}
    blocks = -(-math.prod(shape) // block)
    assert (entries == {blocks}) == shared
    assert sum(part.state["exp_avg.codes"].numel() for part in both.devices) == math.prod(shape)
    said = f"split among devices within blocks of {block}: each has all maxima"
    assert any(said in note for note in both.plan.notes) == shared


def test_many_pieces_of_a_large_part_give_the_codes_that_one_piece_gives(monkeypatch):
    monkeypatch.setattr(kernels, "slice_elements", lambda device: 1024)
    both = Cut(adam(stores.Block4()), (61, 100), (2, 1))
    both.train()
    both.check(True, **EXACT)


def test_codes_that_share_a_byte_with_those_of_another_device_are_kept_in_full():
    both = Cut(adam(stores.Block4()), (100, 51), (1, 2))
    assert set(both.plan.stores.values()) == {"Full()"}
    assert "exp_avg: split among devices within a byte of 2 codes: kept in full" in both.plan.notes


@pytest.mark.parametrize(
    ("shape", "parts"),
    [((40, 512), (3, 1)), ((3, 2000), (4, 1)), ((16, 520), (1, 2)), ((15, 520), (2, 2)), ((6, 4, 260), (2, 1, 2))],
    ids=str,
)
def test_scales_of_rows_and_columns_are_those_of_the_whole(shape, parts):
    both = Cut(adam(stores.Block4(rank1=True)), shape, parts)
    assert set(both.plan.stores.values()) == {"Block4(rank1=True)"}
    both.train()
    both.check(True, **EXACT)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [((7, 5), (2, 1)), ((7, 5), (1, 3)), ((7, 5), (2, 2)), ((3, 5), (4, 1)), ((4, 7, 5), (2, 2, 2)), ((1, 6), (2, 4))],
    ids=str,
)
class TestSmall:
    def test_the_largest_values_of_sm3_are_those_of_the_whole(self, shape, parts):
        chain = optstate.chain(updates.scale_by_rss(stores.AxisMax()))
        both = Cut(lambda params: optstate.Optimizer(params, chain, lr=1e-2), shape, parts)
        both.train()
        both.check(True, **EXACT)

    def test_a_factored_second_moment_is_that_of_the_whole(self, shape, parts):
        """fp32: sums of parts are rounded otherwise, some 1e-7 of a weight of one a step."""
        both = Cut(second_moment(stores.Factored()), shape, parts)
        both.train()
        both.check(False, rtol=1e-6, atol=1e-6)
        ways = sum(n > 1 for n in parts[-2:])
        assert both.rounds == [2 if ways == 2 else 1] * STEPS


@pytest.mark.parametrize("parts", [(2, 1), (3, 1), (7, 1), (3, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("by", ["head", 24, "tensor", "row"])
def test_groups_of_rows_may_lie_on_several_devices(by, parts):
    """fp32, as above. 48 rows in groups of 16 or 24: two devices cut a head, three do not, seven cut all."""
    both = Cut(second_moment(stores.Grouped(by)), (48, 6), parts)
    both.train()
    both.check(False, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize(("shape", "parts"), [((61, 100), (2, 2)), ((9000,), (2,))], ids=str)
def test_every_recipe_takes_a_parameter_in_parts_as_the_whole(recipe: str, shape: Any, parts: Any) -> None:
    """fp32, as above; averages that are kept in codes are of gradients and their squares alone."""
    both = Cut(RECIPES[recipe], shape, parts)
    both.train()
    both.check(False, rtol=1e-6, atol=2e-6)


def test_no_recipe_is_left_out() -> None:
    assert set(RECIPES) >= set(optstate.recipes.names())


@pytest.mark.parametrize(
    "store", [stores.Block8(), stores.Block4(rank1=True), stores.AxisMax(), stores.Factored()], ids=str
)
def test_fp64_parameters_are_stepped_in_fp64_in_parts_too(store: Store) -> None:
    """Scales are fp32 whatever the parameter is; what is computed with is not."""
    update = updates.scale_by_rss if isinstance(store, stores.AxisMax) else updates.scale_by_rms
    chain = optstate.chain(update(store, eps=1e-12))
    recipe = lambda params: optstate.Optimizer(params, chain, lr=1e-2)  # noqa: E731
    both = Cut(recipe, (16, 520), (1, 2), torch.float64)
    both.train()
    both.check(False, rtol=1e-6, atol=1e-6)
    assert both.params[0].dtype == torch.float64


def test_a_store_that_needs_all_of_a_parameter_is_refused_before_anything_is_written() -> None:
    @dataclass(frozen=True)
    class OneNumber(Store):
        """The largest value of all, which its author did not write for parts."""

        elementwise: ClassVar[bool] = False

        def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
            return {"largest": FieldSpec((), spec.accumulator, ())}

    chain = optstate.chain(updates.scale_by_rss(OneNumber()))
    with pytest.raises(ValueError, match="cannot keep 'p', of which each device has only a part"):
        Cut(lambda params: optstate.Optimizer(params, chain, lr=1e-2), (4, 6), (2, 1))
