"""Measure the memory that a piece of code allocates, temporaries inside operators included."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch._C._profiler import _EventType
from torch.autograd.profiler import profile

__all__ = ["peak_extra_bytes"]


def peak_extra_bytes(fn: Callable[[], object]) -> int:
    """Call `fn` once and return the most bytes that were alive at one moment beyond those alive at its start.

    Counted is what PyTorch's CPU allocator hands out while `fn` runs, in exact bytes: tensors made in Python, in
    autograd and inside operators alike, and what `fn` returns or stores like any temporary. Older tensors that `fn`
    frees make no room: the allocator does not know their size. Drop old gradients before measuring.

    Not counted: memory that libraries take past the allocator (workspaces of matrix products), Python objects,
    and memory of accelerators.

    A first call often costs more than the following ones (states, caches): call `fn` once before, to measure a
    warm one. Costs one profiled run, several times slower for many small operators.
    Profilers do not nest: one that is running already loses its records.

    Returns:
        A number of bytes, at least 0.
    """
    gc.collect()
    with profile(profile_memory=True) as profiler:
        kept = fn()
    del kept
    results = profiler.kineto_results
    assert results is not None
    alive: dict[int, int] = {}
    total = peak = 0
    for address, nbytes in _memory_events(results.experimental_event_tree()):
        if nbytes > 0:
            alive[address] = nbytes
            total += nbytes
            peak = max(peak, total)
        else:
            total -= alive.pop(address, 0)
    return peak


def _memory_events(roots: list[Any]) -> list[tuple[int, int]]:
    """Return (address, bytes) of each allocation, and with negative bytes of each release, in the order of time."""
    events, waiting = [], list(roots)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, nbytes) for _, address, nbytes in sorted(events, key=lambda event: event[0])]
