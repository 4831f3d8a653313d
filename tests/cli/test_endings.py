"""What files are left, and whose they are: processes that are asked to end, permissions, pipes, long histories."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from optstate_cli import app
from typer.testing import CliRunner

import optstate
from optstate.checkpoint.document.document_json import to_json
from optstate.checkpoint.files.atomic_write import ending_in_order
from optstate.checkpoint.files.safetensors_check import structural_issues
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.operations import run_conversion
from tests.support.fuzzing import safetensors_of
from tests.support.replaced_files import fresh

pytestmark = pytest.mark.slow


def run(*arguments: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


# --- asked to end -------------------------------------------------------------------------------------------------

WRITER = """
import sys, time
from optstate.checkpoint.files.safetensors_set import create_set
from optstate.checkpoint.files.torch_archive_writer import NewTensor, create_torch
from optstate.checkpoint.files.safetensors_writer import NewEntry
path, kind = sys.argv[1:]
entries = [NewEntry(name, "U8", (100,)) for name in "abc"]
if kind == "torch":
    writing = create_torch(path, {"a": NewTensor("a", "U8", (100,))})
else:
    writing = create_set(path, entries, room=4000, limit=100 if kind == "a set" else None)
with writing as file:
    file.put("a", bytes(100))
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["one file", "a set", "torch"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_asked_to_end_leaves_nothing_half_written(
    number: signal.Signals, kind: str, tmp_path: Path
) -> None:
    """And ends as it would have, by the signal: whoever started it sees no other status."""
    path = tmp_path / "opt.safetensors"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), kind], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == (3 if kind == "a set" else 1)
        process.send_signal(number)
        assert process.wait(50) == -number  # long before it would end by itself
    assert list(tmp_path.iterdir()) == []


def test_a_handler_of_the_programs_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with ending_in_order():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    with ending_in_order():
        assert callable(signal.getsignal(signal.SIGTERM))
        with ending_in_order():  # one within another is part of it
            pass
        assert callable(signal.getsignal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# --- permissions --------------------------------------------------------------------------------------------------


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
@pytest.mark.parametrize("options", [(), ("--format", "torch"), ("--max-shard-size", "20kB"), ("--to", "bf16")])
def test_convert_keeps_the_permissions_of_its_source(options: tuple[str, ...], mode: int, tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    optstate.save(fresh(1.0), source)
    source.chmod(mode)
    before = set(tmp_path.iterdir())
    code, _, err = run("convert", source, tmp_path / "b.safetensors", *options, "--allow-lossy")
    assert (code, err) == (0, "")
    made = set(tmp_path.iterdir()) - before
    assert len(made) > (2 if "--max-shard-size" in options else 0)
    assert {permissions(path) for path in made} == {mode}
    (tmp_path / "c.safetensors").write_bytes(b"")
    (tmp_path / "c.safetensors").chmod(0o604)
    if "--max-shard-size" not in options:  # what is replaced keeps its own
        run("convert", source, tmp_path / "c.safetensors", *options, "--allow-lossy", "--force")
        assert permissions(tmp_path / "c.safetensors") == 0o604


def test_a_set_is_as_private_as_the_most_private_of_its_files(tmp_path: Path) -> None:
    optstate.save(fresh(1.0), tmp_path / "a.safetensors", max_shard_size=20_000)
    for path in tmp_path.iterdir():
        path.chmod(0o644)
    next(tmp_path.glob("*-00002-*")).chmod(0o600)
    run("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert permissions(tmp_path / "b.safetensors") == 0o600


# --- pipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ["convert A -", "convert - B", "check -", "diff A -", "diff - A"])
def test_a_pipe_is_no_file(arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    optstate.save(fresh(1.0), "A")
    code, out, err = run(*arguments.split())
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert "not through a pipe" in err
    assert os.listdir(tmp_path) == ["A"]


# --- documents ----------------------------------------------------------------------------------------------------


def document(parameters: int = 0, history: int = 0, groups: int = 1, **changes: Any) -> str:
    tree = {
        "format_version": 1,
        "recipe": "adamw",
        "groups": [{"hyper": {"lr": 0.1, "betas": {"$tuple": [0.9, 0.99]}, "eps": 1e-8}, "parameters": []}] * groups,
        "parameters": [],
        "clip_grad_norm": None,
        "source": {"tool": "optstate"},
        "history": [{"tool": "optstate", "number": i} for i in range(history)],
    }
    return json.dumps({"__metadata__": {"optstate": json.dumps({**tree, **changes})}})


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_a_document_without_parameters(groups: int, tmp_path: Path) -> None:
    path, new = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    path.write_bytes(safetensors_of(document(groups=groups), b""))
    for arguments in (["inspect", path, "--stats"], ["check", path], ["diff", path, path], ["convert", path, new]):
        assert run(*arguments)[::2] == (0, "")
    assert open_checkpoint(new).document == open_checkpoint(path).document
    code, _, err = run("convert", path, tmp_path / "c.safetensors", "--recipe", "lion")
    assert (code, err.count("\n"), "it has no parameters" in err) == (4, 1, True)
    code, _, err = run("estimate", path)
    assert (code, err.count("\n")) == (3, 1)


def test_the_history_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first entry and the last ones stay, and the number of those between them, however often it is converted."""
    most = 10  # instead of 64, so that few conversions are enough
    monkeypatch.setattr(run_conversion, "MOST_HISTORY", most)
    path = tmp_path / "a.safetensors"
    optstate.save(fresh(1.0), path)
    stores = ["bf16", "fp32"]
    for i in range(most + 5):
        new = tmp_path / f"b{i % 2}.safetensors"
        assert run("convert", path, new, "--to", stores[i % 2], "--allow-lossy", "--force")[0] == 0
        path = new
        history = open_checkpoint(path).document.history
        if i == 0:
            first = history[0]
        assert len(history) <= most
    assert history[0] == first
    assert history[1] == {"left_out": 6}  # of 15: the first, these, and the last 8
    assert len(history) == most
    sizes = len(to_json(open_checkpoint(path).document))
    assert sizes < 100_000


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\nb", "a\x7f", "a\u202eb", "a\x9bb", "a\u2028b"])
def test_control_characters_in_names_are_findings(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({name: torch.ones(2)}, path)
    code, out, err = run("check", path)
    assert (code, err) == (1, "")
    assert ["error" in line for line in out.splitlines() if "control characters" in line] == [True]
    assert out.replace("\n", "").replace("\t", "").isprintable()
    assert run("inspect", path, "--tensors")[0] == 0  # one can look into it
    assert [issue.severity for issue in structural_issues(path)] == ["error"]


def test_control_characters_in_names_of_other_kinds_of_files_are_findings(tmp_path: Path) -> None:
    """Names that a torch file has, and that our own file has though its tensors are no part of it."""
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([("a\x1b[31m", param)])
    param.grad = torch.ones(2)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    code, out, _ = run("check", tmp_path / "a.pt")
    assert (code, "control characters" in out) == (1, True)
    optstate.save(optstate.recipes.get("sgd")([("a\x1b[31m", param)], lr=0.1), tmp_path / "b.safetensors")
    code, out, _ = run("check", tmp_path / "b.safetensors")
    assert (code, "control characters" in out) == (1, True)
    for name in ("\u00e4.weight", "a b", "模型"):  # letters of any language
        safetensors.torch.save_file({name: torch.ones(2)}, tmp_path / "c.safetensors")
        assert run("check", tmp_path / "c.safetensors")[0] == 0
