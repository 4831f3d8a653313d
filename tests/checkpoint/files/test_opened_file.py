"""Files that change while they are read: every reading is of one version, or is refused."""

from __future__ import annotations

import gc
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import optstate
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files import opened_file
from optstate.checkpoint.files.opened_file import FileChangedError, Opened, View, reading
from optstate.checkpoint.files.tensor_bytes import load_tensor
from optstate.checkpoint.open_checkpoint import open_checkpoint
from tests.support.paths import DATA
from tests.support.replaced_files import ACTIONS, SETS, command, fresh, held, saving, seen

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=SETS)
def beside_a_saver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path: Path = tmp_path_factory.mktemp("saved") / "opt.safetensors"
    with saving(path, SETS[request.param]):
        yield path


@pytest.mark.parametrize("action", ACTIONS)
def test_beside_a_saver_every_reading_is_of_one_version(action: str, beside_a_saver: Path) -> None:
    counts = seen(12 if action in ("load", "inspect") else 4, beside_a_saver, action)
    print(f"{action} beside a saver: {dict(counts)}")
    assert set(counts) <= {"1", "2"}


def saved(path: Path, value: float, limit: int | None = None) -> Path:
    optstate.save(fresh(value), path, max_shard_size=limit)
    return path


@pytest.mark.parametrize("kind", SETS)
def test_what_was_opened_is_read_to_its_end_though_it_is_replaced(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", 10.0, SETS[kind] or None)
    checkpoint = open_checkpoint(path)
    saved(path, 20.0, SETS[kind] or None)
    keys = [param.slots["exp_avg"].fields[""] for param in checkpoint.document.parameters]
    assert {float(load_tensor(checkpoint.tensors[key]).mean()) for key in keys} == {1.0}
    assert held(path) == {2}


def overwritten(path: Path, content: bytes) -> None:
    """As a tool that does not replace files writes them."""
    found = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 10_000_000))  # later, whatever the system's clock shows


