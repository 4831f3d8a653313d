"""Processes that share parameters load, hold and save the same, or nothing happens on any of them.

The processes are real, two and four. Nothing hangs: each waits at most `PATIENCE` for the others.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import alike_ranks
from tests.support.launching import Case, launch, result

pytestmark = pytest.mark.ranks

TIMEOUT = 400
"""Seconds for all cases of one number of processes, many times what they take on a quiet machine."""

PATIENCE = 60
"""Seconds after which a process that waits for another gives up, and its case fails."""

LOADED = [
    ("other steps", "file"),
    ("other numbers", "file"),
    ("failing", "file"),
    ("other steps", "state_dict"),
    ("other numbers", "state_dict"),
    ("other values", "state_dict"),
    ("failing", "state_dict"),
]
HELD = [
    (what, how)
    for what in ("lr", "recipe", "steps")
    for how in ("split", "replicated", "split fused", "replicated fused")
]
DRIFTED = ("lr", "steps", "path", "replicas")


def launched(world: int, folder: Path) -> list[dict[Any, Any]]:
    cases: list[Case] = [
        ("runs", folder),
        *(("loads", *case, folder) for case in LOADED),
        ("failing_while_copying", folder),
        ("another_path_to_the_same", folder),
        ("loading_while_others_save", folder),
        *(("holds", *case) for case in HELD),
        *(("saves", what, folder) for what in DRIFTED),
        ("moved_on_the_last_rank", folder),
        ("without_statistics", folder),
    ]
    if world == 2:
        cases += [("kept", name, folder) for name in alike_ranks.KEPT]
    else:
        cases.append(("on_two_meshes", folder))
    found = launch(
        "tests.support.alike_ranks", world, cases, folder / "ranks", timeout=TIMEOUT, collective_timeout=PATIENCE
    )
    for rank in found:
        result(rank, "runs", folder)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {world: tmp_path_factory.mktemp(f"ranks{world}") for world in (2, 4)}


@pytest.fixture(scope="module")
def two(folders: dict[int, Path]) -> list[dict[Any, Any]]:
    return launched(2, folders[2])


@pytest.fixture(scope="module")
def four(folders: dict[int, Path]) -> list[dict[Any, Any]]:
    return launched(4, folders[4])


@pytest.fixture(params=[2, 4])
def everywhere(request: pytest.FixtureRequest, folders: dict[int, Path]) -> tuple[list[dict[Any, Any]], Path]:
    """The results of all ranks, and the folder of their files."""
    return request.getfixturevalue("two" if request.param == 2 else "four"), folders[request.param]


def others(world: int) -> str:
    """All ranks but the last, as they are named."""
    return "rank 0" if world == 2 else "ranks 0, 1, 2"


@pytest.mark.parametrize("case", LOADED, ids=" ".join)
def test_a_load_happens_on_all_ranks_or_on_none(everywhere: Any, case: tuple[str, str]) -> None:
    results, folder = everywhere
    world = len(results)
    for rank, each in enumerate(results):
        said, unchanged, again, equal = result(each, "loads", *case, folder)
        assert unchanged
        assert (again, equal) == ("nothing", True)
        match case:
            case ("failing", _) if rank == world - 1:
                assert "no such file" in said or "nothing for 'first.weight'" in said
            case ("failing", _):
                assert f"rank {world - 1} failed: " in said
            case ("other steps", _):
                assert f"the step of 'first.weight' is 2 on {others(world)}, 1 on rank {world - 1}" in said
            case ("other values", _):
                assert f"lr of param group 0 is 0.001 on {others(world)}, 0.125 on rank {world - 1}" in said
            case ("other numbers", _):
                assert re.search(rf"the content of 'first.weight/exp_avg' is \w+ on {others(world)}, \w+ on rank", said)
    kinds = {result(each, "loads", *case, folder)[0].partition(":")[0] for each in results[:-1]}
    assert kinds == {"CheckpointError" if case[1] == "file" else "DisagreementError"}


def test_a_load_that_fails_half_way_on_one_rank_stops_all(everywhere: Any) -> None:
    results, folder = everywhere
    for rank, each in enumerate(results):
        said, later, again = result(each, "failing_while_copying", folder)
        if rank == len(results) - 1:
            assert said == "OSError: the disk is gone"
        else:
            assert said.startswith(f"InconsistentStateError: loading ended: rank {len(results) - 1} failed: the disk")
        assert ["refused, a step broke off half-way: loading" in text for text in later] == [True, True, True]
        assert again == "nothing"


def test_copies_of_one_file_are_no_difference(everywhere: Any) -> None:
    results, folder = everywhere
    assert {result(each, "another_path_to_the_same", folder) for each in results} == {"nothing"}


def test_calls_that_do_not_belong_together_are_named(everywhere: Any) -> None:
    results, folder = everywhere
    text = f"the call is save on {others(len(results))}, load on rank {len(results) - 1}"
    for each in results:
        assert text in result(each, "loading_while_others_save", folder)


def test_what_fails_on_a_part_of_the_mesh_is_told_to_all(four: list[dict[Any, Any]], folders: dict[int, Path]) -> None:
    said = [result(each, "on_two_meshes", folders[4]) for each in four]
    assert said[3].startswith("ValueError: the saved state has nothing for 'one'")
    for text in said[:3]:
        assert text.startswith("DisagreementError: rank 3 failed: the saved state has nothing for 'one'")


@pytest.mark.parametrize("case", HELD, ids=" ".join)
def test_the_first_step_compares_what_ranks_hold(everywhere: Any, case: tuple[str, str]) -> None:
    results, _ = everywhere
    last, rest = f"rank {len(results) - 1}", others(len(results))
    text = {
        "lr": f"lr of param group 0 is 0.001 on {rest}, 0.5 on {last}",
        "steps": f"the step of 'first.weight' is 0 on {rest}, 5 on {last}",
        "recipe": "the recipe of 'first.weight' is scale_by_adam",
    }[case[0]]
    for each in results:
        said, unchanged = result(each, "holds", *case)
        assert said.startswith(f"RuntimeError: {text}")
        assert unchanged


@pytest.mark.parametrize("what", DRIFTED)
def test_a_save_compares_what_ranks_hold(everywhere: Any, what: str) -> None:
    results, folder = everywhere
    last, rest = f"rank {len(results) - 1}", others(len(results))
    text = {
        "lr": f"lr of param group 0 is 0.001 on {rest}, 0.5 on {last}",
        "path": f"the file is {folder}/drift-path.safetensors on {rest}, {folder}/drift-elsewhere.safetensors on ",
    }.get(what, f"the step of 'first.weight' is 1 on {rest}, 2 on {last}")
    for each in results:
        said, none = result(each, "saves", what, folder)
        assert f"not saved, {text}" in said
        assert none


def test_a_write_beside_a_save_is_noticed_on_any_rank(everywhere: Any) -> None:
    results, folder = everywhere
    for each in results:
        said, none = result(each, "moved_on_the_last_rank", folder)
        assert said.startswith("CheckpointError")
        assert "'first.weight' was updated while it was read" in said
        assert none


def test_state_without_tensors_is_written_by_one_rank_too(everywhere: Any) -> None:
    results, folder = everywhere
    for rank, each in enumerate(results):
        assert result(each, "without_statistics", folder) == (int(rank == 0), [2, 2, 2, 2])


@pytest.mark.parametrize("name", alike_ranks.KEPT)
def test_every_store_and_way_to_write_weights_goes_through_fsdp2(two: Any, folders: Any, name: str) -> None:
    for each in two:
        found = result(each, "kept", name, folders[2])
        assert found == dict.fromkeys(found, True)
        assert len(found) == 4
