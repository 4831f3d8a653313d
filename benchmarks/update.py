"""The update alone: time per million parameters, and memory beyond state and gradients."""

from __future__ import annotations

from statistics import median
from typing import Any

import peers
import torch
from shapes import ParameterSet, gradients_of, module_of
from timing import DTYPES, Action, interleaved, ratio, spread
from torch import Tensor

from optstate.memory import peak_extra_bytes

LR = 1e-6
"""A learning rate so small that all contestants can share one set of weights over many steps."""


def measure_update(parameters: ParameterSet, dtype_name: str, rounds: int) -> list[dict[str, Any]]:
    """One row per contestant.

    `ms_per_million`: milliseconds of CPU time of one step per 10^6 parameters, median of the rounds; `spread` of it.
    `per_adamw_fused`, `per_lomo_optim`: that time over torch's fused AdamW's and over lomo-optim's counterpart's.
    `scratch_bytes`: most bytes alive during one warm step beyond those before it.
    """
    dtype = DTYPES[dtype_name]
    module = module_of(parameters.shapes(), dtype)
    grads = gradients_of(module)
    millions = sum(g.numel() for g in grads) / 1e6
    entrants = peers.contestants(dtype)
    runners = {c.name: c.build(module, LR) for c in entrants}
    seconds = interleaved(
        {name: Action(loader(runner, grads), runner.step) for name, runner in runners.items()}, rounds
    )
    rows = []
    for entrant in entrants:
        times = seconds[entrant.name]
        rows.append(
            {
                "set": parameters.name,
                "dtype": dtype_name,
                "name": entrant.name,
                "ours": entrant.ours,
                "ms_per_million": 1e3 * median(times) / millions,
                "spread": spread(times),
                "per_adamw_fused": ratio(seconds, entrant.name, peers.ADAMW_FUSED),
                "per_lomo_optim": ratio(seconds, entrant.name, entrant.counterpart) if entrant.counterpart else None,
                "per_sgd_fused": ratio(seconds, entrant.name, peers.SGD_FUSED),
                "per_sgd_loop": ratio(seconds, entrant.name, peers.SGD_LOOP),
                "scratch_bytes": scratch_of(runners[entrant.name], grads),
            }
        )
    return rows


def loader(runner: peers.Runner, grads: list[Tensor]) -> Any:
    """Return a function that hands the gradients to one runner."""
    return lambda: runner.load(grads)


@torch.no_grad()
def scratch_of(runner: peers.Runner, grads: list[Tensor]) -> int:
    """Measure the bytes of temporaries of one step whose state exists already."""
    runner.load(grads)
    return peak_extra_bytes(runner.step)
