"""What is written for other libraries: their own files come back as they were, in the right layout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from adalomo import AdaLomo
from optstate.checkpoint.document.document import Document
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.files.tensor_bytes import load_tensor
from optstate.checkpoint.formats.lerobot import GROUPS
from optstate.checkpoint.formats.registry import LayoutError, choose_format, writable_formats, write_state
from optstate.checkpoint.formats.shared.format import NewFolder
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.operations.plan_conversion import plan_stores
from optstate.checkpoint.operations.plan_recipe import plan_recipe
from optstate.recipes import CAME, SGD, AdamW, AdamW4bit, AdamW8bit, Lion, Lion8bit
from tests.support.paths import DATA
from tests.support.written_state import (
    ADAM,
    SHAPES,
    assert_equal,
    document_with,
    entries_of,
    library,
    record,
    saved,
    tensors,
    trained,
    tree_of,
    write,
)


def notes_of(layout: str, document: Document, entries: Mapping[str, NewEntry]) -> tuple[str, ...]:
    return write_state(layout, document, entries).notes


def new_folder(document: Document, entries: Mapping[str, NewEntry]) -> NewFolder:
    folder = write_state("lerobot", document, entries).folder
    assert folder is not None
    return folder


# --- files of a library, written again ----------------------------------------------------------------------------


SAMPLES = {
    "torch_adamw": "torch",
    "torch_adamw_bf16": "torch",
    "torch_adamw_named": "torch",
    "torch_sgd_momentum": "torch",
    "torch_adafactor": "torch",
    "hf_trainer_adamw": "torch",
    "hf_adafactor": "transformers",
    "bnb_adamw8bit": "bitsandbytes",
    "bnb_adamw8bit_legacy_flat": "bitsandbytes",
    "torchao_adamw8bit": "torchao",
    "po_adalomo": "pytorch_optimizer",
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_file_is_written_as_it_was(sample: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(DATA / sample / "optimizer.pt")
    assert choose_format(checkpoint.document) == checkpoint.kind == SAMPLES[sample]
    write(checkpoint.kind, checkpoint, tmp_path / "again.pt")
    trusted = "torchao" not in sample
    if not trusted:
        pytest.importorskip("torchao")
    again = torch.load(tmp_path / "again.pt", weights_only=trusted)
    assert_equal(again, torch.load(DATA / sample / "optimizer.pt", weights_only=trusted))


Made = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


MORE_SHAPES: dict[str, tuple[tuple[tuple[int, ...], ...], Made]] = {
    "adafactor, convolution": (((8, 4, 3, 3), (5,), ()), lambda p: torch.optim.Adafactor(p)),
    "CAME": (((8, 4, 3), *SHAPES), lambda p: library("pytorch_optimizer").CAME(p)),
    "SM3": (((8, 4, 3), *SHAPES), lambda p: library("pytorch_optimizer").SM3(p, momentum=0.9)),
}
"""What the matrices and vectors of `test_libraries.py` do not show."""


@pytest.mark.parametrize("name", MORE_SHAPES)
def test_tensors_of_other_dimensions_are_written_as_they_were(name: str, tmp_path: Path) -> None:
    shapes, make = MORE_SHAPES[name]
    params = tensors(*shapes)
    optimizer = make(params)
    trained(optimizer, params[:-1])  # the last one has no state
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    checkpoint = open_checkpoint(tmp_path / "saved.pt")
    write(checkpoint.kind, checkpoint, tmp_path / "again.pt")
    assert_equal(torch.load(tmp_path / "again.pt"), torch.load(tmp_path / "saved.pt"))


@pytest.mark.parametrize("name", ["OptimState4bit", "OptimStateFp8"])
def test_torchaos_classes_come_back_with_all_their_attributes(name: str, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.optim")
    make = {"OptimState4bit": torchao.AdamW4bit, "OptimStateFp8": torchao.AdamWFp8}[name]
    params = tensors(*SHAPES, dtype=torch.bfloat16)
    optimizer = make(params)
    for param in params:  # a step would compile
        moments = {key: optimizer._new_buffer(param, key == "exp_avg") for key in ("exp_avg", "exp_avg_sq")}
        for moment in moments.values():
            moment.copy_(torch.rand(param.shape))
        optimizer.state[param] = {"step": torch.tensor(3.0), **moments}
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    write("torchao", open_checkpoint(tmp_path / "saved.pt"), tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=False)
    assert type(again["state"][0]["exp_avg"]).__name__ == name
    assert again["state"][0]["exp_avg"].dtype == torch.bfloat16
    assert_equal(again, torch.load(tmp_path / "saved.pt", weights_only=False))


def test_the_map_of_bitsandbytes_is_one_storage(tmp_path: Path) -> None:
    write("bitsandbytes", open_checkpoint(DATA / "bnb_adamw8bit" / "optimizer.pt"), tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt")
    maps = [state["__bnb_optimizer_quant_state__"].get("qmap1") for state in again["state"].values()]
    assert len({m.untyped_storage().data_ptr() for m in maps if m is not None}) == 1


def test_steps_are_not_one_storage(tmp_path: Path) -> None:
    """An optimizer adds one to each step in place."""
    write("torch", open_checkpoint(DATA / "torch_adamw" / "optimizer.pt"), tmp_path / "again.pt")
    steps = [state["step"] for state in torch.load(tmp_path / "again.pt")["state"].values()]
    assert len({step.untyped_storage().data_ptr() for step in steps}) == len(steps) == 6


# --- LeRobot ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["lerobot_adamw", "torch_adamw/optimizer.pt"])
def test_lerobots_two_files(source: str) -> None:
    """Both samples are of the same run."""
    checkpoint = open_checkpoint(DATA / source)
    made = new_folder(checkpoint.document, entries_of(checkpoint))
    text = (DATA / "lerobot_adamw" / "optimizer_param_groups.json").read_text()
    assert made.texts[GROUPS] == text or (
        source != "lerobot_adamw" and json.loads(made.texts[GROUPS]) == json.loads(text)
    )
    theirs = safetensors.torch.load_file(DATA / "lerobot_adamw" / "optimizer_state.safetensors")
    ours = {name: torch.frombuffer(bytearray(c.data), dtype=torch.float32)[0] for name, c in made.constants.items()}
    for key, entry in made.tensors.items():
        assert (entry.dtype, entry.shape) == ("F32", tuple(theirs[entry.name].shape))
        ours[entry.name] = load_tensor(checkpoint.tensors[key])
    assert_equal(ours, theirs)


def test_lerobot_has_no_names_and_no_numbers(tmp_path: Path) -> None:
    _, _, checkpoint = saved(lambda p: AdamW(p), tmp_path)
    made = new_folder(checkpoint.document, entries_of(checkpoint))
    groups = json.loads(made.texts[GROUPS])
    assert list(groups[0]) == [*torch.optim.AdamW([nn.Parameter(torch.ones(1))]).state_dict()["param_groups"][0]]
    assert set(made.constants) == {f"state/{i}/step" for i in range(3)}


# --- what a person should know ------------------------------------------------------------------------------------


def test_notes_say_what_was_assumed(tmp_path: Path) -> None:
    for nesterov in (False, True):
        _, _, checkpoint = saved(lambda p, n=nesterov: SGD(p, momentum=0.9, nesterov=n), tmp_path)
        group = tree_of("torch", checkpoint.document, entries_of(checkpoint))["param_groups"][0]
        assert group["nesterov"] is nesterov
    document, entries = document_with(ADAM, dtype="bfloat16", clip_grad_norm=1.0)
    cast, clip = notes_of("torch", document, entries)
    assert "bfloat16" in cast
    assert "norm clip of the fused backward pass, 1.0" in clip
    assert notes_of("torch", *document_with(ADAM)) == ()


# --- which layout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (lambda p: AdamW(p), "torch"),
        (lambda p: SGD(p, momentum=0.9), "torch"),
        (lambda p: AdamW8bit(p), "bitsandbytes"),
        (lambda p: AdamW4bit(p), "torchao"),
        (lambda p: Lion(p), "lion-pytorch"),
        (lambda p: Lion8bit(p), "bitsandbytes"),
        (lambda p: CAME(p), "pytorch_optimizer"),
        (lambda p: AdaLomo(p), "pytorch_optimizer"),
    ],
)
def test_the_layout_that_has_recipe_and_stores(make: Any, layout: str, tmp_path: Path) -> None:
    _, _, checkpoint = saved(make, tmp_path)
    assert choose_format(checkpoint.document) == layout
    assert layout in writable_formats()


def test_a_library_is_left_when_it_lacks_the_stores() -> None:
    checkpoint = open_checkpoint(DATA / "torch_adamw" / "optimizer.pt")
    assert choose_format(plan_stores(checkpoint, "block8", {}).document) == "bitsandbytes"
    assert choose_format(plan_stores(checkpoint, "bf16", {}).document) == "torch"
    assert choose_format(plan_recipe(checkpoint, "lion").document) == "lion-pytorch"


@pytest.mark.parametrize(
    ("recipe", "store", "message"),
    [
        ("adafactor", "Factored()", "give --format transformers or --format torch"),
        ("adamw", "Factored()", "no library's file holds adamw in Factored"),
        ("adammini", "Full()", "no library's file holds adammini in Full"),
    ],
)
def test_no_layout_or_several(recipe: str, store: str, message: str) -> None:
    document, _ = document_with({"exp_avg_sq": record("square", None, store)}, recipe)
    with pytest.raises(LayoutError, match=message):
        choose_format(document)


def test_no_torch_is_imported() -> None:
    code = "import sys, optstate.checkpoint.formats.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
