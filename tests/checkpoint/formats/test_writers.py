"""What is written for other libraries: their own files come back as they were, and they go on from ours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import optstate
from adalomo import Adafactor, AdaLomo
from optstate import stores
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Document, Group, Parameter, SlotRecord, TensorValue
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.files.tensor_bytes import bytes_of, load_tensor
from optstate.checkpoint.files.torch_archive_writer import Constant, create_torch
from optstate.checkpoint.formats.lerobot import GROUPS
from optstate.checkpoint.formats.registry import LayoutError, choose_format, writable_formats, write_state
from optstate.checkpoint.formats.shared.format import NewFolder
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.operations.plan_conversion import Conversion, plan_stores
from optstate.checkpoint.operations.plan_recipe import plan_recipe
from optstate.checkpoint.operations.run_conversion import carry_out
from optstate.recipes import CAME, SGD, SM3, AdamW, AdamW4bit, AdamW8bit, Lion, Lion8bit, SGDM8bit
from tests.support.paths import DATA

STEPS = 3


def entries_of(checkpoint: Checkpoint) -> dict[str, NewEntry]:
    return {key: NewEntry(key, stored.dtype, stored.shape) for key, stored in checkpoint.tensors.items()}


def tree_of(layout: str, document: Document, entries: Mapping[str, NewEntry]) -> dict[str, Any]:
    return write_state(layout, document, entries).tree


def notes_of(layout: str, document: Document, entries: Mapping[str, NewEntry]) -> tuple[str, ...]:
    return write_state(layout, document, entries).notes


def new_folder(document: Document, entries: Mapping[str, NewEntry]) -> NewFolder:
    folder = write_state("lerobot", document, entries).folder
    assert folder is not None
    return folder


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


# --- files of ours, read by libraries -----------------------------------------------------------------------------


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer.{i}.weight", param) for i, param in enumerate(params)]


def saved(make: Callable[[Any], Any], tmp_path: Path) -> tuple[list[nn.Parameter], Any, Checkpoint]:
    """Parameters in two groups and their optimizer after some steps, and its file."""
    params = tensors(*SHAPES)
    optimizer = make([{"params": named(params)[:2]}, {"params": named(params)[2:], "lr": 3e-3}])
    trained(optimizer, params)
    optstate.save(optimizer, tmp_path / "ours.safetensors")
    return params, optimizer, open_checkpoint(tmp_path / "ours.safetensors")


def copies(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The same parameters in the same groups."""
    clones = [nn.Parameter(param.detach().clone()) for param in params]
    return [{"params": clones[:2]}, {"params": clones[2:]}]


def members(groups: list[dict[str, Any]]) -> list[nn.Parameter]:
    return [param for group in groups for param in group["params"]]


