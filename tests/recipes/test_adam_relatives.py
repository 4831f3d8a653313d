"""AdamS and AdEMAMix, and the mask of cautious updates, beside other code or float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer as po
import torch
from pytorch_optimizer.base.optimizer import BaseOptimizer
from torch import Tensor, nn

import optstate
from optstate import stores, testing, updates
from optstate.recipes import AdamSMN, AdEMAMix
from optstate.testing.devices import CutParameter, gradient_of, noise

RECIPES: dict[str, Callable[..., optstate.Optimizer]] = {
    "adamsmn": AdamSMN,
    "ademamix": lambda params: AdEMAMix(params, t_alpha_beta3=3),
}


@pytest.mark.peer
@pytest.mark.parametrize("warmup", [None, 5, 100])
def test_ademamix_is_that_of_pytorch_optimizer(warmup: int | None) -> None:
    """1e-7: an ulp of weights near one."""
    ours, theirs = (nn.Parameter(noise((9, 7), 1)) for _ in range(2))
    options = {"lr": 1e-3, "weight_decay": 0.1, "t_alpha_beta3": warmup, "betas": (0.9, 0.99, 0.999), "alpha": 3.0}
    a = AdEMAMix([("p", ours)], **options)  # type: ignore[arg-type]
    b = po.AdEMAMix([theirs], weight_decouple=True, **options)  # type: ignore[arg-type]
    for step in range(1, 12):
        ours.grad, theirs.grad = gradient_of((9, 7), step), gradient_of((9, 7), step)
        a.step()
        b.step()
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=2.4e-7)


def test_adams_divides_by_the_last_momentum_and_the_gradient() -> None:
    """fp64 on both sides."""
    lr, (b1, b2), eps, decay = 1e-2, (0.9, 0.95), 1e-8, 0.1
    param = nn.Parameter(noise((6, 5), 1).double())
    optimizer = AdamSMN([("p", param)], lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)
    wanted, m = param.detach().clone(), torch.zeros(6, 5).double()
    for step in range(1, 9):
        g = gradient_of((6, 5), step).double()
        param.grad = g.clone()
        optimizer.step()
        root = (b2 * m**2 + (1 - b2) * g**2).sqrt()
        m = b1 * m + (1 - b1) * g
        if step == 1:  # the form with the new momentum would give 0.410
            assert float((m / root).abs().mean()) == pytest.approx(0.1 / 0.05**0.5)
        wanted = wanted * (1 - lr * decay) - lr * m / (root + eps)
        torch.testing.assert_close(param.detach(), wanted, rtol=0, atol=1e-12)
    assert optimizer.state_nbytes() == 8 * 30


def test_a_huge_gradient_makes_a_small_step_of_adams_and_no_nan() -> None:
    param = nn.Parameter(torch.zeros(4))
    optimizer = AdamSMN([("p", param)], lr=1.0)
    for grad in (1e30, 1.0, 1.0):
        param.grad = torch.full((4,), grad)
        optimizer.step()
    assert param.detach().isfinite().all()


def test_cautious_updates_keep_what_the_gradient_agrees_with() -> None:
    """In float64, from the paper's algorithm 1 on Adam's update; pytorch_optimizer's helper masks the same."""
    shape = (6, 5)
    chain = optstate.chain(updates.scale_by_adam(eps=1e-8), updates.cautious(), updates.add_decayed_weights(0.1))
    param = nn.Parameter(noise(shape, 1).double())
    optimizer = optstate.Optimizer([("p", param)], chain, lr=1e-2)
    wanted, m, v = param.detach().clone(), torch.zeros(shape).double(), torch.zeros(shape).double()
    masked = 0
    for t in range(1, 9):
        g = gradient_of(shape, t).double()
        param.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        keep = (u * g > 0).double()
        theirs = u.clone()
        BaseOptimizer.apply_cautious(theirs, g)
        u = u * keep * u.numel() / (keep.sum() + 1)
        torch.testing.assert_close(theirs, u, rtol=1e-12, atol=0)
        masked += int((keep == 0).sum())
        wanted = wanted * (1 - 1e-2 * 0.1) - 1e-2 * u
        torch.testing.assert_close(param.detach(), wanted, rtol=0, atol=1e-12)
    assert masked > 20


@pytest.mark.parametrize("parts", [(2, 1), (4, 1), (1, 3), (2, 2)], ids=str)
def test_the_cautious_share_is_that_of_the_whole_parameter(parts: tuple[int, ...]) -> None:
    chain = optstate.chain(updates.momentum(), updates.cautious())
    cut = CutParameter(lambda p: optstate.Optimizer(p, chain, lr=1e-2), (40, 24), parts, torch.float64)
    cut.train(4)
    torch.testing.assert_close(cut.joined()[0], cut.whole.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_the_laws_of_recipes_hold(name: str) -> None:
    """Two of the laws; `tests/testing/test_own_parts.py` asks for all of them, with the defaults."""
    testing.check_recipe(RECIPES[name], laws=["fused is stepped", "bad gradients"])


@pytest.mark.parametrize(
    ("store", "share"), [(stores.Block8(), 0.1), (stores.Full("bfloat16"), 0.1), (stores.LowRank(8), 0.3)], ids=str
)
def test_moments_may_be_compressed(store: stores.Store, share: float) -> None:
    """The movement stays near that of a full moment, over few steps of a gradient of rank one and some noise.

    A low rank keeps no noise, and where the gradient is all noise a step has the same size.
    """
    steady = torch.outer(noise((64,), 5), noise((96,), 6)) + 0.05 * noise((64, 96), 7)

    def trained(recipe: Callable[..., optstate.Optimizer]) -> Tensor:
        param = nn.Parameter(noise((64, 96), 1))
        optimizer = recipe([("p", param)])
        for step in range(1, 6):
            param.grad = steady + 0.05 * noise((64, 96), 50 + step)
            optimizer.step()
        return param.detach() - noise((64, 96), 1)

    for build in (lambda p, s: AdamSMN(p, first=s), lambda p, s: AdEMAMix(p, first=s, slow=s)):
        full, kept = (trained(lambda p, s=s, build=build: build(p, s)) for s in (stores.Full(), store))
        assert 0 < float((kept - full).norm()) < share * float(full.norm())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda p: AdamSMN(p, eps=0.0), "eps=0.0 is out of range"),
        (lambda p: AdamSMN(p, betas=(0.9,)), "must be 2 numbers"),
        (lambda p: AdEMAMix(p, betas=(0.9, 0.999)), "must be 3 numbers"),
        (lambda p: AdEMAMix(p, alpha=-1.0), "alpha=-1.0 is out of range"),
        (lambda p: AdEMAMix(p, t_alpha_beta3=2.5), "give a whole number of steps"),
        (lambda p: optstate.Optimizer(p, updates.scale_by_factor(float("nan"))), "give a finite number"),
    ],
)
def test_numbers_that_cannot_be_are_refused_in_a_line(build: Callable[..., Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        build([("p", nn.Parameter(torch.zeros(4, 4)))])
    assert "\n" not in str(raised.value)
