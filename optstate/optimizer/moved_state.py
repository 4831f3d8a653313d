"""Noticing that state moves while it is read or filled, as by a step in another thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from optstate.distributed.placement import here
from optstate.optimizer.broken_step import InconsistentStateError

__all__ = ["MovedStateError", "Watch"]

Mark = tuple[Any, ...]


class MovedStateError(InconsistentStateError):
    """A parameter was updated while its state was saved or loaded: what was read or filled is of two steps."""


class Watch:
    """Remembers every parameter's count of updates, and how often its tensors were written as autograd counts that.

    Costs nothing that grows with the tensors. Writing that autograd does not see, through pointers, is noticed only
    once the count of updates moves.
    """

    def __init__(self, state: Mapping[Tensor, Mapping[str, Any]]) -> None:
        self._state = state
        self._marks = {param: _mark(entry) for param, entry in list(state.items())}

    def renew(self, param: Tensor) -> None:
        """Take what is there of a parameter now for what is right."""
        self._marks.pop(param, None)
        if param in self._state:
            self._marks[param] = _mark(self._state[param])

    def moved(self) -> Tensor | None:
        """Return a parameter whose state is not what it was; None if there is none."""
        now = dict(list(self._state.items()))
        for param in {**self._marks, **now}:
            if param not in now or param not in self._marks or _mark(now[param]) != self._marks[param]:
                return param
        return None


def _mark(state: Mapping[str, Any]) -> Mark:
    items = list(state.items())
    return tuple((key, _writes(value) if isinstance(value, Tensor) else value) for key, value in items)


def _writes(tensor: Tensor) -> tuple[int, int]:
    """Which tensor it is, and how often it was written to."""
    local = here(tensor)
    return id(tensor), 0 if local.is_inference() else local._version
