"""Hyper-parameters are checked when they are used: schedulers and users change them after an optimizer was built."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import optstate
from adalomo import Adafactor, AdaLomo, Lomo
from optstate import updates
from optstate.optimizer import param_groups
from optstate.recipes import CAME, SGD, AdamMini, AdamW, AdamW8bit, Lion
from tests.support.pairwise import pairwise

RECIPES: dict[str, Any] = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "lomo": Lomo,
    "adalomo": AdaLomo,
    "adafactor": Adafactor,
    "lion": Lion,
    "sgd": lambda p, **more: SGD(p, momentum=0.9, **more),
    "came": CAME,
    "adammini": lambda p, **more: AdamMini([{"params": list(p), "role": "matrix"}], **more),
}
every_recipe = pytest.mark.parametrize("build", RECIPES.values(), ids=RECIPES.keys())


def built(build: Any, fused: bool, **more: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = build(model.named_parameters(), lr=0.1, **more)
    if fused:
        optstate.fuse_backward(optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def values_of(model: nn.Module, optimizer: Any) -> list[torch.Tensor]:
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *state)]


def refused(model: nn.Module, optimizer: Any, match: str) -> None:
    """A step raises, in whichever of its parts, and changes nothing."""
    before, steps = values_of(model, optimizer), [s["step"] for s in optimizer.state.values()]
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        step(model, optimizer)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, values_of(model, optimizer), strict=True))
    assert steps == [s["step"] for s in optimizer.state.values()]


UNUSABLE = (-0.1, math.nan, math.inf, "0.1", None, True, torch.tensor(-0.1), torch.ones(2))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fused", "value"), pairwise(list(RECIPES), (False, True), UNUSABLE), ids=str)
def test_a_learning_rate_that_no_step_can_use(name: str, fused: bool, value: Any) -> None:
    model, optimizer = built(RECIPES[name], fused)
    step(model, optimizer)
    optimizer.param_groups[0]["lr"] = value
    refused(model, optimizer, r"param group 0 cannot be stepped: lr(=| has shape)")
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.zero_grad()
    step(model, optimizer)  # nothing was half made
    assert {state["step"] for state in optimizer.state.values()} == {2}


@pytest.mark.parametrize("fused", [False, True])
def test_a_schedule_below_zero_is_refused_where_it_gets_there(fused: bool) -> None:
    model, optimizer = built(AdaLomo, fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 5)
    for _ in range(6):
        step(model, optimizer)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] < 0
    refused(model, optimizer, r"lr=-0\.0[12]\d* is out of range: it must be at least 0.*a scheduler")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("build", "key", "value", "match"),
    [
        (AdamW, "weight_decay", -1.0, "weight_decay=-1.0 is out of range"),
        (AdamW, "weight_decay", math.nan, "weight_decay=nan is out of range"),
        (AdamW, "betas", (0.9, 1.0), r"betas\[1\]=1.0 is out of range"),
        (AdamW, "betas", (math.nan, 0.9), r"betas\[0\]=nan is out of range"),
        (AdamW, "betas", (0.9,), "has no entry 1"),
        (AdamW, "betas", torch.ones(2, 3), r"betas\[0\]=tensor"),
        (AdamW, "betas", np.ones((2, 2)), r"betas\[0\]=array"),
        (AdamW, "eps", 0.0, "eps=0.0 is out of range"),
        (AdamW, "eps", "1e-8", "eps='1e-8' is a str"),
        (AdaLomo, "eps", (0.0, 1e-3), "eps=0 needs a floor"),
        (AdaLomo, "clip_threshold", 0.0, "clip_threshold=0.0 is out of range"),
        (AdaLomo, "decay_rate", 0.8, "decay_rate=0.8 is out of range"),
        (RECIPES["sgd"], "momentum", 1.0, "momentum=1.0 is out of range"),
    ],
)
def test_other_numbers_are_checked_too(build: Any, key: str, value: Any, match: str, fused: bool) -> None:
    model, optimizer = built(build, fused)
    step(model, optimizer)
    optimizer.param_groups[0][key] = value
    refused(model, optimizer, match)


def test_a_list_that_changes_in_place_is_checked_again() -> None:
    model, optimizer = built(AdamW, False)
    optimizer.param_groups[0]["betas"] = [0.9, 0.999]
    step(model, optimizer)
    optimizer.param_groups[0]["betas"][1] = 1.0
    refused(model, optimizer, r"betas\[1\]=1.0 is out of range")


def test_a_number_that_was_taken_out_is_missed() -> None:
    model, optimizer = built(AdamW, False)
    del optimizer.param_groups[0]["eps"]
    refused(model, optimizer, "eps is missing in the param group")
    model, optimizer = built(AdamW, False)
    del optimizer.param_groups[0]["lr"]
    refused(model, optimizer, "lr=None is a NoneType")


def test_rows_without_gradients_are_divided_by_something() -> None:
    """An element whose gradients were all zero is 0 / (sqrt(0) + eps)."""
    for build in (AdamW, AdamW8bit, RECIPES["adammini"]):
        with pytest.raises(ValueError, match=r"eps=0\.0 is out of range"):
            build(nn.Embedding(5, 2).named_parameters(), lr=0.1, eps=0.0)
    table = nn.Embedding(5, 2)
    before = table.weight.detach().clone()
    optimizer = AdamW(table.named_parameters(), lr=0.1, eps=1e-38, weight_decay=0.0)
    table(torch.tensor([1, 2])).square().sum().backward()
    optimizer.step()
    assert torch.equal(table.weight[[0, 3, 4]], before[[0, 3, 4]])
    assert table.weight.isfinite().all()


def test_every_group_is_checked_and_named_by_its_place() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    route = optstate.route([(optstate.is_matrix, updates.scale_by_adam())], default=updates.momentum())
    optimizer = optstate.Optimizer([{"params": []}, {"params": list(model.named_parameters())}], route, lr=0.1)
    optimizer.param_groups[0]["lr"] = -1.0  # of an empty group: it is not used
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.param_groups[2]["momentum"] = 2.0
    with pytest.raises(ValueError, match=r"param group 2 cannot be stepped: momentum=2.0"):
        optimizer.step()


def test_values_of_a_later_group_and_of_a_copy_are_checked() -> None:
    _, optimizer = built(AdamW, False)
    other = nn.Linear(4, 3)
    optimizer.add_param_group({"params": [("other." + name, p) for name, p in other.named_parameters()]})
    for made in (optimizer, copy.deepcopy(optimizer)):
        made.param_groups[1]["eps"] = math.nan
        with pytest.raises(ValueError, match="param group 1 cannot be stepped: eps=nan"):
            made.step()
    optimizer.load_state_dict(AdamW([{"params": list(g["params"])} for g in optimizer.param_groups]).state_dict())
    optimizer.step()


def test_numbers_on_an_accelerator_are_not_read_and_unchanged_ones_not_checked_again(monkeypatch: Any) -> None:
    with FakeTensorMode():  # whose values cannot be read: reading one raises
        model, optimizer = built(AdamW, False)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
        step(model, optimizer)
    calls: list[Any] = []
    monkeypatch.setattr(param_groups, "check_values", lambda *given: calls.append(given))
    model, optimizer = built(AdamW, False)
    calls.clear()
    for _ in range(3):
        step(model, optimizer)
    assert len(calls) == 1
    optimizer.param_groups[0]["weight_decay"] = 0.25
    step(model, optimizer)
    step(model, optimizer)
    assert len(calls) == 2


def test_numpys_numbers_and_zero_are_numbers() -> None:
    model, optimizer = built(AdamW, False)
    for lr in (np.float64(0.1), np.float32(0.1), 0, 1, torch.tensor(0.1)):
        optimizer.param_groups[0]["lr"] = lr
        step(model, optimizer)


def test_fused_a_bad_value_is_found_at_the_first_gradient_of_a_step() -> None:
    model, optimizer = built(AdaLomo, True)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr=nan"):
        model(torch.ones(2, 4)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.param_groups[0]["lr"] = 0.1
    step(model, optimizer)


def test_fused_a_value_that_goes_bad_before_the_step_is_closed_can_be_set_right() -> None:
    model, optimizer = built(AdaLomo, True)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert {state["step"] for state in optimizer.state.values()} == {1}
