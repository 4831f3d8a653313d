"""A GPT's whole training step: time over forward and backward alone, and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from statistics import median
from typing import Any

import lomo_optim
import torch
from gpt import GPT
from peers import cuda_is_identity
from timing import DTYPES, Action, interleaved, ratio, spread
from torch import Tensor

import adalomo
import optstate
from optstate.memory import peak_extra_bytes

TOKENS = 128
LR = 1e-4
KEPT = "forward + backward, gradients kept"
FUSED = ("optstate AdaLomo, fused", "optstate AdaLomo, fused, stochastic")

Finish = Callable[[Tensor], object]
"""A function that takes a loss to the end of the step."""


def measure_training(dtype_name: str, rounds: int) -> list[dict[str, Any]]:
    """One row per way to train on 128 tokens a step.

    `step_ms`: CPU time of forward, backward and update; `per_backward`: over that of forward and backward alone.
    `peak_bytes`: most bytes alive during one warm step beyond those before it, when no gradient exists:
    activations, gradients and temporaries. `peak_per_parameter`: in bytes per parameter.
    """
    torch.manual_seed(0)
    origin = GPT().to(DTYPES[dtype_name])
    parameters = sum(p.numel() for p in origin.parameters())
    tokens = torch.randint(8000, (1, TOKENS + 1))
    actions = {name: training_step(deepcopy(origin), tokens, build) for name, build in ways().items()}
    seconds = interleaved(actions, rounds)
    rows = []
    for name, action in actions.items():
        action.prepare()
        peak = peak_extra_bytes(action.run)
        rows.append(
            {
                "dtype": dtype_name,
                "name": name,
                "parameters": parameters,
                "step_ms": 1e3 * median(seconds[name]),
                "spread": spread(seconds[name]),
                "per_backward": ratio(seconds, name, KEPT),
                "peak_bytes": peak,
                "peak_per_parameter": peak / parameters,
            }
        )
    return rows


def training_step(model: GPT, tokens: Tensor, build: Callable[[GPT], Finish]) -> Action:
    """Return the action of a training step that starts without gradients."""
    finish = build(model)
    return Action(lambda: model.zero_grad(set_to_none=True), lambda: finish(model(tokens)))


def ways() -> dict[str, Callable[[GPT], Finish]]:
    """Return the ways to train that are compared."""
    plain, stochastic = optstate.weights.Plain(), optstate.weights.StochasticRounding()
    return {
        KEPT: lambda model: lambda loss: loss.backward(),
        "torch AdamW fused, step()": with_torch,
        "optstate AdaLomo, step()": with_ours(adalomo.AdaLomo, weights=plain),
        FUSED[0]: with_ours(adalomo.AdaLomo, weights=plain, fused_backward=True),
        FUSED[1]: with_ours(adalomo.AdaLomo, weights=stochastic, fused_backward=True),
        "optstate Lomo, fused": with_ours(adalomo.Lomo, weights=plain, fused_backward=True),
        "lomo-optim AdaLomo": with_lomo_optim(lomo_optim.AdaLomo, loss_scale=0),
        "lomo-optim Lomo": with_lomo_optim(lomo_optim.Lomo),
    }


def with_torch(model: GPT) -> Finish:
    """Step with torch's fused AdamW after the backward pass."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    return lambda loss: (loss.backward(), optimizer.step())


def with_ours(recipe: Callable[..., optstate.Optimizer], **options: Any) -> Callable[[GPT], Finish]:
    """Step with a recipe of ours; if fused, `step()` only closes the step."""

    def build(model: GPT) -> Finish:
        optimizer = recipe(model.named_parameters(), lr=LR, **options)
        return lambda loss: (loss.backward(), optimizer.step())

    return build


def with_lomo_optim(optimizer_class: Callable[..., Any], **options: Any) -> Callable[[GPT], Finish]:
    """Step with an optimizer of lomo-optim, which updates in a backward pass that it calls itself."""

    def build(model: GPT) -> Finish:
        with cuda_is_identity():
            optimizer = optimizer_class(model, lr=LR, **options)
        return lambda loss: optimizer.fused_backward(loss, LR)

    return build
