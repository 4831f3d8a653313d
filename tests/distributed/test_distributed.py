"""Parameters split among processes are stepped, fused, saved and loaded as if they were whole.

Every case runs in two or four processes on the CPU beside the same training unsharded. All cases of one number of
processes share their processes, which take seconds to start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import optstate
from tests.support import ranks
from tests.support.launching import failed, launch, result
from tests.support.pairwise import pairwise

pytestmark = pytest.mark.ranks

CLOSE = 1e-6
"""fp32 weights of order one, some steps: gradients averaged over processes are summed in another order."""

STATE_CLOSE = 2e-4
"""Of the largest number of its tensor: a statistic of squares doubles relative errors."""

CODED = ("adamfactor", "adamw4bit", "adamw8bit", "lion8bit", "sgdm8bit")
CODED_CLOSE = 1e-3
"""Their learning rate: sums in another order move a number across a tie, and its code becomes the neighbour."""

TIMEOUT = 900
"""Seconds for all cases of one number of processes: five times what they take on a quiet machine."""


def run(world: int, cases: list[tuple[Any, ...]], folder: Path) -> dict[Any, Any]:
    """The results of rank 0, and what failed on any other."""
    everywhere = launch("tests.support.ranks", world, cases, folder, timeout=TIMEOUT)
    failures = {key: value for results in everywhere for key, value in results.items() if failed(value)}
    return {**everywhere[0], **failures}


BOTH = (False, True)
SIZES = ((7, (2,)), (1, (2,)))
"""Rows of a matrix, and the mesh they lie on: uneven parts, and a part that is empty. Even ones are in all others."""

TRAINED = [recipe for recipe in ranks.RECIPES if recipe not in ranks.IN_PARTS_ALONE]

SHARDED = [
    *(
        ("equals_unsharded", recipe, fused, rows, layers, mesh)
        for recipe, fused, (rows, mesh), layers in pairwise(TRAINED, BOTH, SIZES, BOTH)
    ),
    ("equals_unsharded", "adalomo", True, 8, True, (2, 1)),
    ("equals_unsharded", "adalomo", False, 8, True, (1, 2)),
]
DEPEND_ON_LAST_DIGITS = ("in the eigenbasis", "orthogonal", "muon", "muon8bit", "soap")
"""Eigenvectors of small values are arbitrary, and sums in bf16 round elsewhere: compared where gradients have the same
bits, which several processes' sums do not give."""

TENSOR_PARALLEL = [
    ("tensor_parallel", recipe, i % 2 == 0, 1)
    for i, recipe in enumerate(TRAINED)
    if recipe not in DEPEND_ON_LAST_DIGITS
]
SUMMED = ("adalomo", "adamfactor", "adamw8bit", "came", "lomo", "sm3")
"""A recipe for each kind of what devices must agree on: sums, codes of blocks, maxima, and nothing."""

WITH_DATA_PARALLEL = [
    ("tensor_parallel", recipe, not fused, 2) for _, recipe, fused, _ in TENSOR_PARALLEL if recipe in SUMMED
]
"""Fused in four processes where two step, and the other way round."""

COUNTED = [
    ("adalomo", False, torch.float32, 8),
    ("adalomo", True, torch.float32, 8),
    ("adalomo", False, torch.bfloat16, 8),
    ("adalomo", True, torch.bfloat16, 8),
    ("adamw", False, torch.float32, 8),
    ("adamw8bit", True, torch.float32, 7),
]
CONVERTED = [("adamw", "adamw8bit"), ("adamw8bit", "adamw"), ("adamw", "adamfactor"), ("adamw8bit", "adamw4bit")]
OTHERS: list[tuple[Any, ...]] = [
    ("rounding_is_that_of_the_whole", True),
    ("mixed_precision", False),
    ("mixed_precision", True),
    ("accumulation", False),
    ("accumulation", True),
    ("clipped_by_the_norm_over_all_devices", "kept"),
    ("clipped_by_the_norm_over_all_devices", "measured"),
    *(("measured_beside_another_optimizer", layers) for layers in BOTH),
    *(("collectives", *case) for case in COUNTED),
    ("gradients_left", True),
    ("unused_parameter", False),
    ("unused_parameter", True),
    ("not_finite_on_one_rank", "adalomo", False),
    ("not_finite_on_one_rank", "adamw", False),
    ("not_finite_on_one_rank", "adalomo", True),
    ("replaced_parameters", False),
    ("replaced_parameters", True),
    ("under_ddp",),
    ("under_fsdp1", False),
    ("under_fsdp1", True),
    ("fused_under_replicate",),
]
FOUR = [
    *(
        ("equals_unsharded", recipe, fused, rows, True, mesh)
        for recipe, fused, (rows, mesh) in pairwise(
            ("adalomo", "adamw8bit", "came"), BOTH, ((8, (2, 2)), (7, (4,)), (3, (4,)))
        )
    ),
    *WITH_DATA_PARALLEL,
]
SAVED = ("adalomo", "adamw", "adamw8bit", "adamw4bit", "adamfactor", "came")
LOADED = pairwise(SAVED, (1, 2, 4), ("dcp", "file"))
"""What two processes saved, in how many it goes on, and from which of its files."""


