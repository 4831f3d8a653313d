"""What a person may give to the commands by mistake or in bad faith: one line, an exit code, nothing written."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from optstate_cli import app
from typer.testing import CliRunner

import optstate
from optstate.recipes import AdamW
from tests.support.forks import run_command
from tests.support.fuzzing import rezipped, safetensors_of
from tests.support.models import loss_of, mlp
from tests.support.paths import DATA
from tests.support.safetensors_cases import HOSTILE, INDICES

pytestmark = pytest.mark.slow

ADAMW = DATA / "torch_adamw" / "optimizer.pt"


def run(*arguments: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def refusal(*arguments: Any, code: int = 3) -> str:
    """The one line on stderr of a command that must end with this code."""
    found, out, err = run(*arguments)
    assert (found, out) == (code, ""), (found, out, err)
    assert err.startswith("optstate: ")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert len(err) < 1000
    return err


def answer(*arguments: Any, codes: tuple[int, ...] = (0,)) -> str:
    """What a command says that must end with one of these codes and complain of nothing."""
    found, out, err = run(*arguments)
    assert found in codes, (found, out, err)
    assert (err, bool(out)) == ("", True)
    return out


# --- files that are damaged, or odd ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_safetensors_files(name: str, tmp_path: Path) -> None:
    path = DATA / "hostile" / f"{name}.safetensors"
    if HOSTILE[name] is None:
        answer("inspect", path)
        answer("inspect", path, "--tensors", "--stats", "--json")
        answer("check", path, codes=(0, 1))
    else:
        for arguments in (["inspect", path], ["inspect", path, "--json"], ["diff", path, path]):
            assert str(path) in refusal(*arguments)
        code, out, err = run("check", path)
        assert (code == 1 and "error\t" in out and err == "") or (code == 3 and out == "" and err.count("\n") == 1)
    assert str(path) in refusal("convert", path, tmp_path / "new.safetensors")  # none has optimizer state
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("of_folder", [False, True])
def test_indices(name: str, of_folder: bool) -> None:
    path = DATA / "hostile_index" / name
    path = path if of_folder else path / "model.safetensors.index.json"
    refusal("inspect", path)
    code, out, err = run("check", path)
    assert (code == 1 and "error\t" in out and err == "") or (code == 3 and out == "" and err.count("\n") == 1)


def test_through_the_installed_command() -> None:
    """In a process of its own, as a person runs it: no traceback, nothing of a warning."""
    code = "from optstate_cli import app; app(prog_name='optstate')"
    evil = DATA / "hostile_torch" / "evil_print.pt"
    alone = subprocess.run([sys.executable, "-c", code, "inspect", evil], capture_output=True, text=True)
    forked = run_command("inspect", evil)
    assert (alone.returncode, alone.stdout, alone.stderr) == (forked.returncode, forked.stdout, forked.stderr)
    for command, path, expected in (
        ("inspect", DATA / "hostile_torch" / "evil_print.pt", 4),
        ("check", DATA / "hostile_torch" / "truncated.pt", 3),
        ("inspect", DATA / "hostile" / "header_len_2e63.safetensors", 3),
        ("check", DATA / "hostile" / "scalar.safetensors", 0),
    ):
        process = run_command(command, path)
        assert process.returncode == expected, process.stderr
        assert process.stderr.count("\n") == (expected != 0)


# --- what is made here --------------------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def in_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def saved(value: Callable[[], Any], **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(value(), folder / "a.pt", **options)
        return folder / "a.pt"

    return make


def deflated(folder: Path) -> Path:
    """A tensor that takes 100 MB, in 100 kB."""
    with zipfile.ZipFile(ADAMW) as old, zipfile.ZipFile(folder / "a.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, bytes(100 << 20) if entry.filename.endswith("data/1") else old.read(entry))
    return folder / "a.pt"


def expanded() -> Any:
    """A tensor of 4 PB in 4 bytes."""
    state = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.zeros(()),
        "exp_avg_sq": torch.zeros(1).expand(1 << 25, 1 << 25),
    }
    return {"state": {0: state}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "params": [0]}]}


def evil_in_an_archive(folder: Path) -> Path:
    (folder / "a.pt").write_bytes(rezipped(ADAMW.read_bytes(), lambda data: pickle.dumps(Evil(), 2)))
    return folder / "a.pt"


def evil_of_the_older_layout(folder: Path) -> Path:
    content = io.BytesIO()
    torch.save({"a": Evil()}, content, _use_new_zipfile_serialization=False)
    (folder / "a.pt").write_bytes(content.getvalue())
    return folder / "a.pt"


def of_hugging_faces_writer(folder: Path) -> Path:
    """torch.distributed.checkpoint's HuggingFaceStorageWriter writes what is no tensor as files of torch.save."""
    (folder / "a").mkdir()
    torch.save(3.0, folder / "a" / "shard-00001-model-00001-of-00001.safetensors")
    return folder / "a" / "shard-00001-model-00001-of-00001.safetensors"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a")
    return folder / "a"


