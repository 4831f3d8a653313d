"""The same work on many pieces, on as many threads as torch has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["for_each"]

T = TypeVar("T")
R = TypeVar("R")


def for_each(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results of `work` on every item, in order.

    A piece that fits a core's cache is too small to be shared by cores: torch's own threads wait for each other at
    every operation. Here each piece is one thread's from its beginning to its end.
    """
    items, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(items) < 2 * threads:
        return [work(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)
