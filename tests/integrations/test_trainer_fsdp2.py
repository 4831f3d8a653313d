"""Other people's trainers sharding with FSDP2 on two processes, run for real: as a plain loop on one, or refused with a
way out.

Every case runs in two processes on the CPU beside the plain loop over the batches of both. All cases share the
processes, which take seconds to start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.launching import failed, launch, result
from tests.support.trainer_words import CLIP, FUSED_AFTER, FUSED_BEFORE, STEPPED, STEPS

pytestmark = [pytest.mark.ranks, pytest.mark.peer]

CLOSE = 1e-6
"""fp32 weights of about 0.02 to 1: gradients are averaged over processes, and squares summed, in another order."""

STATE_CLOSE = 1e-5
"""Of the largest number of its tensor: a statistic of squares doubles relative errors."""

TIMEOUT = 400
"""Seconds for all cases: more than five times what they take on a quiet machine."""

GRADIENTS = 21
"""Parameters of the model, and gradients of a stepped run."""

ACCELERATED: list[tuple[Any, ...]] = [
    *(("accelerated", "adalomo", when) for when in (STEPPED, FUSED_BEFORE, FUSED_AFTER)),
    ("accelerated", "adamw", STEPPED),
    ("accelerated", "adamw8bit", STEPPED),
    ("accelerated", "adamw8bit", FUSED_AFTER),
    ("accelerated", "adalomo", STEPPED, 2),
    ("accelerated", "adamw8bit", FUSED_BEFORE, 2),
    ("accelerated_ram_efficient", FUSED_AFTER),
    ("accelerated_checkpointed", FUSED_AFTER),
    ("accelerated_tied", FUSED_AFTER),
]
ACCUMULATING = [
    ("accelerated_accumulating", STEPPED, False),
    ("accelerated_accumulating", FUSED_AFTER, False),
    ("accelerated_accumulating", FUSED_BEFORE, True),
]
RESUMED = [
    ("accelerated_resumed", "adalomo", STEPPED, "FULL_STATE_DICT", torch.float32),
    ("accelerated_resumed", "adalomo", FUSED_BEFORE, "FULL_STATE_DICT", torch.bfloat16),
    ("accelerated_resumed", "adalomo", FUSED_AFTER, "SHARDED_STATE_DICT", torch.float32),
    ("accelerated_resumed", "adamw8bit", STEPPED, "SHARDED_STATE_DICT", torch.bfloat16),
    ("hf_resumed", "adalomo", False, "FULL_STATE_DICT", torch.float32),
    ("hf_resumed", "adamw8bit", True, "SHARDED_STATE_DICT", torch.bfloat16),
    ("lightning_resumed", "adalomo", True, True, torch.bfloat16),
    ("lightning_resumed", "adamw8bit", False, False, torch.float32),
]
HF = [
    ("hf_trained", "adalomo", False, False, 1, 0.0),
    ("hf_trained", "adalomo", False, True, 1, 0.0),
    ("hf_trained", "adamw", True, False, 1, 0.0),
    ("hf_trained", "lomo", True, True, 2, 0.0),
    ("hf_trained", "lomo", False, False, 2, CLIP),
    ("hf_trained", "lomo", True, True, 1, CLIP),
]
LIGHTNING = [
    ("lightning_trained", "adalomo", True, 1, None),
    ("lightning_trained", "lomo", False, 2, CLIP),
    ("lightning_trained", "lomo", True, 1, CLIP),
]
OTHERS: list[tuple[Any, ...]] = [
    ("accelerated_clipping", "called"),
    ("accelerated_clipping", "kept"),
    ("accelerated_clipping", "measured"),
    ("accelerated_bare_clip",),
    ("accelerated_in_bf16",),
    ("accelerated_too_late",),
    ("accelerated_whole_parameters_alive", STEPPED),
    ("accelerated_whole_parameters_alive", FUSED_BEFORE),
    ("accelerated_from_the_first_gradient",),
    ("lightning_refused", 1, CLIP),
    ("lightning_refused", 2, None),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainers")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[Any, Any]:
    resumed = [(*case, folder / f"resumed{i}") for i, case in enumerate(RESUMED)]
    hf = [(*case, folder / "hf") for case in [*HF, ("hf_refused",), ("hf_handed_over",)]]
    cases = [*ACCELERATED, *ACCUMULATING, *OTHERS, *LIGHTNING, *hf, *resumed]
    everywhere = launch("tests.support.trainer_ranks", 2, cases, folder / "processes", timeout=TIMEOUT)
    failures = {key: value for results in everywhere for key, value in results.items() if failed(value)}
    return {**everywhere[0], **failures}


@pytest.mark.parametrize("case", ACCELERATED, ids=str)
def test_a_loop_under_accelerate_ends_where_a_plain_one_does(two: dict[Any, Any], case: tuple[Any, ...]) -> None:
    weights, state, gradients = result(two, *case)
    assert weights <= CLOSE
    assert state <= STATE_CLOSE
    left = {STEPPED: GRADIENTS, FUSED_BEFORE: 0, FUSED_AFTER: 0}[case[2 if case[0] == "accelerated" else 1]]
    assert gradients[1:] == [left] * (STEPS - 1)


def test_fused_after_prepare_updates_from_the_first_gradient(two: dict[Any, Any]) -> None:
    """Fused before, the first backward finds no hooks, and `step()` uses what it leaves."""
    assert result(two, "accelerated", "adalomo", FUSED_AFTER)[2][0] == 0
    assert result(two, "accelerated", "adalomo", FUSED_BEFORE)[2][0] == GRADIENTS


def test_fused_before_prepare_updates_from_the_first_gradient_if_train_is_called(two: dict[Any, Any]) -> None:
    assert result(two, "accelerated_from_the_first_gradient") == [0, 0]


@pytest.mark.parametrize("when", [STEPPED, FUSED_BEFORE])
def test_the_whole_parameters_are_freed_when_train_is_called(two: dict[Any, Any], when: str) -> None:
    assert result(two, "accelerated_whole_parameters_alive", when) == 0


@pytest.mark.parametrize("case", ACCUMULATING, ids=str)
def test_accumulation_under_accelerate_is_exact(two: dict[Any, Any], case: tuple[Any, ...]) -> None:
    """FSDP2 shows hooks only the sum. That the remedy for one device changes nothing is checked, too."""
    weights, _ = result(two, *case)
    assert weights <= CLOSE


@pytest.mark.parametrize("how", ["called", "kept", "measured"])
def test_clipping_under_accelerate_is_by_the_norm_over_all_devices(two: dict[Any, Any], how: str) -> None:
    """Stepped by accelerate's call, fused of kept gradients or measured. With Lomo, whose step is as long as these."""
    clipped, unclipped = result(two, "accelerated_clipping", how)
    assert clipped <= CLOSE
    assert unclipped > 1e-3


