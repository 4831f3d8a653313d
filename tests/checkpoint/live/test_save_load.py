"""optstate.save and optstate.load: bit-exact, strict, the same bytes for the same state, and in little memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from torch import nn

import optstate
from adalomo import Adafactor, AdaLomo, Lomo
from optstate import stores, updates, weights
from optstate.checkpoint.document.document import KEY, Document, DocumentError, Group, Parameter, TensorValue
from optstate.checkpoint.document.document_json import from_json, to_json
from optstate.recipes import CAME, SGD, SM3, AdamFactor, AdamMini, AdamW, AdamW4bit, AdamW8bit, Lion8bit
from tests.support.forks import run_script
from tests.support.models import EveryShape, assert_same, loss_of, mlp, state_of, weights_of

F32, BF16 = torch.float32, torch.bfloat16
WIDE = 600
"""Wide enough for a matrix above the 4096 elements from which on codes are kept."""

Build = Callable[[nn.Module], Any]

TABLE: dict[str, tuple[torch.dtype, Build]] = {
    "adalomo": (F32, lambda m: AdaLomo(m.named_parameters(), lr=1e-2)),
    "adalomo fused": (BF16, lambda m: AdaLomo(m.named_parameters(), lr=1e-2, fused_backward=True)),
    "lomo, no statistics": (F32, lambda m: Lomo(m.named_parameters(), lr=1e-2)),
    "adafactor momentum": (F32, lambda m: Adafactor(m.named_parameters(), lr=1e-2, beta1=0.9)),
    "adamw": (F32, lambda m: AdamW(m.named_parameters(), lr=1e-2)),
    "adamw fp64": (torch.float64, lambda m: AdamW(m.named_parameters(), lr=1e-2)),
    "adamw fp16 kahan": (torch.float16, lambda m: AdamW(m.named_parameters(), lr=1e-2, weights=weights.Kahan())),
    "adamw bf16 split 16": (BF16, lambda m: AdamW(m.named_parameters(), lr=1e-2, weights=weights.Split())),
    "adamw8bit split 8": (BF16, lambda m: AdamW8bit(m.named_parameters(), lr=1e-2, weights=weights.Split(8))),
    "adamw8bit": (F32, lambda m: AdamW8bit(m.named_parameters(), lr=1e-2)),
    "adamw4bit": (F32, lambda m: AdamW4bit(m.named_parameters(), lr=1e-2)),
    "adamw4bit rank 1": (BF16, lambda m: AdamW4bit(m.named_parameters(), lr=1e-2, rank1=True)),
    "lion8bit kahan": (BF16, lambda m: Lion8bit(m.named_parameters(), lr=1e-3, weights=weights.Kahan())),
    "adamfactor": (F32, lambda m: AdamFactor(m.named_parameters(), lr=1e-2)),
    "float8 and stochastic bf16": (
        BF16,
        lambda m: AdamW(m.named_parameters(), lr=1e-2, first=stores.Float8(), second=stores.Full("bfloat16")),
    ),
    "adam-mini": (F32, lambda m: AdamMini(optstate.declare_roles(m), lr=1e-2)),
    "came": (F32, lambda m: CAME(m.named_parameters(), lr=1e-3)),
    "sm3": (F32, lambda m: SM3(m.named_parameters(), lr=1e-2)),
    "sgd momentum, no names": (F32, lambda m: SGD(m.parameters(), lr=1e-2, momentum=0.9)),
    "roles and groups": (
        BF16,
        lambda m: AdamW8bit([{**g, "lr": 1e-3 * (i + 1)} for i, g in enumerate(optstate.declare_roles(m))]),
    ),
    "a route of two chains": (
        F32,
        lambda m: optstate.Optimizer(
            m.named_parameters(),
            optstate.route([("*.bias", updates.momentum())], default=updates.scale_by_rms(stores.Factored())),
            lr=1e-3,
        ),
    ),
    "lr as a tensor": (F32, lambda m: AdamW(m.named_parameters(), lr=torch.tensor(0.1, dtype=torch.float64))),
}


def steps(model: nn.Module, optimizer: Any, scheduler: Any, first: int, count: int = 3) -> None:
    for step in range(first, first + count):
        loss_of(model, step).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def trained(build: Build, dtype: torch.dtype = F32, count: int = 3) -> tuple[nn.Module, Any]:
    model = mlp(dtype, WIDE)
    optimizer = build(model)
    steps(model, optimizer, None, 0, count)
    return model, optimizer


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The same file with another document, written by hand: length, header, data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    document = json.loads(header["__metadata__"][KEY])
    change(document)
    header["__metadata__"][KEY] = json.dumps(document)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return path


class TestResuming:
    @pytest.mark.parametrize("name", TABLE)
    def test_is_bit_exact(self, name: str, tmp_path: Path) -> None:
        dtype, build = TABLE[name]
        file = tmp_path / "opt.safetensors"

        def fresh() -> tuple[nn.Module, Any, Any]:
            model = mlp(dtype, WIDE)
            optimizer = build(model)
            return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

        model, optimizer, scheduler = fresh()
        steps(model, optimizer, scheduler, 0)
        optstate.save(optimizer, file)
        at_save, scheduled = weights_of(model), scheduler.state_dict()
        resumed, resumed_optimizer, resumed_scheduler = fresh()
        resumed.load_state_dict(at_save)
        optstate.load(resumed_optimizer, file)
        resumed_scheduler.load_state_dict(scheduled)
        assert_same(state_of(resumed_optimizer), state_of(optimizer))
        assert_same(groups_of(resumed_optimizer), groups_of(optimizer))
        steps(model, optimizer, scheduler, 3)
        steps(resumed, resumed_optimizer, resumed_scheduler, 3)
        assert_same(weights_of(resumed), weights_of(model))
        assert_same(state_of(resumed_optimizer), state_of(optimizer))

    @pytest.mark.parametrize("recipe", [AdaLomo, AdamW, Adafactor])
    def test_of_every_shape_frozen_and_unused_parameters(self, recipe: Any, tmp_path: Path) -> None:
        def run(model: EveryShape, optimizer: Any, first: int) -> None:
            for step in range(first, first + 3):
                model(step).backward()
                optimizer.step()
                optimizer.zero_grad()

        model = EveryShape(BF16)
        optimizer = recipe(model.named_parameters(), lr=1e-2)
        run(model, optimizer, 0)
        optstate.save(optimizer, tmp_path / "a")
        resumed = EveryShape(BF16)
        resumed.load_state_dict(model.state_dict())
        again = recipe(resumed.named_parameters(), lr=1e-2)
        optstate.load(again, tmp_path / "a")
        run(model, optimizer, 3)
        run(resumed, again, 3)
        assert_same(weights_of(resumed), weights_of(model))
        assert_same(state_of(again), state_of(optimizer))
        assert resumed.frozen not in again.state

    def test_of_tied_weights(self, tmp_path: Path) -> None:
        def build() -> tuple[nn.ModuleDict, Any]:
            torch.manual_seed(0)
            model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
            model["b"].weight = model["a"].weight
            return model, AdamW(model.named_parameters())

        model, optimizer = build()
        model["b"](model["a"](torch.ones(2, 4))).sum().backward()
        optimizer.step()
        optstate.save(optimizer, tmp_path / "a")
        assert set(safetensors.torch.load_file(tmp_path / "a")) == {"a.weight/exp_avg", "a.weight/exp_avg_sq"}
        _, again = build()
        optstate.load(again, tmp_path / "a")
        assert_same(state_of(again), state_of(optimizer))

    def test_with_non_contiguous_state(self, tmp_path: Path) -> None:
        _, optimizer = trained(TABLE["adamw"][1])
        param = optimizer.param_groups[0]["params"][0]
        turned = optimizer.state[param]["exp_avg"].t().contiguous().t()
        assert not turned.is_contiguous()
        optimizer.state[param]["exp_avg"] = turned
        optstate.save(optimizer, tmp_path / "a")
        _, again = trained(TABLE["adamw"][1], count=1)
        own = again.state[again.param_groups[0]["params"][0]]
        own["exp_avg"] = own["exp_avg"].t().contiguous().t()
        optstate.load(again, tmp_path / "a")
        assert_same(state_of(again), state_of(optimizer))

    def test_hyper_parameters_of_every_kind(self, tmp_path: Path) -> None:
        _, optimizer = trained(TABLE["adamw"][1])
        group = optimizer.param_groups[0]
        values = {
            "initial_lr": float("inf"),
            "max_lr": torch.tensor([0.1, 0.2], dtype=BF16),
            "min_lr": [1, (2.5, None, True)],
            "name": "a\x1b[31m/é\ud7ff",
            "max_momentum": {"nested": (1e-300, -0.0)},
        }
        group.update(values)
        optstate.save(optimizer, tmp_path / "a")
        _, again = trained(TABLE["adamw"][1], count=1)
        optstate.load(again, tmp_path / "a")
        loaded = again.param_groups[0]
        assert torch.equal(loaded.pop("max_lr"), values.pop("max_lr"))
        assert {key: loaded[key] for key in values} == values
        assert isinstance(loaded["betas"], tuple)
        assert isinstance(loaded["min_lr"], list)
        assert isinstance(loaded["min_lr"][1], tuple)

    def test_a_fused_clip_that_differs_is_told(self, tmp_path: Path) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters())
        optstate.fuse_backward(optimizer, clip_grad_norm=1.0)
        optstate.save(optimizer, tmp_path / "a")
        with pytest.warns(UserWarning, match="fused with clip_grad_norm=1.0"):
            optstate.load(AdaLomo(mlp().named_parameters()), tmp_path / "a")


class TestTheFile:
    def test_equal_state_gives_equal_bytes_whatever_the_order_it_was_made_in(self, tmp_path: Path) -> None:
        for i in range(2):
            _, optimizer = trained(TABLE["adamw8bit split 8"][1], BF16)
            optimizer.param_groups[0] = dict(sorted(optimizer.param_groups[0].items(), reverse=bool(i)))
            optstate.save(optimizer, tmp_path / str(i))
        assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
        optstate.load(optimizer, tmp_path / "0")
        optstate.save(optimizer, tmp_path / "2")
        assert (tmp_path / "0").read_bytes() == (tmp_path / "2").read_bytes()

    def test_the_library_reads_the_same_tensors(self, tmp_path: Path) -> None:
        model, optimizer = trained(TABLE["adamw8bit split 8"][1], BF16)
        optstate.save(optimizer, tmp_path / "a")
        read = safetensors.torch.load_file(tmp_path / "a")
        expected = {
            f"{name}/{key}": value
            for name, param in model.named_parameters()
            for key, value in optimizer.state[param].items()
            if key != "step"
        }
        assert_same(read, expected)
        assert {"0.weight/exp_avg.codes", "0.weight/exp_avg.absmax", "0.weight/weight.correction"} <= set(read)
        with safetensors.safe_open(tmp_path / "a", "pt") as file:
            assert set(file.metadata()) == {KEY}
            document = json.loads(file.metadata()[KEY])
        slot = next(p for p in document["parameters"] if p["name"] == "0.weight")["slots"]["exp_avg_sq"]
        assert slot["store"] == "Block8()"
        assert slot["block"] == 256
        assert slot["codebook"].startswith("dynamic8_unsigned:")
        assert document["recipe"] == "adamw8bit"

    def test_an_existing_file_is_kept_if_asked(self, tmp_path: Path) -> None:
        _, optimizer = trained(TABLE["adamw"][1])
        optstate.save(optimizer, tmp_path / "a", overwrite=False)
        before = (tmp_path / "a").read_bytes()
        steps(mlp(), optimizer, None, 0, 1)
        with pytest.raises(optstate.CheckpointError) as caught:
            optstate.save(optimizer, tmp_path / "a", overwrite=False)
        assert caught.value.refused
        assert (tmp_path / "a").read_bytes() == before

    @pytest.mark.parametrize("value", [object(), {1: 2}, {"$tuple": 1}, torch.zeros(2000), 1j])
    def test_a_hyper_parameter_without_an_exact_form_is_refused(self, value: Any, tmp_path: Path) -> None:
        _, optimizer = trained(TABLE["adamw"][1])
        optimizer.param_groups[0]["name"] = value
        with pytest.raises(optstate.CheckpointError, match=r"groups\[0\]\.hyper\.name"):
            optstate.save(optimizer, tmp_path / "a")
        assert list(tmp_path.iterdir()) == []

    def test_a_half_made_step_is_not_saved(self, tmp_path: Path) -> None:
        model, optimizer = trained(TABLE["adamw"][1])
        loss_of(model, 9).backward()
        list(model.parameters())[-1].grad[0] = float("nan")
        with pytest.raises(optstate.NonFiniteGradientError):
            optimizer.step()
        with pytest.raises(optstate.InconsistentStateError):
            optstate.save(optimizer, tmp_path / "a")
        assert list(tmp_path.iterdir()) == []

    def test_names_that_would_share_tensors_are_refused(self, tmp_path: Path) -> None:
        a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        optimizer = AdamW([{"params": [("v", a)]}, {"params": [("w", b)]}])
        optimizer.runner.parameters.leaves[a].plan.spec.__dict__["name"] = (
            "w"  # an optimizer refuses such names when it is built
        )
        with pytest.raises(optstate.CheckpointError, match="two parameters are named 'w'"):
            optstate.save(optimizer, tmp_path / "a")


def small(m: nn.Module) -> Any:
    return AdamW8bit(m.named_parameters())


OTHERS: dict[str, tuple[Build, str]] = {
    "recipe": (lambda m: SGD(m.named_parameters(), momentum=0.9), "another recipe"),
    "store": (lambda m: AdamW4bit(m.named_parameters()), "exp_avg was saved in Block8.*kept in Block4"),
    "full store": (lambda m: AdamW(m.named_parameters()), "convert the file"),
    "block": (lambda m: AdamW8bit(m.named_parameters(), block=64), "Block8.*block=64"),
    "weights": (lambda m: AdamW8bit(m.named_parameters(), weights=weights.StochasticRounding(1)), "StochasticRounding"),
    "names": (
        lambda m: AdamW8bit((f"x.{n}", p) for n, p in m.named_parameters()),
        "has '0.weight' where .*'x.0.weight'",
    ),
    "no names": (lambda m: AdamW8bit(m.parameters()), "has '0.weight' where .*'#0'"),
    "order": (lambda m: AdamW8bit(list(m.named_parameters())[::-1]), "its order differs"),
    "fewer": (lambda m: AdamW8bit(list(m.named_parameters())[:-1]), "6 parameters, this optimizer has 5"),
    "groups": (
        lambda m: AdamW8bit([{"params": list(m.named_parameters())[:2]}, {"params": list(m.named_parameters())[2:]}]),
        "1 param groups, this one has 2",
    ),
    "other hyper-parameters": (
        lambda m: optstate.Optimizer(m.named_parameters(), updates.scale_by_adam()),
        "another recipe",
    ),
}


class TestRefusals:
    def refused(self, optimizer: Any, path: Path, match: str) -> optstate.CheckpointError:
        """Loading fails with one line and changes nothing."""
        before = state_of(optimizer), groups_of(optimizer)
        with pytest.raises(optstate.CheckpointError, match=match) as caught:
            optstate.load(optimizer, path)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{path}: ")
        assert_same(state_of(optimizer), before[0])
        assert_same(groups_of(optimizer), before[1])
        return caught.value

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        _, optimizer = trained(small, BF16)
        optstate.save(optimizer, tmp_path / "a")
        return tmp_path / "a"

    @pytest.mark.parametrize("name", OTHERS)
    def test_another_optimizer(self, name: str, file: Path) -> None:
        build, match = OTHERS[name]
        assert self.refused(build(mlp(BF16, WIDE)), file, match).refused

    @pytest.mark.parametrize(
        ("model", "match"),
        [
            (lambda: mlp(F32, WIDE), r"'0.weight' was bfloat16 \(600, 8\) when it was saved, here it is float32"),
            (lambda: mlp(BF16, 601), r"'0.weight' was bfloat16 \(600, 8\) .* \(601, 8\)"),
        ],
    )
    def test_another_model(self, model: Callable[[], nn.Module], match: str, file: Path) -> None:
        assert self.refused(small(model()), file, match).refused

    def test_what_was_frozen_then_and_trains_now(self, tmp_path: Path) -> None:
        model = mlp()
        model[0].weight.requires_grad_(False)
        optstate.save(AdamW(model.named_parameters()), tmp_path / "a")
        self.refused(AdamW(mlp().named_parameters()), tmp_path / "a", "'0.weight', which trains here")

    LIES: ClassVar[dict[str, tuple[Callable[[dict[str, Any]], Any], str]]] = {
        "version": (lambda d: d.update(format_version=2), "format version 2.*upgrade optstate"),
        "version zero": (lambda d: d.update(format_version=0), "format_version is 0"),
        "no parameters": (lambda d: d.pop("parameters"), "parameters is missing"),
        "step": (lambda d: d["parameters"][0].update(step=-1), r"parameters\[0\].step is -1"),
        "step text": (lambda d: d["parameters"][0].update(step="3"), r"parameters\[0\].step is '3'"),
        "step gone": (lambda d: d["parameters"][0].update(step=None), r"parameters\[0\].step is None"),
        "shape": (lambda d: d["parameters"][0].update(shape=[8, 600]), r"'0.weight' was bfloat16 \(8, 600\)"),
        "repeated": (lambda d: d["parameters"].append(d["parameters"][0]), "comes twice"),
        "in no group": (lambda d: d["groups"][0]["parameters"].pop(), "'3.bias' is in one only"),
        "group beyond": (lambda d: d["parameters"][-1].update(group=1), "there are 1 groups"),
        "swapped tensors": (
            lambda d: d["parameters"][0]["slots"]["exp_avg"]["fields"].update(codes="0.weight/exp_avg_sq.codes"),
            "must be '0.weight/exp_avg.codes'",
        ),
        "codebook": (
            lambda d: d["parameters"][0]["slots"]["exp_avg"].update(codebook="dynamic8_signed:0"),
            "codes of dynamic8_signed:0, here of dynamic8_signed:",
        ),
        "slot unsigned": (
            lambda d: d["parameters"][0]["slots"]["exp_avg"].update(signed=False),
            "'0.weight': exp_avg was saved as",
        ),
        "slot gone": (lambda d: d["parameters"][0]["slots"].pop("exp_avg"), "saved with exp_avg_sq, here it keeps"),
        "lr": (lambda d: d["groups"][0]["hyper"].update(lr=-1.0), "lr=-1.0 is out of range"),
        "lr text": (lambda d: d["groups"][0]["hyper"].update(lr="nan"), "lr='nan' is a str"),
        "no lr": (lambda d: d["groups"][0]["hyper"].pop("lr"), "saved without 'lr'"),
        "unknown value": (lambda d: d["groups"][0]["hyper"].update(eps={"$x": 1}), r"groups\[0\].hyper.eps: '\$x'"),
        "tensor": (
            lambda d: d["groups"][0]["hyper"].update(lr={"$tensor": {"dtype": "f", "shape": [9], "values": []}}),
            "0 values for shape",
        ),
        "tensor dtype": (
            lambda d: d["groups"][0]["hyper"].update(lr={"$tensor": {"dtype": "load", "shape": [], "values": [1]}}),
            "a tensor of 'load'",
        ),
    }

    @pytest.mark.parametrize("name", LIES)
    def test_a_document_that_lies(self, name: str, file: Path) -> None:
        change, match = self.LIES[name]
        self.refused(small(mlp(BF16, WIDE)), rewritten(file, change), match)

    def test_what_a_later_version_adds_is_ignored(self, file: Path) -> None:
        def add(document: dict[str, Any]) -> None:
            document["new"] = document["parameters"][0]["new"] = document["groups"][0]["new"] = {"$x": 1}

        optimizer = small(mlp(BF16, WIDE))
        optstate.load(optimizer, rewritten(file, add))
        assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 3

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda t: t.pop("0.weight/exp_avg.codes"), "'0.weight/exp_avg.codes' is missing"),
            (lambda t: t.update({"x": torch.zeros(2)}), "'x' belongs to no statistic"),
            (
                lambda t: t.update({"0.weight/exp_avg.absmax": torch.zeros(3)}),
                r"absmax' is F32 \(3,\), here it is F32 \(19,\)",
            ),
            (
                lambda t: t.update({"0.weight/exp_avg.codes": t["0.weight/exp_avg.codes"].view(torch.int8)}),
                r"codes' is I8 .* here it is U8",
            ),
        ],
    )
    def test_other_tensors_than_the_document_says(
        self, change: Callable[[dict[str, torch.Tensor]], Any], match: str, file: Path
    ) -> None:
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file, metadata)
        error = self.refused(small(mlp(BF16, WIDE)), file, match)
        assert error.refused == ("missing" not in match)  # a file without its tensors is no valid one

    def test_files_that_are_none_of_ours(self, file: Path, tmp_path: Path) -> None:
        optimizer = small(mlp(BF16, WIDE))
        cut = tmp_path / "cut"
        cut.write_bytes(file.read_bytes()[:-1])
        assert not self.refused(optimizer, cut, "truncated").refused
        safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "weights")
        self.refused(optimizer, tmp_path / "weights", "no metadata 'optstate'")
        safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "broken", {KEY: "{"})
        self.refused(optimizer, tmp_path / "broken", "it is not JSON")
        self.refused(optimizer, tmp_path / "absent", "no such file")
        self.refused(optimizer, tmp_path, "folder")

    def test_a_read_that_fails_half_way_stops_the_optimizer(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from optstate.checkpoint.live import load

        model = mlp(BF16, WIDE)
        optimizer, original, calls = small(model), load.read_part_into, []

        def failing(own: torch.Tensor, stored: Any) -> None:
            calls.append(stored)
            if len(calls) == 3:
                raise OSError("input/output error")
            original(own, stored)

        monkeypatch.setattr(load, "read_part_into", failing)
        with pytest.raises(optstate.CheckpointError, match="reading failed half-way: input/output error"):
            optstate.load(optimizer, file)
        loss_of(model, 0).backward()
        with pytest.raises(optstate.InconsistentStateError, match="loading ended at '0.weight'"):
            optimizer.step()
        optstate.load(optimizer, file)
        optimizer.step()


@pytest.mark.parametrize(
    "value", [10**25 + 1, -(10**3000), "half \ud83d of a pair", float("inf"), [2**80, -0.0]], ids=lambda v: repr(v)[:16]
)
def test_what_a_group_says_comes_back_as_it_was(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "opt.safetensors"
    optimizer = AdamW([{"params": [("w", nn.Parameter(torch.ones(4)))], "note": value}])
    optstate.save(optimizer, path)
    fresh = AdamW([{"params": [("w", nn.Parameter(torch.ones(4)))], "note": None}])
    optstate.load(fresh, path)
    assert repr(fresh.param_groups[0]["note"]) == repr(value)


def test_a_model_tells_the_other_names_of_tied_parameters(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    model[1].weight = model[0].weight
    optimizer = AdamW(model.named_parameters())
    optstate.save(optimizer, tmp_path / "plain")
    optstate.save(optimizer, tmp_path / "tied", model=model)
    for name, tied in (("plain", ()), ("tied", ("1.weight",))):
        with safetensors.safe_open(tmp_path / name, "pt") as file:
            (param,) = from_json(file.metadata()[KEY]).parameters
        assert (param.name, param.tied) == ("0.weight", tied)
        optstate.load(optimizer, tmp_path / name)


def test_the_file_says_what_its_codes_and_statistics_are(tmp_path: Path) -> None:
    model = mlp(width=WIDE)
    optimizer = AdamW8bit(model.named_parameters(), betas=(0.8, 0.95))
    optstate.save(optimizer, tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        document = from_json(file.metadata()[KEY])
    slots = document.parameters[0].slots
    assert [(slots[s].of, slots[s].beta) for s in slots] == [("gradient", 0.8), ("square", 0.95)]
    assert {slot.codebook for slot in slots.values()} == document.codebooks.keys()
    from bitsandbytes.functional import create_dynamic_map

    for slot, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        values = torch.tensor(document.codebooks[slots[slot].codebook])
        assert torch.equal(values, create_dynamic_map(signed).float())


class TestDocument:
    def test_reads_back_equal(self) -> None:
        lr = TensorValue("float32", (), (0.1,))
        group = Group(hyper={"lr": lr, "eps": float("inf"), "x": [(1, 2)]}, parameters=("a",), role="head", head_size=4)
        param = Parameter(name="a", shape=(), dtype="float32", group=0, step=None, chain="", weights="", tied=("b",))
        document = Document(
            recipe="",
            groups=(group,),
            parameters=(param,),
            source={"a": 1},
            history=({"from": (1.5,)},),
            clip_grad_norm=1.0,
        )
        assert from_json(to_json(document)) == document
        assert to_json(from_json(to_json(document))) == to_json(document)

    @pytest.mark.parametrize("depth", [40, 800])
    def test_values_nested_deeper_than_python_copies_are_refused_both_ways(self, depth: int) -> None:
        value: Any = 1
        for _ in range(depth):
            value = [value]
        with pytest.raises(DocumentError, match="nested too deeply"):
            to_json(Document(recipe="", groups=(Group(hyper={"a": value}, parameters=()),), parameters=()))
        text = to_json(Document(recipe="", groups=(Group(hyper={"a": 1}, parameters=()),), parameters=()))
        with pytest.raises(DocumentError, match="nested too deeply"):
            from_json(text.replace('"a":1', '"a":' + "[" * depth + "1" + "]" * depth))

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            "null",
            "NaN",
            '{"a":1,"a":2}',
            "[" * 100_000,
            '{"format_version":1.0}',
            "1" * 5000,
            '{"a":NaN}',
        ],
    )
    def test_nonsense_is_one_error(self, text: str) -> None:
        with pytest.raises(DocumentError) as caught:
            from_json(text)
        assert len(str(caught.value)) < 300


MEMORY = """
import sys, torch, optstate, resource
from optstate.checkpoint.live import load, save
from optstate.recipes import AdamW
torch.manual_seed(0)
def build():
    params = [(f"layer{i}", torch.nn.Parameter(torch.empty(640, 4096))) for i in range(10)]
    optimizer = AdamW(params)
    for _, p in params:
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[p][key].uniform_(0, 1)
        optimizer.state[p]["step"] = 7
    return optimizer
def reset():
    open("/proc/self/clear_refs", "w").write("5")
def now():
    text = open("/proc/self/status").read()
    pick = lambda key: int(text.split(key)[1].split()[0]) * 1024
    return pick("VmRSS:"), pick("VmHWM:")
optimizer, path = build(), sys.argv[1]
warm = AdamW([("a", torch.nn.Parameter(torch.ones(64, 64)))])
optstate.save(warm, path); optstate.load(warm, path)
for act in (optstate.save, optstate.load):
    reset(); before = now()[0]
    act(optimizer, path)
    print(now()[1] - before)
print(optimizer.state_nbytes())
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures by Linux's peak counter")
def test_two_hundred_megabytes_pass_through_little_memory(tmp_path: Path) -> None:
    """The largest tensor has 10.5 MB; on the CPU not even that is copied."""
    (tmp_path / "script.py").write_text(MEMORY)
    done = run_script(tmp_path / "script.py", tmp_path / "a")
    saving, loading, state = map(int, done.stdout.split())
    assert state > 200e6
    assert saving < 640 * 4096 * 4
    assert loading < 640 * 4096 * 4
