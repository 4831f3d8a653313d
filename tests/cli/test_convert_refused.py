"""What `optstate convert` refuses, by exit code and one line, and that it leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import optstate
from optstate.checkpoint.document.document import KEY
from optstate.checkpoint.files.safetensors_header import read_header
from optstate.recipes import AdamW
from tests.support.converting import SHAPES, convert, invoke, model_of, native, refused, torch_file, trained
from tests.support.paths import DATA

pytestmark = pytest.mark.slow


# --- exit codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "block9"], "'block9' is none of"),
        (["--to", "drop"], "'drop' is none of"),
        (["--to", "Block8(block=7)"], "a block is an even number"),
        (["--slot", "exp_avg"], "give NAME=VALUE"),
        (["--slot", "exp_avg="], "give NAME=VALUE"),
        (["--slot", "exp_avg=tiny"], "'tiny' is none of"),
        (["--recipe", "adalom"], "did you mean 'adalomo'?"),
        (["--recipe", "adalomo", "--to", "bf16"], "--recipe decides the stores"),
        (["--set", "lr=1"], "give --recipe"),
        (["--recipe", "adalomo", "--set", "lr"], "give NAME=VALUE"),
        (["--recipe", "adalomo", "--set", "rl=1"], "no hyper-parameter 'rl'"),
        (["--recipe", "adalomo", "--set", "lr=fast"], "give a number"),
        (["--format", "pytorch"], "did you mean 'torch'?"),
        (["--format", "numpy"], "one of optstate, bitsandbytes"),
        (["--max-shard-size", "5XB"], "such as 5GB"),
        (["--format", "torch", "--max-shard-size", "5KB"], "files of optstate's own"),
        (["--nonsense"], "No such option"),
    ],
)
def test_wrong_use(adamw: Path, options: list[str], words: str, tmp_path: Path) -> None:
    assert words in refused(2, "convert", adamw, tmp_path / "b.safetensors", *options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "bf16"], "numbers would change in exp_avg Full() -> Full(dtype='bfloat16')"),
        (["--slot", "exp_avg=factored", "--allow-lossy"], "exp_avg of 'p0' cannot go into Factored()"),
        (["--slot", "exp_sum=bf16", "--allow-lossy"], "keeps no 'exp_sum': it has exp_avg, exp_avg_sq"),
        (["--recipe", "adalomo", "--set", "lr=-1", "--allow-lossy"], "lr=-1"),
        (["--recipe", "sm3", "--allow-lossy"], "accumulator (sum of squared gradients) cannot be made"),
        (["--format", "lion-pytorch"], "lion-pytorch does not have it; convert with --recipe lion"),
    ],
)
def test_refused(adamw: Path, options: list[str], words: str, tmp_path: Path) -> None:
    assert words in refused(4, "convert", adamw, tmp_path / "b.safetensors", *options)
    assert os.listdir(tmp_path) == []


def test_a_momentum_gives_no_second_moment(tmp_path: Path) -> None:
    source = DATA / "torch_sgd_momentum" / "optimizer.pt"
    message = refused(4, "convert", source, tmp_path / "b.safetensors", "--recipe", "adamw", "--allow-lossy")
    assert "exp_avg_sq (average of squared gradients) cannot be made" in message


def test_projected_squares_have_no_way_back(tmp_path: Path) -> None:
    options = ["--slot", "exp_avg_sq=fp32", "--allow-lossy"]
    message = refused(4, "convert", DATA / "galore_adamw", tmp_path / "b.safetensors", *options)
    assert "squares of projected gradients say nothing of the squares of gradients" in message


def test_state_that_lomo_optim_left_out(tmp_path: Path) -> None:
    message = refused(4, "convert", DATA / "lomo_optim_adalomo" / "optimizer.pt", tmp_path / "b.safetensors")
    assert "lomo-optim keeps them in attributes of the optimizer" in message


def test_shapes_that_nobody_tells(tmp_path: Path) -> None:
    source = torch_file(tmp_path, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    message = refused(4, "convert", source, tmp_path / "b.safetensors", "--recipe", "sgd")
    assert "the shape of '#0' is not in the file: give --names with shapes, or a model" in message


def test_adam_without_a_count_of_steps(tmp_path: Path) -> None:
    """Counted from one, its second moment would be taken for a thousand times what it is."""
    _, optimizer = trained(lambda m: torch.optim.AdamW(m.parameters()))
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        del state["step"]
    torch.save(saved, tmp_path / "opt.pt")
    convert(tmp_path / "opt.pt", tmp_path / "a.safetensors")
    options = ["--recipe", "adamw8bit", "--allow-lossy"]
    message = refused(4, "convert", tmp_path / "opt.pt", tmp_path / "b.safetensors", *options)
    assert "does not say how many steps it was updated" in message
    with pytest.raises(optstate.CheckpointError, match="how many steps"):
        optstate.load(AdamW(model_of(SHAPES).parameters()), tmp_path / "opt.pt", allow_lossy=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\nb\n", "it gives 2 names, the checkpoint has 6 parameters"),
        ("a\na\nb\nc\nd\ne\n", "the name 'a' comes twice"),
        (json.dumps({name: [3, 3] for name in "abcdef"}), "of shape [3, 3] for parameter '#0'"),
    ],
)
def test_names_that_do_not_fit(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_text(text)
    source = DATA / "torch_adamw" / "optimizer.pt"
    result = invoke("convert", source, tmp_path / "b.safetensors", "--names", tmp_path / "names")
    assert (result.exit_code in (3, 4), result.stderr.count("\n")) == (True, 1)
    assert words in result.stderr


def test_targets(adamw: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.safetensors"
    target.write_text("old")
    assert "exists already; choose another name, or --force" in refused(4, "convert", adamw, target)
    assert target.read_text() == "old"
    convert(adamw, target, "--force")
    assert target.read_bytes() == adamw.read_bytes()
    missing = tmp_path / "none" / "b.safetensors"
    assert "its folder does not exist; make it first" in refused(3, "convert", adamw, missing)
    assert "is a folder and cannot be replaced" in refused(4, "convert", adamw, tmp_path, "--force")
    assert "no such file" in refused(3, "convert", tmp_path / "nothing", target, "--force")


@pytest.mark.parametrize("kind", ["itself", "symbolic link", "hard link"])
def test_the_source_is_no_target(kind: str, tmp_path: Path) -> None:
    source = native(tmp_path, lambda m: AdamW(m.named_parameters()))
    before, target = source.read_bytes(), tmp_path / "b.safetensors"
    if kind == "itself":
        target = source
    elif kind == "symbolic link":
        target.symlink_to(source)
    else:
        target.hardlink_to(source)
    assert "is the source itself" in refused(4, "convert", source, target, "--to", "bf16", "--allow-lossy", "--force")
    assert source.read_bytes() == before


def test_a_set_is_no_target_of_its_own(adamw: Path, tmp_path: Path) -> None:
    """It has no file of the name that it was saved under."""
    convert(adamw, tmp_path / "set.safetensors", "--max-shard-size", "100KB")
    target = tmp_path / "set.safetensors"
    assert not target.exists()
    assert "is the source itself" in refused(4, "convert", target, target, "--force")
    assert "exists already" in refused(4, "convert", adamw, target)
    assert invoke("check", target).exit_code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(adamw: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "cannot be written" in refused(3, "convert", adamw, tmp_path / "b.safetensors")
    finally:
        tmp_path.chmod(0o700)


def test_no_traceback_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["convert", DATA / "hostile_torch" / "evil_print.pt", tmp_path / "b.safetensors"]
    assert "print" in refused(4, *arguments)
    monkeypatch.setenv("OPTSTATE_DEBUG", "1")
    result = invoke(*arguments)
    assert isinstance(result.exception, optstate.CheckpointError)


@pytest.mark.parametrize("path", sorted((DATA / "hostile_torch").iterdir()), ids=lambda path: path.name)
def test_malformed_files_give_one_line(path: Path, tmp_path: Path) -> None:
    result = invoke("convert", path, tmp_path / "b.safetensors")
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code in (0, 3, 4)
    assert result.stderr.count("\n") == (1 if result.exit_code else 0)


def tampered(source: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The file with another document beside its tensors."""
    document = json.loads(read_header(source).metadata[KEY])
    change(document)
    safetensors.torch.save_file(safetensors.torch.load_file(source), target, {KEY: json.dumps(document)})
    return target


