"""Training on several processes of which one is killed, fails, or has other gradients: nothing hangs, nothing is mixed
up, every error says what to do, and the last checkpoint is whole.

The processes are real, and so are the kills. Cases in which a process dies have processes of their own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import optstate
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.distributed import agreement
from tests.support import killed_ranks, ranks
from tests.support.launching import Case, failed, launch, result
from tests.support.pairwise import pairwise

pytestmark = pytest.mark.ranks

TIMEOUT = 200
"""Seconds for the cases of one pair of processes, many times what they take on a quiet machine."""

PATIENCE = 20
"""Seconds that processes wait for each other. The sockets of a killed process close at once: nobody waits for it."""

CLOSE = 1e-6
"""As in `test_distributed`: fp32 weights of order one, some steps, gradients averaged in another order."""

GONE = "another process is gone, or late by more than the process group's timeout"
SAYS = " (the backend says: "
"""What follows in its own words, with addresses and line numbers."""


def run(
    world: int, cases: list[Case], folder: Path, patience: int = PATIENCE, killed: tuple[int, ...] = ()
) -> list[dict[Any, Any]]:
    module = "tests.support.killed_ranks"
    return launch(module, world, cases, folder, timeout=TIMEOUT, collective_timeout=patience, killed=killed)


def divided(text: str) -> tuple[str, str, str]:
    """An error of a lost process: what comes before the words of the backend, these, and what comes after them."""
    begin, _, rest = text.partition(SAYS)
    said, _, end = rest.partition(")")
    return begin, said, end


# --- killed in a step ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the runs that are killed save themselves."""
    return {place: tmp_path_factory.mktemp("saved") for place in killed_ranks.PLACES}


