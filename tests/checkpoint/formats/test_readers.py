"""State of other libraries' optimizers beside torch.load: values, stores, meanings, steps, and what is refused."""

from __future__ import annotations

import copy
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import adam_mini
import bitsandbytes as bnb
import came_pytorch
import lion_pytorch
import pytest
import pytorch_optimizer as po
import torch
import torchao.optim
from SM3 import SM3
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.optimization import Adafactor as TransformersAdafactor

import optstate
from optstate import recipes
from optstate.checkpoint import CheckpointError
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import SlotRecord, TensorValue
from optstate.checkpoint.formats.shared import codebooks
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.stores.block_codes import LINEAR_4, SIGNED_4, SIGNED_8, UNSIGNED_8
from tests.support.foreign_files import (
    Tiny,
    adamw,
    check_document,
    decoded,
    fields,
    identical,
    param,
    read,
    saved,
    tensor,
    train,
    trained,
)
from tests.support.models import EveryShape
from tests.support.paths import DATA

pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


# --- libraries that keep a tensor per statistic -------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """slots: ours -> (key of theirs, or keys of rows and columns; what it is of; beta)."""

    build: Callable[[Tiny], Any]
    kind: str
    optimizer: str
    recipe: str
    slots: dict[str, tuple[str | tuple[str, str], str, float | None]]
    vector: dict[str, str] = field(default_factory=dict)
    steps: tuple[int, ...] = (3,)


EXP_AVG = ("exp_avg", "gradient", 0.9)
EXP_AVG_SQ = ("exp_avg_sq", "square", 0.999)
ADAM = {"exp_avg": EXP_AVG, "exp_avg_sq": EXP_AVG_SQ}
HALVES = ("exp_avg_sq_row", "exp_avg_sq_col")
FACTORED = {"exp_avg_sq": (HALVES, "square", None)}
CAME = {
    "exp_avg": ("exp_avg", "update", 0.9),
    "exp_avg_sq": (HALVES, "square", 0.999),
    "exp_avg_res": (("exp_avg_res_row", "exp_avg_res_col"), "distance", 0.9999),
}

