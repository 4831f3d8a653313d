"""Schedule-Free AdamW beside other code and float64, and what eval() and train() do to weights and to checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer as po
import torch
from torch import Tensor, nn

import optstate
from optstate import stores, testing, updates, weights
from optstate.recipes import AdamW, ScheduleFreeAdamW
from optstate.testing.devices import CutParameter, gradient_of, noise

SHAPE = (9, 7)


def step_once(param: nn.Parameter, optimizer: torch.optim.Optimizer, step: int) -> None:
    param.grad = gradient_of(tuple(param.shape), step).to(param.dtype)
    optimizer.step()


def trained(steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Parameter, Any]:
    param = nn.Parameter(noise(SHAPE, 1).to(dtype))
    optimizer = ScheduleFreeAdamW([("p", param)], **options)
    for step in range(1, steps + 1):
        step_once(param, optimizer, step)
    return param, optimizer


@pytest.mark.peer
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1, "warmup_steps": 4, "r": 1.0}, {"betas": (0.98, 0.9), "weight_lr_power": 0.0}]
)
def test_steps_and_averages_are_those_of_pytorch_optimizer(options: dict[str, Any]) -> None:
    """2e-6: a few ulp of weights near one after 14 steps; both are written as a mix, in another order."""
    ours, theirs = nn.Parameter(noise(SHAPE, 1)), nn.Parameter(noise(SHAPE, 1))
    a, b = ScheduleFreeAdamW([("p", ours)], **options), po.ScheduleFreeAdamW([theirs], **options)
    for step in range(1, 15):
        for param, optimizer in ((ours, a), (theirs, b)):
            if step == 9:
                optimizer.param_groups[0]["lr"] = 1e-3
            step_once(param, optimizer, step)
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=2e-6)
        if step % 5 == 0:
            a.eval()
            b.eval()
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=2e-6)
            a.train()
            b.train()


def test_three_sequences_in_float64() -> None:
    """From the paper's algorithm 1, with x kept as it is there: 1e-12 on both sides in fp64."""
    lr, b1, b2, decay = 1e-2, 0.9, 0.99, 0.1
    param = nn.Parameter(noise(SHAPE, 1).double())
    optimizer = ScheduleFreeAdamW([("p", param)], lr=lr, betas=(b1, b2), weight_decay=decay)
    x = z = y = param.detach().clone()
    v, total = torch.zeros(SHAPE).double(), 0.0
    for t in range(1, 9):
        g = gradient_of(SHAPE, t).double()
        step_once(param, optimizer, t)
        v = b2 * v + (1 - b2) * g * g
        z = z - lr * (g / ((v / (1 - b2**t)).sqrt() + 1e-8) + decay * y)
        total += lr**2
        x = x + lr**2 / total * (z - x)
        y = (1 - b1) * z + b1 * x
        torch.testing.assert_close(param.detach(), y, rtol=0, atol=1e-12)
        optimizer.eval()
        torch.testing.assert_close(param.detach(), x, rtol=0, atol=1e-11)
        optimizer.train()


@pytest.mark.parametrize("way", ["auto", weights.Kahan(), weights.Split(16)], ids=str)
def test_evaluation_leaves_no_trace(way: Any) -> None:
    (param, optimizer), (other, unseen) = (trained(dtype=torch.bfloat16, weights=way) for _ in range(2))
    before = param.detach().clone()
    for _ in range(2):
        optimizer.eval()
        optimizer.eval()
        assert not torch.equal(param.detach(), before)
        optimizer.train()
        optimizer.train()
        assert torch.equal(param.detach(), before)
    for step in range(4, 7):
        step_once(param, optimizer, step)
        step_once(other, unseen, step)
    assert torch.equal(param.detach(), other.detach())


def test_before_the_first_step_the_average_is_the_weight() -> None:
    param, optimizer = trained(0)
    optimizer.eval()
    assert torch.equal(param.detach(), noise(SHAPE, 1))
    optimizer.train()