def test_a_bare_clip_after_a_fused_backward_reports_a_norm_of_zero(two: dict[Any, Any]) -> None:
    """The limit there is on one device, too."""
    assert result(two, "accelerated_bare_clip") == 0


def test_weights_that_accelerate_makes_fp32_are_written_as_such(two: dict[Any, Any]) -> None:
    weights, difference = result(two, "accelerated_in_bf16")
    assert weights == {"Plain()"}
    assert difference < 0.05  # of a loss near 5.5; bf16 has a spacing of 2**-8


def test_state_that_would_be_lost_by_sharding_is_refused_before_anything_changes(two: dict[Any, Any]) -> None:
    message, states = result(two, "accelerated_too_late")
    assert "was sharded after 2 steps, and its state would need another format: shard the model before" in message
    assert states == GRADIENTS


@pytest.mark.parametrize("case", HF, ids=str)
def test_transformers_trainer_ends_where_a_plain_loop_does(
    two: dict[Any, Any], folder: Path, case: tuple[Any, ...]
) -> None:
    weights, gradients = result(two, *case, folder / "hf")
    assert weights <= CLOSE
    assert gradients == [0 if case[3] else GRADIENTS] * STEPS


def test_trainers_norm_clip_is_refused_when_fused_before_anything_changes(two: dict[Any, Any], folder: Path) -> None:
    message, unchanged = result(two, "hf_refused", folder / "hf")
    assert f"max_grad_norm={CLIP} and would clip nothing" in message
    assert unchanged


def test_trainer_takes_no_finished_optimizer_under_fsdp(two: dict[Any, Any], folder: Path) -> None:
    """The README says so; `create_optimizer` is the way."""
    assert "Passing `optimizers` is not allowed" in result(two, "hf_handed_over", folder / "hf")


@pytest.mark.parametrize("case", LIGHTNING, ids=str)
def test_lightnings_trainer_ends_where_a_plain_loop_does(two: dict[Any, Any], case: tuple[Any, ...]) -> None:
    weights, gradients = result(two, *case)
    assert weights <= CLOSE
    assert gradients == [0 if case[2] else GRADIENTS] * STEPS


@pytest.mark.parametrize(
    ("accumulation", "clip", "words"),
    [(1, CLIP, f"gradient_clip_val={CLIP} and would clip nothing"), (2, None, "accumulate_grad_batches=2")],
)
def test_lightnings_settings_are_refused_when_fused_before_anything_changes(
    two: dict[Any, Any], accumulation: int, clip: float | None, words: str
) -> None:
    message, unchanged = result(two, "lightning_refused", accumulation, clip)
    assert words in message
    assert unchanged


@pytest.mark.parametrize("i", range(len(RESUMED)), ids=[str(case) for case in RESUMED])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(two: dict[Any, Any], folder: Path, i: int) -> None:
    losses, weights, state = result(two, *RESUMED[i], folder / f"resumed{i}")
    assert losses
    assert weights
    assert state