@pytest.fixture(scope="module")
def survivor(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 sees when rank 1 is killed, by the place where it is."""
    found = {}
    for place, folder in folders.items():
        case = ("killed_in_a_step", place, folder)
        found[place] = result(run(2, [case], tmp_path_factory.mktemp("ranks"), killed=(1,))[0], *case)
    return found


@pytest.mark.parametrize(
    ("place", "where"), [("stepped", "'embed.weight' and 10 more"), ("fused", "'mid.weight' and 1 more")]
)
def test_the_survivor_says_which_step_broke_off_and_what_to_do(survivor: Any, place: str, where: str) -> None:
    begin, said, end = divided(survivor[place]["error"])
    assert begin == f"InconsistentStateError: step 4 broke off at {where}: {GONE}"
    assert end == (
        ". Weights may be updated in part, here or on other devices: load the last checkpoint in new processes"
    )
    assert "gloo" in said
    assert said.removesuffix("...") in survivor[place]["cause"]


def test_a_kill_that_fsdp2_notices_first_is_its_error(survivor: Any) -> None:
    assert "gloo" in survivor["fused, in backward"]["error"]


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("stepped", f"0 parameters were updated, then step 4 of 'embed.weight' and 10 more failed: {GONE}"),
        ("fused", f"2 parameters were updated, then step 4 of 'mid.weight' and 1 more failed: {GONE}"),
        ("fused, in backward", "4 parameters were updated, then the backward pass failed"),
    ],
)
def test_the_survivor_neither_steps_nor_saves_any_more(survivor: Any, place: str, why: str) -> None:
    for action, said in zip(("step", "state_dict", "state_dict"), survivor[place]["later"], strict=True):
        begin, _, end = divided(said) if SAYS in said else (said, "", said[said.index(". Load") :])
        assert begin.startswith(f"{action}() refused, a step broke off half-way: {why}")
        assert end.startswith(". Load the last checkpoint")


def test_a_sum_for_clipping_that_fails_leaves_the_step_broken_off(alive: list[dict[Any, Any]]) -> None:
    """What follows from a lost process, whatever the sum; here the backend is made to fail."""
    for results in alive:
        said, cause = result(results, "lost_while_clipping")
        text = f"InconsistentStateError: step 1 broke off at 'embed.weight' and 10 more: {GONE}{SAYS}out of order)."
        assert said.startswith(text)
        assert cause == "out of order"


@pytest.mark.parametrize("world", [1, 2])
def test_the_last_checkpoint_goes_on_where_an_uninterrupted_run_is(
    survivor: Any, folders: dict[str, Path], world: int, tmp_path: Path
) -> None:
    """What was saved before the kill, in both ways, in new processes, fused and stepped."""
    meetings = pairwise(list(folders.values()), ("dcp", "file"), (1, 2))
    cases = [("load_distributed", "adalomo", folder, how) for folder, how, processes in meetings if processes == world]
    results = launch("tests.support.ranks", world, cases, tmp_path, timeout=TIMEOUT)
    assert all(result(results[0], *case) <= CLOSE for case in cases)  # which has the run to compare with
    for rank in results:
        assert not any(failed(found) for found in rank.values())


# --- killed, or failing, in a save ---------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_in_a_save_leaves_the_file_of_before(victim: int, tmp_path: Path) -> None:
    case, folder = ("killed_in_a_save", victim, tmp_path), tmp_path / "ranks"
    said = result(run(2, [case], folder, killed=(victim,))[1 - victim], *case)
    begin, words, end = divided(said)
    assert begin.endswith(f"opt.safetensors: saving broke off: {GONE}")
    assert end.startswith("; the file is what it was before")
    assert "gloo" in words
    assert said.endswith("from RuntimeError")
    file, temporary = tmp_path / "opt.safetensors", [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert len(temporary) == (victim == 0)  # what rank 0 wrote to
    assert set(open_checkpoint(file).document.steps) == {1}
    optimizer = ranks.RECIPES["adalomo"](ranks.net(ranks.SAVED_ROWS).named_parameters())
    optstate.load(optimizer, file)
    optimizer.zero_grad()
    optstate.save(optimizer, file)
    for left in temporary:
        assert re.fullmatch(r"\.optstate-[0-9a-f]+\.tmp", left.name)
        assert left.exists()  # it may be another process's that still writes
        with pytest.raises(CheckpointError):
            open_checkpoint(left)


FAILING = ("disk_full_on_rank_0", "inconsistent_on_rank_1")


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp("saves") for name in FAILING}


@pytest.fixture(scope="module")
def alive(saves: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """The results of both ranks, of cases in which none dies."""
    return run(2, [*saves.items(), *PARTIAL], tmp_path_factory.mktemp("alive"))


def test_a_full_disk_on_rank_0_fails_all_ranks_with_the_reason(alive: Any, saves: dict[str, Path]) -> None:
    for rank, prefix in enumerate(("", "not saved, rank 0 failed: ")):
        said, left, whole = result(alive[rank], "disk_full_on_rank_0", saves["disk_full_on_rank_0"])
        assert said.endswith(f"opt.safetensors: {prefix}cannot be written: No space left on device")
        assert left == ["opt.safetensors"]
        assert whole


def test_a_rank_that_may_not_save_stops_all_before_anything_is_written(alive: Any, saves: dict[str, Path]) -> None:
    case = ("inconsistent_on_rank_1", saves["inconsistent_on_rank_1"])
    why = "0 parameters were updated, then 'layer0' failed: a test failed"
    reason = f"state_dict() refused, a step broke off half-way: {why}"
    assert f"opt.safetensors: not saved, rank 1 failed: {reason}" in result(alive[0], *case)
    assert result(alive[1], *case).startswith(f"InconsistentStateError: {reason}")


# --- gradients on some ranks only ----------------------------------------------------------------------------------

MISSING = {
    ("mid.weight", "down.bias"): "for 'mid.weight' and 1 more on rank 0 only",
    (): "for 'embed.weight' and 10 more on rank 0 only",
}
PARTIAL: list[Case] = [
    *(("missing_gradients", names) for names in MISSING),
    *(("experts_with_zeros", fused) for fused in (False, True)),
    ("lost_while_clipping",),
    *(("experts", fused, layers) for fused in (False, True) for layers in (False, True)),
]


def refusal(which: str) -> str:
    return (
        f"RuntimeError: there are gradients {which}, but parameters that are split among devices are stepped by all "
        "together: give them zeros where they have none (p.grad = torch.zeros_like(p)), or none anywhere"
    )


@pytest.mark.parametrize("names", MISSING, ids=["two", "all"])
def test_gradients_that_rank_1_lacks_are_named_on_all_ranks(
    alive: list[dict[Any, Any]], names: tuple[str, ...]
) -> None:
    for results in alive:
        said, unchanged, distance = result(results, "missing_gradients", names)
        assert said == refusal(MISSING[names])
        assert unchanged
        assert distance <= CLOSE  # from an unsharded run, once they are there


@pytest.mark.parametrize("fused", [False, True], ids=["stepped", "fused"])
def test_zeros_that_fsdp2_gives_for_unused_layers_are_gradients(alive: list[dict[Any, Any]], fused: bool) -> None:
    for results in alive:
        assert result(results, "experts_with_zeros", fused) <= CLOSE


@pytest.mark.parametrize("layers", [False, True], ids=["one group", "a group each"])
@pytest.mark.parametrize("fused", [False, True], ids=["stepped", "fused"])
def test_gradients_that_fsdp2_mixed_up_are_refused(alive: list[dict[Any, Any]], fused: bool, layers: bool) -> None:
    which = "for 'first.weight' and 1 more on rank 0 only, for 'second.weight' and 1 more on rank 1 only"
    for results in alive:
        assert result(results, "experts", fused, layers) == refusal(which)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([("a", "b")] * 3, ""),
        ([("a", "b"), ("a", "b"), ("a",)], "there are gradients for 'b' on all ranks but 2"),
        ([("a",), (), ("b", "c")], "there are gradients for 'a' on rank 0 only, for 'b' and 1 more on rank 2 only"),
        ([("a",)] * 10 + [()] * 15, "there are gradients for 'a' on ranks 0, 1, 2, 3, 4, 5, 6, 7 ... only"),
        ([("a", "b"), ("b", "a")], "gradients do not come in the same order on all ranks"),
    ],
    ids=["none", "one lacks one", "others", "many ranks", "order"],
)
def test_how_gradients_differ_is_said_in_a_line(names: list[tuple[str, ...]], said: str) -> None:
    with patch.object(agreement, "from_all", return_value=dict(enumerate(names))):
        assert agreement.Agreement().difference({("some processes",): names[0]}) == said


def test_processes_ask_once_for_a_set_and_name_what_is_missing_on_one_only(tmp_path: Path) -> None:
    patience = 5
    results = run(2, [("changing_gradients",)], tmp_path, patience=patience)
    for rank, text in enumerate(
        (f"'layer0' and 2 more: {GONE} (", f"{GONE}, or here only 'layer1' lost its gradient (")
    ):
        asked, said, seconds = result(results[rank], "changing_gradients")
        assert asked == [2, 0, 1, 0, 0]  # whether all hold the same and a new set, known, new, known, known
        assert said.startswith("InconsistentStateError: step 6 broke off at 'layer0'")
        assert text in said
        assert seconds < 2 * patience