def loads(world: int, checkpoints: Path) -> list[tuple[Any, ...]]:
    return [("load_distributed", recipe, checkpoints / recipe, how) for recipe, n, how in LOADED if n == world]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> dict[Any, Any]:
    saves = [("save_distributed", recipe, checkpoints / recipe) for recipe in SAVED]
    for recipe in SAVED:
        (checkpoints / recipe).mkdir()
    converted = [("file_of_another_format", *case, checkpoints) for case in CONVERTED]
    stages = [("other_parameters_on_each_rank", checkpoints / "stages.safetensors")]
    cases = [*saves, *loads(2, checkpoints), *SHARDED, *TENSOR_PARALLEL, *OTHERS, *converted, *stages]
    return run(2, cases, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, two: dict[Any, Any], checkpoints: Path) -> dict[Any, Any]:
    others: list[Any] = [("uneven_columns", fused) for fused in BOTH]
    others.append(("gradients_that_differ_on_one_of_two_meshes",))
    others += [("one_file_of_two_meshes", recipe, checkpoints) for recipe in ("adamw8bit", "adalomo")]
    return run(4, [*FOUR, *others, *loads(4, checkpoints)], tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, two: dict[Any, Any], checkpoints: Path) -> dict[Any, Any]:
    return run(1, loads(1, checkpoints), tmp_path_factory.mktemp("one"))


def tolerance(case: tuple[Any, ...]) -> float:
    """Two processes add up gradients as one does, to the bit: an average in codes of these alone is the same, too."""
    exact = case[0] == "equals_unsharded" and case[-1] == (2,) and case[1] != "adamfactor"
    return CODED_CLOSE if case[1] in CODED and not exact else CLOSE


def check_close(case: tuple[Any, ...], weights: float, state: float) -> None:
    assert weights <= tolerance(case)
    assert state <= (STATE_CLOSE if tolerance(case) == CLOSE else 0.02)  # two codes apart at most


@pytest.mark.parametrize("case", [*SHARDED, *TENSOR_PARALLEL], ids=str)
def test_two_processes_end_where_one_does(two: dict[Any, Any], case: tuple[Any, ...]) -> None:
    check_close(case, *result(two, *case))


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_four_processes_end_where_one_does(four: dict[Any, Any], case: tuple[Any, ...]) -> None:
    check_close(case, *result(four, *case))


@pytest.mark.parametrize("fused", BOTH)
def test_parts_of_different_sizes_are_stepped_together(four: dict[Any, Any], fused: bool) -> None:
    assert result(four, "uneven_columns", fused) <= CLOSE


def test_a_missing_gradient_is_refused_on_all_ranks_not_only_where_it_is_seen(four: dict[Any, Any]) -> None:
    said = result(four, "gradients_that_differ_on_one_of_two_meshes")
    assert len(set(said)) == 1
    assert said[0].startswith("RuntimeError: there are gradients for 'one' on rank 0 only")


@pytest.mark.parametrize("recipe", ["adamw8bit", "adalomo"])
def test_parameters_on_a_part_of_the_mesh_are_saved_with_the_others(four: Any, checkpoints: Path, recipe: str) -> None:
    assert result(four, "one_file_of_two_meshes", recipe, checkpoints) == (True, True)


@pytest.mark.parametrize("case", CONVERTED, ids=str)
def test_a_file_in_other_stores_is_converted_on_every_device(two: Any, checkpoints: Path, case: Any) -> None:
    assert result(two, "file_of_another_format", *case, checkpoints)


def test_ranks_that_train_different_parameters_cannot_save_one_file(two: dict[Any, Any], checkpoints: Path) -> None:
    file = checkpoints / "stages.safetensors"
    said = result(two, "other_parameters_on_each_rank", file)
    assert "the ranks have parts of different parameters" in said
    assert "use torch.distributed.checkpoint" in said
    assert not file.exists()


