"""What a step costs in Python, counted: where parameters are small this is what it costs at all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import adalomo
import optstate
from adalomo import AdaLomo, Lomo
from optstate import recipes

OWN = tuple(str(Path(package.__file__ or "").parent) for package in (optstate, adalomo))
KERNELS = str(Path(optstate.__file__).parent / "kernels")


class Calls:
    """Counts Python calls, and how many of our frames stand between the outermost of them and a kernel."""

    def __init__(self) -> None:
        self.total = self.own = self.after_hook = self.deepest = 0

    def of(self, function: Callable[[], Any]) -> Calls:
        sys.setprofile(self._see)
        try:
            function()
        finally:
            sys.setprofile(None)
        return self

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        self.total += 1
        self.own += code.co_filename.startswith((*OWN, "<string>"))  # <string>: constructors of dataclasses
        self.after_hook += self.after_hook > 0 or code.co_qualname == "GradientHook.__call__"
        before = frame.f_back
        enters = code.co_filename.startswith(KERNELS) and before is not None
        if (
            enters
            and not before.f_code.co_filename.startswith((KERNELS, "<string>"))
            and "__init__" not in code.co_name
        ):
            self.deepest = max(self.deepest, _own_frames(frame))


def _own_frames(frame: FrameType | None) -> int:
    """How many frames of ours end in this one, without a foreign one between them."""
    count = 0
    while frame is not None and frame.f_code.co_filename.startswith(OWN):
        count, frame = count + 1, frame.f_back
    return count


def trained(
    recipe: Callable[..., optstate.Optimizer], fused: bool, cols: int = 48
) -> tuple[torch.nn.Parameter, optstate.Optimizer]:
    """A matrix and its optimizer after a few steps, so that nothing is done for the first time."""
    param = torch.nn.Parameter(torch.randn(64, cols))
    optimizer = recipe([("w", param)], lr=1e-3)
    if fused:
        optstate.fuse_backward(optimizer)
    for _ in range(3):
        (param * param).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return param, optimizer


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_hook_reaches_every_kernel_in_seven_frames_and_the_weight_in_120_calls(backend: str) -> None:
    param, optimizer = trained(AdaLomo, fused=True, cols=2048)  # no small one, which would wait for others
    optimizer.use_backend(backend)
    (param * param).sum().backward()  # the steps are found anew
    optimizer.step()
    loss = (param * param).sum()
    before = param.detach().clone()
    calls = Calls().of(loss.backward)
    assert not torch.equal(param, before)
    # hook, arrival, runner, chain, whole step, kernel; or, in eager, the choice of a backend, transform and store
    assert calls.deepest <= 7 + (backend == "eager")
    assert 60 < calls.after_hook < (140 if backend == "eager" else 120)
    optimizer.step()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stepped"])
@pytest.mark.parametrize(
    ("recipe", "most"),
    [(AdaLomo, 115), (Lomo, 95), (recipes.get("adamw"), 90), (recipes.get("lion"), 106), (recipes.get("came"), 135)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_no_recipe_takes_more_calls_than_it_did(
    recipe: Callable[..., optstate.Optimizer], most: int, fused: bool
) -> None:
    """PyTorch adds two calls where something else was begun before: the bounds have room for them."""
    param, optimizer = trained(recipe, fused)
    if fused:
        calls = Calls().of((param * param).sum().backward)
    else:
        param.grad = torch.ones_like(param)
        calls = Calls().of(optimizer.step)
    assert calls.own > 20
    assert calls.total <= most


def test_closing_a_fused_step_with_nothing_left_to_do_takes_25_calls_of_ours() -> None:
    param, optimizer = trained(AdaLomo, fused=True)
    (param * param).sum().backward()
    assert 5 < Calls().of(optimizer.step).own <= 25