def link(folder: Path) -> Path:
    (folder / "a").symlink_to("nowhere")
    return folder / "a"


def folder_of(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "a").mkdir()
        for name in names:
            shutil.copy(ADAMW, folder / "a" / name)
        return folder / "a"

    return make


def index_of(weight_map: Any) -> Callable[[Path], Path]:
    content = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return in_file("a.safetensors.index.json", content)


def linked_shard(folder: Path) -> Path:
    (folder / "set").mkdir()
    safetensors.torch.save_file({"a": torch.ones(2)}, folder / "outside.safetensors")
    (folder / "set" / "s.safetensors").symlink_to(folder / "outside.safetensors")
    return index_of({"a": "s.safetensors"})(folder / "set")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
DEEP = "[" * 5000 + "]" * 5000

MADE: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "nothing there": (lambda folder: folder / "a.pt", 3, "no such file"),
    "a path that cannot be": (lambda folder: folder / ("a" * 300), 3, "File name too long"),
    "a pipe": (pipe, 3, "a named pipe"),
    "a device": (lambda folder: Path("/dev/null"), 3, "a device"),
    "a link to nothing": (link, 3, "a symbolic link to 'nowhere', which does not exist"),
    "an empty folder": (folder_of(), 3, "a folder without optimizer state"),
    "several files": (folder_of("optimizer.pt", "optimizer_1.pt"), 3, "2 checkpoints"),
    "one rank of many": (folder_of("rank0-of-8-optimizer.pt"), 3, "the state of one rank"),
    "a git-LFS pointer": (in_file("a.safetensors", LFS), 3, "git lfs pull"),
    "a git-LFS pointer for a torch file": (in_file("a.pt", LFS), 3, "git lfs pull"),
    "a page": (in_file("a.pt", b"<!DOCTYPE html><html>404</html>"), 3, "an HTML page"),
    "text": (in_file("a.pt", b"hello\n"), 3, "a file of unknown kind"),
    "a zip archive": (in_file("a.pt", b"PK\5\6" + bytes(18)), 3, "a zip archive"),
    "what the hub's writer makes": (of_hugging_faces_writer, 3, "no optimizer state"),
    "a long header": (in_file("a.safetensors", b"\x40" + bytes(7) + b"{}"), 3, "64 bytes, but only 2 follow"),
    "a deep header": (in_file("a.safetensors", safetensors_of('{"a":' + DEEP + "}", b"")), 3, "nested too deeply"),
    "a deep document": (
        in_file("a.safetensors", safetensors_of(json.dumps({"__metadata__": {"optstate": DEEP}}), b"")),
        3,
        "nested too deeply",
    ),
    "an evil pickle": (in_file("a.pt", pickle.dumps(Evil(), 4)), 4, "was not executed"),
    "an evil archive": (evil_in_an_archive, 4, "was not executed"),
    "an evil file of the older layout": (evil_of_the_older_layout, 4, "was not executed"),
    "a pickle": (in_file("a.pt", pickle.dumps({"state": {}, "param_groups": []}, 4)), 3, "not written by torch.save"),
    "a compressed archive": (deflated, 3, "is compressed"),
    "a tensor that was expanded": (saved(expanded), 3, "more than the 1 that are stored"),
    "the model's file": (saved(lambda: mlp().state_dict()), 3, "looks like model weights"),
    "a list": (saved(lambda: [0] * 10_000), 3, "no optimizer state in it: it is a list"),
    "a shard above the folder": (index_of({"a": "../b.safetensors"}), 3, "outside the folder"),
    "a shard elsewhere": (index_of({"a": "https://example.org/b.safetensors"}), 3, "a URL"),
    "a shard behind a link": (linked_shard, 3, "a symbolic link out of the folder"),
    "an index of a list": (index_of(["a"]), 3, "weight_map is not an object"),
}


