"""Recordings: a step is run on tensors without values, to write down what it does to any number of elements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from optstate.kernels.rehearsal import RECORDED, STAND_IN

__all__ = ["RECORDING", "Recording", "recorded"]


class Recording:
    """What a recorded step takes from outside in the place of random bits, which are a function of a name and a step.

    keys: int32 `[n]`, one for each tensor that is rounded at random. first_word: 0-d int32, half the flat index of the
    first element. Both are tensors that stand for those of a later step.
    """

    def __init__(self, keys: Tensor, first_word: Tensor) -> None:
        self._keys, self.first_word = keys, first_word
        self.asked: list[tuple[str, int]] = []
        """Name and seed of every tensor whose bits the step asked for, in the order of `keys`."""

    def key(self, name: str, seed: int) -> Tensor:
        """Return the 0-d key of a tensor's bits; the same one each time."""
        if (name, seed) not in self.asked:
            self.asked.append((name, seed))
        return self._keys[self.asked.index((name, seed))]


RECORDING: ContextVar[Recording | None] = ContextVar("RECORDING", default=None)
"""The recording in progress; None outside of one."""


@contextmanager
def recorded(recording: Recording) -> Iterator[None]:
    """Record what runs inside: nothing is cut into chunks, and random bits come from the recording."""
    tokens = STAND_IN.set(RECORDED), RECORDING.set(recording)
    try:
        yield
    finally:
        STAND_IN.reset(tokens[0])
        RECORDING.reset(tokens[1])
