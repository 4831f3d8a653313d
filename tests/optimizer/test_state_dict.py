"""state_dict and load_state_dict: bit-exact, strict, never casting."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import optstate
from adalomo import Adafactor, AdaLomo, Lomo
from optstate import stores, updates
from optstate.recipes import SGD, AdamW, Lion
from tests.support.models import assert_same, loss_of, mlp, state_of, weights_of
from tests.support.pairwise import pairwise

RECIPES: dict[str, Any] = {
    "adalomo": AdaLomo,
    "lomo": Lomo,
    "adafactor": Adafactor,
    "adafactor momentum": lambda p, lr: Adafactor(p, lr=lr, beta1=0.9),
    "adamw": AdamW,
    "adamw bf16 momentum": lambda p, lr: AdamW(p, lr=lr, first=stores.Full("bfloat16")),
    "sgd momentum": lambda p, lr: SGD(p, lr=lr, momentum=0.9),
    "lion": Lion,
}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint on disk, read back without executing pickles."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def steps(model: nn.Module, optimizer: Any, scheduler: Any, first: int, count: int) -> None:
    for step in range(first, first + count):
        loss_of(model, step).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fused", "dtype"),
    pairwise(list(RECIPES), (False, True), (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    ids=str,
)
def test_resuming_is_bit_exact_with_a_scheduler(name: str, fused: bool, dtype: torch.dtype) -> None:
    def build() -> tuple[nn.Module, Any, Any]:
        model = mlp(dtype)
        optimizer = RECIPES[name](model.named_parameters(), lr=1e-2)
        if fused:
            optstate.fuse_backward(optimizer)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    model, optimizer, scheduler = build()
    steps(model, optimizer, scheduler, 0, 3)
    saved = through_a_file(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    )
    steps(model, optimizer, scheduler, 3, 2)

    resumed, resumed_optimizer, resumed_scheduler = build()
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    resumed_scheduler.load_state_dict(saved["scheduler"])
    steps(resumed, resumed_optimizer, resumed_scheduler, 3, 2)
    assert_same(weights_of(resumed), weights_of(model))
    assert_same(state_of(resumed_optimizer), state_of(optimizer))


def test_a_learning_rate_changed_after_loading_takes_effect_fused() -> None:
    """Libraries that keep the group inside hooks or state miss this."""
    model = mlp()
    optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights_of(model)
    loss_of(model, 1).backward()
    optimizer.step()
    assert_same(weights_of(model), before)


def test_nothing_is_cast_and_nothing_aliased() -> None:
    """torch would turn the fp32 statistics of a bf16 parameter into bf16."""
    model = mlp(torch.bfloat16)
    optimizer = AdamW(model.named_parameters())
    loss_of(model, 0).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = AdamW(mlp(torch.bfloat16).named_parameters())
    other.load_state_dict(saved)
    for i, state in enumerate(state_of(other)):
        assert state["exp_avg_sq"].dtype == torch.float32
        assert_same(state, saved["state"][i])
    snapshot = copy.deepcopy(saved)
    loss_of(model, 1).backward()
    other.param_groups[0]["params"][0].grad = torch.ones_like(other.param_groups[0]["params"][0])
    other.step()
    assert_same(saved["state"], snapshot["state"])


def test_the_state_dict_survives_a_deepcopy_and_holds_plain_values() -> None:
    model = mlp()
    optimizer = AdaLomo(model.named_parameters())
    loss_of(model, 0).backward()
    optimizer.step()

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str | int) and plain(v) for k, v in value.items())
        if isinstance(value, list | tuple):
            return all(plain(v) for v in value)
        return value is None or type(value) in (int, float, str, bool, torch.Tensor)

    saved = optimizer.state_dict()
    assert plain(saved)
    assert_same(copy.deepcopy(saved)["state"], saved["state"])


def test_a_parameter_frozen_when_saved_loads_into_a_frozen_one() -> None:
    def build() -> tuple[nn.Module, AdaLomo]:
        model = mlp()
        model[0].weight.requires_grad_(False)
        return model, AdaLomo(model.named_parameters())

    model, optimizer = build()
    loss_of(model, 0).backward()
    optimizer.step()
    other_model, other = build()
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other_model[0].weight not in other.state
    assert other.state[other_model[0].bias]["step"] == 1


def mutate_drop_state(saved: dict[str, Any]) -> None:
    del saved["state"][0]


def mutate_missing_key(saved: dict[str, Any]) -> None:
    del saved["state"][0]["exp_avg_sq.row"]


def mutate_extra_key(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg"] = torch.zeros(16, 8)


def mutate_dtype(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg_sq.row"] = saved["state"][0]["exp_avg_sq.row"].bfloat16()


def mutate_shape(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg_sq.row"] = saved["state"][0]["exp_avg_sq.row"][:-1]


def mutate_not_a_tensor(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg_sq.row"] = [0.0] * 16


def mutate_step(saved: dict[str, Any]) -> None:
    saved["state"][0]["step"] = 1.5


def mutate_names(saved: dict[str, Any]) -> None:
    names = saved["param_groups"][0]["param_names"]
    names[0], names[1] = names[1], names[0]


def mutate_group_count(saved: dict[str, Any]) -> None:
    saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))


def mutate_group_size(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


def mutate_hyper(saved: dict[str, Any]) -> None:
    del saved["param_groups"][0]["clip_threshold"]


def mutate_hyper_value(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["weight_decay"] = -3.0


def mutate_version(saved: dict[str, Any]) -> None:
    saved["optstate"]["version"] = 99


def mutate_store(saved: dict[str, Any]) -> None:
    saved["optstate"]["stores"][0]["exp_avg_sq"] = "Full()"


def mutate_stray(saved: dict[str, Any]) -> None:
    saved["state"][77] = {"step": 1}


def mutate_no_groups(saved: dict[str, Any]) -> None:
    del saved["param_groups"]


@pytest.mark.parametrize(
    ("mutate", "match"),
    [
        (mutate_drop_state, "nothing for '0.weight'"),
        (mutate_missing_key, "'0.weight' was saved with"),
        (mutate_extra_key, "'0.weight' was saved with"),
        (mutate_dtype, r"'0.weight': exp_avg_sq.row was saved as torch.bfloat16 \(16,\), here it is torch.float32"),
        (mutate_shape, r"saved as torch.float32 \(15,\)"),
        (mutate_not_a_tensor, "as a list, not as a tensor"),
        (mutate_step, "step 1.5, which is not a count"),
        (mutate_names, "'0.weight' where '0.bias' was saved"),
        (mutate_group_count, "had 2 param groups, this one has 1"),
        (mutate_group_size, "saved with 5 parameters, here it has 6"),
        (mutate_hyper, "without 'clip_threshold': it comes from another recipe"),
        (mutate_hyper_value, "weight_decay=-3.0"),
        (mutate_version, "format version 99"),
        (mutate_store, r"saved as exp_avg_sq in Full\(\), here it is exp_avg_sq in Factored\(\)"),
        (mutate_stray, "belong to no parameter, such as 77"),
        (mutate_no_groups, "not an optimizer's state_dict"),
    ],
)
def test_a_mismatch_names_the_parameter_and_changes_nothing(mutate: Any, match: str) -> None:
    model = mlp()
    optimizer = AdaLomo(model.named_parameters())
    loss_of(model, 0).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    mutate(saved)
    before, groups = state_of(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=match) as caught:
        optimizer.load_state_dict(saved)
    assert "\n" not in str(caught.value)
    assert_same(state_of(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


def test_another_recipes_state_is_refused() -> None:
    adamw, adalomo = AdamW(mlp().named_parameters()), AdaLomo(mlp().named_parameters())
    for saver, loader in ((adamw, adalomo), (adalomo, adamw)):
        with pytest.raises(ValueError, match="saved"):
            loader.load_state_dict(copy.deepcopy(saver.state_dict()))
    first = updates.chain(updates.momentum(stores.Full()))
    low = updates.chain(updates.momentum(stores.Full("bfloat16")))
    a = optstate.Optimizer(mlp().named_parameters(), first)
    b = optstate.Optimizer(mlp().named_parameters(), low)
    with pytest.raises(
        ValueError, match=r"saved as exp_avg in Full\(\), here it is exp_avg in Full\(dtype='bfloat16'\)"
    ):
        b.load_state_dict(a.state_dict())


def test_a_dict_without_our_header_still_loads_strictly() -> None:
    """Distributed checkpoints keep only torch's two keys, and may turn the step into a tensor."""
    model = mlp()
    optimizer = AdaLomo(model.named_parameters())
    loss_of(model, 0).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    bare = {key: saved[key] for key in ("state", "param_groups")}
    for state in bare["state"].values():
        state["step"] = torch.tensor(float(state["step"]))
    other = AdaLomo(mlp().named_parameters())
    other.load_state_dict(bare)
    assert_same(state_of(other), state_of(optimizer))
    assert type(other.state[other.param_groups[0]["params"][0]]["step"]) is int


def test_torch_distributed_checkpointing_round_trips_in_one_process() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def build() -> tuple[nn.Module, AdaLomo]:
        model = mlp()
        return model, AdaLomo(model.named_parameters(), lr=1e-2)

    model, optimizer = build()
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other_model, other = build()
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, saved)
    assert_same(state_of(other), state_of(optimizer))
