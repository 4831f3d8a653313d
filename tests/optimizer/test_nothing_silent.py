"""Cases in which something could silently be other than what was asked for."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch

import optstate
from adalomo import AdaLomo
from optstate import InconsistentStateError, stores, updates
from optstate.recipes import AdamMini, AdamW
from optstate.weights import StochasticRounding, Weights
from tests.support.models import assert_same, state_of


@dataclass(frozen=True)
class _undeclared_sum(updates.Transform):
    def __call__(self, update, state, ctx):
        mean_square = yield from ctx.mean_square(update)
        return update.rescaled(mean_square.rsqrt())


@dataclass(frozen=True)
class _fails_after_the_first_slice(updates.Transform):
    def __call__(self, update, state, ctx):
        if ctx.start:
            raise ZeroDivisionError
        return update


def test_numbers_in_a_group_are_checked_like_those_of_the_recipe() -> None:
    group = {"params": [torch.nn.Parameter(torch.ones(4, 4))], "eps": (0.0, 1e-3)}
    with pytest.raises(ValueError, match="eps=0 needs a floor"):
        AdaLomo([group])


@pytest.mark.parametrize("role", ["querykey", "Embedding", "norms"])
def test_a_role_that_is_nearly_one_is_refused(role: str) -> None:
    with pytest.raises(ValueError, match=f"role='{role}' in a param group is nearly"):
        AdamW([{"params": [torch.nn.Parameter(torch.ones(4, 4))], "role": role}])


def test_a_role_of_ones_own_is_welcome() -> None:
    opt = AdamW([{"params": [torch.nn.Parameter(torch.ones(4, 4))], "role": "router"}])
    assert next(iter(opt.plan())).spec.role == "router"


@pytest.mark.parametrize("head_size", [0, -4, 2.5, True, "4"])
def test_a_head_size_is_a_number_of_rows(head_size: object) -> None:
    with pytest.raises(ValueError, match="must be a whole number of rows"):
        AdamW([{"params": [torch.nn.Parameter(torch.ones(4, 4))], "head_size": head_size}])


def test_a_learning_rate_has_no_dimensions() -> None:
    with pytest.raises(TypeError, match=r"lr has shape \(1,\)"):
        AdamW([torch.nn.Parameter(torch.ones(()))], lr=torch.tensor([0.1]))


def test_a_slot_cannot_take_the_name_of_what_weights_keep() -> None:
    with pytest.raises(ValueError, match="slot='weight' is not usable"):
        updates.chain(updates.momentum(slot="weight"))


def test_chains_in_a_chain_are_one_chain() -> None:
    inner = updates.chain(updates.clip_by_rms(1.0), updates.momentum())
    assert updates.chain(inner, updates.chain()).transforms == inner.transforms


def test_a_group_that_cannot_be_kept_is_not_added() -> None:
    opt = AdamMini([torch.nn.Parameter(torch.ones(4, 4))])
    bad = {"params": [torch.nn.Parameter(torch.ones(6, 4))], "role": "query_key", "head_size": 4}
    with pytest.raises(ValueError, match="head size 4 does not divide"):
        opt.add_param_group(bad)
    assert len(opt.param_groups) == 1
    assert len(opt.plan()) == 1


def test_state_of_a_frozen_parameter_is_planned_in_a_copy_too() -> None:
    param = torch.nn.Parameter(torch.ones(4, 4))
    opt = AdamW([param])
    param.grad = torch.ones(4, 4)
    opt.step()
    param.requires_grad_(False)
    other = copy.deepcopy(opt)
    assert other.plan().nbytes == other.state_nbytes() > 0


def test_other_ways_of_writing_weights_are_announced_when_loading() -> None:
    def build(way: Weights) -> AdamW:
        return AdamW([("p", torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)))], weights=way)

    saved = build(StochasticRounding(1)).state_dict()
    with pytest.warns(UserWarning, match=r"'p' was written by StochasticRounding\(seed=1\) in the saved run"):
        build(StochasticRounding(2)).load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(StochasticRounding(1)).load_state_dict(saved)


def test_a_rate_that_bf16_would_swallow_is_refused_whenever_it_comes() -> None:
    param = torch.nn.Parameter(torch.ones(4, 4))
    second = stores.Full("bfloat16", stochastic=False)
    opt = optstate.Optimizer([("p", param)], updates.scale_by_adam(second=second, betas=(0.9, 0.99)))
    param.grad = torch.ones(4, 4)
    opt.step()
    before = state_of(opt)
    opt.param_groups[0]["betas"] = (0.9, 0.9999)
    with pytest.raises(ValueError, match="does not decay with an averaging weight of 0.0001"):
        opt.step()
    assert_same(state_of(opt), before)


def test_a_sum_asked_for_in_a_slice_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(700, 1000))
    opt = optstate.Optimizer([("p", param)], updates.chain(updates.momentum(), _undeclared_sum()))
    param.grad = torch.ones(700, 1000)
    with pytest.raises(TypeError, match="must declare elementwise = False"):
        opt.step()


def test_a_step_that_broke_off_inside_a_parameter_says_so() -> None:
    param = torch.nn.Parameter(torch.ones(700, 1000))
    opt = optstate.Optimizer([("p", param)], updates.chain(updates.momentum(), _fails_after_the_first_slice()))
    param.grad = torch.ones(700, 1000)
    with pytest.raises(ZeroDivisionError):
        opt.step()
    with pytest.raises(InconsistentStateError, match="'p' failed and may itself be updated in part"):
        opt.step()