@pytest.mark.parametrize("cut", [False, True])
def test_a_file_overwritten_where_it_lies_is_refused(cut: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", 10.0)
    other = saved(tmp_path / "b.safetensors", 20.0).read_bytes()
    checkpoint, optimizer = open_checkpoint(path), fresh()
    overwritten(path, other[: len(other) // 2] if cut else other)
    with pytest.raises(FileChangedError, match="was overwritten while it was read"):
        load_tensor(checkpoint.tensors["p0/exp_avg"])
    path.write_bytes(other)
    optstate.load(optimizer, path)  # what is complete again is read


def test_a_load_that_meets_an_overwritten_file_says_that_the_state_is_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.safetensors", 10.0)
    other = saved(tmp_path / "b.safetensors", 20.0).read_bytes()
    read, count = Opened.read_into, iter(range(100))

    def reading_and_writing(self: Opened, buffer: memoryview, start: int) -> int:
        if start > 10_000 and next(count) == 3:  # the fourth tensor
            overwritten(path, other)
        return read(self, buffer, start)

    monkeypatch.setattr(Opened, "read_into", reading_and_writing)
    optimizer = fresh()
    with pytest.raises(CheckpointError, match="overwritten while it was read.*load again before the next step"):
        optstate.load(optimizer, path)
    with pytest.raises(optstate.InconsistentStateError):
        optimizer.step()
    optstate.load(optimizer, path)
    assert {round(float(state["exp_avg"].mean())) for state in optimizer.state.values()} == {2}


@pytest.mark.parametrize("name", ["dcp_two_ranks", "deepspeed_zero3", "deepspeed_universal3"])
def test_a_folder_whose_files_are_replaced_is_opened_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of its files is put in place between the opening of the first and the end: none of the old ones is used."""
    source = DATA / name
    shutil.copytree(source, tmp_path / "a")
    names = sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file())
    opening, done, attempts = opened_file.OpenFiles.replaced, [], []

    def replacing(self: opened_file.OpenFiles, paths: object = None) -> str | None:
        if not done:
            for path in names:
                shutil.copy(path, path.with_suffix(".new"))
                os.replace(path.with_suffix(".new"), path)
            done.append(True)
        attempts.append(opening(self, paths))  # type: ignore[arg-type]
        return attempts[-1]

    monkeypatch.setattr(opened_file.OpenFiles, "replaced", replacing)
    checkpoint = open_checkpoint(tmp_path / "a")
    assert [attempt is not None for attempt in attempts] == [True, False]
    monkeypatch.undo()
    for stored in checkpoint.tensors.values():
        load_tensor(stored)


def test_a_set_that_is_replaced_all_the_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.safetensors", 10.0, SETS["a set"])
    monkeypatch.setattr(opened_file.OpenFiles, "replaced", lambda self, paths=None: str(path))
    monkeypatch.setattr("optstate.checkpoint.open_checkpoint.sleep", lambda seconds: None)
    with pytest.raises(CheckpointError, match="files that are replaced again and again, such as 'a.safetensors'"):
        open_checkpoint(path)


# --- descriptors --------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts what the system says is open")


@needs_proc
@pytest.mark.parametrize("kind", SETS)
def test_everything_is_closed_without_the_collector(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", 10.0, SETS[kind] or None)
    optimizer = fresh()
    gc.collect()
    gc.disable()
    before = descriptors()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            for _ in range(3):
                optstate.load(optimizer, path)
                assert held(path) == {1}
                command("check", path)
            with pytest.raises(CheckpointError):
                optstate.load(optimizer, DATA / "torch_adamw" / "optimizer.pt")
        gc.collect()  # an exception that was caught may be in a circle with its frames
        assert descriptors() == before
    finally:
        gc.enable()


def test_a_file_that_outlives_its_module_ends_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the interpreter ends, what a module has is set to None one by one, before the last objects are gone."""
    (tmp_path / "a").write_bytes(b"abc")
    file = opened_file.Opened(tmp_path / "a")
    with monkeypatch.context() as patch:
        for name in [name for name in vars(opened_file) if not name.startswith("__")]:
            patch.setattr(opened_file, name, None)
        file.__del__()
    assert file.size == 3


@needs_proc
def test_a_folder_of_hundreds_of_files_keeps_few_of_them_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = [(f"p{i:03}", torch.nn.Parameter(torch.zeros(8, 8))) for i in range(300)]
    optimizer = optstate.recipes.get("lion")(named, lr=1e-3)
    for i, (_, param) in enumerate(named):
        param.grad = torch.full_like(param, float(i + 1))
    optimizer.step()
    path = tmp_path / "a.safetensors"
    optstate.save(optimizer, path, max_shard_size=256)
    assert len(list(tmp_path.iterdir())) == 301
    before, most = descriptors(), []
    read = Opened.read_into

    def counting(self: Opened, buffer: memoryview, start: int) -> int:
        most.append(descriptors())
        return read(self, buffer, start)

    monkeypatch.setattr(Opened, "read_into", counting)
    checkpoint = open_checkpoint(path)
    values = [load_tensor(stored).unique().tolist() for stored in checkpoint.tensors.values()]
    assert len(values) == 300
    assert len({value for (value,) in values}) == 300
    assert max(most) <= before + opened_file.MOST_OPEN + 2
    victim = next(iter(checkpoint.tensors.values()))
    saved(Path(victim.path), 1.0)  # it is not open any more, as others were used since
    with pytest.raises(FileChangedError, match="was replaced while it was read"):
        load_tensor(victim)
    del checkpoint, victim
    gc.collect()
    assert descriptors() == before


def test_a_view_reads_as_a_file_does(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40
    (tmp_path / "a").write_bytes(content)
    view = View(Opened(tmp_path / "a"))
    assert (view.read(10), view.tell(), view.seek(-6, os.SEEK_END)) == (content[:10], 10, len(content) - 6)
    assert (view.read(), view.read(5), view.seek(3), view.read(1 << 60)) == (content[-6:], b"", 3, content[3:])
    with pytest.raises(OSError, match="no byte -1"):
        view.seek(-1)


def test_within_a_reading_a_path_is_one_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", 10.0)
    with reading() as files:
        first = files.at(path)
        assert held(path) == {1}
        saved(path, 20.0)
        assert held(path) == {1}
        assert files.at(path) is first
        assert files.replaced([path]) == str(path)
    assert held(path) == {2}
