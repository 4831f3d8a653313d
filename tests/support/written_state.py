"""Checkpoints written in the layouts of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optstate
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Document, Group, Parameter, SlotRecord
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.files.tensor_bytes import bytes_of, load_tensor
from optstate.checkpoint.files.torch_archive_writer import create_torch
from optstate.checkpoint.formats.registry import write_state
from optstate.checkpoint.open_checkpoint import open_checkpoint

STEPS = 3


def entries_of(checkpoint: Checkpoint) -> dict[str, NewEntry]:
    return {key: NewEntry(key, stored.dtype, stored.shape) for key, stored in checkpoint.tensors.items()}


def tree_of(layout: str, document: Document, entries: Mapping[str, NewEntry]) -> dict[str, Any]:
    return write_state(layout, document, entries).tree


def write(layout: str, checkpoint: Checkpoint, path: Path) -> None:
    tree = tree_of(layout, checkpoint.document, entries_of(checkpoint))
    with create_torch(path, tree) as file:
        for key, stored in checkpoint.tensors.items():
            file.put(key, bytes_of(load_tensor(stored)))


def assert_equal(ours: Any, theirs: Any, place: str = "") -> None:
    """The same types, keys and values, and tensors of the same bits."""
    assert type(ours) is (tuple if type(theirs) is torch.Size else type(theirs)), place
    if isinstance(theirs, Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), place
        if type(theirs) is not Tensor:  # a class of torchao's
            assert_equal(vars(ours), vars(theirs), place)
        else:
            assert torch.equal(ours, theirs), place
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), place
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{place}[{key!r}]")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), place
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(mine, other, f"{place}[{i}]")
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), place


def trained(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = STEPS) -> None:
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


MATRICES = ((96, 64), (128, 64))


SHAPES = (*MATRICES, (128,))


def library(name: str) -> Any:
    return pytest.importorskip(name)


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer.{i}.weight", param) for i, param in enumerate(params)]


def saved(make: Callable[[Any], Any], tmp_path: Path) -> tuple[list[nn.Parameter], Any, Checkpoint]:
    """Parameters in two groups and their optimizer after some steps, and its file."""
    params = tensors(*SHAPES)
    optimizer = make([{"params": named(params)[:2]}, {"params": named(params)[2:], "lr": 3e-3}])
    trained(optimizer, params)
    optstate.save(optimizer, tmp_path / "ours.safetensors")
    return params, optimizer, open_checkpoint(tmp_path / "ours.safetensors")


def document_with(
    slots: Mapping[str, SlotRecord], recipe: str = "adamw", hyper: Mapping[str, Any] | None = None, **parts: Any
) -> tuple[Document, dict[str, NewEntry]]:
    """One matrix of 96 x 64 with these statistics, and fp32 tensors of its shape for all of their fields."""
    given = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01} | dict(hyper or {})
    param = {"name": "w", "shape": (96, 64), "dtype": "float32", "group": 0, "step": 3, "chain": "", "weights": ""}
    param |= {key: parts.pop(key) for key in list(parts) if key in ("chain", "extra", "step", "name", "dtype")}
    document = Document(
        recipe=recipe,
        groups=(Group(hyper=given, parameters=(param["name"],)),),
        parameters=(Parameter(**param, slots=dict(slots)),),
        **parts,
    )
    keys = [key for record in slots.values() for key in record.fields.values()]
    return document, {key: NewEntry(key, "F32", (96, 64)) for key in keys}


def record(of: str, beta: float | None, store: str = "Full()", *fields: str, **more: Any) -> SlotRecord:
    return SlotRecord(
        store=store,
        signed=True,
        fields={field: f"w/{of}.{field}" for field in fields or ("",)},
        of=of,
        beta=beta,
        **more,
    )


ADAM = {"exp_avg": record("gradient", 0.9), "exp_avg_sq": record("square", 0.999)}
