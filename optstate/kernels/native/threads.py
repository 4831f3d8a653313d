"""Share the work of one call among as many threads as torch uses; results do not depend on how many these are."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any

import torch

__all__ = ["WORTH_SHARING", "parts_of", "share"]

MOST_PARTS = 16
"""Ranges of rows whose sums are made apart, so that threads can share a matrix; the same for any number of threads."""

MOST_COLUMN_SUMS = 1 << 18
"""Numbers that the column sums of all parts may take: 1 MB."""

SMALLEST_PART = 1 << 14
"""Elements that are worth a part of their own."""

WORTH_SHARING = 1 << 18
"""Elements from which on a second thread saves more than it costs to wake."""


def share(call: Callable[..., Any], addresses: tuple[Any, ...], count: int, step: int, elements: int) -> None:
    """Call `call(*addresses, begin, end)` on ranges that cover `count` things, on threads where that is worth it.

    Args:
        call: works on a range, and lets other threads run meanwhile, as calls of C code do.
        addresses: the first arguments of every call.
        count: number of things, such as elements or rows.
        step: ranges begin at multiples of this number of things.
        elements: number of elements of the parameter, which says how much work there is.
    """
    if elements < WORTH_SHARING:
        call(*addresses, 0, count)
        return
    threads = min(torch.get_num_threads(), -(-count // step))
    if threads <= 1:
        call(*addresses, 0, count)
        return
    each = -(-count // step // threads) * step
    ranges = [(begin, min(begin + each, count)) for begin in range(0, count, each)]
    others = [_pool(threads - 1).submit(call, *addresses, begin, end) for begin, end in ranges[1:]]
    try:
        call(*addresses, *ranges[0])
    finally:
        wait(others)  # also where Ctrl-C comes first: the others still write to the parameter
    for other in others:
        other.result()


def parts_of(rows: int, cols: int) -> int:
    """Return into how many ranges of rows a matrix is cut."""
    return max(1, min(MOST_PARTS, MOST_COLUMN_SUMS // cols, rows * cols // SMALLEST_PART, rows))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="optstate")


if hasattr(os, "register_at_fork"):  # threads do not survive in a child
    os.register_at_fork(after_in_child=_pool.cache_clear)
