"""Time of several actions in one process, in interleaved rounds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Action:
    """A function that is timed, and one that is called before it untimed."""

    prepare: Callable[[], object]
    run: Callable[[], object]


def interleaved(
    actions: Mapping[str, Action], rounds: int, warmups: int = 1, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Measure the seconds of each action in each round: CPU time, unless `clock` is another clock.

    Rounds go A B C A B C, so that a machine that turns slower for a while slows all actions alike. The warm-up
    rounds are left out. The garbage collector rests meanwhile.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    gc.collect()
    gc.disable()
    try:
        for number in range(warmups + rounds):
            for name, action in actions.items():
                action.prepare()
                start = clock()
                action.run()
                elapsed = clock() - start
                if number >= warmups:
                    seconds[name].append(elapsed)
    finally:
        gc.enable()
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Return the median over the rounds of the time of `name` divided by that of `base` in the same round."""
    return median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def spread(values: list[float]) -> float:
    """Return the largest minus the smallest, as a fraction of the median."""
    return (max(values) - min(values)) / median(values)
