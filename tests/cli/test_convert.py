"""`optstate convert` as a command: every kind of file there and back, and what is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import optstate
from optstate.checkpoint.document.native_file import document_of
from optstate.checkpoint.files.safetensors_header import read_header
from optstate.recipes import AdamW, AdamW8bit
from optstate.weights import Kahan
from tests.support.converting import (
    SHAPES,
    convert,
    converted,
    invoke,
    model_of,
    native,
    refused,
    train,
    trained,
)
from tests.support.models import EveryShape
from tests.support.paths import DATA
from tests.support.written_state import assert_equal

pytestmark = pytest.mark.slow


# --- every kind of file, there and back ---------------------------------------------------------------------------


BACK = {
    "torch_adamw/optimizer.pt": "torch",
    "torch_adamw_named/optimizer.pt": "torch",
    "torch_adamw_bf16/optimizer.pt": "torch",
    "torch_sgd_momentum/optimizer.pt": "torch",
    "torch_adafactor/optimizer.pt": "torch",
    "hf_trainer_adamw": "torch",
    "hf_adafactor/optimizer.pt": "transformers",
    "bnb_adamw8bit/optimizer.pt": "bitsandbytes",
    "bnb_adamw8bit_legacy_flat/optimizer.pt": "bitsandbytes",
    "torchao_adamw8bit/optimizer.pt": "torchao",
    "po_adalomo/optimizer.pt": "pytorch_optimizer",
    "lerobot_adamw": "lerobot",
}


ONE_WAY = [
    "lomo_optim_adalomo/attributes.pt",
    "galore_adamw",
    "schedulefree_adamw",
    "dcp_adamw",
    "dcp_adamw_flat",
    "dcp_optstate",
    "dcp_two_ranks",
    "deepspeed_zero1",
    "deepspeed_zero2",
    "deepspeed_zero3",
    "deepspeed_universal1",
    "deepspeed_universal3",
]


@pytest.mark.parametrize("sample", [*BACK, *ONE_WAY])
def test_every_kind_becomes_ours_without_loss(sample: str, tmp_path: Path) -> None:
    """And goes back to what it was, bit by bit, with its groups, ids and types."""
    source, ours = DATA / sample, tmp_path / "ours.safetensors"
    for command in ("inspect", "check"):
        assert invoke(command, source).exit_code == 0
    tree = converted(source, ours)
    assert (tree["lossless"], tree["bytes_after"]) == (True, tree["bytes_before"])
    assert json.loads(invoke("check", ours, "--json").stdout)["issues"] == []
    difference = invoke("diff", source, ours, "--json")
    assert (difference.exit_code, json.loads(difference.stdout)["verdict"]) == (0, "equal")
    if sample not in BACK:
        return
    again = tmp_path / ("again" if BACK[sample] == "lerobot" else "again.pt")
    asked = ["--format", "lerobot"] if BACK[sample] == "lerobot" else []
    assert converted(ours, again, *asked)["format"] == BACK[sample]
    assert json.loads(invoke("diff", source, again, "--json").stdout)["verdict"] == "equal"
    if BACK[sample] == "lerobot":
        assert_same_lerobot(again, source)
        return
    if BACK[sample] == "torchao":
        pytest.importorskip("torchao")
    trusted = BACK[sample] != "torchao"
    original = source if source.is_file() else source / "optimizer.pt"
    assert_equal(torch.load(again, weights_only=trusted), torch.load(original, weights_only=trusted))


def assert_same_lerobot(folder: Path, original: Path) -> None:
    original = next(original.rglob("optimizer_state.safetensors")).parent
    assert sorted(os.listdir(folder)) == ["optimizer_param_groups.json", "optimizer_state.safetensors"]
    ours, theirs = (safetensors.torch.load_file(f / "optimizer_state.safetensors") for f in (folder, original))
    assert_equal(dict(sorted(ours.items())), dict(sorted(theirs.items())))
    groups = [json.loads((f / "optimizer_param_groups.json").read_text()) for f in (folder, original)]
    assert groups[0] == groups[1]


def test_notes_of_the_source_are_shown(tmp_path: Path) -> None:
    notes = converted(DATA / "deepspeed_zero1", tmp_path / "a.safetensors")["notes"]
    assert any("fp32 copy of the weight" in note for note in notes)
    assert "note\tthe slot 'master'" in convert(DATA / "deepspeed_zero1", tmp_path / "b.safetensors")


# --- what is said -------------------------------------------------------------------------------------------------


PLANS = [
    ["--to", "block8"],
    ["--slot", "exp_avg_sq=factored", "--slot", "exp_avg=bf16"],
    ["--slot", "exp_avg=drop"],
    ["--recipe", "adalomo"],
    ["--recipe", "adamw4bit"],
    ["--format", "torch"],
    ["--to", "block8", "--format", "torchao"],
]


@pytest.mark.parametrize("options", PLANS, ids=" ".join)
def test_a_dry_run_predicts_every_byte_and_writes_nothing(adamw: Path, options: list[str], tmp_path: Path) -> None:
    target = tmp_path / "b.safetensors"
    planned = converted(adamw, target, "--dry-run", *options)
    assert (os.listdir(tmp_path), planned["written"]) == ([], False)
    made = converted(adamw, target, "--allow-lossy", *options)
    for key in ("bytes_before", "bytes_after", "lossless", "format", "notes"):
        assert planned[key] == made[key]
    for before, after in zip(planned["slots"], made["slots"], strict=True):
        same = ("slot", "from", "to", "parameters", "bytes_before", "bytes_after", "lossless")
        assert [before[key] for key in same] == [after[key] for key in same]
    assert sum(row["bytes_after"] for row in made["slots"]) == made["bytes_after"]
    if made["format"] == "optstate":
        tensors = safetensors.torch.load_file(target).values()
        assert sum(tensor.nbytes for tensor in tensors) == made["bytes_after"]


def test_a_dry_run_refuses_what_writing_refuses(adamw: Path, tmp_path: Path) -> None:
    for options in (["--format", "lion-pytorch"], ["--to", "factored"]):
        assert refused(4, "convert", adamw, tmp_path / "b.pt", *options, "--dry-run")


def test_json_is_the_report_and_the_file_keeps_it(adamw: Path, tmp_path: Path) -> None:
    tree = converted(adamw, tmp_path / "b.safetensors", "--slot", "exp_avg_sq=factored", "--allow-lossy")
    assert tree.keys() >= {"schema", "lossless", "bytes_before", "bytes_after", "slots", "notes", "target", "format"}
    (row,) = (row for row in tree["slots"] if row["to"] == "Factored()")
    assert row.keys() >= {"slot", "from", "to", "relative_error", "update_relative_error", "update_cosine"}
    assert (row["slot"], row["from"], row["parameters"]) == ("exp_avg_sq", "Full()", 2)
    old, new = (safetensors.torch.load_file(path) for path in (adamw, tmp_path / "b.safetensors"))
    error = [(v, torch.outer(v.mean(1), v.mean(0)) / v.mean()) for v in (old[f"p{i}/exp_avg_sq"] for i in (0, 1))]
    ratio = sum(float((a - b).square().sum()) for a, b in error) / sum(float(a.square().sum()) for a, _ in error)
    assert row["relative_error"] == pytest.approx(ratio**0.5, rel=1e-4)
    assert new.keys() >= {"p0/exp_avg_sq.row", "p0/exp_avg_sq.col", "p2/exp_avg_sq"}
    (entry,) = document_of(read_header(tmp_path / "b.safetensors")).history
    assert entry["from"]["recipe"] == "adamw"
    assert [line["now"] for line in entry["slots"]] == [line["to"] for line in tree["slots"]]
    assert entry["update_relative_error"] == pytest.approx(tree["update_relative_error"], rel=1e-3)


def test_text_in_a_pipe_has_stable_columns(adamw: Path, tmp_path: Path) -> None:
    text = convert(adamw, tmp_path / "b.safetensors", "--to", "bf16", "--allow-lossy")
    table, _, facts = text.partition("\n\n")
    header, *rows = (line.split("\t") for line in table.splitlines())
    assert header == [
        *["SLOT", "FROM", "TO", "PARAMETERS", "BYTES", "NEW BYTES"],
        *["ERROR", "UPDATE ERROR", "COSINE", "INFLATION", "ZEROS"],
    ]
    assert [row[:6] for row in rows] == [
        ["exp_avg", "Full()", "Full(dtype='bfloat16')", "3", "57856", "28928"],
        ["exp_avg_sq", "Full()", "Full(dtype='bfloat16')", "3", "57856", "28928"],
    ]
    assert [line.split("\t")[0] for line in facts.splitlines()] == ["format", "state", "numbers", "update", "written"]


def test_a_terminal_of_80_columns_is_wide_enough(adamw: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    options = ["--slot", "exp_avg_sq=factored", "--slot", "exp_avg=bf16", "--allow-lossy"]
    code = "import sys; from optstate_cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", code, "convert", str(adamw), "b.safetensors", *options]
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb"}
    done = subprocess.Popen(command, stdout=follower, stderr=follower, cwd=tmp_path, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # of a closed terminal
            break
        if not part:
            break
        shown += part
    assert done.wait() == 0
    lines = shown.decode().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:4] == ["exp_avg_sq", "2", "Full", "Factored"] for line in lines), lines


def test_a_set_of_files(adamw: Path, tmp_path: Path) -> None:
    target = tmp_path / "set.safetensors"
    tree = converted(adamw, target, "--max-shard-size", "60KB")
    assert tree["lossless"]
    names = sorted(os.listdir(tmp_path))
    assert names[-1] == "set.safetensors.index.json"
    assert len(names) > 2
    assert all((tmp_path / name).stat().st_size < 70_000 for name in names)
    for command in ("inspect", "check"):
        assert invoke(command, target).exit_code == 0
    optimizer = AdamW(model_of(SHAPES).named_parameters())
    optstate.load(optimizer, target)
    assert {state["step"] for state in optimizer.state.values()} == {3}


# --- nothing is lost silently -------------------------------------------------------------------------------------


def notes_of(source: Path, target: Path, *options: Any) -> str:
    return "\n".join(converted(source, target, "--dry-run", *options)["notes"])


def test_what_a_library_has_no_place_for_is_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)).bfloat16()
    model[1].weight = model[0].weight
    optimizer = AdamW([{"params": list(model.named_parameters()), "role": "embedding"}])
    optstate.fuse_backward(optimizer, clip_grad_norm=1.0)
    optstate.save(optimizer, tmp_path / "a.safetensors", model=model)
    notes = notes_of(tmp_path / "a.safetensors", tmp_path / "b.pt")
    assert "other names of tied parameters are not in the file: 1.weight = 0.weight" in notes
    assert "the declared roles" in notes
    assert "clip of the fused backward pass, 1.0" in notes
    assert "how weights are written, StochasticRounding" in notes
    assert "names of parameters are not in the file" in notes_of(
        tmp_path / "a.safetensors", tmp_path / "folder", "--format", "lerobot"
    )
    assert "clip_grad_norm=1.0" in notes_of(tmp_path / "a.safetensors", tmp_path / "b", "--recipe", "adamw8bit")
    assert notes_of(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == ""


def test_what_a_recipe_has_no_place_for_is_said(tmp_path: Path) -> None:
    notes = notes_of(DATA / "hf_adafactor", tmp_path / "b.safetensors", "--recipe", "adalomo")
    assert "left out: RMS" in notes
    assert "relative_step=False" in notes
    notes = notes_of(DATA / "torch_adamw" / "optimizer.pt", tmp_path / "b.safetensors", "--recipe", "adamw8bit")
    assert "hyper-parameters of the file that are left out: amsgrad=False, capturable=False" in notes
    assert " lr=" not in notes


def test_tensors_of_no_statistic_are_said(tmp_path: Path) -> None:
    source = native(tmp_path, lambda m: AdamW(m.named_parameters()))
    tensors, metadata = safetensors.torch.load_file(source), read_header(source).metadata
    safetensors.torch.save_file({**tensors, "mine": torch.zeros(3)}, source, metadata)
    assert "left out, tensors of no statistic: mine" in notes_of(source, tmp_path / "b.safetensors")


# --- numbers and shapes of every kind -----------------------------------------------------------------------------


EVERY = [
    ["--to", "bf16"],
    ["--to", "block8"],
    ["--to", "block4"],
    ["--slot", "exp_avg_sq=factored"],
    ["--slot", "exp_avg_sq=Grouped(by='row')"],
    ["--recipe", "adalomo"],
    ["--recipe", "adamw8bit"],
    ["--recipe", "adammini"],
    ["--format", "torch"],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", EVERY, ids=" ".join)
def test_every_shape_and_dtype(options: list[str], dtype: torch.dtype, tmp_path: Path) -> None:
    """Without dimensions, empty, frozen, unused; of several groups."""
    model = EveryShape(dtype)
    named = dict(model.named_parameters())
    groups = [[name for name in named if len(name) < 6], [name for name in named if len(name) >= 6]]
    optimizer = AdamW([{"params": [(name, named[name]) for name in group]} for group in groups])
    for seed in range(3):
        model(seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    optstate.save(optimizer, tmp_path / "a.safetensors")
    target = tmp_path / ("b.pt" if "torch" in options else "b.safetensors")
    tree = converted(tmp_path / "a.safetensors", target, *options, "--allow-lossy")
    issues = json.loads(invoke("check", target, "--json").stdout)["issues"]
    assert [issue["where"] for issue in issues] == ["step"]  # the unused one has made none
    for row in tree["slots"]:
        for key in ("relative_error", "update_relative_error"):
            assert row[key] is None or 0 <= row[key] < 2


def test_fp64_is_measured_in_fp64(tmp_path: Path) -> None:
    source = native(tmp_path, lambda m: AdamW(m.named_parameters()), dtype=torch.float64)
    tree = converted(source, tmp_path / "b.safetensors", "--to", "Full(dtype='float32')", "--allow-lossy")
    assert 1e-9 < tree["slots"][0]["relative_error"] < 6e-8  # of fp32's rounding, not zero
    assert converted(source, tmp_path / "c.safetensors", "--to", "full")["lossless"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_numbers_that_are_none_are_copied_and_not_converted(value: float, tmp_path: Path) -> None:
    """Infinity in a block makes all of it NaN, and has no relative error."""
    _, optimizer = trained(lambda m: torch.optim.AdamW(m.parameters()))
    next(iter(optimizer.state.values()))["exp_avg_sq"][0, 0] = value
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    convert(tmp_path / "opt.pt", tmp_path / "a.safetensors")
    target = tmp_path / "b.safetensors"
    for options in (["--to", "block8"], ["--slot", "exp_avg_sq=factored"], ["--recipe", "adalomo"]):
        message = refused(4, "convert", tmp_path / "opt.pt", target, "--allow-lossy", *options)
        assert "exp_avg_sq of '#0' holds" in message
    assert not target.exists()
    resumed = AdamW8bit(model_of(SHAPES).parameters())
    with pytest.raises(optstate.CheckpointError, match="the state is incomplete"):
        optstate.load(resumed, tmp_path / "opt.pt", allow_lossy=True)


def test_huge_numbers_still_have_an_error(tmp_path: Path) -> None:
    """Their squares overflow in fp32."""
    _, optimizer = trained(lambda m: torch.optim.AdamW(m.parameters()))
    next(iter(optimizer.state.values()))["exp_avg"][0, 0] = 1e30
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    tree = converted(tmp_path / "opt.pt", tmp_path / "b.safetensors", "--to", "bf16", "--allow-lossy")
    assert all(0 < row["relative_error"] < 0.01 for row in tree["slots"])


def test_a_group_without_parameters(tmp_path: Path) -> None:
    """It stays in its place, also where the recipe becomes another."""
    model = model_of(SHAPES)
    first, *others = model.parameters()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": []}, {"params": others, "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups)
    train(model, optimizer, 0, 2)
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    convert(tmp_path / "opt.pt", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "again.pt")
    assert_equal(*(torch.load(tmp_path / name, weights_only=True) for name in ("again.pt", "opt.pt")))
    convert(tmp_path / "opt.pt", tmp_path / "b.safetensors", "--recipe", "adamw8bit", "--allow-lossy")
    assert [group.hyper["lr"] for group in document_of(read_header(tmp_path / "b.safetensors")).groups] == [
        1e-3,
        1e-3,
        0.5,
    ]


def test_state_of_no_steps(tmp_path: Path) -> None:
    source = native(tmp_path, lambda m: AdamW(m.named_parameters(), lr=0.5), steps=0)
    convert(source, tmp_path / "b.safetensors", "--recipe", "adamw8bit", "--allow-lossy")
    optimizer = AdamW8bit(model_of(SHAPES).named_parameters())
    optstate.load(optimizer, tmp_path / "b.safetensors")
    assert optimizer.state_dict()["state"][0]["exp_avg_sq.absmax"].max() < 1e-36  # codes of squares are never zero
    assert ({state["step"] for state in optimizer.state.values()}, optimizer.param_groups[0]["lr"]) == ({0}, 0.5)


def test_what_is_kept_for_weights_is_copied_or_refused(tmp_path: Path) -> None:
    source = native(tmp_path, lambda m: AdamW(m.named_parameters(), weights=Kahan()), dtype=torch.bfloat16)
    convert(source, tmp_path / "b.safetensors", "--to", "block8", "--allow-lossy")
    old, new = (safetensors.torch.load_file(path) for path in (source, tmp_path / "b.safetensors"))
    kept = [key for key in old if "/weight" in key]
    assert kept
    assert all(torch.equal(old[key], new[key]) for key in kept)
    assert "no way back" in refused(4, "convert", source, tmp_path / "c.safetensors", "--slot", "weight=bf16")
    assert "weight of 'p0' (Kahan()) has no place" in refused(
        4, "convert", source, tmp_path / "c.pt", "--format", "torch"
    )
    optstate.load(
        AdamW8bit(model_of(SHAPES, torch.bfloat16).named_parameters(), weights=Kahan()), source, allow_lossy=True
    )
