"""Parameters that differ in nothing but their names are planned once, as each would be by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

import optstate
from adalomo import AdaLomo
from optstate import recipes, stores, updates, weights
from optstate.optimizer.plan import plan_parameter

LAYERS = 50
ADAM = optstate.chain(updates.scale_by_adam(stores.Block8(), stores.Factored()))
LION = optstate.chain(updates.sign_momentum(stores.Full()))
SLOW = optstate.chain(updates.momentum(stores.Full(), 0.9))
ROUTED = optstate.route([("*.0.weight", LION), (optstate.is_vector, SLOW)], default=ADAM)


def stack(dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.nn.Parameter]]:
    """Named weights and biases of layers that are all of one shape."""
    shapes = {"weight": (6, 4), "bias": (6,)}
    return [
        (f"layers.{layer}.{name}", torch.nn.Parameter(torch.ones(shape, dtype=dtype)))
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    ]


@pytest.mark.parametrize(
    ("make", "kinds"),
    [(AdaLomo, 2), (recipes.get("adamw8bit"), 2), (lambda p: optstate.Optimizer(p, ROUTED), 3)],
    ids=["adalomo", "adamw8bit", "a route by names"],
)
def test_building_decides_once_for_each_kind_of_parameter(make: Callable[..., Any], kinds: int) -> None:
    with mock.patch("optstate.optimizer.planner.plan_parameter", wraps=plan_parameter) as decided:
        make(stack())
    assert decided.call_count == kinds


@pytest.mark.parametrize("recipe", [ADAM, ROUTED], ids=["chain", "route"])
@pytest.mark.parametrize("way", ["auto", weights.Kahan()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_plan_is_the_one_the_parameter_gets_alone(recipe: Any, way: Any, dtype: torch.dtype) -> None:
    optimizer = optstate.Optimizer(stack(dtype), recipe, weights=way)
    assert len(optimizer.plan()) == 2 * LAYERS
    for plan in optimizer.plan():
        assert plan == plan_parameter(plan.spec, optimizer.recipe, way, trainable=True)
    assert {plan.spec.name for plan in optimizer.plan()} == {name for name, _ in stack()}


def test_no_two_parameters_share_a_tensor_of_state() -> None:
    optimizer = optstate.Optimizer(stack(), ADAM)
    places = [v.data_ptr() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert len(places) == len(set(places)) > 2 * LAYERS


def test_role_and_head_size_are_kinds_of_their_own() -> None:
    grouped = optstate.chain(updates.scale_by_rms(stores.Grouped("head"), eps=1e-8))
    pairs = [(f"p{i}", torch.nn.Parameter(torch.ones(8, 4))) for i in range(3)]
    groups = [
        {"params": pairs[:1], "role": "query_key", "head_size": 1},
        {"params": pairs[1:2], "role": "query_key", "head_size": 4},
        {"params": pairs[2:], "role": "query_key", "head_size": 2},
    ]
    optimizer = optstate.Optimizer(groups, grouped)
    entries = [sum(field.shape[0] for field in plan.fields.values()) for plan in optimizer.plan()]
    assert entries == [8, 2, 4]  # one per row, and one per head of 4 and of 2 rows


def test_a_refusal_names_the_parameter_at_hand_and_adds_nothing() -> None:
    grouped = optstate.chain(updates.scale_by_rms(stores.Grouped("head"), eps=1e-8))
    first = {"params": [("first", torch.nn.Parameter(torch.ones(8, 4)))], "head_size": 4}
    optimizer = optstate.Optimizer([first], grouped)
    for name in ("second", "third"):  # what was refused is not remembered
        added = {"params": [(name, torch.nn.Parameter(torch.ones(7, 4)))], "role": "query_key", "head_size": 4}
        with pytest.raises(ValueError, match=f"'{name}' has 7 rows"):
            optimizer.add_param_group(added)
    assert [plan.spec.name for plan in optimizer.plan()] == ["first"]
    assert len(optimizer.state) == 1


def test_parameters_without_names_are_numbered_through_the_groups_of_a_route() -> None:
    params = [param for _, param in stack()]
    optimizer = optstate.Optimizer(params, optstate.route([(optstate.is_vector, updates.momentum())], default=ADAM))
    assert [plan.spec.name for plan in optimizer.plan()] == [f"param_{i}" for i in range(2 * LAYERS)]


def test_a_frozen_parameter_of_a_known_kind_gets_state_when_it_trains() -> None:
    pairs = stack()
    pairs[-2][1].requires_grad_(False)
    optimizer = optstate.Optimizer(pairs, ADAM)
    assert [plan.trainable for plan in optimizer.plan()].count(False) == 1
    frozen = pairs[-2][1].requires_grad_()
    assert frozen not in optimizer.state
    frozen.grad = torch.ones_like(frozen)
    optimizer.step()
    assert optimizer.state[frozen].keys() == optimizer.state[pairs[0][1]].keys()
    assert all(plan.trainable for plan in optimizer.plan())


class ByName(type(updates.sign_momentum(stores.Full()))):  # type: ignore[misc]
    """A transform of somebody else's, which keeps something for one parameter alone."""

    def slots(self, spec: Any, group: Any) -> dict[str, Any]:
        return super().slots(spec, group) if spec.name.endswith("3.weight") else {}


def test_what_a_foreign_transform_keeps_may_depend_on_the_name() -> None:
    kept = [len(plan.slots) for plan in optstate.Optimizer(stack(), optstate.chain(ByName(stores.Full()))).plan()]
    assert sum(kept) == LAYERS // 10
