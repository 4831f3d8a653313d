"""Memory claims as tests: scratch of a step, and what a fused backward keeps alive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import optstate
from adalomo import Adafactor, AdaLomo, Lomo
from optstate import updates, weights
from optstate.memory import peak_extra_bytes
from optstate.recipes import SGD, AdamW, Lion

pytestmark = pytest.mark.slow

MEGABYTE = 10**6


def warm_step(recipe: Any, shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> int:
    """Peak bytes beyond parameters, gradients and state in a second step."""
    param = nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = recipe([("p", param)], lr=1e-3, **options)
    param.grad = torch.randn(shape).to(dtype)
    optimizer.step()
    return peak_extra_bytes(optimizer.step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [AdaLomo, Lomo, Adafactor, AdamW, Lion, SGD])
def test_scratch_is_at_most_8_mb_for_a_24_mb_parameter(recipe: Any, dtype: torch.dtype) -> None:
    assert warm_step(recipe, (2048, 3072), dtype, weights=weights.Plain()) <= 8 * MEGABYTE


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (AdaLomo, {}),
        (AdaLomo, {"clip_grad_value": 1e-3, "weight_decay": 0.1}),
        (Adafactor, {"beta1": 0.9}),
        (AdamW, {"weight_decay": 0.1}),
        (SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (Lomo, {"weight_decay": 0.1, "clip_grad_value": 1e-3}),
    ],
)
def test_options_and_stochastic_rounding_stay_within_8_mb(recipe: Any, options: dict[str, Any]) -> None:
    assert warm_step(recipe, (2048, 3072), torch.bfloat16, **options) <= 8 * MEGABYTE


@pytest.mark.parametrize("shape", [(6_000_000,), (3, 2_000_000), (2_000_000, 3), (64, 400, 240), (512, 256, 7, 7)])
def test_scratch_is_as_announced_for_every_shape(shape: tuple[int, ...]) -> None:
    """Elementwise chains need chunks only; factored statistics of thin matrices are large, and the plan says so."""
    announced = next(iter(AdaLomo([nn.Parameter(torch.empty(shape, device="meta"))]).plan())).scratch_bytes
    assert (announced == 0) == (shape == (64, 400, 240))
    assert warm_step(AdaLomo, shape, torch.bfloat16) <= 8 * MEGABYTE + announced
    assert warm_step(AdamW, shape, torch.bfloat16) <= 8 * MEGABYTE


@pytest.mark.parametrize(
    "chain",
    [
        updates.chain(updates.scale_by_adam(), updates.clip_by_rms()),
        updates.chain(updates.momentum(heavy_ball=True, nesterov=True), updates.clip_by_norm()),
        updates.chain(updates.sign_momentum(), updates.scale_by_param_rms()),
        updates.chain(updates.scale_by_rms(optstate.stores.Full()), updates.clip_by_rms()),
        updates.chain(updates.scale_by_rms(optstate.stores.Factored(), floor=1e-6), updates.clip_by_rms()),
        updates.chain(updates.add_decayed_weights(0.1), updates.clip_by_rms()),
        updates.chain(updates.clip_by_rms(), updates.clip_by_value(0.1), updates.clip_by_rms(updates.hyper("b", 1.0))),
    ],
    ids=str,
)
def test_what_needs_more_says_how_much(chain: Any) -> None:
    """The plan's bound holds, and is not more than twice what is needed plus the chunks."""
    shape = (2048, 2048)
    param = nn.Parameter(torch.randn(shape))
    optimizer = optstate.Optimizer([("p", param)], chain, lr=1e-3)
    optimizer.use_backend("eager")
    param.grad = torch.randn(shape)
    optimizer.step()
    announced = next(iter(optimizer.plan())).scratch_bytes
    assert announced > 0
    measured = peak_extra_bytes(optimizer.step)
    assert measured <= announced + 8 * MEGABYTE
    assert announced <= 2 * measured + 8 * MEGABYTE


def test_a_fused_backward_keeps_no_gradients() -> None:
    """Beyond the weights: all gradients without fusing, two layers' worth with it (one being made, one in use)."""

    def peak(fused: bool) -> int:
        torch.manual_seed(0)
        layers = [nn.Linear(512, 512, bias=False) for _ in range(24)]
        model = nn.Sequential(*layers)
        optimizer = AdaLomo(model.named_parameters())
        if fused:
            optstate.fuse_backward(optimizer)

        def train() -> None:
            model(torch.ones(4, 512)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        train()
        return peak_extra_bytes(train)

    layer = 512 * 512 * 4
    assert peak(fused=False) >= 24 * layer
    assert peak(fused=True) <= 4 * layer
