"""Choosing few combinations of many axes: every two values that may meet do meet, in one combination at least.

A grid of all combinations tests each branch as often as the other axes have values. What breaks, breaks because of one
value or because two of them meet (a store under a way to write weights, say); two are what these combinations hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from typing import Any

Pair = tuple[int, int, int, int]
"""An axis and the position of its value, another axis and the position of its value."""


def pairwise(*axes: Sequence[Any], allowed: Callable[..., bool] = lambda *values: True) -> list[tuple[Any, ...]]:
    """Return combinations of one value per axis that hold every pair of values of two axes that is possible at all.

    The same axes give the same combinations, in the order of the full grid. The choice is greedy: the combination with
    most pairs that are still missing comes next, of several the one whose values were chosen least often, the first.

    allowed: whether a combination, given as one argument per axis, may be chosen; all are unless said otherwise.
    """
    grid = [at for at in product(*(range(len(axis)) for axis in axes)) if allowed(*values_at(axes, at))]
    pairs = {at: pairs_of(at) for at in grid}
    missing = set().union(*pairs.values()) if pairs else set()
    left, chosen, used = dict(pairs), [], Counter[tuple[int, int]]()
    while missing:
        best = max(left, key=lambda at: (len(left[at]), -sum(used[value] for value in enumerate(at))))
        chosen.append(best)
        used.update(enumerate(best))
        missing -= pairs[best]
        left = {at: still for at, held in left.items() if (still := held & missing)}
    return [values_at(axes, at) for at in sorted(chosen)]


def values_at(axes: Iterable[Sequence[Any]], at: Sequence[int]) -> tuple[Any, ...]:
    """Return the values at these positions."""
    return tuple(axis[i] for axis, i in zip(axes, at, strict=True))


def pairs_of(at: Sequence[int]) -> set[Pair]:
    """Return the pairs of values that a combination, given as positions, holds."""
    return {(i, at[i], j, at[j]) for i, j in combinations(range(len(at)), 2)}
