"""What hooks cost per step when there is next to nothing to update."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import lomo_optim
import torch
from shapes import module_of, one_element_shapes
from timing import Action, interleaved, ratio, spread
from torch import Tensor, nn

import optstate

LAYERS = (32, 80)
"""Models with 291 and 723 parameters."""
LR = 1e-3


def measure_hooks(layers: int, rounds: int) -> list[dict[str, Any]]:
    """Rows for ours and lomo-optim's Lomo on parameters of one element each, named and nested as LLaMA's.

    `backward_ms`: CPU time of the backward pass without hooks. `step_ms`: with hooks, and the call that closes the
    step. `overhead_ms`: median of their difference round by round. All milliseconds per step.
    """
    bare, ours, theirs = (module_of(one_element_shapes(layers), torch.float32) for _ in range(3))
    optimizer = optstate.Optimizer(ours.named_parameters(), optstate.chain(), lr=LR)
    optstate.fuse_backward(optimizer)
    lomo = lomo_optim.Lomo(theirs, lr=LR)

    def our_step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()

    actions = {
        "bare": backward_of(bare, lambda loss: loss.backward()),
        "optstate, empty chain": backward_of(ours, our_step),
        "lomo-optim Lomo": backward_of(theirs, lambda loss: lomo.fused_backward(loss, LR)),
    }
    seconds = interleaved(actions, rounds, warmups=2)
    rows = []
    for name in list(actions)[1:]:
        overheads = [a - b for a, b in zip(seconds[name], seconds["bare"], strict=True)]
        rows.append(
            {
                "parameters": sum(1 for _ in bare.parameters()),
                "name": name,
                "backward_ms": 1e3 * median(seconds["bare"]),
                "step_ms": 1e3 * median(seconds[name]),
                "overhead_ms": 1e3 * median(overheads),
                "spread": spread(overheads),
                "step_per_lomo_optim": ratio(seconds, name, "lomo-optim Lomo"),
            }
        )
    for row in rows:
        row["overhead_per_lomo_optim"] = row["overhead_ms"] / rows[-1]["overhead_ms"]
    return rows


def backward_of(module: nn.Module, backward: Callable[[Tensor], object]) -> Action:
    """Call `backward` on a fresh sum of all parameters, whose gradients are then all one."""
    losses: list[Tensor] = []

    def prepare() -> None:
        module.zero_grad(set_to_none=True)
        losses[:] = [torch.cat(list(module.parameters())).sum()]

    return Action(prepare, lambda: backward(losses[0]))