@pytest.mark.parametrize("action", ["step", "state_dict", "save", "load", "load_state_dict", "copy", "backward"])
def test_averaged_weights_are_neither_trained_nor_saved(action: str, tmp_path: Path) -> None:
    param, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    optstate.save(optimizer, tmp_path / "a.safetensors")
    if action == "backward":
        optstate.fuse_backward(optimizer)
    optimizer.eval()
    shown = param.detach().clone()
    actions: dict[str, Callable[[], Any]] = {
        "step": optimizer.step,
        "state_dict": optimizer.state_dict,
        "save": lambda: optstate.save(optimizer, tmp_path / "b.safetensors"),
        "load": lambda: optstate.load(optimizer, tmp_path / "a.safetensors"),
        "load_state_dict": lambda: optimizer.load_state_dict(saved),
        "copy": lambda: copy.deepcopy(optimizer),
        "backward": lambda: param.square().sum().backward(),
    }
    with pytest.raises(RuntimeError, match=r"averaged weights since eval\(\). Call the optimizer's train\(\) first"):
        actions[action]()
    assert torch.equal(param.detach(), shown)
    optimizer.train()
    if action == "backward":
        param.grad = None
    else:
        step_once(param, optimizer, 4)


def test_a_file_resumes_exactly(tmp_path: Path) -> None:
    param, optimizer = trained(4, warmup_steps=6)
    optstate.save(optimizer, tmp_path / "a.safetensors")
    again = nn.Parameter(param.detach().clone())
    other = ScheduleFreeAdamW([("p", again)], warmup_steps=6)
    optstate.load(other, tmp_path / "a.safetensors")
    for step in range(5, 8):
        step_once(param, optimizer, step)
        step_once(again, other, step)
    for mode in ("train", "eval"):
        getattr(optimizer, mode)()
        getattr(other, mode)()
        assert torch.equal(param.detach(), again.detach())


def test_other_recipes_have_nothing_to_show() -> None:
    param = nn.Parameter(noise(SHAPE, 1))
    optimizer = AdamW([("p", param)])
    step_once(param, optimizer, 1)
    before = param.detach().clone()
    optimizer.eval()
    assert torch.equal(param.detach(), before)
    step_once(param, optimizer, 2)


@pytest.mark.parametrize("parts", [(2, 1), (4, 1), (1, 3), (2, 2)], ids=str)
def test_parts_are_the_whole(parts: tuple[int, ...]) -> None:
    """fp64: nothing is summed over parts, so that every element is the same to the bit."""
    cut = CutParameter(lambda p: ScheduleFreeAdamW(p, warmup_steps=3), (40, 24), parts, torch.float64)
    cut.train(5)
    torch.testing.assert_close(cut.joined()[0], cut.whole.detach(), rtol=0, atol=0)


def test_any_chain_may_be_schedule_free() -> None:
    """Gradient descent, whose z is kept in bf16 and stays near the one in fp32: 2**-7 of weights near one."""

    def run(store: stores.Store) -> Tensor:
        param = nn.Parameter(noise(SHAPE, 1))
        optimizer = optstate.Optimizer([("p", param)], updates.schedule_free(0.9, store), lr=1e-2)
        for step in range(1, 9):
            step_once(param, optimizer, step)
        optimizer.eval()
        return param.detach()

    torch.testing.assert_close(run(stores.Full("bfloat16")), run(stores.Full()), rtol=0, atol=3 * 2.0**-7)


def test_the_laws_of_recipes_hold() -> None:
    """Two of the laws; `tests/testing/test_own_parts.py` asks for all of them, with the defaults."""
    testing.check_recipe(ScheduleFreeAdamW, warmup_steps=2, laws=["fused is stepped", "bad gradients"])


def test_state_is_adams_and_two_numbers() -> None:
    assert trained()[1].state_nbytes() == 8 * 63 + 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"betas": (0.0, 0.9)}, "out of range"),
        ({"warmup_steps": -1}, "give a whole number of steps"),
        ({"r": -1.0}, "r=-1.0: give a finite number"),
        ({"weight_lr_power": float("inf")}, "weight_lr_power=inf: give a finite number"),
        ({"eps": 0.0}, "eps=0.0 is out of range"),
    ],
)
def test_numbers_that_cannot_be_are_refused_in_a_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        ScheduleFreeAdamW([("p", nn.Parameter(torch.zeros(4)))], **options)
    assert "\n" not in str(raised.value)