CASES = {
    "AdamW": Case(lambda m: torch.optim.AdamW(m.groups()), "torch", "AdamW", "adamw", ADAM),
    "AdamW fused": Case(lambda m: torch.optim.AdamW(m.groups(), fused=True), "torch", "AdamW", "adamw", ADAM),
    "AdamW maximize": Case(lambda m: torch.optim.AdamW(m.groups(), maximize=True), "torch", "AdamW", "", ADAM),
    "Adam": Case(lambda m: torch.optim.Adam(m.groups()), "torch", "Adam", "", ADAM),
    "Adam without decay": Case(lambda m: torch.optim.Adam(m.parameters()), "torch", "Adam", "adamw", ADAM),
    "Adam amsgrad": Case(
        lambda m: torch.optim.Adam(m.groups(), lr=torch.tensor(1e-3), amsgrad=True),
        "torch",
        "Adam",
        "",
        {**ADAM, "max_exp_avg_sq": ("max_exp_avg_sq", "square_max", None)},
    ),
    "SGD": Case(
        lambda m: torch.optim.SGD(m.groups(), lr=0.1, momentum=0.9),
        "torch",
        "SGD",
        "sgd",
        {"momentum_buffer": ("momentum_buffer", "update_sum", None)},
        steps=(),
    ),
    "RMSprop": Case(
        lambda m: torch.optim.RMSprop(m.groups(), alpha=0.98, centered=True, momentum=0.9),
        "torch",
        "RMSprop",
        "",
        {
            "square_avg": ("square_avg", "square", 0.98),
            "grad_avg": ("grad_avg", "gradient", 0.98),
            "momentum_buffer": ("momentum_buffer", "update_sum", None),
        },
    ),
    "RMSprop plain": Case(
        lambda m: torch.optim.RMSprop(m.groups()),
        "torch",
        "RMSprop",
        "",
        {"square_avg": ("square_avg", "square", 0.99)},
    ),
    "Adagrad": Case(
        lambda m: torch.optim.Adagrad(m.groups()), "torch", "Adagrad", "", {"sum": ("sum", "square_sum", None)}
    ),
    "Adafactor": Case(
        lambda m: torch.optim.Adafactor(m.groups()),
        "torch",
        "Adafactor",
        "adafactor",
        {"exp_avg_sq": (("row_var", "col_var"), "square", None)},
        {"exp_avg_sq": "variance"},
    ),
    "Muon": Case(
        lambda m: torch.optim.Muon([m.fc1.weight, m.fc2.weight]),
        "torch",
        "Muon",
        "",
        {"momentum_buffer": ("momentum_buffer", "gradient", 0.95)},
        steps=(),
    ),
    "transformers": Case(
        lambda m: TransformersAdafactor(m.groups(), lr=1e-3, relative_step=False, scale_parameter=False),
        "transformers",
        "Adafactor",
        "adafactor",
        FACTORED,
        {"exp_avg_sq": "exp_avg_sq"},
    ),
    "transformers with momentum": Case(
        lambda m: TransformersAdafactor(m.groups(), beta1=0.8, warmup_init=True),
        "transformers",
        "Adafactor",
        "adafactor",
        {"exp_avg": ("exp_avg", "update", 0.8), **FACTORED},
        {"exp_avg_sq": "exp_avg_sq"},
    ),
    "lion-pytorch": Case(
        lambda m: lion_pytorch.Lion(m.groups()),
        "lion-pytorch",
        "Lion",
        "lion",
        {"exp_avg": ("exp_avg", "gradient", 0.99)},
        steps=(),
    ),
    "came-pytorch": Case(
        lambda m: came_pytorch.CAME(m.groups(), lr=1e-3),
        "came-pytorch",
        "CAME",
        "came",
        CAME,
        {"exp_avg_sq": "exp_avg_sq"},
    ),
    "pytorch_optimizer CAME": Case(
        lambda m: po.CAME(m.groups()), "pytorch_optimizer", "CAME", "came", CAME, {"exp_avg_sq": "exp_avg_sq"}
    ),
    "pytorch_optimizer Adafactor": Case(
        lambda m: po.AdaFactor(m.groups()),
        "pytorch_optimizer",
        "AdaFactor",
        "",
        {"exp_avg": ("exp_avg", "update", 0.9), **FACTORED},
        {"exp_avg_sq": "exp_avg_sq"},
    ),
    "pytorch_optimizer Lion": Case(
        lambda m: po.Lion(m.groups()),
        "pytorch_optimizer",
        "Lion",
        "lion",
        {"exp_avg": ("exp_avg", "gradient", 0.99)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_statistic_is_what_torch_loads(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = saved(trained(case.build).state_dict(), tmp_path)
    theirs, ours = torch.load(path, weights_only=True), open_checkpoint(path)
    check_document(ours)
    assert (ours.kind, ours.certainty, ours.files) == (case.kind, "layout", (str(path),))
    assert (ours.document.source["optimizer"], ours.document.recipe) == (case.optimizer, case.recipe)
    assert ours.document.steps == case.steps
    assert [p.name for p in ours.document.parameters] == [f"#{i}" for i in theirs["state"]]
    for place, state in theirs["state"].items():
        own = param(ours, place)
        assert own.slots.keys() <= case.slots.keys()
        assert len(own.keys) == len(state.keys() - {"step", "RMS"})
        for slot, record in own.slots.items():
            keys, of, beta = case.slots[slot]
            assert (record.of, record.beta) == (of, beta)
            assert record.signed == (of not in ("square", "square_sum", "square_max", "distance"))
            found = fields(ours, record)
            if isinstance(keys, tuple) and keys[0] in state:
                assert record.store == "Factored()"
                assert {k: v.shape for k, v in found.items()} == {"row": own.shape[:1], "col": own.shape[1:]}
                assert torch.equal(found["row"], state[keys[0]].flatten())
                assert torch.equal(found["col"], state[keys[1]].flatten())
            else:
                whole = state[keys if isinstance(keys, str) else case.vector[slot]]
                assert record.store == ("Full(dtype='bfloat16')" if whole.dtype == torch.bfloat16 else "Full()")
                assert identical(found[""], whole)
                assert own.shape == tuple(whole.shape)
    of_matrix = param(ours, 0)
    assert of_matrix.slots.keys() == case.slots.keys()


@pytest.mark.parametrize("name", CASES)
def test_every_hyper_parameter_is_kept_as_it_is(name: str, tmp_path: Path) -> None:
    path = saved(trained(CASES[name].build).state_dict(), tmp_path)
    theirs, ours = torch.load(path, weights_only=True)["param_groups"], open_checkpoint(path).document.groups
    assert len(ours) == len(theirs)
    for group, own in zip(theirs, ours, strict=True):
        assert [f"#{i}" for i in group.pop("params")] == list(own.parameters)
        assert own.hyper.keys() == group.keys()
        for key, value in group.items():
            if isinstance(value, Tensor):
                assert own.hyper[key] == TensorValue("float32", (), (value.item(),))
            else:
                assert own.hyper[key] == value
                assert type(own.hyper[key]) is type(value)


def test_what_is_no_statistic_stays_beside_it(tmp_path: Path) -> None:
    tree = trained(CASES["transformers"].build).state_dict()
    ours = read(tree, tmp_path)
    for place, state in tree["state"].items():
        assert param(ours, place).extra == {"RMS": TensorValue("float32", (), (state["RMS"].item(),))}
    assert ours.document.source["step"] == "int"


def test_bf16_parameters_have_bf16_statistics_in_torch(tmp_path: Path) -> None:
    tree = trained(lambda m: torch.optim.AdamW(m.groups()), torch.bfloat16).state_dict()
    ours = read(tree, tmp_path)
    for place, state in tree["state"].items():
        record = param(ours, place).slots["exp_avg"]
        assert record.store == "Full(dtype='bfloat16')"
        assert identical(fields(ours, record)[""], state["exp_avg"])


def test_names_in_the_groups_are_the_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tiny()
    tree = train(model, torch.optim.AdamW(model.named_parameters())).state_dict()
    ours = read(tree, tmp_path)
    assert [p.name for p in ours.document.parameters] == [name for name, _ in model.named_parameters()]
    assert ours.named
    assert ours.document.source["named"] is True
    assert "param_names" not in ours.document.groups[0].hyper
    assert "fc1.weight/exp_avg" in ours.tensors


def test_ids_that_are_text_are_names(tmp_path: Path) -> None:
    tree = trained(lambda m: torch.optim.AdamW(m.groups())).state_dict()
    names = ["embed.weight", "fc1.weight", "fc2.weight", "fc1.bias", "norm.weight", "norm.bias"]
    tree["state"] = {names[i]: state for i, state in tree["state"].items()}
    for group in tree["param_groups"]:
        group["params"] = [names[i] for i in group["params"]]
    ours = read(tree, tmp_path)
    assert [p.name for p in ours.document.parameters] == names
    assert ours.document.source["keys"] == "names"
    assert torch.equal(fields(ours, param(ours, 4).slots["exp_avg"])[""], tree["state"]["norm.weight"]["exp_avg"])


def test_every_shape_has_state_and_unused_parameters_have_none(tmp_path: Path) -> None:
    model = EveryShape().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    for seed in range(2):
        model(seed).backward()
        optimizer.step()
    tree = optimizer.state_dict()
    ours = read(tree, tmp_path)
    check_document(ours)
    for place, parameter in enumerate(model.parameters()):
        own = param(ours, place)
        if place not in tree["state"]:
            assert (own.step, own.shape, own.slots) == (None, None, {})
            continue
        assert (own.step, own.shape) == (2, tuple(parameter.shape))
        assert identical(fields(ours, own.slots["exp_avg"])[""], tree["state"][place]["exp_avg"])
    assert any(stored.stride is not None for stored in ours.tensors.values())  # that of the convolution


@pytest.mark.parametrize(
    ("build", "recipe"),
    [
        (lambda m: torch.optim.SGD(m.groups(), lr=0.1), "sgd"),
        (lambda m: torch.optim.AdamW(m.groups()), "adamw"),
        (lambda m: lion_pytorch.Lion(m.groups()), "lion"),
        (lambda m: po.CAME(m.groups()), "came"),
        (lambda m: TransformersAdafactor(m.groups()), "adafactor"),
    ],
)
def test_an_optimizer_that_keeps_nothing_yet_is_told_by_its_groups(build: Any, recipe: str, tmp_path: Path) -> None:
    ours = read(build(Tiny()).state_dict(), tmp_path)
    assert ours.document.recipe == recipe
    assert ours.document.steps == ()
    assert not ours.tensors


def test_files_before_torch_2_7_do_not_say_whether_decay_is_decoupled(tmp_path: Path) -> None:
    tree = trained(lambda m: torch.optim.AdamW(m.groups())).state_dict()
    for group in tree["param_groups"]:
        del group["decoupled_weight_decay"]
    ours = read(tree, tmp_path)
    assert ours.document.recipe == "adamw"
    assert any("--optimizer Adam" in note for note in ours.notes)
    told = read(tree, tmp_path, optimizer="adam")
    assert (told.document.source["optimizer"], told.document.recipe) == ("Adam", "")
    (note,) = told.notes
    assert "param group 0 has decoupled_weight_decay=False: weight decay is added to the gradient" in note
    for group in tree["param_groups"]:
        group["weight_decay"] = 0.0
    assert read(tree, tmp_path).notes == ()


@pytest.mark.parametrize("tool", ["torch-SM3", "pytorch_optimizer"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sm3_keeps_maxima_along_both_dimensions(tool: str, momentum: float, tmp_path: Path) -> None:
    kind = SM3 if tool == "torch-SM3" else po.SM3
    tree = trained(lambda m: kind(m.groups(), momentum=momentum)).state_dict()
    ours = read(tree, tmp_path)
    check_document(ours)
    assert (ours.kind, ours.document.recipe, ours.document.steps) == (tool, "sm3", (3,))
    for place, state in tree["state"].items():
        record = param(ours, place).slots["accumulator"]
        found = fields(ours, record)
        assert (record.of, record.beta, record.signed) == ("square_sum", None, False)
        if "accumulator_1" in state:
            assert record.store == "AxisMax()"
            assert torch.equal(found["row"], state["accumulator_0"][:, 0])
            assert torch.equal(found["col"], state["accumulator_1"][0])
        else:
            assert identical(found[""], state["accumulator_0"])
        if momentum:
            buffer = param(ours, place).slots["momentum_buffer"]
            assert (buffer.of, buffer.beta) == ("update", momentum)
            assert identical(fields(ours, buffer)[""], state["momentum_buffer"])


def test_sm3_of_more_dimensions_and_none(tmp_path: Path) -> None:
    model = EveryShape()
    optimizer = po.SM3([model.scalar, model.experts, model.conv])
    model(0).backward()
    optimizer.step()
    tree = optimizer.state_dict()
    ours = read(tree, tmp_path)
    check_document(ours)
    assert [p.shape for p in ours.document.parameters] == [(), (3, 4, 5), (4, 3, 2, 2)]
    found = fields(ours, param(ours, 2).slots["accumulator"])
    for i, name in enumerate(("axis0", "axis1", "row", "col")):
        assert torch.equal(found[name], tree["state"][2][f"accumulator_{i}"].flatten())


def test_adam_mini_keeps_a_mean_per_row_or_one(tmp_path: Path) -> None:
    model = nn.ModuleDict({"Embed": nn.Linear(16, 12), "wq": nn.Linear(16, 16, bias=False), "norm": nn.LayerNorm(12)})
    optimizer = adam_mini.Adam_mini(model.named_parameters(), dim=16, n_heads=4, verbose=False)
    for seed in range(2):
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
        model["norm"](model["Embed"](model["wq"](x))).square().mean().backward()
        optimizer.step()
    tree = optimizer.state_dict()
    ours = read(tree, tmp_path)
    check_document(ours)
    assert (ours.kind, ours.document.recipe, ours.document.steps) == ("adam-mini", "adammini", (2,))
    assert [p.name for p in ours.document.parameters] == [name.lower() for name, _ in model.named_parameters()]
    by_name = {p.name: (p, tree["state"][i]) for i, p in enumerate(ours.document.parameters)}
    stores = {name: p.slots["exp_avg_sq"].store for name, (p, _) in by_name.items()}
    assert stores == {
        "embed.weight": "Grouped(by='row')",
        "embed.bias": "Full()",
        "wq.weight": "Unknown()",  # a mean for every head; how its rows are laid out is not in the file
        "norm.weight": "Grouped(by='tensor')",
        "norm.bias": "Full()",
    }
    for name, (own, state) in by_name.items():
        assert torch.equal(fields(ours, own.slots["exp_avg"])[""], state["m"])
        theirs = state["vmean"] if "vmean" in state else state["v"]
        (second,) = fields(ours, own.slots["exp_avg_sq"]).values()
        assert torch.equal(second.flatten(), theirs.flatten()), name
    assert by_name["wq.weight"][0].shape is None
    assert by_name["embed.weight"][0].extra == {"neuron_per_gpu": 12}


def test_schedulefree_counts_steps_in_its_groups() -> None:
    path = DATA / "schedulefree_adamw" / "optimizer.pt"
    theirs, ours = torch.load(path, weights_only=True), open_checkpoint(path)
    assert (ours.kind, ours.document.source["optimizer"]) == ("schedulefree", "AdamWScheduleFree")
    assert ours.document.steps == (theirs["param_groups"][0]["k"],) == (3,)
    assert ours.document.groups[0].hyper["weight_sum"] == theirs["param_groups"][0]["weight_sum"]
    for place, state in theirs["state"].items():
        for slot in ("z", "exp_avg_sq"):
            assert identical(fields(ours, param(ours, place).slots[slot])[""], state[slot])


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


def of_bitsandbytes(name: str, **more: Any) -> Any:
    if name.startswith(("SGD", "LARS")):
        more = {"lr": 0.1, "momentum": 0.9, **more}
    return trained(lambda m: getattr(bnb.optim, name)(m.groups(), **more)).state_dict()


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


# --- GaLore, AdaLomo ----------------------------------------------------------------------------------------------


@pytest.fixture
def galore(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What torch loads of GaLore's file with a stand-in for its class."""
    module = types.ModuleType("galore_torch.galore_projector")
    projector = type("GaLoreProjector", (), {"__module__": module.__name__})
    module.GaLoreProjector = projector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "galore_torch", types.ModuleType("galore_torch"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return torch.load(DATA / "galore_adamw" / "optimizer.pt", weights_only=False)


def test_galores_projected_moments_and_their_basis(galore: Any) -> None:
    ours = open_checkpoint(DATA / "galore_adamw" / "optimizer.pt")
    check_document(ours)
    assert (ours.kind, ours.document.recipe, ours.document.steps) == ("galore", "", (3,))
    assert [p.shape for p in ours.document.parameters] == [(96, 64), (128,), (128,), (128,), (128, 64), (96, 128)]
    for place, state in galore["state"].items():
        own = param(ours, place)
        for slot in ("exp_avg", "exp_avg_sq"):
            assert identical(fields(ours, own.slots[slot])[""], state[slot])
        if "projector" in state:
            assert own.slots["exp_avg"].store == own.slots["exp_avg_sq"].store == "Projected(rank=8)"
            basis = fields(ours, own.slots["exp_avg"])["basis"]
            assert identical(basis, state["projector"].ortho_matrix)
            back = state["exp_avg"] @ basis if basis.shape[0] == 8 else basis @ state["exp_avg"]
            assert own.shape == tuple(back.shape)
            assert own.extra["projector"]["update_proj_gap"] == 200


def test_adalomos_statistics_are_read_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = po.AdaLOMO(model)
    for step in range(3):
        ids = torch.randint(0, 90, (8,), generator=torch.Generator().manual_seed(step))
        optimizer.fused_backward(F.cross_entropy(model(ids), ids), 1e-3)
    tree = optimizer.state_dict()
    ours = read(tree, tmp_path)
    check_adalomo(ours, tree, "num_steps")
    assert (ours.kind, ours.document.recipe) == ("pytorch_optimizer", "adalomo")
    assert ours.document.groups[0].hyper["eps1"] == 1e-30
    names = [name for name, _ in model.named_parameters()]
    order = tmp_path / "names.txt"
    order.write_text("\n".join(names))
    ordered = read(tree, tmp_path, names=str(order))
    assert [p.name for p in ordered.document.parameters] == names
    check_adalomo(ordered, tree, "num_steps")


def check_adalomo(ours: Checkpoint, tree: Any, step: str) -> None:
    check_document(ours)
    assert ours.document.steps == (int(tree[step]),)
    assert {p.name for p in ours.document.parameters} == {*tree["exp_avg_sq"], *tree["exp_avg_sq_row"]}
    for own in ours.document.parameters:
        record = own.slots["exp_avg_sq"]
        found = fields(ours, record)
        assert (record.of, record.beta) == ("square", None)
        if own.name in tree["exp_avg_sq"]:
            assert identical(found[""], tree["exp_avg_sq"][own.name])
        else:
            assert record.store == "Factored()"
            assert identical(found["row"], tree["exp_avg_sq_row"][own.name])
            assert identical(found["col"], tree["exp_avg_sq_col"][own.name])


def test_lomo_optims_attributes_are_read() -> None:
    path = DATA / "lomo_optim_adalomo" / "attributes.pt"
    ours = open_checkpoint(path)
    check_adalomo(ours, torch.load(path, weights_only=True), "step_num")
    assert ours.kind == "lomo-optim"
    assert any("hyper-parameters" in note for note in ours.notes)


def test_what_lomo_optims_state_dict_loses_is_said() -> None:
    ours = open_checkpoint(DATA / "lomo_optim_adalomo" / "optimizer.pt")
    assert (ours.kind, ours.document.recipe, ours.document.steps) == ("lomo-optim", "adalomo", ())
    assert len(ours.document.parameters) == 6
    assert not ours.tensors
    assert any("exp_avg_sq_row" in note and "state_dict()" in note for note in ours.notes)


# --- optimizers that are not known --------------------------------------------------------------------------------


def test_an_unknown_optimizer_keeps_its_tensors_under_their_own_names(tmp_path: Path) -> None:
    tree = trained(lambda m: po.Adan(m.groups())).state_dict()
    for i, state in tree["state"].items():
        state.update({"product": torch.tensor(0.5), "note": "x", "exp_avg::scales": torch.rand(3) + i})
    ours = read(tree, tmp_path)
    check_document(ours)
    assert (ours.kind, ours.document.source["optimizer"], ours.document.recipe) == ("torch", "unknown", "")
    assert ours.document.steps == (3,)
    assert ours.document.source["spelling"] == {"exp_avg__scales": "exp_avg::scales"}
    for place, state in tree["state"].items():
        own = param(ours, place)
        assert own.extra == {"product": TensorValue("float32", (), (0.5,)), "note": "x"}
        assert len(own.slots) == len(state) - 2
        for slot, record in own.slots.items():
            assert identical(fields(ours, record)[""], state[slot.replace("__", "::")])
            assert (record.of, record.store) == ("", "Unknown()")  # the tensors do not tell the parameter's shape


def test_where_all_tensors_agree_they_tell_the_shape(tmp_path: Path) -> None:
    ours = read(trained(lambda m: torch.optim.Adamax(m.groups())).state_dict(), tmp_path)
    assert param(ours, 0).shape == (96, 64)
    assert {record.store for record in param(ours, 0).slots.values()} == {"Full()"}


def test_nested_state_that_nobody_knows_is_refused() -> None:
    with pytest.raises(CheckpointError, match="parameter 0 has the key 0, a dict: nested state"):
        open_checkpoint(DATA / "heavyball_adamw" / "optimizer.pt")


def test_what_a_document_cannot_hold_is_said(tmp_path: Path) -> None:
    tree = trained(lambda m: torch.optim.AdamW(m.groups())).state_dict()
    tree["param_groups"][0]["momentum_dtype"] = torch.bfloat16
    tree["param_groups"][0]["big"] = torch.zeros(2000)
    tree["others"] = {"a": 1, "b": (2.5, None)}
    tree["ids"] = {1, 2}
    ours = read(tree, tmp_path)
    assert ours.document.extra == {"others": {"a": 1, "b": (2.5, None)}}
    assert "big" not in ours.document.groups[0].hyper
    for left_out in ("momentum_dtype", "big", "ids"):
        assert any(f"'{left_out}' is left out" in note for note in ours.notes)


# --- what contradicts itself --------------------------------------------------------------------------------------


def inner(tree: Any) -> Any:
    return tree["state"][1]["__bnb_optimizer_quant_state__"]


def set_state(place: int, **values: Any) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        for key, value in values.items():
            if value is None:
                del tree["state"][place][key]
            else:
                tree["state"][place][key] = value

    return change


def set_inner(**values: Any) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        for key, value in values.items():
            if value is None:
                del inner(tree)[key]
            else:
                inner(tree)[key] = value

    return change


def set_group(**values: Any) -> Callable[[Any], None]:
    return lambda tree: tree["param_groups"][0].update(values)


OUT_OF_ORDER = torch.linspace(-1, 1, 256)[torch.tensor([0, 2, 1, *range(3, 256)])]
WITH_NAN = torch.linspace(-1, 1, 256).index_fill(0, torch.tensor([7]), math.nan)

BROKEN: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "dangling id": (adamw, lambda t: t["state"].update({99: {}}), "parameter 99, which is in no param group.*6 param"),
    "id twice": (adamw, set_group(params=[0, 1, 3]), "have the parameter 3 twice"),
    "no params": (adamw, lambda t: t["param_groups"][0].pop("params"), r"param_groups\[0\] is not a param group"),
    "names short": (adamw, set_group(param_names=["a", "b"]), r"param_groups\[0\] has 2 param_names for 3 params"),
    "names twice": (adamw, set_group(param_names=["a", "b", "a"]), "two parameters are named 'a'"),
    "state no dict": (adamw, lambda t: t["state"].update({1: [1]}), "state of parameter 1 is a list, not a dict"),
    "shapes": (
        adamw,
        set_state(1, exp_avg_sq=torch.zeros(64, 80)),
        r"'#1': exp_avg_sq has shape \[64, 80\], exp_avg that of a parameter of shape \[80, 64\]",
    ),
    "step NaN": (adamw, set_state(2, step=torch.tensor(math.nan)), "'#2': step is nan: it must be a whole number"),
    "step negative": (adamw, set_state(2, step=-1), "'#2': step is -1"),
    "step too large": (adamw, set_state(2, step=10**400), "'#2': step is 1000.*: it must be a whole number"),
    "key that is no text": (adamw, lambda t: t["state"][1].update({None: 1}), "parameter 1 has the key None, an int"),
    "step half": (adamw, set_state(2, step=1.5), "'#2': step is 1.5"),
    "step many": (adamw, set_state(2, step=torch.zeros(3)), r"'#2': step is a tensor of shape \[3\]"),
    "set": (adamw, set_state(2, exp_avg={1, 2}), "'#2': 'exp_avg' cannot be read: it is a set"),
    "rows alone": (
        lambda: trained(CASES["transformers"].build).state_dict(),
        set_state(0, exp_avg_sq_col=None),
        "'#0': exp_avg_sq_col is missing",
    ),
    "rows of another": (
        lambda: trained(CASES["transformers with momentum"].build).state_dict(),
        set_state(0, exp_avg_sq_row=torch.ones(95)),
        r"'#0': exp_avg_sq has shape \[95, 64\], exp_avg that of a parameter of shape \[96, 64\]",
    ),
    "columns not [1, m]": (
        lambda: trained(CASES["Adafactor"].build).state_dict(),
        set_state(0, col_var=torch.ones(64, 1)),
        r"'#0': row_var has shape \[96, 1\] and col_var \[64, 1\]: they must be",
    ),
    "no absmax": (
        lambda: of_bitsandbytes("AdamW8bit"),
        set_inner(absmax1=None),
        "'#1': state1 has codes without absmax1",
    ),
    "no qmap": (lambda: of_bitsandbytes("AdamW8bit"), set_inner(qmap2=None), "'#1': state2 has codes without.*qmap2"),
    "absmax count": (
        lambda: of_bitsandbytes("AdamW8bit"),
        set_inner(absmax2=torch.ones(19)),
        "'#1': state2 has 19 scales for 5120 codes: blocks of 256 have 20",
    ),
    "qmap short": (
        lambda: of_bitsandbytes("AdamW8bit"),
        set_inner(qmap1=torch.linspace(-1, 1, 255)),
        "'#1': the map of exp_avg has 255 numbers: the map of 256 codes has 256",
    ),
    "qmap unsorted": (
        lambda: of_bitsandbytes("AdamW8bit"),
        set_inner(qmap1=OUT_OF_ORDER),
        "the map of exp_avg is not ascending.* at 1",
    ),
    "qmap NaN": (lambda: of_bitsandbytes("AdamW8bit"), set_inner(qmap1=WITH_NAN), "the map of exp_avg holds nan"),
    "codes not contiguous": (
        lambda: of_bitsandbytes("AdamW8bit"),
        set_inner(state1=torch.zeros(64, 80, dtype=torch.uint8).t()),
        r"'#1': state1 is not contiguous, its strides are \[1, 80\]",
    ),
    "states of two shapes": (
        lambda: of_bitsandbytes("AdamW8bit"),
        set_inner(state1=torch.zeros(64, 80, dtype=torch.uint8)),
        r"'#1': exp_avg_sq has shape \[80, 64\], exp_avg that of a parameter of shape \[64, 80\]",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_contradictions_are_one_line_that_names_the_parameter(name: str, tmp_path: Path) -> None:
    build, change, message = BROKEN[name]
    tree = copy.deepcopy(build())
    change(tree)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tree, tmp_path)
    assert "\n" not in str(caught.value)
    assert not caught.value.refused


def test_scales_of_torchao_must_divide_the_codes(tmp_path: Path) -> None:
    tree = trained(lambda m: torchao.optim.AdamW8bit(m.groups())).state_dict()
    tree["state"][1]["exp_avg"].scale = torch.ones(19)
    with pytest.raises(CheckpointError, match="'#1': exp_avg has 19 scales for 5120 codes"):
        read(tree, tmp_path)


def test_the_name_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    assert read(adamw(), tmp_path, optimizer="adamw").document.recipe == "adamw"
    with pytest.raises(CheckpointError, match=r"state of AdamW \(torch\), not of Lion") as caught:
        read(adamw(), tmp_path, optimizer="Lion")
    assert caught.value.refused


# --- our own state_dict --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [recipes.AdamW8bit, recipes.AdamW4bit])
@pytest.mark.parametrize("says_stores", [True, False], ids=["with stores", "as distributed checkpoints have it"])
def test_blocks_in_rows_are_read_as_our_own_file_has_them(kind: Any, says_stores: bool, tmp_path: Path) -> None:
    """In memory maxima, and codes of four bits, are in rows where these hold whole blocks; in a file they are flat."""
    weight = nn.Parameter(torch.randn(64, 512, generator=torch.Generator().manual_seed(0)))
    optimizer = kind([("w", weight)])
    weight.grad = weight.detach().clone()
    optimizer.step()
    assert optimizer.state[weight]["exp_avg.absmax"].ndim == 2
    optstate.save(optimizer, tmp_path / "own.safetensors")
    tree = optimizer.state_dict()
    if not says_stores:
        del tree["optstate"]
    found, own = read(tree, tmp_path), open_checkpoint(tmp_path / "own.safetensors")
    assert found.tensors.keys() == own.tensors.keys()
    for key, stored in own.tensors.items():
        assert (found.tensors[key].shape, found.tensors[key].dtype) == (stored.shape, stored.dtype)
        assert torch.equal(tensor(found.tensors[key]), tensor(stored))
    slots = [document.parameters[0].slots for document in (found.document, own.document)]
    assert [(s.store, s.block) for s in slots[0].values()] == [(s.store, s.block) for s in slots[1].values()]
