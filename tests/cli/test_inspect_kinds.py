"""`inspect`, `check` and `diff` on checkpoints of every kind, and on files that are none or would do harm."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from optstate_cli import app
from torch import Tensor, nn
from typer.testing import CliRunner

import optstate
from optstate.recipes import AdamW
from tests.cli.test_inspect import as_json, run, table
from tests.support.models import loss_of, mlp
from tests.support.paths import DATA

WIDTH = 600


def trained(build: Any, steps: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    model = mlp(dtype, WIDTH)
    optimizer = build(model)
    for step in range(steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def torch_file(folder: Path, build: Any, **options: Any) -> Path:
    torch.save(trained(build, **options).state_dict(), folder / "optimizer.pt")
    return folder / "optimizer.pt"


TORCH: dict[str, tuple[Any, str, dict[str, tuple[str, int]]]] = {
    "AdamW": (
        lambda m: torch.optim.AdamW(m.parameters()),
        "adamw",
        {"exp_avg": ("Full()", 4 * 9004), "exp_avg_sq": ("Full()", 4 * 9004)},
    ),
    "AdamW in bf16": (
        lambda m: torch.optim.AdamW(m.parameters()),
        "adamw",
        {"exp_avg": ("Full(dtype='bfloat16')", 2 * 9004), "exp_avg_sq": ("Full(dtype='bfloat16')", 2 * 9004)},
    ),
    "SGD": (lambda m: torch.optim.SGD(m.parameters(), momentum=0.9), "sgd", {"momentum_buffer": ("Full()", 4 * 9004)}),
    "RMSprop": (lambda m: torch.optim.RMSprop(m.parameters()), "", {"square_avg": ("Full()", 4 * 9004)}),
}


@pytest.mark.parametrize("name", TORCH)
def test_files_of_torch(name: str, tmp_path: Path) -> None:
    build, recipe, slots = TORCH[name]
    path = torch_file(tmp_path, build, dtype=torch.bfloat16 if "bf16" in name else torch.float32)
    tree = as_json("inspect", path, "--tensors")
    assert (tree["kind"], tree["certainty"]) == ("torch", "layout")
    assert (tree["looks_like"], tree["recipe"]) == (name.split()[0], recipe or None)
    assert (tree["step"], tree["parameters"]) == (None if name == "SGD" else 3, 6)  # torch's SGD does not count
    assert {row["slot"]: (row["store"], row["bytes"]) for row in tree["slots"]} == slots
    assert tree["fp32_adamw_bytes"] == 8 * 9004
    read = torch.load(path)["state"]
    shapes = {(row["parameter"], row["slot"]): row["shape"] for row in tree["tensors"]}
    for i, state in read.items():
        for slot, value in state.items():
            if isinstance(value, Tensor) and slot != "step":
                assert shapes[f"#{i}", slot] == list(value.shape)
    prices = {row["recipe"]: row["bytes"] for row in tree["recipes"]}
    assert prices["adamw8bit"] == optstate.recipes.AdamW8bit(mlp(width=WIDTH).parameters()).plan().nbytes
    assert as_json("check", path) == {"schema": "optstate.check/1", "path": str(path), "ok": True, "issues": []}
    assert as_json("diff", path, path)["verdict"] == "equal"


def test_text(tmp_path: Path) -> None:
    path = torch_file(tmp_path, TORCH["AdamW"][0])
    text = run("inspect", path)
    assert text.split("\n\n")[0].splitlines() == [
        f"file\t{path}",
        "kind\ttorch (by its layout)",
        "optimizer\tAdamW",
        "recipe\tadamw",
        "step\t3",
        "parameters\t6, 9004 elements with state",
        "state\t72032 bytes (70.34 KiB), 8.0000 per element",
        "fp32 AdamW\t72032 bytes: this is 100.0 % of it",
    ]
    assert table(text, "SLOT")[1] == {
        "SLOT": "exp_avg_sq",
        "STORE": "Full()",
        "DTYPE": "float32",
        "TENSORS": "6",
        "ELEMENTS": "9004",
        "BYTES": "36016",
        "B/PARAM": "4.0000",
    }


def test_stats_are_torchs_whatever_the_layout_of_a_tensor_is(tmp_path: Path) -> None:
    """torch.save keeps the strides of a tensor: here those of a transposed one, and of a slice."""
    state = trained(TORCH["AdamW"][0]).state_dict()
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].T.contiguous().T
    state["state"][1]["exp_avg"] = torch.stack([state["state"][1]["exp_avg"]] * 3, 1)[:, 1]
    torch.save(state, tmp_path / "a.pt")
    stats = {row["name"]: row["stats"] for row in as_json("inspect", tmp_path / "a.pt", "--stats")["tensors"]}
    for i, slots in state["state"].items():
        for slot in ("exp_avg", "exp_avg_sq"):
            found, own = stats[f"#{i}/{slot}"], slots[slot].double()
            assert (found["minimum"], found["maximum"]) == (own.min().item(), own.max().item())
            assert found["mean"] == pytest.approx(own.mean().item(), rel=1e-12)


def test_names_and_keys(tmp_path: Path) -> None:
    optimizer = trained(TORCH["AdamW"][0])
    torch.save({"epoch": 1, "optimizer": optimizer.state_dict(), "other": optimizer.state_dict()}, tmp_path / "a.pt")
    assert "optimizer" in run("inspect", tmp_path / "a.pt", code=3)
    names = [name for name, _ in mlp(width=WIDTH).named_parameters()]
    (tmp_path / "names.txt").write_text("\n".join(names))
    options = ("--key", "optimizer", "--names", tmp_path / "names.txt")
    for command in ("inspect", "check"):
        assert as_json(command, tmp_path / "a.pt", *options)["issues"] == []
    rows = as_json("inspect", tmp_path / "a.pt", *options, "--tensors")["tensors"]
    assert [row["parameter"] for row in rows[::2]] == names
    torch.save(optimizer.state_dict(), tmp_path / "b.pt")
    assert as_json("diff", tmp_path / "a.pt", tmp_path / "b.pt", "--key", "other")["verdict"] == "equal"
    assert "'nothing'" in run("diff", tmp_path / "a.pt", tmp_path / "b.pt", "--key", "nothing", code=3)
    message = run("inspect", tmp_path / "a.pt", "--key", "optimizer", "--optimizer", "lion", code=4)
    assert "it is the state of AdamW" in message


def test_another_kind_and_its_own(tmp_path: Path) -> None:
    """The same run, by torch and by this library: other files, the same numbers to rounding, and one more kind of
    rounding where state is kept otherwise."""
    theirs = torch_file(tmp_path, lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.0))
    optimizer = trained(lambda m: AdamW(m.named_parameters(), weight_decay=0.0))
    optstate.save(optimizer, tmp_path / "own")
    tree = as_json("diff", theirs, tmp_path / "own")
    assert tree["verdict"] in ("equal values", "close", "equal")
    assert tree["notes"][0] == "one side has no names: parameters are matched by their places"
    assert "hyper-parameters on the first side only: amsgrad, capturable" in tree["notes"][1]
    assert tree["differences"] == []


def test_values_of_a_torch_file_are_checked(tmp_path: Path) -> None:
    state = trained(TORCH["AdamW"][0]).state_dict()
    state["state"][0]["exp_avg_sq"][5, 3] = -1.0
    state["state"][1]["exp_avg"][7] = float("nan")
    state["state"][2]["step"] += 1
    torch.save(state, tmp_path / "a.pt")
    issues = as_json("check", tmp_path / "a.pt", code=1)["issues"]
    assert [(issue["severity"], issue["where"]) for issue in issues] == [
        ("warning", "step"),
        ("error", "#0/exp_avg_sq"),
        ("error", "#1/exp_avg"),
    ]


FOLDERS = {
    "dcp_adamw": ("dcp", "AdamW", "adamw", 216064),
    "dcp_adamw_flat": ("dcp", "AdamW", "adamw", 216064),
    "dcp_two_ranks": ("dcp", "AdamW", "adamw", 320),
    "deepspeed_zero2": ("deepspeed-zero2", "AdamW", "adamw", 3 * 108032),  # with the fp32 weights
    "galore_adamw": ("galore", "GaLoreAdamW", None, 73728),
    "lomo_optim_adalomo/optimizer.pt": ("lomo-optim", "AdaLomo", "adalomo", 0),
}
"""Checkpoints that torch does not write alone, or not without a cluster: kind, optimizer, recipe, bytes."""


@pytest.mark.parametrize("name", FOLDERS)
def test_checkpoints_of_other_tools(name: str) -> None:
    path = DATA / name
    kind, optimizer, recipe, nbytes = FOLDERS[name]
    tree = as_json("inspect", path, "--stats")
    assert (tree["kind"], tree["looks_like"], tree["recipe"], tree["state_bytes"]) == (kind, optimizer, recipe, nbytes)
    assert sum(row["bytes"] for row in tree["tensors"]) == nbytes
    assert all(row["stats"]["nan"] == row["stats"]["infinite"] == 0 for row in tree["tensors"])
    facts = dict(line.split("\t", 1) for line in run("inspect", path).split("\n\n")[0].splitlines())
    assert facts["kind"] == f"{kind} (by its layout)"
    assert as_json("check", path)["issues"] == []
    assert as_json("diff", path, path)["verdict"] == "equal"


def test_parts_of_two_ranks_are_read_as_one() -> None:
    """Statistics go through all numbers of a tensor, whatever file they are in."""
    tree = as_json("inspect", DATA / "dcp_two_ranks", "--stats")
    assert {row["stats"]["zeros"] for row in tree["tensors"]} == {0}
    assert as_json("diff", DATA / "dcp_two_ranks", DATA / "dcp_two_ranks", "--tensors")["equal"] is True


def test_the_two_layouts_of_a_distributed_checkpoint_hold_the_same() -> None:
    tree = as_json("diff", DATA / "dcp_adamw", DATA / "dcp_adamw_flat")
    assert (tree["verdict"], tree["differences"]) == ("equal", [])


def test_places_of_parameters_without_state(tmp_path: Path) -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(9)])
    optimizer = torch.optim.AdamW(model.parameters())
    model[3].grad = torch.ones(2)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    tree = as_json("inspect", tmp_path / "a.pt")
    assert tree["without_state"] == [f"#{i}" for i in range(9) if i != 3]
    assert (tree["frozen"], tree["groups"][0]["elements"]) == (8, None)
    assert {row["recipe"]: row["bytes"] for row in tree["recipes"]}["adamw"] == 16
    assert "without state\t8: #0, #1, #2, #4, #5 and 3 more\n" in run("inspect", tmp_path / "a.pt")


HOSTILE = {
    "dangling_id.pt": 3,
    "empty.pt": 3,
    "evil_print.pt": 4,
    "missing_storage.pt": 3,
    "not_a_dict.pt": 3,
    "plain_zip.pt": 3,
    "short_storage.pt": 3,
    "truncated.pt": 3,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_one_line_and_the_exit_code_for_what_is_damaged_or_harmful(name: str, tmp_path: Path) -> None:
    sound = torch_file(tmp_path, TORCH["AdamW"][0])
    path = DATA / "hostile_torch" / name
    for arguments in (
        ["inspect", path],
        ["inspect", path, "--stats", "--json"],
        ["check", path],
        ["diff", sound, path],
    ):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert (result.exit_code, result.stdout) == (HOSTILE[name], "")
        assert result.stderr.startswith(f"optstate: {path}: ")
        assert result.stderr.count("\n") == 1


def test_model_weights_are_no_optimizer_state(tmp_path: Path) -> None:
    torch.save(mlp().state_dict(), tmp_path / "model.pt")
    for command in ("inspect", "check"):
        assert "model weights" in run(command, tmp_path / "model.pt", code=3)


def test_a_trainers_folder_with_sharded_weights_is_its_optimizers(tmp_path: Path) -> None:
    """The index of the model beside it is not what is asked for."""
    shutil.copytree(DATA / "hostile_index" / "missing_shard", tmp_path / "a")
    torch_file(tmp_path / "a", TORCH["AdamW"][0])
    assert as_json("inspect", tmp_path / "a")["kind"] == "torch"
    assert as_json("check", tmp_path / "a")["ok"] is True
