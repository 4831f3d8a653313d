"""What `--shard fsdp` says one device holds, beside what two real processes hold under FSDP2."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import optstate
from optstate import kernels
from optstate.memory.result import RecipeEstimate
from tests.support import memory_ranks
from tests.support.launching import launch, result
from tests.support.pairwise import pairwise

pytestmark = pytest.mark.ranks

RECIPES = ("adalomo", "lomo", "adafactor", "adamw", "adamw8bit", "came")
CASES = pairwise(RECIPES, (False, True), list(memory_ranks.SIZES))
CLOSE = 0.02
"""Of rank 1, whose parts of uneven rows are smaller; rank 0's figures are held to the byte."""

WAITING = [
    *((recipe, (512, 512)) for recipe in ("adalomo", "came", "adamw", "adamw8bit", "sm3")),
    ("adalomo", (128, 128, 3, 3)),
    ("adamw8bit", (520, 500)),
]
MANY = 28

TIMEOUT = 600
"""Seconds for all cases: ten times what they take on a quiet machine."""

LOOSE = {"adamw8bit": 1.9}
"""The peak is a bound: it takes it that all of the root's gradients are there from the start, of which the embedding's
come last, and that an update needs the scratch of a whole parameter, which is most where codes are made."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    cases = [("held", *case) for case in CASES]
    cases += [("kept_while_waiting", recipe, count, shape) for recipe, shape in WAITING for count in (1, MANY)]
    return launch("tests.support.memory_ranks", 2, cases, tmp_path_factory.mktemp("held"), timeout=TIMEOUT)[0]


def ranks_of(measured: dict[Any, Any], case: tuple[Any, ...]) -> list[dict[str, int]]:
    return result(measured, "held", *case)


@cache
def estimated(recipe: str, fused: bool, rows: str) -> RecipeEstimate:
    answer = optstate.estimate(
        lambda: memory_ranks.stack(rows),
        recipe=recipe,
        fused_backward=fused,
        dtype="float32",
        world_size=2,
        shard="fsdp",
        example_inputs=(memory_ranks.tokens(),),
    )
    return answer.recipes[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_two_processes_hold_is_what_was_estimated(measured: dict[Any, Any], case: tuple[Any, ...]) -> None:
    """Bytes of the storages behind local tensors. Rank 0's weights, gradients and state to the byte; fused gradients
    are the most that were alive at any update. Rank 1 allocates as much for weights and gradients, and keeps as much
    state as its rows have."""
    answer = estimated(*case)
    figures = {
        "weights": answer.weights_bytes,
        "gradients": answer.gradients_bytes,
        "state": answer.state_bytes,
    }
    first, second = ranks_of(measured, case)
    assert {kind: first[kind] for kind in figures} == figures
    for kind, nbytes in figures.items():
        assert second[kind] <= nbytes
        assert second[kind] >= (1 - CLOSE) * nbytes
    assert first["state"] == first["state_nbytes"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_peak_of_a_step_is_below_the_estimated_bound(measured: dict[Any, Any], case: tuple[Any, ...]) -> None:
    """Storages alive after each operator of a step, whole weights and gradients of FSDP2 included."""
    bound = estimated(*case).peak_bytes
    assert bound is not None
    for rank in ranks_of(measured, case):
        assert rank["peak"] <= bound
        assert bound <= LOOSE.get(case[0], 1.45) * rank["peak"]


@pytest.mark.parametrize("case", WAITING, ids=str)
def test_many_parameters_that_share_their_sums_keep_little_while_they_wait(measured: Any, case: Any) -> None:
    """Besides what one parameter takes a few tensors of a chunk, such as two new statistics, values and scales of those
    that wait together. All parameters would keep seven chunks or more for each of these."""
    one, many = (result(measured, "kept_while_waiting", case[0], count, case[1]) for count in (1, MANY))
    assert many <= one + 5 * 4 * kernels.chunk_elements(torch.device("cpu"))
