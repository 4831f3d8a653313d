"""Weights in fp32 that mixed precision keeps beside the optimizer's state: they are not read, and that is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optstate
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.recipes import AdamW

NOTE = "weights in fp32 beside the optimizer's state are not read"

State = dict[str, Any]
Wrapped = Callable[[State, list[list[torch.Tensor]]], State]

WITH_COPIES: dict[str, tuple[str, Wrapped]] = {
    "megatron": (
        "fp32_from_fp16_params",
        lambda state, copies: {"iteration": 3, "optimizer": {"optimizer": state, "fp32_from_fp16_params": copies}},
    ),
    "apex": ("fp32_groups_flat", lambda state, copies: {"optimizer_state_dict": state, "fp32_groups_flat": copies[0]}),
    "beside": ("master params", lambda state, copies: {"optimizer": state, "master params": copies}),
    "by name": ("master_params", lambda state, copies: {"optimizer": state, "master_params": {"w": copies[0][0]}}),
    "within": ("fp32_from_fp16", lambda state, copies: {**state, "fp32_from_fp16": copies}),
}
WITHOUT: dict[str, Wrapped] = {
    "alone": lambda state, copies: state,
    "numbers": lambda state, copies: {"optimizer": state, "fp32_from_fp16_params": [], "master_port": 29500},
    "other names": lambda state, copies: {"optimizer": state, "ema": copies},
    "elsewhere": lambda state, copies: {"optimizer": state, "model": {"fp32_head": copies[0][0]}},
}


def saved(wrapped: Wrapped, path: Path) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    torch.save(wrapped(optimizer.state_dict(), [[p.detach().clone() for p in model.parameters()]]), path)
    return model


@pytest.mark.parametrize("name", WITH_COPIES)
def test_copies_that_are_not_read_are_said(name: str, tmp_path: Path) -> None:
    key, wrapped = WITH_COPIES[name]
    model = saved(wrapped, tmp_path / "run.pt")
    notes = [note for note in open_checkpoint(tmp_path / "run.pt").notes if note.startswith(NOTE)]
    assert len(notes) == 1
    assert f"'{key}'" in notes[0]
    with pytest.warns(UserWarning, match=NOTE) as said:
        optstate.load(AdamW(model.named_parameters()), tmp_path / "run.pt")
    assert len(said) == 1


@pytest.mark.parametrize("name", WITHOUT)
def test_nothing_is_said_where_there_are_none(name: str, tmp_path: Path) -> None:
    model = saved(WITHOUT[name], tmp_path / "run.pt")
    assert not [note for note in open_checkpoint(tmp_path / "run.pt").notes if note.startswith(NOTE)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optstate.load(AdamW(model.named_parameters()), tmp_path / "run.pt")
