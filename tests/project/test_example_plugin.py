"""The package in `examples/plugin`, which lives outside the tree: its parts keep the laws, all commands take them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from optstate_cli import app
from torch import nn
from typer.testing import CliRunner

import optstate
from optstate import stores, testing, updates
from optstate.recipes import AdamW
from optstate.stores.registry import parse_store
from tests.support.paths import ROOT
from tests.support.plugins import install

pytestmark = pytest.mark.slow

FOLDER = ROOT / "examples" / "plugin"


@pytest.fixture(autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package as pip would leave it: its folder and its entry points on the import path."""
    with pytest.MonkeyPatch.context() as patch:
        declared = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]["entry-points"]
        install(patch, tmp_path_factory.mktemp("site"), "fixed_point", declared)
        patch.syspath_prepend(str(FOLDER))
        yield


def command(code: int, *args: object) -> str:
    """What a command prints; its exit code must be this one."""
    result = CliRunner().invoke(app, [*map(str, args)])
    assert result.exit_code == code, (result.output, result.stderr)
    return result.stdout + (result.stderr if code else "")


def trained(make: Any, steps: int = 3, seed: int = 0) -> tuple[nn.Module, optstate.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(60, 90), nn.Tanh(), nn.Linear(90, 7))
    optimizer = make(model.named_parameters())
    for step in range(steps):
        x = torch.randn(4, 60, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def adam_with_int16(params: Any) -> optstate.Optimizer:
    return AdamW(params, lr=1e-2, first=parse_store("int16"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "adamw.safetensors"
    optstate.save(trained(lambda params: AdamW(params, lr=1e-2))[1], path)
    return path


def test_the_store_keeps_the_laws() -> None:
    testing.check_store(parse_store("int16"))
    testing.check_store(parse_store("Int16(block=64)"), laws=testing.LAWS_OF_STORES[:5])


def test_it_saves_and_loads_bit_for_bit(tmp_path: Path) -> None:
    _, optimizer = trained(adam_with_int16)
    optstate.save(optimizer, tmp_path / "a.safetensors")
    _, other = trained(adam_with_int16, steps=1, seed=1)
    optstate.load(other, tmp_path / "a.safetensors")
    optstate.save(other, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_commands_inspect_check_convert_both_ways_and_diff(saved: Path, tmp_path: Path) -> None:
    small, back = tmp_path / "small.safetensors", tmp_path / "back.safetensors"
    command(0, "convert", saved, small, "--slot", "exp_avg=int16", "--allow-lossy")
    seen = json.loads(command(0, "inspect", small, "--json"))
    assert {slot["slot"]: slot["store"] for slot in seen["slots"]} == {"exp_avg": "Int16()", "exp_avg_sq": "Full()"}
    assert seen["issues"] == []
    elements = {slot["slot"]: slot["elements"] for slot in seen["slots"]}
    assert elements
    assert json.loads(command(0, "check", small, "--json"))["issues"] == []

    command(0, "convert", small, back, "--to", "fp32", "--allow-lossy")
    told = json.loads(command(0, "diff", small, back, "--json"))
    assert told["equal"]
    told = json.loads(command(1, "diff", saved, small, "--json").partition("\n")[0])
    (first,) = [slot for slot in told["slots"] if slot["slot"] == "exp_avg"]
    assert not first["equal"]
    # Computed by hand from what the store promises: half a unit, 1 / 32767 of the block's largest magnitude, at most.
    assert 0 < first["relative_l2"] < 0.5 / 32767 * 256**0.5


def test_the_numbers_of_a_converted_file_are_whole_units(saved: Path, tmp_path: Path) -> None:
    """Against a computation of its own, with numpy, on the bytes in the file."""
    safetensors = pytest.importorskip("safetensors.numpy")
    import numpy as np

    small = tmp_path / "small.safetensors"
    command(0, "convert", saved, small, "--slot", "exp_avg=int16", "--allow-lossy")
    old, new = safetensors.load_file(saved), safetensors.load_file(small)
    value = old["0.weight/exp_avg"].reshape(-1)
    padded = np.pad(value, (0, -value.size % 256)).reshape(-1, 256)
    unit = np.abs(padded).max(1) / np.float32(32767)
    assert new["0.weight/exp_avg.codes"].dtype == np.int16
    np.testing.assert_array_equal(new["0.weight/exp_avg.unit"], unit)
    np.testing.assert_array_equal(
        new["0.weight/exp_avg.codes"].reshape(-1), np.rint(padded / unit[:, None]).reshape(-1)[: value.size]
    )


def test_what_the_store_refuses_is_refused_by_the_command(saved: Path, tmp_path: Path) -> None:
    said = command(4, "convert", saved, tmp_path / "b.safetensors", "--to", "int16", "--allow-lossy")
    assert "Int16() would round small second moments to zero" in said


@pytest.mark.parametrize("field", ["codes", "unit"])
def test_a_file_whose_tensors_are_not_the_stores_is_found_out(field: str, saved: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    from safetensors import safe_open

    small, wrong = tmp_path / "small.safetensors", tmp_path / "wrong.safetensors"
    command(0, "convert", saved, small, "--slot", "exp_avg=int16", "--allow-lossy")
    with safe_open(small, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.load_file(small)
    key = f"0.weight/exp_avg.{field}"
    tensors[key] = tensors[key].reshape(-1)[:-1].clone()
    safetensors.save_file(tensors, wrong, metadata)
    (issue,) = json.loads(command(1, "check", wrong, "--json").partition("\n")[0])["issues"]
    assert issue["severity"] == "error"
    assert issue["where"] == "0.weight/exp_avg"
    assert f"is kept in Int16(): {field} is" in issue["what"]
    assert f"{field} is" in command(4, "convert", wrong, tmp_path / "c.safetensors", "--to", "fp32", "--allow-lossy")


def test_without_the_package_the_file_is_inspected_and_not_judged(saved: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    command(0, "convert", saved, small, "--slot", "exp_avg=int16", "--allow-lossy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [path for path in sys.path if "site" not in Path(path).name or "packages" in path])
        assert json.loads(command(0, "inspect", small, "--json"))["issues"] == []
        issues = json.loads(command(0, "check", small, "--json"))["issues"]
        assert {issue["severity"] for issue in issues} == {"warning"}
        assert "Int16() cannot be judged here: 'Int16()' is none of AxisMax" in issues[0]["what"]
        said = command(4, "convert", small, tmp_path / "c.safetensors", "--to", "fp32", "--allow-lossy")
        assert "is kept in Int16(), which has no way back to its numbers" in said


def test_it_goes_into_chains_like_any_other() -> None:
    chain = optstate.chain(updates.momentum(parse_store("int16")))
    plan = optstate.Optimizer([("p", nn.Parameter(torch.zeros(100, 60)))], chain).plan()
    assert plan.nbytes == 2 * 6000 + 4 * 24
    with pytest.raises(ValueError, match="second moments"):
        updates.scale_by_rms(parse_store("int16"))
    assert stores.Full() != parse_store("int16")


# --- the format ---------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer_file(tmp_path: Path) -> Path:
    """A file of the trainer, written by hand: Adam's averages of two parameters after five steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((60, 90), (90,))
    state = {
        i: {"step": 5, "m": torch.randn(shape, generator=generator), "v": torch.rand(shape, generator=generator)}
        for i, shape in enumerate(shapes)
    }
    hyper = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "tiny_version": 1}
    group = {**hyper, "params": [0, 1], "param_names": ["a.weight", "a.bias"]}
    path = tmp_path / "tiny.pt"
    torch.save({"state": state, "param_groups": [group]}, path)
    return path


def test_the_format_keeps_the_laws() -> None:
    from fixed_point.trainer_files import FORMAT

    testing.check_format(FORMAT)


def test_commands_take_a_file_of_the_trainer_both_ways(trainer_file: Path, tmp_path: Path) -> None:
    own, back = tmp_path / "own.safetensors", tmp_path / "back.pt"
    seen = json.loads(command(0, "inspect", trainer_file, "--json"))
    assert seen["kind"] == "tinytrainer"
    assert (seen["step"], [slot["slot"] for slot in seen["slots"]]) == (5, ["exp_avg", "exp_avg_sq"])
    assert json.loads(command(0, "check", trainer_file, "--json"))["issues"] == []
    command(0, "convert", trainer_file, own)
    assert json.loads(command(0, "diff", trainer_file, own, "--json"))["equal"]
    command(0, "convert", own, back, "--format", "tinytrainer")
    assert back.read_bytes() != b""
    theirs, made = (torch.load(path, weights_only=True) for path in (trainer_file, back))
    assert made["param_groups"] == theirs["param_groups"]
    for i, kept in theirs["state"].items():
        assert made["state"][i].keys() == kept.keys()
        assert made["state"][i]["step"] == kept["step"]
        assert all(torch.equal(made["state"][i][key], kept[key]) for key in ("m", "v"))
    command(0, "convert", trainer_file, tmp_path / "s.safetensors", "--slot", "exp_avg=int16", "--allow-lossy")


def test_a_run_goes_on_from_a_file_of_the_trainer(trainer_file: Path) -> None:
    params = [("a.weight", nn.Parameter(torch.ones(60, 90))), ("a.bias", nn.Parameter(torch.ones(90)))]
    optimizer = AdamW(params, lr=1.0)
    optstate.load(optimizer, trainer_file)
    theirs = torch.load(trainer_file, weights_only=True)["state"]
    for i, (_, param) in enumerate(params):
        state = optimizer.state[param]
        assert state["step"] == 5
        assert torch.equal(state["exp_avg"], theirs[i]["m"])
        assert torch.equal(state["exp_avg_sq"], theirs[i]["v"])
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_inspect_finds_the_format_without_torch(trainer_file: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        declared = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]["entry-points"]
        install(patch, tmp_path / "packages", "fixed_point", declared)
    code = (
        "import sys\n"
        "from optstate import checkpoint\n"
        "print(checkpoint.summarize(sys.argv[1]).checkpoint.kind, 'torch' in sys.modules)"
    )
    path = os.pathsep.join([str(tmp_path / "packages"), str(FOLDER), *sys.path])
    command_line = [sys.executable, "-c", code, str(trainer_file)]
    done = subprocess.run(command_line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.stdout.split() == ["tinytrainer", "False"], done.stderr


def test_without_the_package_the_file_is_not_taken_for_another_librarys(trainer_file: Path) -> None:
    assert json.loads(command(0, "inspect", trainer_file, "--json"))["kind"] == "tinytrainer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [path for path in sys.path if "site" not in Path(path).name or "packages" in path])
        seen = json.loads(command(0, "inspect", trainer_file, "--json"))
    assert seen["recipe"] is None
    assert seen["kind"] != "tinytrainer"
