"""`optstate diff`: what is equal, close and different, across stores and kinds, against torch's own arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import optstate
from adalomo import AdaLomo
from optstate.checkpoint.document.document import KEY
from optstate.checkpoint.operations.compare import measure_deviation
from optstate.recipes import AdamW, AdamW4bit, AdamW8bit
from optstate.weights import Kahan
from tests.cli.test_inspect import as_json, run, table
from tests.support.models import loss_of, mlp


def saved(
    path: Path, build: Callable[..., Any], steps: int = 2, dtype: torch.dtype = torch.float32, **hyper: Any
) -> Path:
    model = mlp(dtype, 600)
    optimizer = build(model.named_parameters(), **hyper)
    for step in range(steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    optstate.save(optimizer, path)
    return path


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adamw") / "a.safetensors", AdamW)


@pytest.fixture(scope="module")
def eight_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("eight") / "b.safetensors", AdamW8bit)


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor], Any], Any]) -> Path:
    with safetensors.safe_open(source, "pt") as file:
        document = json.loads(file.metadata()[KEY])
    tensors = safetensors.torch.load_file(source)
    change(tensors, document)
    safetensors.torch.save_file(tensors, target, {KEY: json.dumps(document)})
    return target


def slot_of(tree: dict[str, Any], slot: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in tree["slots"] if row["slot"] == slot)
    return found


def test_a_file_equals_itself(adamw: Path, eight_bit: Path, tmp_path: Path) -> None:
    for path in (adamw, eight_bit, saved(tmp_path / "k", AdamW4bit, dtype=torch.bfloat16, weights=Kahan())):
        tree = as_json("diff", path, path, "--tensors")
        assert (tree["schema"], tree["equal"], tree["verdict"]) == ("optstate.diff/1", True, "equal")
        assert (tree["differences"], tree["notes"]) == ([], [])
        for row in tree["slots"] + tree["tensors"]:
            assert (row["verdict"], row["max_abs"], row["relative_l2"], row["cosine"]) == ("equal", 0.0, 0.0, 1.0)


def test_figures_are_torchs(adamw: Path, tmp_path: Path) -> None:
    noisy = torch.Generator().manual_seed(0)

    def change(tensors: dict[str, Tensor], document: Any) -> None:
        for name in ("0.weight/exp_avg", "1.bias/exp_avg"):
            tensors[name] += 0.01 * torch.randn(tensors[name].shape, generator=noisy)

    other = changed(adamw, tmp_path / "b", change)
    tree = as_json("diff", adamw, other, "--tensors", code=1)
    a, b = safetensors.torch.load_file(adamw), safetensors.torch.load_file(other)
    keys = [key for key in a if key.endswith("/exp_avg")]
    x, y = (torch.cat([side[key].flatten() for key in keys]).double() for side in (a, b))
    whole = slot_of(tree, "exp_avg")
    assert (whole["verdict"], whole["equal"], whole["different"], whole["parameters"]) == ("different", False, 2, 6)
    assert whole["max_abs"] == (x - y).abs().max().item()
    assert whole["relative_l2"] == pytest.approx(((x - y).norm() / x.norm()).item(), rel=1e-12)
    assert whole["cosine"] == pytest.approx(nn.functional.cosine_similarity(x, y, 0).item(), rel=1e-12)
    assert slot_of(tree, "exp_avg_sq")["verdict"] == "equal"
    one = next(r for r in tree["tensors"] if (r["parameter"], r["slot"]) == ("0.weight", "exp_avg"))
    x, y = (side["0.weight/exp_avg"].double() for side in (a, b))
    assert one["relative_l2"] == pytest.approx(((x - y).norm() / x.norm()).item(), rel=1e-12)
    assert not tree["equal"]
    rows = table(run("diff", adamw, other, code=1), "SLOT")
    assert [(row["SLOT"], row["VERDICT"], row["DIFFERENT"]) for row in rows] == [
        ("exp_avg", "different", "2"),
        ("exp_avg_sq", "equal", "0"),
    ]


def test_the_tolerance_decides_what_is_close(adamw: Path, tmp_path: Path) -> None:
    other = changed(adamw, tmp_path / "b", lambda t, d: t["0.weight/exp_avg_sq"].mul_(1 + 1e-4))
    assert as_json("diff", adamw, other, code=1)["verdict"] == "different"
    tree = as_json("diff", adamw, other, "--tolerance", "2e-4")
    assert (tree["verdict"], tree["equal"], slot_of(tree, "exp_avg_sq")["equal"]) == ("close", False, False)
    assert "verdict\tclose" in run("diff", adamw, other, "--tolerance", "2e-4")
    run("diff", adamw, other, "--tolerance", "-1", code=2)


def test_across_stores(adamw: Path, eight_bit: Path) -> None:
    """What 8-bit blocks hold is decoded: within a few per cent of the fp32 moments of the same run."""
    tree = as_json("diff", adamw, eight_bit, code=1)
    rows = {(row["slot"], *row["stores"]): row for row in tree["slots"]}
    coded = rows["exp_avg", "Full()", "Block8()"]
    assert 1e-4 < coded["relative_l2"] < 0.03
    assert coded["cosine"] > 0.999
    assert coded["parameters"] == 1
    assert rows["exp_avg", "Full()", "Full()"]["parameters"] == 5
    assert as_json("diff", adamw, eight_bit, "--tolerance", "0.05")["verdict"] == "close"


def test_equal_numbers_in_other_stores(tmp_path: Path, eight_bit: Path) -> None:
    from optstate.checkpoint.open_checkpoint import open_checkpoint
    from optstate.checkpoint.operations.read_values import Values

    checkpoint = open_checkpoint(eight_bit)
    values = Values(checkpoint)

    def decode(tensors: dict[str, Tensor], document: Any) -> None:
        for param, tree in zip(checkpoint.document.parameters, document["parameters"], strict=True):
            for slot, record in param.slots.items():
                full = values.read(param, slot).contiguous()
                for key in record.fields.values():
                    del tensors[key]
                tensors[f"{param.name}/{slot}"] = full
                tree["slots"][slot] = {
                    "store": "Full()",
                    "signed": record.signed,
                    "fields": {"": f"{param.name}/{slot}"},
                }

    decoded = changed(eight_bit, tmp_path / "b", decode)
    tree = as_json("diff", eight_bit, decoded)
    assert (tree["verdict"], tree["equal"]) == ("equal values", True)
    assert {row["verdict"] for row in tree["slots"]} == {"equal", "equal values"}


def test_a_zero_is_minus_zero_but_not_the_same_bytes(adamw: Path, tmp_path: Path) -> None:
    zero = changed(adamw, tmp_path / "a", lambda t, d: t["0.bias/exp_avg"].zero_())
    minus = changed(adamw, tmp_path / "b", lambda t, d: t["0.bias/exp_avg"].fill_(-0.0))
    assert as_json("diff", zero, minus)["verdict"] == "equal values"


def test_nan_and_infinity_equal_themselves_only(adamw: Path, tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")

    def odd(values: list[float]) -> Callable[[dict[str, Tensor], Any], Any]:
        return lambda t, d: t["0.bias/exp_avg"][:4].copy_(torch.tensor(values))

    a = changed(adamw, tmp_path / "a", odd([nan, inf, -inf, 1.0]))
    b = changed(adamw, tmp_path / "b", odd([nan, inf, -inf, 2.0]))
    c = changed(adamw, tmp_path / "c", odd([nan, inf, inf, 1.0]))
    assert as_json("diff", a, a)["verdict"] == "equal"
    one = slot_of(as_json("diff", a, b, code=1), "exp_avg")
    assert one["max_abs"] == 1.0
    assert 0 < one["relative_l2"] < 1.1
    lone = slot_of(as_json("diff", a, c, "--tolerance", "1e9", code=1), "exp_avg")
    assert (lone["verdict"], lone["max_abs"], lone["cosine"]) == ("different", None, None)


def test_against_zeros(adamw: Path, tmp_path: Path) -> None:
    zero = changed(adamw, tmp_path / "a", lambda t, d: [x.zero_() for key, x in t.items() if key.endswith("exp_avg")])
    one = slot_of(as_json("diff", zero, adamw, "--tolerance", "1e9", code=1), "exp_avg")
    assert (one["relative_l2"], one["cosine"]) == ("inf", 0.0)
    other = slot_of(as_json("diff", adamw, zero, code=1), "exp_avg")
    assert (other["relative_l2"], other["cosine"]) == (1.0, 0.0)


def test_a_statistic_on_one_side_only(adamw: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "b", AdaLomo)
    tree = as_json("diff", adamw, other, "--tensors", code=1)
    one = next(row for row in tree["slots"] if row["slot"] == "exp_avg")
    assert (one["verdict"], one["stores"], one["max_abs"]) == ("different", ["Full()", "-"], None)
    assert {row["why"] for row in tree["tensors"] if row["slot"] == "exp_avg"} == {"on one side only"}


def test_what_is_said_differently(adamw: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], document: Any) -> None:
        document["groups"][0]["hyper"] |= {"lr": 0.5, "betas": [0.9, 0.999]}  # a list is as good as a tuple
        document["groups"][0]["hyper"]["initial_lr"] = 1.0
        for param in document["parameters"][:2]:
            param["step"] = 7

    tree = as_json("diff", adamw, changed(adamw, tmp_path / "b", change), code=1)
    assert {row["verdict"] for row in tree["slots"]} == {"equal"}
    assert (tree["equal"], tree["verdict"]) == (False, "different")
    assert tree["differences"] == [
        {"where": "step of 0.weight, 0.bias", "a": "2", "b": "7"},
        {"where": "group 0: lr", "a": "0.001", "b": "0.5"},
        {"where": "group 0: initial_lr", "a": "-", "b": "1.0"},
    ]
    text = run("diff", adamw, tmp_path / "b", code=1)
    assert table(text, "WHAT")[1] == {"WHAT": "group 0: lr", "A": "0.001", "B": "0.5"}


def renamed(names: Callable[[int, str], str]) -> Callable[[dict[str, Tensor], Any], Any]:
    def change(tensors: dict[str, Tensor], document: Any) -> None:
        for i, param in enumerate(document["parameters"]):
            old, param["name"] = param["name"], names(i, param["name"])
            for slot in param["slots"].values():
                for field, key in slot["fields"].items():
                    slot["fields"][field] = param["name"] + key.removeprefix(old)
                    tensors[slot["fields"][field]] = tensors.pop(key)
        document["groups"][0]["parameters"] = [param["name"] for param in document["parameters"]]

    return change


def test_places_are_matched_where_one_side_has_no_names(adamw: Path, tmp_path: Path) -> None:
    numbered = changed(adamw, tmp_path / "b", renamed(lambda i, name: f"#{i}"))
    tree = as_json("diff", adamw, numbered)
    assert tree["verdict"] == "equal"
    assert tree["notes"] == ["one side has no names: parameters are matched by their places"]
    assert as_json("diff", numbered, numbered)["notes"] == []


def test_other_names_are_no_match(adamw: Path, tmp_path: Path) -> None:
    other = changed(adamw, tmp_path / "b", renamed(lambda i, name: f"model.{name}" if i < 4 else name))
    tree = as_json("diff", adamw, other, code=1)
    assert tree["differences"] == [
        {
            "where": "parameters on one side only",
            "a": "0.weight, 0.bias, 1.weight and 1 more",
            "b": "model.0.weight, model.0.bias, model.1.weight and 1 more",
        }
    ]
    assert {row["verdict"] for row in tree["slots"]} == {"equal"}


def test_a_file_that_contradicts_itself_is_not_compared(adamw: Path, tmp_path: Path) -> None:
    other = changed(adamw, tmp_path / "b", lambda t, d: t.update({"0.bias/exp_avg": torch.zeros(3)}))
    message = run("diff", adamw, other, code=3)
    assert message.startswith(f"optstate: {other}: 0.bias/exp_avg: it has shape [3]")
    assert message.endswith("; `optstate check` tells all that is wrong with it\n")
    run("diff", adamw, tmp_path / "absent", code=3)


def test_a_deviation_longer_than_a_piece() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1_200_003, generator=generator)
    y = x + 1e-3 * torch.randn(x.shape, generator=generator)
    found, error = measure_deviation(x, y), (x.double() - y.double())
    assert found.max_abs == error.abs().max().item()
    assert found.relative_l2 == pytest.approx((error.norm() / x.double().norm()).item(), rel=1e-12)
    empty = measure_deviation(torch.zeros(0, 3), torch.zeros(0, 3))
    assert (empty.max_abs, empty.relative_l2, empty.cosine) == (0.0, 0.0, 1.0)


def test_a_rate_in_a_tensor_is_the_number_to_its_rounding(adamw: Path, tmp_path: Path) -> None:
    def rate(value: float) -> Callable[[dict[str, Tensor], Any], Any]:
        lr = {"$tensor": {"dtype": "float32", "shape": [], "values": [torch.tensor(value).item()]}}
        return lambda t, d: d["groups"][0]["hyper"].update(lr=lr)

    assert as_json("diff", adamw, changed(adamw, tmp_path / "b", rate(1e-3)))["verdict"] == "equal"
    assert as_json("diff", adamw, changed(adamw, tmp_path / "c", rate(1.001e-3)), code=1)["differences"] != []