def test_stochastic_rounding_of_a_shard_is_that_of_the_whole(two: dict[Any, Any]) -> None:
    assert result(two, "rounding_is_that_of_the_whole", True) == 0


@pytest.mark.parametrize("fused", [False, True])
def test_weights_computed_with_in_bf16_train_as_in_fp32(two: dict[Any, Any], fused: bool) -> None:
    assert result(two, "mixed_precision", fused) < 0.05  # of a loss near 2.5; bf16 has a spacing of 2**-8


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_two_micro_batches_are_used_once(two: dict[Any, Any], fused: bool) -> None:
    assert result(two, "accumulation", fused) <= CLOSE


@pytest.mark.parametrize("how", ["kept", "measured"])
def test_the_clip_is_by_the_norm_over_all_devices(two: dict[Any, Any], how: str) -> None:
    assert result(two, "clipped_by_the_norm_over_all_devices", how) <= CLOSE


@pytest.mark.parametrize("layers", BOTH)
def test_measuring_the_norm_leaves_the_gradients_of_other_optimizers(two: dict[Any, Any], layers: bool) -> None:
    of_norm, of_others = result(two, "measured_beside_another_optimizer", layers)
    assert of_norm <= CLOSE
    assert of_others <= CLOSE


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_a_group_needs_two_all_reduces_and_so_does_a_whole_step_that_is_not_fused(two: Any, case: Any) -> None:
    recipe, fused, *_ = case
    count, groups = result(two, "collectives", *case)
    assert groups == 4
    assert count <= 2 * groups if fused else count == (1 if recipe == "adamw" else 2)


def test_a_fused_backward_leaves_no_gradient(two: dict[Any, Any]) -> None:
    assert result(two, "gradients_left", True) == 0


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_waits_for_a_parameter_without_gradient(two: dict[Any, Any], fused: bool) -> None:
    assert result(two, "unused_parameter", fused) <= CLOSE


@pytest.mark.parametrize(("recipe", "fused"), [("adalomo", False), ("adamw", False), ("adalomo", True)])
def test_a_gradient_that_is_not_finite_on_one_rank_is_refused_on_all(
    two: dict[Any, Any], recipe: str, fused: bool
) -> None:
    assert result(two, "not_finite_on_one_rank", recipe, fused) == ["NonFiniteGradientError, unchanged: True"] * 2


@pytest.mark.parametrize("fused", [False, True])
def test_parameters_sharded_after_the_optimizer_was_built_are_taken_over(two: dict[Any, Any], fused: bool) -> None:
    assert result(two, "replaced_parameters", fused) <= CLOSE


def test_stepped_under_ddp(two: dict[Any, Any]) -> None:
    assert result(two, "under_ddp") <= CLOSE


@pytest.mark.parametrize("own_shapes", BOTH)
def test_under_fsdp1_only_what_works_element_by_element(two: dict[Any, Any], own_shapes: bool) -> None:
    """A flat parameter counts as a vector: AdaLomo would factor nothing, and clip each device's piece by itself."""
    said, distance = result(two, "under_fsdp1", own_shapes)
    assert "a piece of a flat parameter of FSDP1" in said
    assert "use FSDP2 (fully_shard), or a recipe that works element by element, such as AdamW" in said
    assert distance <= CLOSE


def test_fused_under_replicate_the_remedy_for_ddp(two: dict[Any, Any]) -> None:
    assert result(two, "fused_under_replicate") <= CLOSE


@pytest.mark.parametrize(("recipe", "world", "how"), LOADED)
def test_what_two_processes_saved_goes_on_in_one_two_and_four(
    one: Any, two: Any, four: Any, checkpoints: Path, recipe: str, world: int, how: str
) -> None:
    results = {1: one, 2: two, 4: four}[world]
    distance = result(results, "load_distributed", recipe, checkpoints / recipe, how)
    assert distance <= tolerance(("load_distributed", recipe))


@pytest.mark.parametrize("recipe", SAVED)
def test_the_one_file_is_what_an_unsharded_run_writes(two: Any, checkpoints: Path, tmp_path: Path, recipe: str) -> None:
    """Equal in every byte but the numbers' last digits: load it unsharded, and save it again."""
    result(two, "save_distributed", recipe, checkpoints / recipe)
    optimizer = ranks.RECIPES[recipe](ranks.net(ranks.SAVED_ROWS).named_parameters())
    optstate.load(optimizer, checkpoints / recipe / "opt.safetensors")
    optstate.save(optimizer, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (checkpoints / recipe / "opt.safetensors").read_bytes()
