"""An interrupt anywhere in a step is seen afterwards, if it left the step half made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import optstate
from adalomo import AdaLomo
from tests.support.forks import starter
from tests.support.interrupts import CASES, attack, first_in_step
from tests.support.models import mlp

pytestmark = pytest.mark.slow

CHOSEN = ("AdaLomo fused", "AdaLomo fused, reentrant checkpoint", "AdamW stepped", "AdamW8bit loaded")


@pytest.mark.parametrize("name", CHOSEN)
def test_no_line_leaves_a_half_made_step_unseen(name: str) -> None:
    """Also none of the others: what goes on after an interrupt that changed nothing, or after a whole step, ends where
    the run without an interrupt does, to the bit."""
    found = attack(CASES[name], first_in_step)
    assert found.tried > 60
    assert found.half > 0
    assert not found.silent
    assert not found.wrong_afterwards


def test_what_other_devices_may_have_gone_on_with_is_seen(tmp_path: Path) -> None:
    """In a process of its own, as it is one of two devices."""
    log = tmp_path / "log"
    code = starter().run("tests.support.interrupts:attack_one_of_two_devices", log=log, timeout=300)
    assert code == 0, log.read_text()


class FailsIf(torch.autograd.Function):
    """Passes its input on, and raises when a gradient comes back if it is told to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fails: bool) -> Tensor:
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.fails:
            raise MemoryError("out of memory")
        return grad, None


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("outside", [False, True], ids=["all inside", "some outside"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_pass_around_a_reentrant_checkpoint_can_still_fail(levels: int, outside: bool, fails: bool) -> None:
    """The inner pass ends well, and its mark with it; the outer one has its own, also where it updates nothing."""
    model, before = mlp(), nn.Linear(8, 8)
    params = [*model.parameters(), *(before.parameters() if outside else ())]
    optimizer = AdaLomo(params, lr=1e-2, fused_backward=True)
    x = before(torch.ones(2, 8)) if outside else torch.ones(2, 8, requires_grad=True)

    def block(h: Tensor) -> Tensor:
        return model(h)

    def outer(h: Tensor) -> Tensor:
        return checkpoint(block, h * 1.0, use_reentrant=True)

    h = checkpoint(block if levels == 1 else outer, FailsIf.apply(x * 1.0, fails), use_reentrant=True)
    loss = h.square().mean()
    if not fails:
        loss.backward()
        optimizer.step()
        optimizer.state_dict()
        return
    with pytest.raises(MemoryError):
        loss.backward()
    for action in (optimizer.state_dict, optimizer.step):
        with pytest.raises(optstate.InconsistentStateError, match="then the backward pass failed"):
            action()


def test_a_pass_that_failed_is_not_closed_by_the_next_one() -> None:
    """The two update different parameters, so no gradient arrives twice."""
    first, second = mlp(), mlp()
    optimizer = AdaLomo([*first.parameters(), *second.parameters()], lr=1e-2, fused_backward=True)
    optimizer.use_backend("eager")  # which updates small parameters at once
    with pytest.raises(MemoryError):
        first[3](FailsIf.apply(first[0](torch.ones(2, 8)), True)).square().mean().backward()
    second(torch.ones(2, 8)).square().mean().backward()
    with pytest.raises(optstate.InconsistentStateError, match="the backward pass failed"):
        optimizer.step()


def test_a_pass_that_failed_before_it_changed_anything_is_forgotten() -> None:
    model, plain = mlp(), mlp()
    optimizer, other = AdaLomo(model.named_parameters(), fused_backward=True), AdaLomo(plain.named_parameters())
    with pytest.raises(MemoryError):
        FailsIf.apply(model(torch.ones(2, 8)), True).square().mean().backward()
    for m, o in ((model, optimizer), (plain, other)):
        m(torch.ones(2, 8)).square().mean().backward()
        o.step()
    optimizer.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


class TestAnOpenStep:
    def test_it_is_not_saved(self, tmp_path: Path) -> None:
        """A fused discriminator is moved by the generator's loss, which nobody meant."""
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        model(torch.ones(2, 8)).square().mean().backward()
        saved = tmp_path / "opt.safetensors"
        for action in (optimizer.state_dict, lambda: optstate.save(optimizer, saved)):
            with pytest.raises(
                optstate.InconsistentStateError, match="refused inside a step: a backward pass has upda"
            ):
                action()
        assert not saved.exists()
        optimizer.step()
        optstate.save(optimizer, saved)

    def test_a_copy_of_it_is_not_taken_for_a_whole_one(self) -> None:
        import copy

        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        model(torch.ones(2, 8)).square().mean().backward()
        with pytest.raises(optstate.InconsistentStateError, match="copied before step"):
            copy.deepcopy(optimizer).step()
