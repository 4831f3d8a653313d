"""Sums and largest values over devices: drive the steps of parameters and answer their requests together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from optstate.distributed.agreement import collective
from optstate.distributed.placement import Placement
from optstate.stores import Largest, Partial, Requests, Whole

__all__ = ["add_up", "lock_step", "run_together"]

T = TypeVar("T")


def lock_step(runs: Sequence[Requests[T]], reduce: Callable[[list[Any]], list[Any]]) -> list[T]:
    """Drive several steps together, with one call of `reduce` per round.

    Args:
        runs: the steps.
        reduce: takes the pending request of every step that still has one, in order, and returns their totals; here
            the shards of a group of parameters meet in one all-reduce.

    Returns:
        What each step returned.
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


class Pending(NamedTuple):
    """A request that waits for its totals, with the placement of its parameter."""

    placement: Placement
    request: Any


def run_together(steps: Sequence[tuple[Placement, Requests[Any]]], before: Callable[[], None] = lambda: None) -> None:
    """Drive the steps of several parameters, each split among devices.

    Each round takes one all-reduce for all parameters that share their devices, two where largest values are asked
    for, and one gather for each tensor that is asked for as a whole. Every device must call this with the same
    parameters in the same order.

    Args:
        steps: the placement and the step of each parameter.
        before: called before each round, when everything that the round sends is ready.
    """

    def reduce(pending: Sequence[Pending]) -> list[Any]:
        before()
        return add_up(pending)

    lock_step([_marked(placement, requests) for placement, requests in steps], reduce)


def add_up(pending: Sequence[Pending]) -> list[Any]:
    """Return the replies to all requests, each summed over the devices of its parameter.

    Raises:
        LostProcessError: if another process does not take part.
    """
    parts: dict[Any, list[Tensor]] = {}

    def note(placement: Placement, item: Any) -> Callable[[], Any]:
        """Put every local value into its all-reduce, and return a function that reads the totals afterwards."""
        if isinstance(item, tuple) and not isinstance(item, Partial | Largest | Whole):
            readers = [note(placement, each) for each in item]
            return lambda: tuple(read() for read in readers)
        if isinstance(item, Whole):
            return lambda: placement.gather(item.local, item.spec)
        local, dim = (item, None) if isinstance(item, Tensor) else (item.local, item.dim)
        groups = placement.groups((dim,) if isinstance(dim, int) else dim)
        if not groups:
            return lambda: local
        how = dist.ReduceOp.MAX if isinstance(item, Largest) else dist.ReduceOp.SUM
        key = (groups, how, local.dtype, local.device)
        place = len(parts.setdefault(key, []))
        parts[key].append(local)
        return lambda: totals[key][place].view(local.shape)

    readers = [note(placement, request) for placement, request in pending]
    totals = {}
    for key, tensors in parts.items():
        groups, how, *_ = key
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        for group in groups:
            with collective():
                dist.all_reduce(flat, op=how, group=group)
        totals[key] = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [read() for read in readers]


def _marked(placement: Placement, requests: Requests[T]) -> Requests[T]:
    """Run a computation, with the placement added to each of its requests."""
    reply = None
    while True:
        try:
            request = requests.send(reply)
        except StopIteration as stop:
            return cast(T, stop.value)
        reply = yield Pending(placement, request)