@pytest.mark.parametrize(
    ("code", "words", "change"),
    [
        (3, "p0/exp_avg: it has shape [96, 64]", lambda p: p.update(shape=[1 << 40, 1 << 20])),
        (3, "p0/exp_avg: it has shape [96, 64]", lambda p: p.update(shape=[64, 96])),
        (3, "Block8() without absmax", lambda p: p["slots"]["exp_avg"].update(store="Block8()")),
        (3, "is used, but its values are not in the file", lambda p: p["slots"]["exp_avg"].update(codebook="mine:0")),
        (4, "its tensors do not fit", lambda p: p["slots"]["exp_avg"].update(store="Projected(rank=8)", of="gradient")),
        (4, "no way back to its numbers", lambda p: p["slots"]["exp_avg"].update(store="Zipped()")),
    ],
)
def test_a_document_that_is_not_of_its_tensors(
    adamw: Path, code: int, words: str, change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    source = tampered(adamw, tmp_path / "a.safetensors", lambda document: change(document["parameters"][0]))
    message = refused(code, "convert", source, tmp_path / "b.safetensors", "--to", "block4", "--allow-lossy")
    assert words in message
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_parameter_of_whole_numbers(adamw: Path, tmp_path: Path) -> None:
    source = tampered(adamw, tmp_path / "a.safetensors", lambda d: d["parameters"][0].update(dtype="int8"))
    options = ["--recipe", "adalomo", "--allow-lossy"]
    assert "'p0' has dtype 'int8'" in refused(4, "convert", source, tmp_path / "b.safetensors", *options)


# --- nothing is left behind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--format", "torch"], ["--max-shard-size", "60KB"]], ids=" ".join)
def test_an_error_half_way_leaves_the_old_file(
    adamw: Path, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, written = tmp_path / "b.safetensors", os.pwrite
    target.write_text("old")
    count = 0

    def full(descriptor: int, data: Any, position: int) -> int:
        nonlocal count
        count += 1
        if count > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    assert "cannot be written: No space left on device" in refused(3, "convert", adamw, target, "--force", *options)
    assert (os.listdir(tmp_path), target.read_text()) == (["b.safetensors"], "old")


def test_an_error_half_way_leaves_no_folder(adamw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: Any, position: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert "No space left" in refused(3, "convert", adamw, tmp_path / "folder", "--format", "lerobot")
    assert os.listdir(tmp_path) == []


def test_a_file_larger_than_the_system_allows(adamw: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it."""
    resource = pytest.importorskip("resource")
    (tmp_path / "b.safetensors").write_text("old")
    code = "import sys; from optstate_cli import app; app(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", str(adamw), "b.safetensors", "--force"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("optstate: ")
    assert done.stderr.count("\n") == 1
    assert (os.listdir(tmp_path), (tmp_path / "b.safetensors").read_text()) == (["b.safetensors"], "old")


def test_a_conversion_to_a_recipe_does_not_import_the_compiler(adamw: Path, tmp_path: Path) -> None:
    """The optimizer that says what the recipe keeps is one of parameters without values, and never runs."""
    code = (
        "import sys; from optstate import checkpoint\n"
        "checkpoint.convert(*sys.argv[1:], recipe='adamw8bit', allow_lossy=True)\n"
        "print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])\n"
        "import torch; from optstate.recipes import AdamW; AdamW([('w', torch.nn.Parameter(torch.ones(2)))])\n"
        "print('torch._dynamo' in sys.modules)"
    )
    arguments = [sys.executable, "-c", code, str(adamw), str(tmp_path / "b.safetensors")]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\nTrue\n"