def assert_same_steps(ours: Any, theirs: Any, params: list[nn.Parameter], others: list[nn.Parameter]) -> None:
    """Both optimizers move by the same three steps, which are far longer than the tolerance: a few roundings of weights
    up to 4, as one fuses multiplications and additions and the other does not."""
    before = [param.detach().clone() for param in params]
    for _ in range(3):
        for mine, other in zip(params, others, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    for mine, other, was in zip(params, others, before, strict=True):
        assert (mine - was).abs().mean() > 1e-3
        torch.testing.assert_close(other, mine, rtol=1e-6, atol=5e-7)


def transformers_adafactor(params: Any) -> Any:
    return library("transformers").Adafactor(params)


CONTINUED: dict[str, tuple[Callable[[Any], Any], str, Callable[[Any], Any]]] = {
    "adamw": (lambda p: AdamW(p, lr=1e-2, betas=(0.8, 0.95)), "torch", lambda p: torch.optim.AdamW(p)),
    "sgd": (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), "torch", lambda p: torch.optim.SGD(p)),
    "sgd without momentum": (lambda p: SGD(p, lr=0.1), "torch", lambda p: torch.optim.SGD(p)),
    "torch's adafactor": (
        lambda p: Adafactor(p, lr=1e-2, eps=(None, 1e-3), torch_compatible=True, weight_decay=0.1),
        "torch",
        lambda p: torch.optim.Adafactor(p),
    ),
    "adafactor in torch": (lambda p: Adafactor(p, lr=1e-2), "torch", lambda p: torch.optim.Adafactor(p)),
    "adafactor": (lambda p: Adafactor(p, lr=1e-2, weight_decay=0.1), "transformers", transformers_adafactor),
    "adafactor, lr alone": (
        lambda p: Adafactor(p, lr=1e-2, scale_parameter=False, clip_threshold=None),
        "transformers",
        transformers_adafactor,
    ),
    "adafactor, relative": (
        lambda p: Adafactor([{**group, "lr": 1.0} for group in p]),
        "transformers",
        lambda p: library("transformers").Adafactor(p, lr=1.0, relative_step=False),
    ),
    "adafactor, average of steps": (
        lambda p: Adafactor(p, lr=1e-2, beta1=0.9, momentum_before_lr=False),
        "transformers",
        transformers_adafactor,
    ),
    "adalomo": (lambda p: AdaLomo(p, lr=1e-2, weight_decay=0.1), "transformers", transformers_adafactor),
    "lion": (
        lambda p: Lion(p, lr=1e-3, weight_decay=0.1),
        "lion-pytorch",
        lambda p: library("lion_pytorch").Lion(p),
    ),
    "came": (
        lambda p: CAME(p, lr=1e-3, weight_decay=0.1),
        "pytorch_optimizer",
        lambda p: library("pytorch_optimizer").CAME(p),
    ),
    "sm3": (lambda p: SM3(p, lr=0.1), "pytorch_optimizer", lambda p: library("pytorch_optimizer").SM3(p)),
    "sm3 with momentum": (
        lambda p: SM3([{**group, "lr": 1.0} for group in p], momentum=0.9),
        "pytorch_optimizer",
        lambda p: library("pytorch_optimizer").SM3(p),
    ),
    "adamw in bitsandbytes": (
        lambda p: AdamW(p, lr=1e-2),
        "bitsandbytes",
        lambda p: library("bitsandbytes").optim.AdamW32bit(p),
    ),
    "lion in bitsandbytes": (
        lambda p: Lion(p, lr=1e-3, weight_decay=0.1),
        "bitsandbytes",
        lambda p: library("bitsandbytes").optim.Lion32bit(p),
    ),
    "sgd in bitsandbytes": (
        lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        "bitsandbytes",
        lambda p: library("bitsandbytes").optim.SGD32bit(p, lr=0.1, momentum=0.5),
    ),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_the_library_goes_on_as_we_do(name: str, tmp_path: Path) -> None:
    """The hyper-parameters come from the file as well: the library's optimizer is built with others."""
    make, layout, theirs = CONTINUED[name]
    params, optimizer, checkpoint = saved(make, tmp_path)
    write(layout, checkpoint, tmp_path / "theirs.pt")
    groups = copies(params)
    other = theirs(groups)
    own_keys = set(other.param_groups[0])
    other.load_state_dict(torch.load(tmp_path / "theirs.pt"))
    assert {"param_names", *own_keys, "step"} >= set(other.param_groups[0]) >= own_keys
    assert other.param_groups[0]["param_names"] == ["layer.0.weight", "layer.1.weight"]
    assert_same_steps(optimizer, other, params, members(groups))


def test_adalomo_goes_on_in_pytorch_optimizer(tmp_path: Path) -> None:
    """Its state lies beside `state` by the names of the parameters."""
    made = library("pytorch_optimizer")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, param in enumerate(tensors(*SHAPES)):
                self.register_parameter(f"p{i}", param)

    ours, theirs = Model(), Model()
    optimizer = AdaLomo(ours.named_parameters(), lr=1e-2, weight_decay=0.1)
    trained(optimizer, list(ours.parameters()))
    optstate.save(optimizer, tmp_path / "ours.safetensors")
    write("pytorch_optimizer", open_checkpoint(tmp_path / "ours.safetensors"), tmp_path / "theirs.pt")
    theirs.load_state_dict(ours.state_dict())
    other = made.AdaLOMO(theirs, lr=1e-2, weight_decay=0.1)
    other.load_state_dict(torch.load(tmp_path / "theirs.pt"))
    assert other.num_steps == STEPS
    grads = [torch.randn_like(param) for param in ours.parameters()]
    before = [param.detach().clone() for param in ours.parameters()]
    for param, grad in zip(ours.parameters(), grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()
    other.fused_backward(sum((p * g).sum() for p, g in zip(theirs.parameters(), grads, strict=True)), lr=1e-2)
    for mine, theirs_, was in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        assert (mine - was).abs().mean() > 1e-3
        torch.testing.assert_close(theirs_, mine, rtol=1e-6, atol=1e-7)


LOW_BIT: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], dict[str, str]]] = {
    "adamw": (
        lambda p: AdamW8bit(p, lr=1e-2),
        lambda p: library("bitsandbytes").optim.AdamW8bit(p),
        {"exp_avg": "1", "exp_avg_sq": "2"},
    ),
    "lion": (
        lambda p: Lion8bit(p, lr=1e-3),
        lambda p: library("bitsandbytes").optim.Lion8bit(p),
        {"exp_avg": "1"},
    ),
    "sgd": (
        lambda p: SGDM8bit(p, lr=0.1),
        lambda p: library("bitsandbytes").optim.SGD8bit(p, lr=0.1, momentum=0.5),
        {"momentum_buffer": "1"},
    ),
}


