"""Requests: sums and largest values over a whole parameter, asked for by a computation on a part of it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor

from optstate.spec import ParamSpec

__all__ = ["Largest", "Partial", "Requests", "Whole", "about", "own_totals", "run_alone", "together"]

T = TypeVar("T")


class Partial(NamedTuple):
    """The request of a sum of local values over one or several dimensions of the parameter.

    Attributes:
        local: the sum over this device's part.
        dim: the dimensions, negative, counted from the end.
        settled: whether the dimensions are the parameter's, also where the sum is one over another tensor; see `about`.
    """

    local: Tensor
    dim: int | tuple[int, ...]
    settled: bool = False


class Largest(NamedTuple):
    """The request of the largest of non-negative local values over one or several dimensions of the parameter.

    Attributes:
        local: the largest values of this device's part, no value negative; zero for an empty part.
        dim: the dimensions, counted from the end if negative; None for all.
        settled: as in `Partial`.
    """

    local: Tensor
    dim: int | tuple[int, ...] | None = None
    settled: bool = False


class Whole(NamedTuple):
    """The request of all of a tensor of which this device has a part.

    Attributes:
        local: the part on this device.
        spec: of the tensor: the parameter's own, or that of another tensor, made with `spec.like`.
    """

    local: Tensor
    spec: ParamSpec


Requests = Generator[Any, Any, T]
"""A computation on one shard of a parameter that needs sums, or largest values, over the whole parameter.

The generator yields a request and is sent back the reply: a tensor is the request of a sum over every dimension, a
`Partial` of a sum over some dimensions, a `Largest` of largest values, a `Whole` of a tensor put together, a tuple of
several requests in one round. On one device the reply is the local value. The reply is the receiver's own and may be
overwritten, but for a `Whole`, which may be the local tensor itself.
"""


def own_totals(request: Any) -> Any:
    """Return the reply to a request where nothing is sharded: each total is the local value."""
    if isinstance(request, Partial | Largest | Whole):
        return request.local
    if isinstance(request, tuple):
        return tuple(own_totals(item) for item in request)
    return request


def run_alone(requests: Requests[T], asked: Any = None) -> T:
    """Drive one computation whose parameter is whole on this device, and return its result.

    Args:
        requests: the computation.
        asked: its first request, if the computation has begun already.
    """
    try:
        request = next(requests) if asked is None else asked
        while True:
            request = requests.send(own_totals(request))
    except StopIteration as stop:
        return cast(T, stop.value)


def about(requests: Requests[T], spec: ParamSpec) -> Requests[T]:
    """Run a computation about another tensor than the parameter as one about the parameter.

    A sum over the other tensor becomes one over the devices that have different parts of the other tensor.

    Args:
        requests: the computation.
        spec: of the other tensor, made with `like`; the parameter's own is allowed.
    """
    reply = None
    while True:
        try:
            request = requests.send(reply)
        except StopIteration as stop:
            return cast(T, stop.value)
        reply = yield request if spec.dims is None else _about(request, spec)


def _about(request: Any, spec: ParamSpec) -> Any:
    """Return a request about another tensor in terms of the parameter's dimensions."""
    if isinstance(request, Whole) or (isinstance(request, Partial | Largest) and request.settled):
        return request
    if isinstance(request, tuple) and not isinstance(request, Partial | Largest):
        return tuple(_about(item, spec) for item in request)
    local, dim = (request, None) if isinstance(request, Tensor) else (request.local, request.dim)
    dims = range(spec.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    along = tuple(d for d in spec.along(dims) if d is not None)
    return (Largest if isinstance(request, Largest) else Partial)(local, along, settled=True)


def together(runs: Sequence[Requests[None]]) -> Requests[None]:
    """Run several computations about one parameter as one, which asks for all their requests at once."""
    replies: tuple[Any, ...] = (None,) * len(runs)
    while runs:
        asked = []
        for run, reply in zip(runs, replies, strict=True):
            with suppress(StopIteration):
                asked.append((run, run.send(reply)))
        runs = [run for run, _ in asked]
        if runs:
            replies = yield tuple(request for _, request in asked)
