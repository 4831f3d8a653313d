"""State of optimizers that are not known, and state that contradicts itself: refused, with the reason."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer as po
import torch
import torchao.optim

from optstate.checkpoint import CheckpointError
from optstate.checkpoint.document.document import TensorValue
from optstate.checkpoint.open_checkpoint import open_checkpoint
from tests.support.foreign_files import (
    adamw,
    check_document,
    fields,
    identical,
    param,
    read,
    trained,
)
from tests.support.foreign_state import CASES, of_bitsandbytes
from tests.support.paths import DATA

pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


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
