"""State of bitsandbytes and torchao beside their own decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torchao.optim
from torch import Tensor

from optstate.checkpoint import CheckpointError
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import SlotRecord, TensorValue
from optstate.checkpoint.formats.shared import codebooks
from optstate.stores.block_codes import LINEAR_4, SIGNED_4, SIGNED_8, UNSIGNED_8
from tests.support.foreign_files import (
    check_document,
    decoded,
    fields,
    identical,
    param,
    read,
    trained,
)
from tests.support.foreign_state import of_bitsandbytes

pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


# --- bitsandbytes -------------------------------------------------------------------------------------------------


EIGHT_BIT: dict[str, tuple[str, str, dict[str, tuple[str, float | None]]]] = {
    "AdamW8bit": ("AdamW8bit", "adamw8bit", {"exp_avg": ("gradient", 0.9), "exp_avg_sq": ("square", 0.999)}),
    "Adam8bit": ("AdamW8bit", "adamw8bit", {"exp_avg": ("gradient", 0.9), "exp_avg_sq": ("square", 0.999)}),
    "PagedAdamW8bit": ("AdamW8bit", "adamw8bit", {"exp_avg": ("gradient", 0.9), "exp_avg_sq": ("square", 0.999)}),
    "LAMB8bit": ("LAMB8bit", "", {"exp_avg": ("gradient", 0.9), "exp_avg_sq": ("square", 0.999)}),
    "Lion8bit": ("Lion8bit", "lion8bit", {"exp_avg": ("gradient", 0.99)}),
    "SGD8bit": ("SGD8bit", "sgdm8bit", {"momentum_buffer": ("update_sum", None)}),
    "LARS8bit": ("LARS8bit", "", {"momentum_buffer": ("", None)}),
    "RMSprop8bit": ("RMSprop8bit", "", {"square_avg": ("square", 0.99)}),
    "Adagrad8bit": ("Adagrad8bit", "", {"sum": ("square_sum", None)}),
}


def flat(tree: Any) -> Any:
    """The layout of bitsandbytes before it nested its state, which its loader still takes."""
    state = {}
    for ident, kept in tree["state"].items():
        inner = kept["__bnb_optimizer_quant_state__"]
        state[ident] = {key: value for key, value in kept.items() if not isinstance(value, dict)} | inner
    return {**tree, "state": state}


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_8_bit_codes_are_read_as_bitsandbytes_reads_them(name: str, nested: bool, tmp_path: Path) -> None:
    tree = of_bitsandbytes(name)
    states = flat(tree)["state"]
    ours = read(tree if nested else flat(tree), tmp_path)
    check_document(ours)
    optimizer, recipe, slots = EIGHT_BIT[name]
    assert (ours.kind, ours.document.source["optimizer"], ours.document.recipe) == ("bitsandbytes", optimizer, recipe)
    assert ours.document.source["nested"] is nested
    assert ours.document.steps == (3,)
    for place, state in states.items():
        assert param(ours, place).slots.keys() == slots.keys()
        for i, (slot, record) in enumerate(param(ours, place).slots.items(), 1):
            assert (record.of, record.beta) == slots[slot]
            if state[f"state{i}"].dtype == torch.float32:
                assert record.store == "Full()"
                assert identical(fields(ours, record)[""], state[f"state{i}"])
                continue
            assert (record.store, record.block) == ("Block8()", 256)
            expected = bnb.functional.dequantize_blockwise(
                state[f"state{i}"], absmax=state[f"absmax{i}"], code=state[f"qmap{i}"], blocksize=256
            )
            assert identical(decoded(ours, record), expected)
    stores = {record.store for p in ours.document.parameters for record in p.slots.values()}
    assert stores == {"Block8()", "Full()"}


def test_maps_are_ours_and_stand_in_the_document_once(tmp_path: Path) -> None:
    ours = read(of_bitsandbytes("AdamW8bit"), tmp_path)
    assert ours.document.codebooks == {book.id: tuple(book.values.tolist()) for book in (SIGNED_8, UNSIGNED_8)}
    slots = param(ours, 0).slots
    assert (slots["exp_avg"].codebook, slots["exp_avg_sq"].codebook) == (SIGNED_8.id, UNSIGNED_8.id)


@pytest.mark.parametrize("book", [SIGNED_8, UNSIGNED_8, SIGNED_4, LINEAR_4], ids=lambda book: book.name)
def test_ids_of_maps_are_those_of_the_stores(book: Any) -> None:
    assert codebooks.codebook_id(tuple(book.values.tolist())) == book.id


def test_a_map_of_its_own_is_called_so(tmp_path: Path) -> None:
    tree = of_bitsandbytes("AdamW8bit")
    inner = tree["state"][0]["__bnb_optimizer_quant_state__"]
    inner["qmap1"] = torch.linspace(-1, 1, 256)
    ours = read(tree, tmp_path)
    book = param(ours, 0).slots["exp_avg"].codebook
    assert book.startswith("map:")
    assert ours.document.codebooks[book] == tuple(inner["qmap1"].tolist())
    assert param(ours, 1).slots["exp_avg"].codebook == SIGNED_8.id


def test_ademamix_keeps_two_averages_in_one_tensor(tmp_path: Path) -> None:
    tree = of_bitsandbytes("AdEMAMix8bit")
    ours = read(tree, tmp_path)
    check_document(ours)
    assert (ours.document.source["optimizer"], ours.document.recipe) == ("AdEMAMix8bit", "")
    for place, state in flat(tree)["state"].items():
        slots = param(ours, place).slots
        assert [slots[s].beta for s in ("exp_avg", "exp_avg_slow", "exp_avg_sq")] == [0.9, 0.9999, 0.999]
        for i, slot in enumerate(("exp_avg", "exp_avg_slow")):
            if state["state1"].dtype == torch.float32:
                assert identical(fields(ours, slots[slot])[""], state["state1"][i])
                continue
            expected = bnb.functional.dequantize_blockwise(
                state["state1"][i], absmax=state["absmax1"][i].clone(), code=state["qmap1"], blocksize=256
            )
            assert identical(decoded(ours, slots[slot]), expected)
            assert slots[slot].store == "Block8()"


@pytest.mark.parametrize("name", ["AdamW32bit", "Lion32bit", "SGD32bit"])
def test_32_bit_states_are_whole(name: str, tmp_path: Path) -> None:
    tree = of_bitsandbytes(name)
    ours = read(tree, tmp_path)
    for place, state in flat(tree)["state"].items():
        for i, record in enumerate(param(ours, place).slots.values(), 1):
            assert record.store == "Full()"
            assert identical(fields(ours, record)[""], state[f"state{i}"])
    assert not ours.document.codebooks


def test_blocks_of_another_size_are_recognised(tmp_path: Path) -> None:
    """bitsandbytes had blocks of 2048 before."""
    tree = of_bitsandbytes("AdamW8bit")
    inner = tree["state"][0]["__bnb_optimizer_quant_state__"]
    inner["absmax1"], inner["absmax2"] = torch.rand(3), torch.rand(3)
    record = param(read(tree, tmp_path), 0).slots["exp_avg"]
    assert (record.store, record.block) == ("Block8(block=2048)", 2048)


def test_one_state_of_no_known_rule_needs_a_name(tmp_path: Path) -> None:
    tree = of_bitsandbytes("Lion8bit")
    for group in tree["param_groups"]:
        group["betas"] = (0.0, 0.99)
    ours = read(tree, tmp_path)
    assert param(ours, 0).slots["state1"].of == ""
    assert ours.document.source["optimizer"] == "unknown"
    assert any("Lion or SGD" in note and "--optimizer" in note for note in ours.notes)
    told = read(tree, tmp_path, optimizer="Lion8bit")
    assert param(told, 0).slots["exp_avg"].of == "gradient"
    with pytest.raises(CheckpointError, match="one statistic.*give Lion or SGD"):
        read(tree, tmp_path, optimizer="AdamW")


def test_lion_is_a_reading_that_is_said(tmp_path: Path) -> None:
    tree = of_bitsandbytes("Lion8bit")
    assert any("SGD with dampening" in note for note in read(tree, tmp_path).notes)
    told = read(tree, tmp_path, optimizer="SGD")
    assert param(told, 0).slots.keys() == {"momentum_buffer"}
    assert told.notes == ()


# --- torchao ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "store", "recipe"),
    [("AdamW8bit", "Block8", "adamw8bit"), ("AdamW4bit", "Block4", "adamw4bit"), ("AdamWFp8", "Float8", "adamw")],
)
@pytest.mark.parametrize("block", [None, 64])
def test_torchaos_moments_are_read_as_it_reads_them(
    name: str, store: str, recipe: str, block: int | None, tmp_path: Path
) -> None:
    options = {} if block is None else {"block_size": block}
    tree = trained(lambda m: getattr(torchao.optim, name)(m.groups(), **options)).state_dict()
    ours = read(tree, tmp_path)
    check_document(ours)
    assert (ours.kind, ours.document.source["optimizer"], ours.document.recipe) == ("torchao", name, recipe)
    assert ours.document.groups[0].hyper["lr"] == TensorValue("float32", (), (torch.tensor(1e-3).item(),))
    words = f"{store}()" if block is None else f"{store}(block={block})"
    for place, state in tree["state"].items():
        own = param(ours, place)
        assert own.step == 3
        for slot in ("exp_avg", "exp_avg_sq"):
            record, theirs = own.slots[slot], state[slot]
            if type(theirs) is Tensor:
                assert identical(fields(ours, record)[""], theirs)
                continue
            assert (record.store, own.shape, own.dtype) == (words, tuple(theirs.shape), "float32")
            found = fields(ours, record)
            assert found["codes"].shape == theirs.codes.shape
            assert identical(as_torchao(ours, record, theirs), theirs.dequantize())
    assert param(ours, 0).slots["exp_avg"].store == words


def as_torchao(checkpoint: Checkpoint, record: SlotRecord, like: Any) -> Tensor:
    """torchao's own class made of the tensors that were found."""
    parts = fields(checkpoint, record)
    if "scale" in parts:
        return type(like)(parts["codes"], parts["scale"], torch.float32).dequantize()
    qmap = torch.tensor(checkpoint.document.codebooks[record.codebook])
    extra = () if like.codes.shape == like.shape else (like.shape,)
    return type(like)(parts["codes"], parts["absmax"], qmap, record.signed, *extra, torch.float32).dequantize()


def test_torchao_does_not_say_whether_decay_is_decoupled(tmp_path: Path) -> None:
    tree = trained(lambda m: torchao.optim.Adam8bit(m.groups())).state_dict()
    assert any("--optimizer Adam8bit" in note for note in read(tree, tmp_path).notes)
    told = read(tree, tmp_path, optimizer="Adam8bit")
    assert (told.document.source["optimizer"], told.document.recipe) == ("Adam8bit", "")
    (note,) = told.notes
    assert "param group 0 has decoupled_weight_decay=False: weight decay is added to the gradient" in note
