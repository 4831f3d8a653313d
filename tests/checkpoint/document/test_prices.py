"""The prices that `optstate inspect` prints are the bytes that the recipes allocate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optstate.checkpoint.document.prices import RECIPES, bytes_by_recipe
from optstate.recipes import get, names

SHAPES = [
    (),
    (0,),
    (1,),
    (7,),
    (4095,),
    (4096,),
    (4097,),
    (0, 6),
    (6, 0),
    (1, 4096),
    (63, 65),
    (64, 64),
    (65, 63),
    (4097, 1),
    (513, 1001),
    (3, 5, 7),
    (3, 0, 7),
    (9, 33, 65),
    (8, 3, 3, 3),
    (32, 16, 3, 3),
    (31, 17, 5, 3),
]


def planned(recipe: str, shapes: list[tuple[int, ...]]) -> int:
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    nbytes: int = get(recipe)(params).plan().nbytes
    return nbytes


@pytest.mark.parametrize("recipe", RECIPES)
def test_prices_are_the_plans(recipe: str) -> None:
    for shape in SHAPES:
        assert bytes_by_recipe([shape])[recipe] == planned(recipe, [shape]), shape
    assert bytes_by_recipe(SHAPES)[recipe] == planned(recipe, SHAPES)


def test_every_recipe_of_this_package_has_a_price() -> None:
    from optstate.recipes import describe

    assert {name for name in names() if describe(name)["package"] == "optstate"} == set(RECIPES)


def test_the_smallest_comes_first() -> None:
    totals = bytes_by_recipe([(4096, 4096), (4096,)])
    assert list(totals.values()) == sorted(totals.values())
    assert totals["adamw"] == 8 * (4096 * 4096 + 4096)
    assert totals["adalomo"] == 4 * (4096 + 4096 + 4096)
    assert totals["lomo"] == 0
