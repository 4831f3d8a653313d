"""A parameter cut into parts for several devices, in every store, beside the same parameter in one piece.

The devices are simulated: their steps run in lock-step in this process, and the test adds up what they ask for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import optstate
from optstate import kernels, stores, updates
from optstate.distributed.sums import lock_step
from optstate.optimizer.chain_step import context, run_chain
from optstate.optimizer.plan import ParamPlan, plan_parameter
from optstate.spec import FieldSpec, ParamSpec, Region
from optstate.stores import Guard, Largest, Partial, Store
from tests.support.ranks import RECIPES

STEPS = 5


def noise(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def gradient(shape: Sequence[int], step: int) -> Tensor:
    return noise(shape, 100 + step) * (0.1 if step % 2 else 3.0)


def cut(size: int, parts: int, index: int) -> slice:
    """Which part of a dimension a device has: chunks as `torch.chunk` makes them, the last ones smaller or empty."""
    chunk = -(-size // parts)
    return slice(min(index * chunk, size), min((index + 1) * chunk, size))


class Part:
    """What one device has."""

    def __init__(self, spec: ParamSpec, place: tuple[int, ...], optimizer: optstate.Optimizer) -> None:
        self.place, self.plan = place, plan_parameter(spec, optimizer.recipe, "auto", trainable=True)
        assert spec.region is not None
        self.region = spec.region
        self.state: dict[str, Any] = {}
        for key, field in self.plan.fields.items():
            self.state[key] = torch.zeros(field.layout(spec)[0], dtype=field.dtype)[self.of_field(field)].clone()

    def of_field(self, field: FieldSpec) -> tuple[slice, ...]:
        shape, dims = field.layout(self.plan.spec)
        if not dims:
            return (slice(None),) * len(shape)
        return tuple(cut(n, self.region.parts[d], self.place[d]) for n, d in zip(shape, dims, strict=True))

    def step(self, param: Tensor, grad: Tensor, group: dict[str, Any], step: int) -> Iterator[Any]:
        guard = Guard(self.plan.spec.name, grad)
        if not self.plan.guards:
            guard.check(torch.isfinite(grad).all())
        ctx = context(self.plan, self.state, param, grad, group, step, guard)
        return self._asking(run_chain(self.plan, self.state, ctx))

    def _asking(self, requests: Any) -> Any:
        reply = None
        while True:
            try:
                request = requests.send(reply)
            except StopIteration:
                return
            reply = yield self, request


class Cut:
    """A parameter in one piece, and the same one cut `parts[d]` times along every dimension d."""

    def __init__(
        self,
        recipe: Callable[..., optstate.Optimizer],
        shape: Sequence[int],
        parts: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shape, self.parts = tuple(shape), tuple(parts)
        self.whole = torch.nn.Parameter(noise(shape, 1).to(dtype))
        group = {"params": [("p", self.whole)], "head_size": 16}
        self.optimizer = recipe([group])
        self.devices = [self._part(place) for place in product(*map(range, parts))]
        self.params = [self.whole.detach()[part.region.index].clone() for part in self.devices]
        self.rounds: list[int] = []

    def _part(self, place: tuple[int, ...]) -> Part:
        index = [cut(n, count, i) for n, count, i in zip(self.shape, self.parts, place, strict=True)]
        offset, size = tuple(s.start for s in index), tuple(s.stop - s.start for s in index)
        region = Region(self.shape, offset, size, self.parts)
        spec = ParamSpec(name="p", shape=self.shape, dtype=self.whole.dtype, head_size=16, region=region)
        return Part(spec, place, self.optimizer)

    @property
    def plan(self) -> ParamPlan:
        return self.devices[0].plan

    def train(self) -> None:
        for step in range(1, STEPS + 1):
            grad = gradient(self.shape, step).to(self.whole.dtype)
            group = self.optimizer.param_groups[0]
            self.rounds.append(0)
            with torch.no_grad():
                runs = [
                    part.step(param, grad[part.region.index].clone(), group, step)
                    for part, param in zip(self.devices, self.params, strict=True)
                ]
                lock_step(runs, self._reply)
            self.whole.grad = grad.clone()
            self.optimizer.step()

    def _reply(self, pending: list[tuple[Part, Any]]) -> list[Any]:
        self.rounds[-1] += 1
        assert len(pending) == len(self.devices)
        return [self._total(part, request, pending, ()) for part, request in pending]

    def _total(self, part: Part, request: Any, pending: list[tuple[Part, Any]], path: tuple[int, ...]) -> Any:
        """What a device gets: its request added up over the devices that differ from it along the dimensions asked."""
        if isinstance(request, tuple) and not isinstance(request, Partial | Largest):
            return tuple(self._total(part, item, pending, (*path, i)) for i, item in enumerate(request))
        ndim = len(self.shape)
        dim = None if isinstance(request, Tensor) else request.dim
        dims = range(ndim) if dim is None else [d % ndim for d in ([dim] if isinstance(dim, int) else dim)]
        values = []
        for other, theirs in pending:
            if all(other.place[d] == part.place[d] for d in range(ndim) if d not in dims):
                for i in path:
                    theirs = theirs[i]
                assert type(theirs) is type(request)
                values.append(theirs if isinstance(theirs, Tensor) else theirs.local)
        stacked = torch.stack(values)
        return stacked.amax(0) if isinstance(request, Largest) else stacked.sum(0)

    def joined(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameter and its state, put together; what several devices have must be the same on all of them."""
        param, seen = torch.full(self.shape, math.nan, dtype=self.whole.dtype), {}
        for part, mine in zip(self.devices, self.params, strict=True):
            param[part.region.index] = mine
            for key, field in part.plan.fields.items():
                whole = seen.setdefault(key, torch.zeros(field.layout(part.plan.spec)[0], dtype=field.dtype))
                if not field.layout(part.plan.spec)[1] and part is not self.devices[0]:
                    assert torch.equal(whole, part.state[key])
                whole[part.of_field(field)] = part.state[key]
        return param, seen

    def check(self, state_bits: bool, **close: float) -> None:
        param, state = self.joined()
        torch.testing.assert_close(param, self.whole.detach(), **close)
        for key, want in self.optimizer.state[self.whole].items():
            if key == "step":
                continue
            if state_bits:
                assert torch.equal(state[key], want), key
            else:
                torch.testing.assert_close(state[key], want, rtol=1e-5, atol=1e-7)


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
@pytest.mark.parametrize(("shape", "parts"), [((64, 100), (3, 1)), ((61, 100), (2, 2)), ((9000,), (2,))], ids=str)
def test_every_recipe_takes_a_parameter_in_parts_as_the_whole(recipe: str, shape: Any, parts: Any) -> None:
    """fp32, as above; averages that are kept in codes are of gradients and their squares alone."""
    both = Cut(RECIPES[recipe], shape, parts)
    both.train()
    both.check(False, rtol=1e-6, atol=2e-6)


def test_no_recipe_is_left_out() -> None:
    assert sorted(RECIPES) == optstate.recipes.names()


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