@pytest.mark.parametrize("name", MADE)
def test_one_line_and_the_exit_code(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, code, words = MADE[name]
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert words in refusal("inspect", path, code=code)
    for arguments in (["convert", path, tmp_path / "new.pt"], ["diff", path, path]):
        refusal(*arguments, code=code)
    found, out, err = run("check", path)
    assert (found, out, err.count("\n")) == (code, "", 1) or (found == 1 and "error\t" in out and err == "")
    assert sorted(tmp_path.rglob("*")) == before  # nothing was made, by us or by what is in the file
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < (50 << 20) // 1024


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    shutil.copy(ADAMW, tmp_path / "a.pt")
    (tmp_path / "a.pt").chmod(0)
    if os.access(tmp_path / "a.pt", os.R_OK):
        pytest.skip("this user may read everything")
    assert "Permission denied" in refusal("inspect", tmp_path / "a.pt")


def test_a_model_of_many_tensors_is_no_state(tmp_path: Path) -> None:
    safetensors.torch.save_file(mlp().state_dict(), tmp_path / "model.safetensors")
    assert "not an optimizer's file" in answer("inspect", tmp_path / "model.safetensors")
    assert "looks like model weights" in refusal("convert", tmp_path / "model.safetensors", tmp_path / "b.pt")


# --- what is written ----------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = mlp()
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    loss_of(model, 0).backward()
    optimizer.step()
    optstate.save(optimizer, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_an_existing_target_is_kept_unless_forced(source: Path) -> None:
    target = source.with_name("b.safetensors")
    target.write_bytes(b"old")
    assert "exists already" in refusal("convert", source, target, code=4)
    assert target.read_bytes() == b"old"
    answer("convert", source, target, "--force")
    assert answer("diff", source, target).splitlines()[2] == "verdict\tequal"


@pytest.mark.parametrize("make", [os.symlink, os.link, shutil.copy], ids=["symbolic link", "hard link", "itself"])
def test_the_source_is_never_the_target(make: Callable[[Path, Path], Any], source: Path) -> None:
    target = source.with_name("b.safetensors") if make is not shutil.copy else source
    if target != source:
        make(source, target)
    before = source.read_bytes()
    assert "is the source itself" in refusal("convert", source, target, "--force", code=4)
    assert source.read_bytes() == before


def test_targets_that_cannot_be_written(source: Path) -> None:
    folder = source.parent
    refusal("convert", source, folder / "nowhere" / "b.safetensors")
    refusal("convert", source, source / "b.safetensors")
    (folder / "sub").mkdir()
    assert "is a folder" in refusal("convert", source, folder / "sub", "--force", code=4)
    refusal("convert", source, Path("/proc/b.safetensors"))
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "sub"]


@pytest.mark.parametrize("name", ["b.safetensors", "b.pt"])
def test_a_disk_that_fills_up_leaves_the_old_file(name: str, source: Path) -> None:
    target = source.with_name(name)
    target.write_bytes(b"old")
    answer("inspect", source)  # nothing but the target is written below
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        message = refusal("convert", source, target, "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in message
    assert sorted(path.name for path in source.parent.iterdir()) == sorted(["a.safetensors", name])
    assert target.read_bytes() == b"old"
