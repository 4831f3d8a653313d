"""AdaLomo and Lomo against recorded runs of the official code.

Tolerance 1e-6 absolute on weights: a clean-room rule ends at most 1.2e-7 away after 20 steps in fp32, and every
mistake in the rule that these runs can see is at least 8e-6 away.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import optstate
from adalomo import AdaLomo, Lomo
from optstate import stores, updates
from tests.support.models import RecordedModel
from tests.support.paths import DATA

COMMON = load_file(DATA / "common.safetensors")
RUNS = {
    "adalomo_default": (AdaLomo, {}),
    "adalomo_wd0.1": (AdaLomo, {"weight_decay": 0.1}),
    "adalomo_clipvalue0.1": (AdaLomo, {"clip_grad_value": 0.1}),
    "lomo_plain": (Lomo, {}),
    "lomo_wd0.1": (Lomo, {"weight_decay": 0.1}),
    "lomo_clipnorm1": (Lomo, {}),
}
ATOL = 1e-6


def start(dtype: torch.dtype = torch.float32) -> RecordedModel:
    model = RecordedModel()
    model.load_state_dict({k.removeprefix("init."): v for k, v in COMMON.items() if k.startswith("init.")})
    return model.to(dtype)


def loss_at(model: RecordedModel, t: int) -> torch.Tensor:
    return model(COMMON["inputs.ids"][t], COMMON["inputs.targets"][t], COMMON["inputs.loss_weight"][t])


def largest_difference(model: RecordedModel, run: dict[str, torch.Tensor], t: int) -> float:
    return max((p - run[f"traj.{name}"][t]).abs().max().item() for name, p in model.named_parameters())


@pytest.mark.parametrize("fused", [False, True], ids=["step", "fused"])
@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_follow_the_official_code(name: str, fused: bool) -> None:
    run, (recipe, options) = load_file(DATA / f"{name}.safetensors"), RUNS[name]
    clip = 1.0 if "clipnorm" in name else None
    model = start()
    optimizer = recipe(model.named_parameters(), lr=run["lr"][0].item(), **options)
    backward = optstate.fuse_backward(optimizer, clip_grad_norm=clip) if fused else None
    for t in range(20):
        loss = loss_at(model, t)
        if backward is not None and clip:
            backward.grad_norm(loss)
        loss.backward()
        if backward is None and clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        assert largest_difference(model, run, t + 1) <= ATOL, f"step {t + 1}"
        assert loss.item() == pytest.approx(run["loss"][t].item(), abs=1e-5)


@pytest.mark.parametrize("name", [n for n in RUNS if n != "lomo_clipnorm1"])
def test_each_single_step_follows_the_official_code(name: str) -> None:
    """From the recorded weights and gradients, so that errors cannot cancel or build up."""
    run, (recipe, options) = load_file(DATA / f"{name}.safetensors"), RUNS[name]
    model = start()
    optimizer = recipe(model.named_parameters(), lr=run["lr"][0].item(), **options)
    for t in range(20):
        for key, p in model.named_parameters():
            p.data.copy_(run[f"traj.{key}"][t])
            p.grad = run[f"grad.{key}"][t].clone()
        optimizer.step()
        assert largest_difference(model, run, t + 1) <= ATOL, f"step {t + 1}"


@pytest.mark.parametrize("name", [n for n in RUNS if n.startswith("adalomo")])
def test_final_statistics_are_the_official_ones(name: str) -> None:
    """Relative 1e-5, absolute 0: rows of tokens that never occur hold eps itself, 1e-30, which weights cannot show."""
    run, (recipe, options) = load_file(DATA / f"{name}.safetensors"), RUNS[name]
    model = start()
    optimizer = recipe(model.named_parameters(), lr=run["lr"][0].item(), **options)
    for t in range(20):
        loss_at(model, t).backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, p in model.named_parameters():
        state = optimizer.state[p]
        assert state["step"] == 20
        if p.ndim == 2:
            torch.testing.assert_close(state["exp_avg_sq.row"], run[f"final.exp_avg_sq_row.{key}"], rtol=1e-5, atol=0)
            torch.testing.assert_close(state["exp_avg_sq.col"], run[f"final.exp_avg_sq_col.{key}"], rtol=1e-5, atol=0)
        else:
            torch.testing.assert_close(state["exp_avg_sq"], run[f"final.exp_avg_sq.{key}"], rtol=1e-5, atol=0)
    unseen = optimizer.state[model.emb.weight]["exp_avg_sq.row"][11:]
    torch.testing.assert_close(unseen, torch.full((2,), 1e-30), rtol=1e-5, atol=0)


def test_the_norm_clip_uses_the_recorded_coefficients() -> None:
    run = load_file(DATA / "lomo_clipnorm1.safetensors")
    model = start()
    optimizer = Lomo(model.named_parameters(), lr=run["lr"][0].item())
    fused = optstate.fuse_backward(optimizer, clip_grad_norm=1.0)
    clipped = 0
    for t in range(20):
        loss = loss_at(model, t)
        norm = fused.grad_norm(loss)
        coefficient = min(1.0, 1.0 / (norm.item() + 1e-6))
        assert coefficient == pytest.approx(run["clip_coef"][t].item(), abs=1e-6)
        clipped += coefficient < 1.0
        loss.backward()
        optimizer.step()
    assert clipped == 10


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_composed_chain_is_the_recipe_bit_for_bit(weight_decay: float) -> None:
    def train(build: object) -> list[torch.Tensor]:
        model = start()
        optimizer = build(model.named_parameters())  # type: ignore[operator]
        for t in range(20):
            loss_at(model, t).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    chain = optstate.chain(
        updates.scale_by_rms(stores.Factored(), decay=updates.power_decay(0.8), eps=1e-30),
        updates.clip_by_rms(1.0),
        updates.add_decayed_weights(weight_decay),
        updates.scale_by_param_rms(1e-3),
    )
    composed = train(lambda params: optstate.Optimizer(params, chain, lr=1e-3))
    recipe = train(lambda params: AdaLomo(params, lr=1e-3, weight_decay=weight_decay))
    assert all(torch.equal(a, b) for a, b in zip(composed, recipe, strict=True))
