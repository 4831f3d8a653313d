"""The `state_dict` of this library's optimizers in a file of torch.save: read with its stores, and gone on from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optstate
from adalomo import Adafactor, AdaLomo
from optstate import weights
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.operations.plan_conversion import plan_copy
from optstate.checkpoint.operations.run_conversion import export
from optstate.recipes import CAME, SGD, SM3, AdamFactor, AdamMini, AdamW, AdamW4bit, AdamW8bit, Lion8bit
from tests.support.models import assert_same, loss_of, mlp, state_of

BUILDS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: AdamW(p),
    "adamw8bit": lambda p: AdamW8bit(p),
    "adamw4bit": lambda p: AdamW4bit(p),
    "adamw4bit rank 1": lambda p: AdamW4bit(p, rank1=True),
    "adamfactor": lambda p: AdamFactor(p),
    "adammini": lambda p: AdamMini(p),
    "adalomo": lambda p: AdaLomo(p),
    "adafactor": lambda p: Adafactor(p, lr=1e-3, beta1=0.9),
    "came": lambda p: CAME(p),
    "sm3": lambda p: SM3(p, momentum=0.9),
    "lion8bit": lambda p: Lion8bit(p),
    "sgd": lambda p: SGD(p, momentum=0.9),
}


def trained(build: Callable[[Any], Any], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    model = mlp(dtype, 600)
    optimizer = build(model.named_parameters())
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("name", BUILDS)
def test_every_statistic_keeps_its_store_and_bytes(name: str, tmp_path: Path) -> None:
    _, optimizer = trained(BUILDS[name])
    torch.save({"model": {}, "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    optstate.save(optimizer, tmp_path / "ours.safetensors")
    found, ours = open_checkpoint(tmp_path / "run.pt"), open_checkpoint(tmp_path / "ours.safetensors")
    for param, own in zip(found.document.parameters, ours.document.parameters, strict=True):
        assert (param.name, param.step) == (own.name, own.step)
        for slot, record in own.slots.items():
            there = param.slots[slot]
            assert (there.store, there.signed, there.block) == (record.store, record.signed, record.block), slot
            assert there.fields == record.fields
            if there.of:
                assert (there.of, there.beta) == (record.of, record.beta)
    assert found.nbytes == ours.nbytes
    assert found.document.groups[0].hyper == ours.document.groups[0].hyper


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adamfactor", "adalomo", "lion8bit", "sgd", "sm3"])
def test_an_optimizer_loads_it(name: str, tmp_path: Path) -> None:
    model, optimizer = trained(BUILDS[name])
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    other = BUILDS[name](model.named_parameters())
    optstate.load(other, tmp_path / "opt.pt")
    assert_same(state_of(other), state_of(optimizer))


def test_what_is_kept_for_the_weight_comes_along(tmp_path: Path) -> None:
    _, optimizer = trained(lambda p: AdamW8bit(p, weights=weights.Split(8)), torch.bfloat16)
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    source = open_checkpoint(tmp_path / "opt.pt")
    assert source.document.parameters[0].slots["weight"].store == "Split(bits=8)"
    export(plan_copy(source), tmp_path / "opt.safetensors")
    assert open_checkpoint(tmp_path / "opt.safetensors").nbytes == source.nbytes


def loaded(build: Callable[[Any], Any], path: Path, given: Callable[[nn.Module], Any], dtype: torch.dtype) -> list[str]:
    """What is said when a new optimizer loads the file."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = build(given(mlp(dtype, 600)))
        said.clear()
        optstate.load(optimizer, path)
    return [str(warning.message) for warning in said]


def named(model: nn.Module) -> Any:
    return model.named_parameters()


def unnamed(model: nn.Module) -> Any:
    return model.parameters()


@pytest.mark.parametrize(("there", "here"), [(named, unnamed), (unnamed, named)])
def test_other_names_round_otherwise_and_that_is_said(there: Any, here: Any, tmp_path: Path) -> None:
    model = mlp(torch.bfloat16, 600)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = AdamW(there(model))
    loss_of(model, 0).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    (said,) = loaded(AdamW, tmp_path / "opt.pt", here, torch.bfloat16)
    assert "rounded at random under the name" in said
    assert not [text for text in loaded(AdamW, tmp_path / "opt.pt", there, torch.bfloat16) if "rounded" in text]


def test_another_way_to_write_weights_needs_consent_as_in_our_files(tmp_path: Path) -> None:
    _, optimizer = trained(AdamW)
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    other = AdamW(mlp(torch.bfloat16, 600).named_parameters())
    with pytest.raises(CheckpointError, match=r"was written by Plain\(\), here it is by StochasticRounding"):
        optstate.load(other, tmp_path / "opt.pt")
    with pytest.warns(UserWarning, match="was written by") as said:
        optstate.load(other, tmp_path / "opt.pt", allow_lossy=True)
    assert len(said) == 1


@pytest.mark.parametrize("build", [AdamW, AdaLomo])
def test_the_norm_that_a_fused_run_clipped_by_is_told(build: Any, tmp_path: Path) -> None:
    model = mlp(torch.float32, 600)
    fused = optstate.fuse_backward(optimizer := AdamW(model.named_parameters()), clip_grad_norm=1.0)
    fused.grad_norm(loss_of(model, 0))
    loss_of(model, 0).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    optstate.save(optimizer, tmp_path / "opt.safetensors")
    for name in ("opt.pt", "opt.safetensors"):
        other = build(mlp(torch.float32, 600).named_parameters())
        with pytest.warns(UserWarning, match="clip_grad_norm=1.0") as said:
            optstate.load(other, tmp_path / name, allow_lossy=True)
        assert len(said) == 1


@pytest.mark.parametrize("odd", [{"weights": 7}, {"weights": {0: 7, "x": "Kahan()"}}, {"clip_grad_norm": "1"}])
def test_a_header_of_odd_values_tells_nothing(odd: dict[str, Any], tmp_path: Path) -> None:
    _, optimizer = trained(AdamW)
    saved = optimizer.state_dict()
    torch.save({**saved, "optstate": {**saved["optstate"], **odd}}, tmp_path / "opt.pt")
    document = open_checkpoint(tmp_path / "opt.pt").document
    assert document.clip_grad_norm is None
    assert document.parameters[0].weights == ("" if "weights" in odd else "Plain()")
