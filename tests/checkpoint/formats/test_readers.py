"""State of other libraries' optimizers beside torch.load: values, stores, meanings, steps."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import adam_mini
import lion_pytorch
import pytest
import pytorch_optimizer as po
import torch
from SM3 import SM3
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.optimization import Adafactor as TransformersAdafactor

import optstate
from optstate import recipes
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import TensorValue
from optstate.checkpoint.open_checkpoint import open_checkpoint
from tests.support.foreign_files import (
    Tiny,
    check_document,
    fields,
    identical,
    param,
    read,
    saved,
    tensor,
    train,
    trained,
)
from tests.support.foreign_state import CASES
from tests.support.models import EveryShape
from tests.support.paths import DATA

pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


# --- libraries that keep a tensor per statistic -------------------------------------------------------------------


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
