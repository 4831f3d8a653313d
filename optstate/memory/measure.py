"""Measuring what a piece of code allocates, temporaries inside operators included."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch.autograd.profiler import profile

__all__ = ["peak_extra_bytes"]


def peak_extra_bytes(fn: Callable[[], object]) -> int:
    """Call `fn` once and return the most bytes that were alive at one moment beyond those alive at its start.

    It counts what PyTorch's CPU allocator hands out, in exact bytes: tensors made in Python, in autograd and
    inside operators alike. What `fn` returns or stores is counted like any temporary. Tensors it frees that were
    alive before make room: replacing a tensor by one of the same size counts nothing, if the old one goes first.
    Not counted: memory that libraries take past the allocator (workspaces of matrix products), Python objects,
    and memory of accelerators.

    A first call often costs more than the following ones (states, caches): call `fn` once before, to measure a
    warm one. Costs one profiled run, several times slower for many small operators.

    Returns:
        A number of bytes, at least 0.

    Raises:
        RuntimeError: if another profiler is running already; they do not nest.
    """
    gc.collect()  # garbage of earlier code, freed meanwhile, would pass for room that `fn` makes
    with profile(profile_memory=True) as profiler:
        kept = fn()
    del kept
    results = profiler.kineto_results
    assert results is not None
    events = (event for event in results.events() if event.name() == "[memory]")
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.device_type().name == "CPU"]
    alive = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        alive += nbytes
        peak = max(peak, alive)
    return peak
