"""A run goes on in another dtype, or with weights written in another way: with consent, and with all statistics."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optstate
from adalomo import AdaLomo
from optstate.checkpoint.live import load as load_module
from optstate.recipes import AdamFactor, AdamW, AdamW8bit
from optstate.weights import Kahan, Plain, Split, StochasticRounding
from tests.support.models import assert_same, state_of
from tests.support.pairwise import pairwise

pytestmark = pytest.mark.slow

FP32, BF16 = torch.float32, torch.bfloat16
WAYS: list[tuple[torch.dtype, Any]] = [
    (FP32, Plain()),
    (BF16, Plain()),
    (BF16, StochasticRounding()),
    (BF16, Kahan()),
    (BF16, Split(16)),
    (BF16, Split(8)),
]
STEPS = 2


def run(make: Any, dtype: torch.dtype, way: Any, steps: int = 0) -> tuple[nn.Module, optstate.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 64)).to(dtype)
    optimizer = make(model.named_parameters(), weights=way)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: nn.Module, optimizer: optstate.Optimizer, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2, 64, generator=generator).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def statistics(optimizer: optstate.Optimizer) -> list[dict[str, Any]]:
    """The state without what is kept for writing weights."""
    return [{k: v for k, v in state.items() if not k.startswith("weight.")} for state in state_of(optimizer)]


@pytest.mark.parametrize(
    ("make", "there", "here"),
    pairwise((AdamW, AdamW8bit, AdaLomo), WAYS, WAYS, allowed=lambda make, there, here: there != here),
    ids=str,
)
def test_a_run_goes_on_in_another_dtype_with_consent(make: Any, there: Any, here: Any, tmp_path: Path) -> None:
    """Statistics of these recipes are in the same formats whatever the weights are in: all are taken over, bit for bit;
    corrections of weights that are others now begin at zero, as in a new optimizer."""
    file = tmp_path / "opt.safetensors"
    _, source = run(make, *there, STEPS)
    optstate.save(source, file)
    model, optimizer = run(make, *here)
    before = copy.deepcopy(state_of(optimizer))
    with pytest.raises(optstate.CheckpointError, match="or convert with allow_lossy=True") as caught:
        optstate.load(optimizer, file)
    assert caught.value.refused
    assert_same(state_of(optimizer), before)
    with pytest.warns(UserWarning, match="in the saved run") if there[1] != here[1] else warnings.catch_warnings():
        optstate.load(optimizer, file, allow_lossy=True)
    assert_same(statistics(optimizer), statistics(source))
    for state in optimizer.state.values():
        kept = [value for key, value in state.items() if key.startswith("weight.")]
        assert not any(value.any() for value in kept if isinstance(value, Tensor))
    train(model, optimizer, 1)
    assert {state["step"] for state in optimizer.state.values()} == {STEPS + 1}


def test_numbers_of_the_weights_themselves_are_not_begun_anew_where_they_fit(tmp_path: Path) -> None:
    """Consent to another store is none to drop the corrections of a master weight that is written as before."""
    _, source = run(AdamW, BF16, Split(16), STEPS)
    optstate.save(source, tmp_path / "opt.safetensors")
    _, optimizer = run(AdamW8bit, BF16, Split(16))
    optstate.load(optimizer, tmp_path / "opt.safetensors", allow_lossy=True)
    for ours, theirs in zip(optimizer.state.values(), source.state.values(), strict=True):
        assert theirs["weight.correction"].any()
        assert torch.equal(ours["weight.correction"], theirs["weight.correction"])


@pytest.mark.parametrize("way", [Kahan(), Split(16)], ids=str)
def test_another_librarys_file_has_nothing_for_weights(way: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 64))
    theirs = torch.optim.AdamW(model.named_parameters())
    train(model, theirs, STEPS)  # type: ignore[arg-type]
    torch.save(theirs.state_dict(), tmp_path / "opt.pt")
    _, optimizer = run(AdamW, BF16, way)
    with pytest.raises(optstate.CheckpointError, match=r"is not in the file; .*allow_lossy=True"):
        optstate.load(optimizer, tmp_path / "opt.pt")
    optstate.load(optimizer, tmp_path / "opt.pt", allow_lossy=True)
    for ours, other in zip(optimizer.state.values(), theirs.state.values(), strict=True):
        assert torch.equal(ours["exp_avg"], other["exp_avg"])
        assert ours["step"] == STEPS


def test_a_state_dict_names_the_way() -> None:
    _, source = run(AdamW, FP32, Plain(), STEPS)
    _, optimizer = run(AdamW, BF16, Split(16))
    with pytest.raises(ValueError, match=r"optstate.load\(..., allow_lossy=True\)"):
        optimizer.load_state_dict(source.state_dict())


def test_corrections_of_fp16_weights_are_not_cast_for_bf16_ones(tmp_path: Path) -> None:
    """Both are kept as "Kahan()", so only the dtype of the parameters tells that they are not the same."""
    _, there = run(AdamW, torch.float16, Kahan(), STEPS)
    assert any(bool(state["weight.compensation"].any()) for state in state_of(there))
    optstate.save(there, tmp_path / "a.safetensors")
    _, here = run(AdamW, BF16, Kahan(), STEPS)
    with pytest.raises(optstate.CheckpointError, match="float16.* when it was saved, here it is bfloat16"):
        optstate.load(here, tmp_path / "a.safetensors")
    optstate.load(here, tmp_path / "a.safetensors", allow_lossy=True)
    assert_same(statistics(here), statistics(there))
    assert not any(bool(state["weight.compensation"].any()) for state in state_of(here))


def test_what_stays_as_it_is_is_read_into_place_beside_what_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamFactor keeps the first moment as AdamW8bit does, and the second one in factors: of the large parameters the
    one is copied and the other converted; the small ones are kept in full by both."""
    _, there = run(AdamW8bit, FP32, Plain(), STEPS)
    optstate.save(there, tmp_path / "a.safetensors")
    in_place: list[int] = []
    original = load_module.read_part_into
    monkeypatch.setattr(
        load_module, "read_part_into", lambda own, stored: (in_place.append(own.numel()), original(own, stored))
    )
    _, here = run(AdamFactor, FP32, Plain(), STEPS)
    optstate.load(here, tmp_path / "a.safetensors", allow_lossy=True)
    read = [
        state[key].numel()
        for state in state_of(there)
        for key in state
        if key.startswith("exp_avg") and (not key.startswith("exp_avg_sq") or key == "exp_avg_sq")
    ]
    assert sorted(in_place) == sorted(read)
    for mine, theirs in zip(state_of(here), state_of(there), strict=True):
        for key in ("exp_avg", "exp_avg.codes", "exp_avg.absmax"):
            assert (key in mine) == (key in theirs)
            if key in mine:
                assert torch.equal(mine[key], theirs[key])
        if "exp_avg_sq.row" in mine:
            assert mine["exp_avg_sq.row"].isfinite().all()
            assert bool(mine["exp_avg_sq.row"].any())