@pytest.mark.parametrize("name", LOW_BIT)
def test_bitsandbytes_takes_our_codes(name: str, tmp_path: Path) -> None:
    make, theirs, slots = LOW_BIT[name]
    params, optimizer, checkpoint = saved(make, tmp_path)
    write("bitsandbytes", checkpoint, tmp_path / "theirs.pt")
    groups = copies(params)
    other = theirs(groups)
    other.load_state_dict(torch.load(tmp_path / "theirs.pt"))
    for mine, theirs_ in zip(params, members(groups), strict=True):
        state, wanted = other.state[theirs_], optimizer.state[mine]
        assert state["step"] == STEPS
        for slot, n in slots.items():
            codes = mine.numel() >= 4096
            assert torch.equal(state[f"state{n}"], wanted[f"{slot}.codes" if codes else slot])
            if codes:
                assert torch.equal(state[f"absmax{n}"], wanted[f"{slot}.absmax"])
    before = [param.detach().clone() for param in members(groups)]
    for param in members(groups):
        param.grad = torch.randn_like(param)
    other.step()
    assert all((a - b).abs().mean() > 1e-4 for a, b in zip(members(groups), before, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_takes_our_codes(bits: int, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.optim")
    params, optimizer, checkpoint = saved(lambda p: (AdamW8bit if bits == 8 else AdamW4bit)(p, lr=1e-2), tmp_path)
    assert choose_format(checkpoint.document) == ("bitsandbytes" if bits == 8 else "torchao")
    write("torchao", checkpoint, tmp_path / "theirs.pt")
    groups = copies(params)
    other = (torchao.AdamW8bit if bits == 8 else torchao.AdamW4bit)(groups)
    other.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=False))
    for mine, theirs in zip(params, members(groups), strict=True):
        for slot in ("exp_avg", "exp_avg_sq"):
            fresh, state = other._new_buffer(theirs, slot == "exp_avg"), other.state[theirs][slot]
            assert type(state) is type(fresh)
            assert state.shape == mine.shape
            if type(state) is Tensor:
                continue
            assert {key: type(value) for key, value in vars(state).items() if key != "_shape"} == {
                key: type(value) for key, value in vars(fresh).items() if key != "_shape"
            }
            assert (state.signed, state.block_size) == (fresh.signed, fresh.block_size)
            assert torch.equal(state.qmap, fresh.qmap)
            store = stores.Block8(signed=state.signed) if bits == 8 else stores.Block4(signed=state.signed)
            fields = {field: optimizer.state[mine][f"{slot}.{field}"] for field in ("codes", "absmax")}
            assert torch.equal(state.dequantize(), store.read(fields, mine.shape))
    with torch.compiler.set_stance("force_eager"):
        trained(other, members(groups), steps=1)
    assert all(torch.isfinite(param).all() for param in members(groups))


# --- from one library to another ----------------------------------------------------------------------------------


def carried(conversion: Conversion, layout: str, path: Path) -> dict[str, Any]:
    """The file of a conversion, as torch reads it."""
    tree = tree_of(layout, conversion.document, {entry.name: entry for entry in conversion.entries})
    with create_torch(path, tree) as file:
        carry_out(conversion, lambda key, tensor: file.put(key, bytes_of(tensor)))
    return torch.load(path, weights_only=layout != "torchao")


def trained_by(make: Callable[[Any], Any], path: Path) -> tuple[list[nn.Parameter], Any, Checkpoint]:
    """Parameters and a library's optimizer after some steps, and its file."""
    params = tensors(*SHAPES)
    optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}])
    trained(optimizer, params)
    torch.save(optimizer.state_dict(), path)
    return params, optimizer, open_checkpoint(path)


