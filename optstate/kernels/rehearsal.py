"""Rehearsals: run a step on fake tensors, to measure its memory on a device that may not be installed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

__all__ = ["RECORDED", "STAND_IN", "device_type", "rehearsal", "rehearsing", "worth_running"]

T = TypeVar("T")

STAND_IN: ContextVar[str] = ContextVar("STAND_IN", default="")
"""The type of the device that fake tensors on the CPU stand for; empty outside of a rehearsal."""

RECORDED = "recorded"
"""What stands for a type of device while a step is recorded, to be compiled for any number of elements."""

_LEAVES_OUT: ContextVar[bool] = ContextVar("_LEAVES_OUT", default=False)
"""Whether loops leave out rounds that need as much memory as those before them."""


@contextmanager
def rehearsal(on: str, every_round: bool = False) -> Iterator[None]:
    """Let fake tensors on the CPU stand for tensors on a device of type `on`, and leave repeated work out.

    Args:
        on: type of the device that is rehearsed, such as "cuda".
        every_round: leave nothing out, for counts of what a step does.
    """
    tokens = STAND_IN.set(on), _LEAVES_OUT.set(not every_round)
    try:
        yield
    finally:
        STAND_IN.reset(tokens[0])
        _LEAVES_OUT.reset(tokens[1])


def rehearsing() -> bool:
    """Return whether a rehearsal is in progress, in which nothing is trained."""
    return bool(STAND_IN.get())


def device_type(device: torch.device) -> str:
    """Return the type of `device`, or in a rehearsal the type of the device that is rehearsed."""
    return STAND_IN.get() or device.type


def worth_running(rounds: Iterable[T], size: Callable[[T], int]) -> Iterable[T]:
    """Return the rounds of a loop; in a rehearsal that leaves work out only the first two rounds of each size.

    Only for loops whose rounds do not depend on each other. The second round meets the buffers that the first left
    behind; every later one needs as much memory as the second.

    Args:
        rounds: what the loop runs over.
        size: tells how large a round is, such as its number of elements.
    """
    return _two_of_each(rounds, size) if _LEAVES_OUT.get() else rounds


def _two_of_each(rounds: Iterable[T], size: Callable[[T], int]) -> Iterator[T]:
    seen: Counter[int] = Counter()
    for item in rounds:
        seen[size(item)] += 1
        if seen[size(item)] <= 2:
            yield item
