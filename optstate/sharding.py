"""Sums across shards: driving one-parameter steps that ask for totals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from optstate.stores import Partial, Requests

__all__ = ["lock_step", "own_totals", "run_alone"]

T = TypeVar("T")


def own_totals(request: Any) -> Any:
    """The reply to a request where nothing is sharded: each total is the local sum."""
    if isinstance(request, Partial):
        return request.local
    if isinstance(request, tuple):
        return tuple(own_totals(item) for item in request)
    return request


def run_alone(requests: Requests[T]) -> T:
    """Drive one step whose parameter is whole on this device."""
    try:
        request = next(requests)
        while True:
            request = requests.send(own_totals(request))
    except StopIteration as stop:
        return cast(T, stop.value)


def lock_step(runs: Sequence[Requests[T]], reduce: Callable[[list[Any]], list[Any]]) -> list[T]:
    """Drive several steps together, one call of `reduce` per round.

    reduce: takes the pending request of every run that still has one, in order, and returns their totals. It is
        where the shards of a group of parameters meet in one all-reduce.
    """
    results: dict[int, T] = {}
    replies: list[Any] = [None] * len(runs)
    active = list(range(len(runs)))
    while active:
        pending: list[tuple[int, Any]] = []
        for i in active:
            try:
                pending.append((i, runs[i].send(replies[i])))
            except StopIteration as stop:
                results[i] = stop.value
        active = [i for i, _ in pending]
        if pending:
            for i, total in zip(active, reduce([request for _, request in pending]), strict=True):
                replies[i] = total
    return [results[i] for i in range(len(runs))]
