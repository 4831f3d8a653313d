"""Gradients whose squares overflow are refused by whatever keeps squares, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import optstate
from adalomo import Adafactor, AdaLomo
from optstate import stores, updates
from optstate.recipes import CAME, SGD, SM3, AdamFactor, AdamMini, AdamW, AdamW4bit, AdamW8bit, Lion, Lion8bit
from tests.support.models import assert_same, state_of

SHAPE = (64, 128)
KEEPS_SQUARES: dict[str, Callable[..., Any]] = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "adamw4bit": AdamW4bit,
    "adamw rank1": lambda p: AdamW4bit(p, rank1=True),
    "adamw float8": lambda p: AdamW(p, first=stores.Float8(), second=stores.Float8()),
    "adamw bf16": lambda p: AdamW(p, second=stores.Full("bfloat16")),
    "adamw grouped": lambda p: AdamW(p, second=stores.Grouped("row")),
    "adamw axes": lambda p: AdamW(p, second=stores.AxisMax()),
    "adamfactor": AdamFactor,
    "adammini": AdamMini,
    "came": CAME,
    "sm3": SM3,
    "adalomo": AdaLomo,
    "adafactor": Adafactor,
    "rms": lambda p: optstate.Optimizer(p, updates.scale_by_rms(stores.Full())),
}


def outlier(dtype: torch.dtype, size: float) -> torch.Tensor:
    grad = torch.full(SHAPE, 1e-2, dtype=dtype)
    grad[3, 5] = size
    return grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e20, -1e25])
@pytest.mark.parametrize("name", KEEPS_SQUARES)
def test_an_overflowing_square_is_refused_and_training_goes_on(name: str, size: float, dtype: torch.dtype) -> None:
    """A second moment of infinity would freeze its element or block, and make it NaN in the next step."""
    param = nn.Parameter(torch.ones(SHAPE, dtype=dtype))
    optimizer = KEEPS_SQUARES[name]([("p", param)])
    before = state_of(optimizer)
    param.grad = outlier(dtype, size)
    with pytest.raises(optstate.NonFiniteGradientError, match="its squares overflow"):
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param))
    assert_same(state_of(optimizer), before)
    for _ in range(3):
        param.grad = outlier(dtype, 1e-2)
        optimizer.step()
    assert param.isfinite().all()


@pytest.mark.parametrize("recipe", [Lion, Lion8bit, SGD])
def test_what_keeps_no_squares_takes_such_a_gradient(recipe: Any) -> None:
    param = nn.Parameter(torch.ones(SHAPE))
    optimizer = recipe([("p", param)], lr=1e-3)
    param.grad = outlier(torch.float32, 1e25)
    optimizer.step()
    assert param.isfinite().all()
    assert param[3, 5] != 1


def test_a_clip_at_the_head_makes_it_harmless() -> None:
    chain = updates.chain(updates.clip_by_value(1.0), updates.scale_by_adam(second=stores.Block8()))
    param = nn.Parameter(torch.ones(SHAPE))
    optimizer = optstate.Optimizer([("p", param)], chain, lr=1e-3)
    param.grad = outlier(torch.float32, 1e25)
    optimizer.step()
    # Adam's first step is the learning rate, whatever the gradient; 1e-6 is a few roundings of 1.
    torch.testing.assert_close(param.detach(), torch.full(SHAPE, 1 - 1e-3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("recipe", "refused"), [(AdamW, False), (AdamW8bit, True)])
def test_scales_in_fp32_limit_fp64_parameters(recipe: Any, refused: bool) -> None:
    param = nn.Parameter(torch.ones(SHAPE, dtype=torch.float64))
    optimizer = recipe([("p", param)])
    param.grad = outlier(torch.float64, 1e50)
    if refused:
        with pytest.raises(optstate.NonFiniteGradientError):
            optimizer.step()
    else:
        optimizer.step()
        assert param.isfinite().all()
