"""`optstate.checkpoint`: seven plain functions with typed results, and a command line that only calls them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import optstate
from optstate import checkpoint
from optstate.checkpoint import CheckpointError, UsageError
from optstate.checkpoint.files.issues import Issue
from optstate.recipes import AdamW, AdamW8bit

pytestmark = pytest.mark.slow

COMMANDS = Path(__file__).parents[2] / "cli"


def saved(path: Path, lr: float = 1e-2) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 4))
    optimizer = AdamW(model.named_parameters(), lr=lr)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    checkpoint.save(optimizer, path)
    return path


def test_nothing_is_imported_before_it_is_used() -> None:
    code = (
        "import sys; from optstate import checkpoint\n"
        "assert 'torch' not in sys.modules\n"
        "checkpoint.open; checkpoint.summarize; checkpoint.check\n"
        "assert 'torch' not in sys.modules\n"
        "checkpoint.convert\n"
        "print(sorted(m for m in sys.modules if m.startswith(('optstate.optimizer', 'optstate.updates', 'adalomo'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"  # only what becomes another recipe's state needs optimizers


def test_every_name_is_there_and_no_other() -> None:
    assert set(checkpoint.__all__) <= set(dir(checkpoint))
    assert all(callable(getattr(checkpoint, name)) for name in checkpoint.__all__)
    assert (checkpoint.save, checkpoint.load) == (optstate.save, optstate.load)
    with pytest.raises(AttributeError, match="'opne'"):
        _ = checkpoint.opne


def test_one_file_goes_through_all_of_them(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors")
    assert checkpoint.open(source).document.recipe == "adamw"
    assert checkpoint.summarize(source).step == 1
    assert (checkpoint.check(source).ok, checkpoint.check(source).issues) == (True, ())
    made = checkpoint.convert(source, tmp_path / "b.safetensors", recipe="adamw8bit", allow_lossy=True)
    assert (made.recipe, made.format, made.written, made.report.lossless) == ("adamw8bit", "optstate", True, False)
    found = checkpoint.compare(source, tmp_path / "b.safetensors")
    assert (found.equal, found.close, found.verdict) == (False, False, "different")
    assert {one.slot for one in found.statistics} == {"exp_avg", "exp_avg_sq"}
    assert checkpoint.compare(source, checkpoint.open(source)).verdict == "equal"
    model = nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 4))
    checkpoint.load(AdamW8bit(model.named_parameters()), tmp_path / "b.safetensors")


def test_a_broken_file_is_a_result_of_check(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors")
    content = bytearray(path.read_bytes())
    content[-4:] = b"\xff\xff\xff\xff"  # a NaN
    path.write_bytes(content)
    found = checkpoint.check(path)
    assert not found.ok
    assert [type(issue) for issue in found.issues] == [Issue]
    assert "NaN" in found.issues[0].what


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "adamw8bit", "to": "bf16"},
        {"recipe": "adamw8bit", "slots": {"exp_avg": "bf16"}},
        {"settings": {"lr": "1"}},
        {"recipe": "adamw9bit"},
        {"recipe": "adamw", "settings": {"lrr": "1"}},
        {"to": "blocks"},
        {"slots": {"exp_avg": "blocks"}},
        {"format": "pytorch"},
        {"max_shard_size": 1000, "format": "torch"},
    ],
    ids=str,
)
def test_what_no_file_makes_right_is_wrong_use(options: dict[str, object], tmp_path: Path) -> None:
    """Said before anything is written, and, but for the last, before the source is looked at."""
    source = tmp_path / "absent"
    if "max_shard_size" in options:
        source = saved(tmp_path / "a.safetensors")
    with pytest.raises(UsageError) as caught:
        checkpoint.convert(source, tmp_path / "b", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_consent_and_overwriting_are_asked_for_here(tmp_path: Path) -> None:
    source, target = saved(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    with pytest.raises(CheckpointError, match="numbers would change") as caught:
        checkpoint.convert(source, target, to="block8")
    assert caught.value.refused
    assert not target.exists()
    planned = checkpoint.convert(source, target, to="block8", dry_run=True)  # asks for nothing, and writes nothing
    assert (planned.written, planned.report.lossless, target.exists()) == (False, False, False)
    checkpoint.convert(source, target, to="block8", allow_lossy=True)
    before = target.read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.convert(source, target)
    assert target.read_bytes() == before
    checkpoint.convert(source, target, overwrite=True)
    assert checkpoint.compare(source, target).verdict == "equal"
    with pytest.raises(CheckpointError, match="is the source itself"):
        checkpoint.convert(source, source, overwrite=True)
    with pytest.raises(CheckpointError, match="not through a pipe"):
        checkpoint.convert(source, "-")


def test_the_suffix_chooses_the_format(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors")
    for name, layout in (("b.pt", "torch"), ("c.bin", "torch"), ("d.safetensors", "optstate"), ("e", "optstate")):
        assert checkpoint.convert(source, tmp_path / name).format == layout
    assert checkpoint.convert(source, tmp_path / "f.pt", format="bitsandbytes").format == "bitsandbytes"


def test_the_command_line_decides_nothing() -> None:
    """Its modules reach the checkpoint's rooms only through the facade, but for types, and a header in a pipe."""
    allowed = {"optstate.checkpoint", "optstate.checkpoint.operations.summarize", "optstate.checkpoint.errors"}
    for path in sorted(COMMANDS.glob("*.py")):
        tree = ast.parse(path.read_text())
        typed = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or id(node) in typed:
                continue
            names = {alias.name for alias in node.names}
            data = names <= {"OPTSTATE", "STREAM", "TensorValue", "measure_tensor"}
            if (node.module or "").startswith("optstate.checkpoint"):
                assert node.module in allowed or data, f"{path.name}: {node.module}"