def test_torchs_adamw_goes_into_bitsandbytes_and_back(tmp_path: Path) -> None:
    bnb = library("bitsandbytes")
    _, _, checkpoint = trained_by(lambda p: torch.optim.AdamW(p, betas=(0.8, 0.9)), tmp_path / "torch.pt")
    made = carried(plan_stores(checkpoint, "block8", {}), "bitsandbytes", tmp_path / "bnb.pt")
    other = bnb.optim.AdamW8bit(copies(tensors(*SHAPES)))
    other.load_state_dict(made)
    assert other.param_groups[1]["lr"] == 3e-3
    assert other.param_groups[0]["betas"] == (0.8, 0.9)
    assert "foreach" not in other.param_groups[0]
    trained(other, members(other.param_groups), steps=1)

    again = carried(plan_stores(open_checkpoint(tmp_path / "bnb.pt"), "fp32", {}), "torch", tmp_path / "again.pt")
    theirs = torch.load(tmp_path / "torch.pt")
    assert again["param_groups"] == theirs["param_groups"]
    for i, state in theirs["state"].items():
        assert list(again["state"][i]) == list(state)
        assert torch.equal(again["state"][i]["step"], state["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert (again["state"][i][key] - state[key]).abs().max() < 0.01 * state[key].abs().max()


def test_codes_of_bitsandbytes_are_torchaos(tmp_path: Path) -> None:
    """Both libraries have the same map, so nothing but the names of the parts changes."""
    pytest.importorskip("torchao")
    write("torchao", open_checkpoint(DATA / "bnb_adamw8bit" / "optimizer.pt"), tmp_path / "torchao.pt")
    bnb = torch.load(DATA / "bnb_adamw8bit" / "optimizer.pt")["state"][1]["__bnb_optimizer_quant_state__"]
    made = torch.load(tmp_path / "torchao.pt", weights_only=False)
    for slot, n in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        moment = made["state"][1][slot]
        parts = (bnb[f"state{n}"], bnb[f"absmax{n}"], bnb[f"qmap{n}"])
        assert all(map(torch.equal, (moment.codes, moment.scale, moment.qmap), parts))
        assert moment.signed is (slot == "exp_avg")
    theirs = torch.load(DATA / "torchao_adamw8bit" / "optimizer.pt", weights_only=False)
    assert made["param_groups"] == theirs["param_groups"]


def test_adafactor_of_torch_and_transformers_is_the_same_state(tmp_path: Path) -> None:
    adafactor = library("transformers").Adafactor
    _, hf, checkpoint = trained_by(
        lambda p: adafactor([{**group, "lr": 1e-3} for group in p], lr=1e-3, relative_step=False), tmp_path / "hf.pt"
    )
    write("torch", checkpoint, tmp_path / "torch.pt")
    params = tensors(*SHAPES)
    for param, trained_one in zip(params, members(hf.param_groups), strict=True):
        param.data.copy_(trained_one)
    other = torch.optim.Adafactor([{"params": params[:2]}, {"params": params[2:]}])
    other.load_state_dict(torch.load(tmp_path / "torch.pt"))
    for param, trained_one in zip(params, members(hf.param_groups), strict=True):
        state, wanted = other.state[param], hf.state[trained_one]
        assert state["step"] == wanted["step"] == STEPS
        if param.ndim == 2:
            assert torch.equal(state["row_var"], wanted["exp_avg_sq_row"][:, None])
            assert torch.equal(state["col_var"], wanted["exp_avg_sq_col"][None])
        else:
            assert torch.equal(state["variance"], wanted["exp_avg_sq"])
    assert_same_steps(hf, other, members(hf.param_groups), params)
    write("transformers", open_checkpoint(tmp_path / "torch.pt"), tmp_path / "again.pt")
    again, first = torch.load(tmp_path / "again.pt"), torch.load(tmp_path / "hf.pt")
    assert [{**group, "eps": None} for group in again["param_groups"]] == [
        {**group, "eps": None} for group in first["param_groups"]
    ]
    assert again["param_groups"][0]["eps"] == pytest.approx((1e-30, 1e-3), rel=1e-12)
    torch.testing.assert_close(
        {i: {**state, "RMS": 0.0} for i, state in again["state"].items()},
        {i: {**state, "RMS": 0.0} for i, state in first["state"].items()},
        rtol=0,
        atol=0,
    )


def test_adamw_becomes_adafactor_without_its_correction(tmp_path: Path) -> None:
    """After three steps of beta2=0.999 the second moment is 0.003 of the mean square that Adafactor has."""
    adafactor = library("transformers").Adafactor
    _, adamw, checkpoint = trained_by(lambda p: torch.optim.AdamW(p), tmp_path / "torch.pt")
    with pytest.raises(LayoutError, match="--recipe adafactor"):
        tree_of("transformers", checkpoint.document, entries_of(checkpoint))
    groups = tuple(replace(g, hyper={**g.hyper, "eps": (1e-30, 1e-3)}) for g in checkpoint.document.groups)
    relabelled = replace(checkpoint.document, recipe="adafactor", groups=groups)
    with pytest.raises(LayoutError, match=r"of='gradient', beta=0.9, where transformers has of='update', beta=None"):
        tree_of("transformers", relabelled, entries_of(checkpoint))
    made = carried(plan_recipe(checkpoint, "adafactor"), "transformers", tmp_path / "hf.pt")
    raw = members(adamw.param_groups)[0]
    mean_square = adamw.state[raw]["exp_avg_sq"] / (1 - 0.999**STEPS)
    torch.testing.assert_close(made["state"][0]["exp_avg_sq_row"], mean_square.mean(-1))
    other = adafactor(copies(tensors(*SHAPES)))
    other.load_state_dict(made)
    trained(other, members(other.param_groups), steps=1)


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


# --- what has no place --------------------------------------------------------------------------------------------


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
BLOCKS = {"block": 256, "codebook": "map:1"}
FACTORED = record("square", None, "Factored()", "row", "col")
EIGHT = record("gradient", 0.9, "Block8()", "codes", "absmax", **BLOCKS)

REFUSED: dict[str, tuple[str, tuple[Document, dict[str, NewEntry]], str]] = {
    "no such layout": (
        "keras",
        document_with(ADAM),
        "no library whose files can be written is called 'keras': one of bitsandbytes, ",
    ),
    "codes in torch": (
        "torch",
        document_with({**ADAM, "exp_avg": EIGHT}),
        "exp_avg of 'w' is in Block8(): torch keeps Full(); convert with --slot exp_avg=fp32",
    ),
    "factors in bitsandbytes": (
        "bitsandbytes",
        document_with({**ADAM, "exp_avg_sq": record("square", 0.999, "Factored()", "row", "col")}),
        "exp_avg_sq of 'w' is in Factored(): bitsandbytes keeps Block8() of 256 elements or Full(); convert with "
        "--slot exp_avg_sq=block8",
    ),
    "one moment in codes": (
        "bitsandbytes",
        document_with({**ADAM, "exp_avg": EIGHT}, codebooks={"map:1": (0.0,) * 256}),
        "'w' has exp_avg in Block8(), exp_avg_sq in Full(): bitsandbytes keeps both in 8 bits or both in fp32",
    ),
    "other blocks": (
        "bitsandbytes",
        document_with({**ADAM, "exp_avg": replace(EIGHT, store="Block8(block=64)", block=64)}),
        "exp_avg of 'w' is in Block8(block=64): bitsandbytes keeps Block8() of 256 elements or Full()",
    ),
    "blocks that end early": (
        "torchao",
        document_with({**ADAM, "exp_avg": replace(EIGHT, store="Block8(block=250)", block=250)}),
        "'w' has 6144 elements: torchao has whole blocks of 250 only; convert with --slot exp_avg=fp32",
    ),
    "maxima of 8-bit floats": (
        "torchao",
        document_with({**ADAM, "exp_avg": replace(EIGHT, store="Float8()", codebook="")}),
        "torchao has them divided by 448",
    ),
    "codes without their map": (
        "torchao",
        document_with({**ADAM, "exp_avg": EIGHT}),
        "the values of the codes 'map:1' are not in the file",
    ),
    "a matrix in full": (
        "transformers",
        document_with({"exp_avg_sq": record("square", None)}, "adafactor"),
        "exp_avg_sq of 'w' is in Full(): transformers keeps row and column means of matrices; convert with --slot "
        "exp_avg_sq=factored",
    ),
    "another rule": ("lion-pytorch", document_with(ADAM), "the state is of the recipe 'adamw': lion-pytorch does not"),
    "no recipe": ("torch", document_with(ADAM, ""), "the state is of a chain without a name: torch does not have it"),
    "another beta": (
        "torch",
        document_with(ADAM, hyper={"betas": (0.9, 0.99)}),
        "what exp_avg_sq of 'w' averages is of='square', beta=0.999, where torch has of='square', beta=0.99; convert",
    ),
    "an unknown meaning": (
        "torch",
        document_with({**ADAM, "exp_avg": record("", None)}),
        "what exp_avg of 'w' averages is unknown",
    ),
    "a moment that is missing": (
        "torch",
        document_with({"exp_avg": ADAM["exp_avg"]}),
        "'w' has no exp_avg_sq, which torch needs; convert with --recipe adamw",
    ),
    "no steps": ("torch", document_with(ADAM, step=None), "the file does not say how many steps 'w' was updated"),
    "what is kept for weights": (
        "torch",
        document_with({**ADAM, "weight": record("", None, "Kahan()", "low")}),
        "weight of 'w' (Kahan()) has no place in torch; write a file of optstate's own",
    ),
    "a copy of weights": (
        "torch",
        document_with({**ADAM, "master": record("", None)}),
        "master of 'w' (Full()) has no place in torch; leave it out with --slot master=drop",
    ),
    "a value of a parameter": (
        "torch",
        document_with(ADAM, extra={"mu_product": 0.5}),
        "'w' has mu_product, which torch has no place for",
    ),
    "maximize": (
        "bitsandbytes",
        document_with(ADAM, hyper={"maximize": True}),
        "param group 0 has maximize=True, which bitsandbytes cannot express: it does as with maximize=False",
    ),
    "an L2 penalty": (
        "bitsandbytes",
        document_with(ADAM, hyper={"decoupled_weight_decay": False}),
        "param group 0 has decoupled_weight_decay=False, which bitsandbytes cannot express",
    ),
    "no learning rate": (
        "lion-pytorch",
        (
            Document(recipe="lion", groups=(Group(hyper={}, parameters=()),), parameters=()),
            {},
        ),
        "param group 0 has no 'lr', which lion-pytorch needs",
    ),
    "parameters without names": (
        "pytorch_optimizer",
        document_with({"exp_avg_sq": FACTORED}, "adalomo", name="#0"),
        "the parameter #0 has no name",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_named(name: str) -> None:
    layout, (document, entries), message = REFUSED[name]
    if name == "parameters without names":
        entries = {key: NewEntry(key, "F32", (64,)) for key in entries}
    with pytest.raises(LayoutError) as caught:
        tree_of(layout, document, entries)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ADAFACTOR_CHAIN = "scale_by_rms > clip_by_rms > add_decayed_weights > scale_by_param_rms"
RULES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "no scale": ("torch", {}, "scale_by_rms > clip_by_rms > add_decayed_weights", "scale_parameter=False"),
    "scaled decay": ("torch", {}, ADAFACTOR_CHAIN, "weight_decay=0.01, scaled by the parameter's RMS"),
    "decay by lr alone": (
        "transformers",
        {},
        "clip_by_rms > scale_by_param_rms > scale_by_schedule(cap_by_inverse_root) > add_decayed_weights",
        "weight_decay=0.01, which acts by lr alone",
    ),
    "relative": (
        "torch",
        {"lr": 1.0},
        f"{ADAFACTOR_CHAIN} > scale_by_schedule(relative_step_size)",
        "a relative step size",
    ),
    "a factor": (
        "transformers",
        {},
        f"{ADAFACTOR_CHAIN} > scale_by_schedule(relative_step_size)",
        "lr=0.001 as a factor",
    ),
    "clamped gradients": ("transformers", {"clip_grad_value": 1.0}, ADAFACTOR_CHAIN, "clip_grad_value=1.0"),
}


@pytest.mark.parametrize("name", RULES)
def test_another_rule_of_adafactor_is_refused(name: str) -> None:
    layout, hyper, chain, message = RULES[name]
    hyper = {"eps": (1e-30, 1e-3), "decay_rate": -0.8, "clip_threshold": 1.0} | hyper
    document, _ = document_with({"exp_avg_sq": FACTORED}, "adafactor", hyper, chain=chain)
    entries = {key: NewEntry(key, "F32", (64,)) for key in FACTORED.fields.values()}
    with pytest.raises(LayoutError, match=re.escape(f"param group 0 has {message}")):
        tree_of(layout, document, entries)


def test_averages_of_updates_are_no_averages_of_steps(tmp_path: Path) -> None:
    """transformers multiplies by the learning rate before it averages: the same numbers would be 100 times too long."""
    _, _, checkpoint = saved(lambda p: Adafactor(p, lr=1e-2, beta1=0.9), tmp_path)
    with pytest.raises(LayoutError, match=r"exp_avg of 'layer.0.weight' averages updates, .* finished steps"):
        tree_of("transformers", checkpoint.document, entries_of(checkpoint))


def test_values_beside_the_state_stay_or_are_named() -> None:
    document, entries = document_with(ADAM, source={"kind": "torch", "optimizer": "AdamW", "named": False})
    document = replace(document, extra={"epoch": 3, "scale": TensorValue("bfloat16", (2,), (0.5, -2.0))})
    tree = tree_of("torch", document, entries)
    assert tree["epoch"] == 3
    assert tree["scale"] == Constant("BF16", (2,), bytes_of(torch.tensor([0.5, -2.0]).bfloat16()).tobytes())
    with pytest.raises(LayoutError, match="epoch, scale of the file: bitsandbytes has no place for it"):
        tree_of("bitsandbytes", document, entries)


def test_a_users_own_hyper_parameters_stay() -> None:
    document, entries = document_with(ADAM, hyper={"initial_lr": 5e-5, "name": "decay", "foreach": True})
    assert tree_of("bitsandbytes", document, entries)["param_groups"][0] == {
        "param_names": ["w"],
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "alpha": 0.0,
        "t_alpha": None,
        "t_beta3": None,
        "initial_lr": 5e-5,
        "name": "decay",
        "params": [0],
    }


def test_a_parameter_without_state_has_no_entry(tmp_path: Path) -> None:
    params = tensors(*SHAPES)
    params[1].requires_grad_(False)
    optimizer = AdamW(named(params))
    trained(optimizer, [params[0], params[2]])
    optstate.save(optimizer, tmp_path / "ours.safetensors")
    checkpoint = open_checkpoint(tmp_path / "ours.safetensors")
    tree = tree_of("torch", checkpoint.document, entries_of(checkpoint))
    assert list(tree["state"]) == [0, 2]
    assert tree["param_groups"][0]["params"] == [0, 1, 2]


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
