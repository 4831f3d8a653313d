"""What a computation on a part of a parameter asks for: sums and largest values over all of it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor

__all__ = ["Largest", "Partial", "Requests", "own_totals", "run_alone", "together"]

T = TypeVar("T")


class Partial(NamedTuple):
    """A sum over dimension `dim`, or several, of a local shard (negative, counted from the end)."""

    local: Tensor
    dim: int | tuple[int, ...]


class Largest(NamedTuple):
    """The largest values of a local shard over dimension `dim`, or several, or all of them (None). None is negative;
    zero stands for those of an empty shard."""

    local: Tensor
    dim: int | tuple[int, ...] | None = None


Requests = Generator[Any, Any, T]
"""A computation that works on one shard of a parameter and needs sums, or largest values, over all of it.

It yields the local sum and is sent back the total: a tensor stands for a sum over every dimension, a `Partial`
for one over a single dimension, a `Largest` for largest values, a tuple for several in one round. On one device each
total is the local sum. The total is the receiver's own and may be overwritten.
"""


def own_totals(request: Any) -> Any:
    """The reply to a request where nothing is sharded: each total is the local sum."""
    if isinstance(request, Partial | Largest):
        return request.local
    if isinstance(request, tuple):
        return tuple(own_totals(item) for item in request)
    return request


def run_alone(requests: Requests[T], asked: Any = None) -> T:
    """Drive one computation whose parameter is whole on this device. asked: what has been asked for already."""
    try:
        request = next(requests) if asked is None else asked
        while True:
            request = requests.send(own_totals(request))
    except StopIteration as stop:
        return cast(T, stop.value)


def together(runs: Sequence[Requests[None]]) -> Requests[None]:
    """Several computations about one parameter as one, which asks for what all of them ask for at once."""
    replies: tuple[Any, ...] = (None,) * len(runs)
    while runs:
        asked = []
        for run, reply in zip(runs, replies, strict=True):
            with suppress(StopIteration):
                asked.append((run, run.send(reply)))
        runs = [run for run, _ in asked]
        if runs:
            replies = yield tuple(request for _, request in asked)
