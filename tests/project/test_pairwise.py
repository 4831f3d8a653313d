"""The few combinations that stand for a grid hold every pair of values of it."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest

from tests.support.pairwise import pairwise

LETTERS, NUMBERS, BOTH = "abcdefg", range(5), (False, True)


def held(chosen: list[tuple[Any, ...]]) -> set[Any]:
    return {(i, c[i], j, c[j]) for c in chosen for i, j in combinations(range(len(c)), 2)}


@pytest.mark.parametrize(
    ("axes", "most"),
    [
        ((LETTERS, NUMBERS), 35),  # two axes are their grid
        ((LETTERS, NUMBERS, BOTH), 37),  # of 70; no fewer than the two largest axes have pairs
        ((LETTERS, NUMBERS, BOTH, BOTH, "xyz"), 42),  # of 420
        ((LETTERS, "x"), 7),
    ],
)
def test_every_pair_of_the_grid_is_among_few_combinations(axes: tuple[Any, ...], most: int) -> None:
    chosen = pairwise(*axes)
    assert held(chosen) == held(list(product(*axes)))
    assert len(chosen) == len(set(chosen)) <= most
    assert chosen == [c for c in product(*axes) if c in set(chosen)]


def test_a_combination_that_is_not_allowed_is_not_chosen_and_no_other_pair_is_missed() -> None:
    def allowed(letter: str, number: int, flag: bool) -> bool:
        return (letter != "a" or number == 0) and not (flag and number == 4)

    axes = (LETTERS, NUMBERS, BOTH)
    chosen = pairwise(*axes, allowed=allowed)
    assert all(allowed(*c) for c in chosen)
    assert held(chosen) == held([c for c in product(*axes) if allowed(*c)])
    assert held(chosen) < held(pairwise(*axes))


def test_values_that_are_equal_or_cannot_be_hashed_are_values_of_their_own() -> None:
    assert pairwise([[], []], [{}]) == [([], {}), ([], {})]


def test_nothing_is_chosen_from_nothing() -> None:
    assert pairwise(LETTERS, ()) == []
    assert pairwise(LETTERS, NUMBERS, allowed=lambda *_: False) == []
