"""Steps on tensors without values, to see what they would need on a device that may not be here."""

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
    """Inside, fake tensors on the CPU stand for tensors on a device of type `on`, and repetitions are left out."""
    token = STAND_IN.set(on)
    try:
        yield
    finally:
        STAND_IN.reset(token)


def rehearsing() -> bool:
    """Whether a rehearsal is on: nothing is trained."""
    return bool(STAND_IN.get())


def device_type(device: torch.device) -> str:
    """The type of a device, or of the one it stands for."""
    return STAND_IN.get() or device.type


def worth_running(rounds: Iterable[T], size: Callable[[T], int]) -> Iterable[T]:
    """The rounds of a loop over parts that do not know of each other: in a rehearsal only the first two of each size.

    The second meets what the first left behind; those after it need what the second needs.
    """
    return _two_of_each(rounds, size) if STAND_IN.get() else rounds


def _two_of_each(rounds: Iterable[T], size: Callable[[T], int]) -> Iterator[T]:
    seen: Counter[int] = Counter()
    for item in rounds:
        seen[size(item)] += 1
        if seen[size(item)] <= 2:
            yield item
