"""Rehearsals: run a step on fake tensors, to measure its memory on a device that may not be installed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

__all__ = ["STAND_IN", "device_type", "rehearsal", "rehearsing", "worth_running"]

T = TypeVar("T")

STAND_IN: ContextVar[str] = ContextVar("STAND_IN", default="")
"""The type of the device that fake tensors on the CPU stand for; empty outside of a rehearsal."""


@contextmanager
def rehearsal(on: str) -> Iterator[None]:
    """Let fake tensors on the CPU stand for tensors on a device of type `on`, and leave repeated work out.

    Args:
        on: type of the device that is rehearsed, such as "cuda".
    """
    token = STAND_IN.set(on)
    try:
        yield
    finally:
        STAND_IN.reset(token)


def rehearsing() -> bool:
    """Return whether a rehearsal is in progress, in which nothing is trained."""
    return bool(STAND_IN.get())


def device_type(device: torch.device) -> str:
    """Return the type of `device`, or in a rehearsal the type of the device that is rehearsed."""
    return STAND_IN.get() or device.type


def worth_running(rounds: Iterable[T], size: Callable[[T], int]) -> Iterable[T]:
    """Return the rounds of a loop; in a rehearsal only the first two rounds of each size.

    Only for loops whose rounds do not depend on each other. The second round meets the buffers that the first left
    behind; every later one needs as much memory as the second.

    Args:
        rounds: what the loop runs over.
        size: tells how large a round is, such as its number of elements.
    """
    return _two_of_each(rounds, size) if STAND_IN.get() else rounds


def _two_of_each(rounds: Iterable[T], size: Callable[[T], int]) -> Iterator[T]:
    seen: Counter[int] = Counter()
    for item in rounds:
        seen[size(item)] += 1
        if seen[size(item)] <= 2:
            yield item
