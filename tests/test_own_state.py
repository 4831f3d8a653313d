"""The `state_dict` of this library's optimizers in a file of torch.save: read with its stores, and gone on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optstate
from adalomo import Adafactor, AdaLomo
from optstate import weights
from optstate.checkpoint.conversion import unchanged
from optstate.checkpoint.exporting import export
from optstate.checkpoint.opening import open_checkpoint
from optstate.recipes import CAME, SGD, SM3, AdamFactor, AdamMini, AdamW, AdamW4bit, AdamW8bit, Lion8bit
from tests.models import assert_same, loss_of, mlp, state_of

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
    export(unchanged(source), tmp_path / "opt.safetensors")
    assert open_checkpoint(tmp_path / "opt.safetensors").nbytes == source.nbytes
