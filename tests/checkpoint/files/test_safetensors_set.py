"""State in several files: read by the safetensors library, found through the index, and never half a set."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import optstate
from optstate.checkpoint.document.contradictions import inconsistencies
from optstate.checkpoint.document.document import KEY
from optstate.checkpoint.document.native_file import native_checkpoint
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files import atomic_write
from optstate.checkpoint.files.safetensors_check import structural_issues
from optstate.checkpoint.files.safetensors_index import read_index
from optstate.checkpoint.files.safetensors_set import create_set, find_file_or_index
from optstate.checkpoint.files.safetensors_writer import NewEntry, header_size
from optstate.checkpoint.files.tensor_bytes import load_tensor
from optstate.checkpoint.operations.plan_conversion import plan_stores
from optstate.recipes import AdamW
from tests.support.models import mlp

KILLS = int(os.environ.get("OPTSTATE_KILLS", "20"))

NAME = "opt.safetensors"
INDEX = "opt.safetensors.index.json"


def shards(count: int, stem: str = "opt") -> list[str]:
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def write_set(path: Path, sizes: dict[str, int], limit: int | None, value: int = 1, **options: Any) -> None:
    """Tensors of bytes that are all `value`."""
    entries = [NewEntry(name, "U8", (size,)) for name, size in sizes.items()]
    metadata = {KEY: f"document {value}"}
    with create_set(path, entries, room=header_size(metadata, entries), limit=limit, **options) as file:
        for name, size in reversed(sizes.items()):
            file.put(name, bytes([value]) * size)
        file.finish(metadata)


def held(folder: Path, index: str = INDEX) -> list[list[str]]:
    """The tensors of each file of a set."""
    found = read_index(folder / index)
    return [sorted(entry.name for entry in found.shards[name].tensors) for name in sorted(found.shards)]


FOUR = {"b/m": 40, "b/v": 40, "a/m": 40, "a/v": 40}
SIX = {**FOUR, "c/m": 60, "c/v": 60}


class TestTheSet:
    def test_the_library_reads_every_file(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        tensors = {f"{param}/{slot}": torch.randn(16, 8).to(dtype) for param in "dbca" for slot, dtype in SLOTS.items()}
        entries = [NewEntry(name, NAMES[tensor.dtype], (16, 8)) for name, tensor in tensors.items()]
        metadata = {KEY: "ä" * 100, "other": "x"}
        with create_set(tmp_path / NAME, entries, room=header_size(metadata, entries), limit=2000) as file:
            for name, tensor in tensors.items():
                data = tensor.view(torch.uint8).numpy().tobytes()
                file.put(name, data[100:], 100)
                file.put(name, data[:100])
            file.finish(metadata)
        assert files(tmp_path) == [*shards(2), INDEX]
        loaded = [load_file(tmp_path / name) for name in shards(2)]
        read = loaded[0] | loaded[1]
        assert len(read) == len(loaded[0]) + len(loaded[1]) == len(tensors)
        assert all(
            read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) for name, tensor in tensors.items()
        )
        for name, expected in zip(shards(2), (metadata, None), strict=True):
            with safe_open(tmp_path / name, "pt") as opened:
                assert opened.metadata() == expected
        assert structural_issues(tmp_path) == structural_issues(tmp_path / INDEX) == []

    def test_the_index_is_what_hugging_face_writes(self, tmp_path: Path) -> None:
        write_set(tmp_path / NAME, FOUR, 80)
        first, second = shards(2)
        tree = {
            "metadata": {"total_size": 160},
            "weight_map": {"a/m": second, "a/v": second, "b/m": first, "b/v": first},
        }
        assert (tmp_path / INDEX).read_text() == json.dumps(tree, indent=2, sort_keys=True) + "\n"

    def test_names_and_bytes_are_the_same_again(self, tmp_path: Path) -> None:
        for folder in "one", "two":
            (tmp_path / folder).mkdir()
            write_set(tmp_path / folder / NAME, SIX, 100)
        assert files(tmp_path / "one") == files(tmp_path / "two")
        for name in files(tmp_path / "one"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    @pytest.mark.parametrize(
        ("limit", "expected"),
        [
            (279, [["a/m", "a/v", "b/m", "b/v"], ["c/m", "c/v"]]),
            (160, [["a/m", "a/v", "b/m", "b/v"], ["c/m", "c/v"]]),
            (159, [["b/m", "b/v"], ["a/m", "a/v"], ["c/m", "c/v"]]),  # a and b do not fit together, in this order
            (119, [["b/m", "b/v"], ["a/m", "a/v"], ["c/m"], ["c/v"]]),
            (79, [["b/m"], ["b/v"], ["a/m"], ["a/v"], ["c/m"], ["c/v"]]),
            (1, [["b/m"], ["b/v"], ["a/m"], ["a/v"], ["c/m"], ["c/v"]]),  # larger than the limit, and not split
        ],
    )
    def test_a_parameter_stays_together_where_it_fits(
        self, limit: int, expected: list[list[str]], tmp_path: Path
    ) -> None:
        write_set(tmp_path / NAME, SIX, limit)
        assert held(tmp_path) == expected

    @pytest.mark.parametrize("limit", [280, 1000, None])
    def test_up_to_the_limit_it_is_one_file_as_ever(self, limit: int | None, tmp_path: Path) -> None:
        write_set(tmp_path / NAME, SIX, limit)
        assert files(tmp_path) == [NAME]
        tensors = {name: torch.ones(size, dtype=torch.uint8) for name, size in SIX.items()}
        save_file(tensors, tmp_path / "theirs", {KEY: "document 1"})
        assert (tmp_path / NAME).read_bytes() == (tmp_path / "theirs").read_bytes()

    def test_empty_tensors_belong_to_the_set_too(self, tmp_path: Path) -> None:
        write_set(tmp_path / NAME, {"e": 0, "big/m": 50, "z/m": 0}, 10)
        assert held(tmp_path) == [["e"], ["big/m"], ["z/m"]]

    def test_paths_of_every_kind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write_set(Path("plain"), FOUR, 80)
        assert files(tmp_path) == [*shards(2, "plain"), "plain.index.json"]
        Path("link").symlink_to(tmp_path)
        write_set(Path("link/plain"), FOUR, 80, overwrite=True)
        assert held(tmp_path, "plain.index.json") == [["b/m", "b/v"], ["a/m", "a/v"]]


SLOTS = {"exp_avg": torch.float32, "exp_avg_sq": torch.bfloat16, "codes": torch.uint8}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}


class TestReplacing:
    def test_a_set_by_a_set(self, tmp_path: Path) -> None:
        """Names alternate, since those of the set in place are never written to."""
        for value, stem in (1, "opt"), (2, "opt-2"), (3, "opt"):
            write_set(tmp_path / NAME, SIX, 160, value, overwrite=True)
            assert files(tmp_path) == sorted([*shards(2, stem), INDEX])
            assert all(set(load_file(tmp_path / name)["b/m" if i == 0 else "c/m"].tolist()) == {value}
                       for i, name in enumerate(shards(2, stem)))  # fmt: skip
        write_set(tmp_path / NAME, SIX, 100, 4, overwrite=True)
        assert files(tmp_path) == [*shards(4), INDEX]  # other names than those of two files

    def test_names_that_another_set_or_file_has_are_left_alone(self, tmp_path: Path) -> None:
        write_set(tmp_path / "opt-2.safetensors", FOUR, 80)
        (tmp_path / shards(2)[1]).write_bytes(b"of a killed process, or anything")
        os.mkfifo(tmp_path / "pipe.index.json")
        before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path) if name != "pipe.index.json"}
        write_set(tmp_path / NAME, FOUR, 80)
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
        assert set(files(tmp_path)) - before.keys() == {*shards(2, "opt-3"), INDEX, "pipe.index.json"}

    def test_a_file_by_a_set_and_back(self, tmp_path: Path) -> None:
        write_set(tmp_path / NAME, FOUR, None, 1)
        assert find_file_or_index(tmp_path / NAME) == str(tmp_path / NAME)
        write_set(tmp_path / NAME, FOUR, 80, 2, overwrite=True)
        assert files(tmp_path) == [*shards(2), INDEX]
        assert find_file_or_index(tmp_path / NAME) == str(tmp_path / INDEX)
        write_set(tmp_path / NAME, FOUR, 1000, 3, overwrite=True)
        assert files(tmp_path) == [NAME]
        assert set(load_file(tmp_path / NAME)["a/m"].tolist()) == {3}

    def test_files_that_another_index_names_are_kept(self, tmp_path: Path) -> None:
        write_set(tmp_path / NAME, FOUR, 80)
        (tmp_path / "copy.safetensors.index.json").write_bytes((tmp_path / INDEX).read_bytes())
        write_set(tmp_path / NAME, FOUR, 80, 2, overwrite=True)
        write_set(tmp_path / NAME, FOUR, None, 3, overwrite=True)
        assert files(tmp_path) == ["copy.safetensors.index.json", *shards(2), NAME]

    def test_an_index_that_lies_costs_no_file(self, tmp_path: Path) -> None:
        """Only what is called like a file of this set is removed."""
        (tmp_path / "sub").mkdir()
        others = [
            "weights.safetensors",
            "sub/opt-00001-of-00002.safetensors",
            "opt.txt",
            "model-00001-of-00002.safetensors",
        ]
        for name in others:
            (tmp_path / name).write_bytes(b"precious")
        outside = tmp_path.parent / "opt-00001-of-00001.safetensors"
        names = [*others, f"../{outside.name}", str(outside), "opt-00009-of-00009.safetensors"]
        outside.write_bytes(b"precious")
        for limit in 80, None:
            (tmp_path / "opt-00009-of-00009.safetensors").write_bytes(b"old")
            (tmp_path / INDEX).write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(names)}}))
            write_set(tmp_path / NAME, {"a": 9, "b": 9}, limit, overwrite=True)
            assert all((tmp_path / name).read_bytes() == b"precious" for name in others)
            assert outside.read_bytes() == b"precious"
            assert not (tmp_path / "opt-00009-of-00009.safetensors").exists()

    def test_a_set_is_as_private_as_what_it_replaces(self, tmp_path: Path) -> None:
        def modes() -> set[int]:
            return {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in files(tmp_path)}

        seen = []
        write_set(tmp_path / NAME, FOUR, None)
        (tmp_path / NAME).chmod(0o600)
        for limit in 80, 80, None:
            entries = [NewEntry(name, "U8", (size,)) for name, size in FOUR.items()]
            with create_set(tmp_path / NAME, entries, room=1000, limit=limit, overwrite=True) as file:
                seen.append(modes())  # while it is written
                for name, size in FOUR.items():
                    file.put(name, bytes(size))
                file.finish({})
            seen.append(modes())
        assert seen == [{0o600}] * 6


class TestRefusals:
    @pytest.mark.parametrize("there", [NAME, INDEX])
    @pytest.mark.parametrize("limit", [80, None])
    def test_what_is_there_is_kept_unless_overwriting(self, there: str, limit: int | None, tmp_path: Path) -> None:
        (tmp_path / there).write_bytes(b"old")
        with pytest.raises(CheckpointError, match=f"{there}: exists already; choose another name") as caught:
            write_set(tmp_path / NAME, FOUR, limit)
        assert caught.value.refused
        assert files(tmp_path) == [there]

    @pytest.mark.parametrize("limit", [80, None])
    @pytest.mark.parametrize("there", [NAME, INDEX])
    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
    def test_only_regular_files_are_replaced(
        self, make: Callable[[Path], None], there: str, limit: int | None, tmp_path: Path
    ) -> None:
        make(tmp_path / there)
        with pytest.raises(CheckpointError, match=f"{there}: is (a folder|not a regular file) and cannot") as caught:
            write_set(tmp_path / NAME, {"a": 9, "b": 9}, limit, overwrite=True)
        assert caught.value.refused
        assert files(tmp_path) == [there]

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"weight_map": []}', b"\xff", b"[" * 100_000])
    def test_an_index_that_cannot_be_read_is_not_replaced(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / INDEX).write_bytes(content)
        with pytest.raises(CheckpointError, match="not the index of a sharded set; .* remove it first") as caught:
            write_set(tmp_path / NAME, FOUR, 80, overwrite=True)
        assert caught.value.refused
        assert files(tmp_path) == [INDEX]

    def test_names_and_limits_that_cannot_be(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"the name of an index.*; give the name without \.index\.json"):
            write_set(tmp_path / INDEX, FOUR, 80)
        with pytest.raises(ValueError, match="at most 0 bytes in a file"):
            write_set(tmp_path / NAME, FOUR, 0)
        with pytest.raises(CheckpointError, match="cannot be .*No such file or directory"):
            write_set(tmp_path / "no" / NAME, FOUR, 80)
        twice = [NewEntry("a/m", "U8", (9,))] * 2
        with (
            pytest.raises(ValueError, match="two tensors are called 'a/m'"),
            create_set(tmp_path / NAME, twice, room=1000, limit=9),
        ):
            pass
        assert files(tmp_path) == []

    def test_more_files_than_can_be_open(self, tmp_path: Path) -> None:
        import resource

        old = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, old[1]))
        try:
            with pytest.raises(CheckpointError, match="100 files are too many: Too many open files; allow more bytes"):
                write_set(tmp_path / NAME, {f"{i}/m": 9 for i in range(100)}, 9)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, old)
        assert files(tmp_path) == []

    @pytest.mark.parametrize(
        ("act", "error", "reason"),
        [
            (lambda file: file.put("x", b""), ValueError, "tensor 'x' is none of the 4 of the set"),
            (lambda file: file.put("a/m", bytes(41)), ValueError, "tensor 'a/m': bytes 0 to 41 of 40"),
            (lambda file: file.finish({}), ValueError, "tensor 'b/m': 40 of 40 bytes were not written"),
            (lambda file: None, ValueError, r"the writing ended without finish\(\)"),
            (lambda file: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt, None),
        ],
    )
    @pytest.mark.parametrize("existing", [False, True])
    def test_what_breaks_off_leaves_no_trace(
        self, act: Any, error: type[BaseException], reason: str | None, existing: bool, tmp_path: Path
    ) -> None:
        if existing:
            write_set(tmp_path / NAME, FOUR, 80)
        before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
        entries = [NewEntry(name, "U8", (size,)) for name, size in FOUR.items()]
        with (
            pytest.raises(error, match=reason),
            create_set(tmp_path / NAME, entries, room=1000, limit=80, overwrite=True) as file,
        ):
            act(file)
        assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before

    @pytest.mark.parametrize("nth", range(1, 9))
    @pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
    def test_a_failure_at_any_fsync_leaves_a_whole_set(
        self, nth: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Three files, each with its folder, then the index; with the last one, of its folder, the new set is there."""
        write_set(tmp_path / NAME, SIX, 159, 1)
        real, calls = os.fsync, 0

        def fails(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise error
            real(descriptor)

        monkeypatch.setattr(atomic_write.os, "fsync", fails)
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            write_set(tmp_path / NAME, SIX, 159, 2, overwrite=True)
        monkeypatch.undo()
        assert whole(tmp_path) == (2 if nth == 8 else 1)
        if nth < 8:
            assert files(tmp_path) == [*shards(3), INDEX]

    def test_a_file_that_appears_under_a_free_name_is_kept(self, tmp_path: Path) -> None:
        entries = [NewEntry(name, "U8", (size,)) for name, size in FOUR.items()]
        with (
            pytest.raises(CheckpointError, match="exists already"),
            create_set(tmp_path / NAME, entries, room=1000, limit=80) as file,
        ):
            (tmp_path / shards(2)[0]).write_bytes(b"theirs")
            for name, size in FOUR.items():
                file.put(name, bytes(size))
            file.finish({})
        assert files(tmp_path) == [shards(2)[0]]
        assert (tmp_path / shards(2)[0]).read_bytes() == b"theirs"


# ------------------------------------------------------------------------------------------------ killed processes

# torch is never imported: a fork of a small process is quick. Sets of three files, forever, each with its own number.
WRITER = """
import os, sys
from optstate.checkpoint.files.safetensors_set import create_set
from optstate.checkpoint.files.safetensors_writer import NewEntry

def write_for_ever():
    number = 0
    while True:
        number = number % 200 + 1
        entries = [NewEntry(f"{i}/m", "U8", (200_000,)) for i in range(3)]
        with create_set(sys.argv[1], entries, room=1000, limit=200_000, overwrite=True) as file:
            for entry in entries:
                file.put(entry.name, bytes([number]) * 200_000)
            file.finish({"optstate": f"document {number}"})

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            print(os.getpid(), flush=True)
            write_for_ever()
        except KeyboardInterrupt:
            pass  # handled: a writer that the interrupt met between the lines of a `with` is closed now
        finally:
            os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def whole(folder: Path) -> int:
    """The number that all bytes of a set are; fails unless its index leads to one set that is complete."""
    index = read_index(folder / INDEX)
    assert index.metadata["total_size"] == sum(e.nbytes for h in index.shards.values() for e in h.tensors)
    (document,) = (header.metadata[KEY] for header in index.shards.values() if header.metadata)
    numbers = {n for name in index.shards for t in load_file(folder / name).values() for n in t.unique().tolist()}
    assert document == f"document {numbers.copy().pop()}"
    (number,) = numbers
    return int(number)


def stop_writers(path: Path, delays: list[float], how: signal.Signals) -> Iterator[int]:
    """Start a writing process, stop it after a delay, and give its exit code; once per delay."""
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for delay in delays:
            process.stdin.write("\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            while not (path.parent / INDEX).exists():
                time.sleep(0.001)
            time.sleep(delay)
            os.kill(child, how)
            yield int(process.stdout.readline())
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_writer_leaves_one_complete_set(how: signal.Signals, tmp_path: Path) -> None:
    """At times that run through a write. A kill may leave what no index names, Ctrl-C no temporary file."""
    left = set()
    for code in stop_writers(tmp_path / NAME, [0.0013 * i for i in range(KILLS)], how):
        assert code == (7 if how is signal.SIGINT else -how)
        number = whole(tmp_path)
        named = set(read_index(tmp_path / INDEX).shards)
        left = set(files(tmp_path)) - named - {INDEX}
        if how is signal.SIGINT:
            assert all(name.startswith("opt-") for name in left)  # it came while the old set was removed
    if how is signal.SIGKILL and KILLS >= 20:
        assert left  # else no kill came in the middle of a write, and this shows nothing
    write_set(tmp_path / NAME, {f"{i}/m": 9 for i in range(3)}, 9, number % 200 + 1, overwrite=True)
    assert whole(tmp_path) == number % 200 + 1


def interrupt_at(line: int, action: Callable[[], None]) -> bool:
    """Run the action, with a Ctrl-C at one line of `contextlib`: counted over the run. Whether it got so far."""
    seen = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != contextlib.__file__:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return seen >= line


@pytest.mark.parametrize("limit", [9, 100])
def test_an_interrupt_between_the_lines_of_with_statements_leaves_no_temporary_file(limit: int, tmp_path: Path) -> None:
    """At every line of `contextlib`: there no writer of ours is asked."""
    gc.disable()  # what only a collection would remove is left
    try:
        for line in count(1):
            if not interrupt_at(line, lambda: write_set(tmp_path / NAME, {"a": 9, "b": 9}, limit, overwrite=True)):
                break
            assert [name for name in os.listdir(tmp_path) if name.startswith(".optstate")] == [], line
    finally:
        gc.enable()
    assert line > 50


# --------------------------------------------------------------------------------------------- optimizers and sets


def saved(folder: Path, limit: int | None) -> Any:
    """An optimizer after two steps, saved: 8 tensors of 64 to 2048 bytes."""
    model = mlp(torch.float32)
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    optstate.save(optimizer, folder / NAME, max_shard_size=limit)
    return optimizer


class TestNative:
    @pytest.mark.parametrize("given", [NAME, INDEX, ""])
    def test_a_set_opens_as_the_one_file_does(self, given: str, tmp_path: Path) -> None:
        for folder, limit in ("one", None), ("set", 600):
            torch.manual_seed(0)
            (tmp_path / folder).mkdir()
            saved(tmp_path / folder, limit)
        one, many = native_checkpoint(tmp_path / "one" / NAME), native_checkpoint(tmp_path / "set" / given)
        assert (
            (one.kind, one.certainty, one.notes)
            == (many.kind, many.certainty, many.notes)
            == ("optstate", "declared", ())
        )
        assert one.document == many.document
        assert list(one.tensors) == list(many.tensors)
        for key, stored in one.tensors.items():
            assert torch.equal(load_tensor(stored), load_tensor(many.tensors[key]))
        assert one.files == (str(tmp_path / "one" / NAME),)
        assert many.path == str(tmp_path / "set" / INDEX)
        assert sorted(many.files) == [str(tmp_path / "set" / name) for name in files(tmp_path / "set")]
        assert len(many.files) > 3

    def test_a_set_is_converted_in_place(self, tmp_path: Path) -> None:
        from optstate.checkpoint.operations.run_conversion import write_native

        optimizer = saved(tmp_path, 600)
        conversion = plan_stores(native_checkpoint(tmp_path), None, {"exp_avg_sq": "factored"})
        write_native(conversion, tmp_path / NAME, overwrite=True, max_shard_size=1000)
        converted = native_checkpoint(tmp_path)
        assert sorted(map(os.path.basename, converted.files)) == files(tmp_path)
        assert len(converted.document.history) == 1
        param = optimizer.param_groups[0]["params"][0]
        assert torch.equal(load_tensor(converted.tensors["0.weight/exp_avg"]), optimizer.state[param]["exp_avg"])

    def test_a_set_with_a_lost_or_exchanged_file(self, tmp_path: Path) -> None:
        saved(tmp_path, 600)
        names = [name for name in files(tmp_path) if name != INDEX]
        contents = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

        def broken(match: str) -> None:
            with pytest.raises(CheckpointError, match=match) as caught:
                native_checkpoint(tmp_path / NAME)
            assert "\n" not in str(caught.value)
            for name, content in contents.items():
                (tmp_path / name).write_bytes(content)

        (tmp_path / names[-1]).unlink()
        broken(f"{names[-1]}.*no such file")
        (tmp_path / names[-1]).write_bytes(contents[names[-1]][:-1])
        broken("truncated")
        tensors = load_file(tmp_path / names[0])
        save_file(tensors, tmp_path / names[0])
        broken(f"no optstate document in a set of {len(names)} files")
        with safe_open(tmp_path / names[0], "pt") as opened:
            document = opened.metadata()
        save_file(load_file(tmp_path / names[1]), tmp_path / names[1], document)
        broken(f"2 optstate documents, in {names[0]}, {names[1]}, in a set of")
        tree = json.loads(contents[INDEX])
        gone = next(name for name, shard in tree["weight_map"].items() if shard == names[-1])
        del tree["weight_map"][gone]
        (tmp_path / INDEX).write_text(json.dumps(tree))
        broken(f"the tensor '{gone}' is missing")

    def test_tensors_that_belong_to_nothing_are_told(self, tmp_path: Path) -> None:
        saved(tmp_path, None)
        with safe_open(tmp_path / NAME, "pt") as opened:
            document = opened.metadata()
        tensors: dict[str, Tensor] = {**load_file(tmp_path / NAME), "x\x1b": torch.zeros(2)}
        save_file(tensors, tmp_path / NAME, document)
        (issue,) = inconsistencies(native_checkpoint(tmp_path / NAME))
        assert (issue.where, issue.what) == ("x\\x1b", "belongs to no statistic in the document")

    def test_files_that_are_none_of_ours(self, tmp_path: Path) -> None:
        save_file({"w": torch.zeros(2)}, tmp_path / NAME)
        with pytest.raises(CheckpointError, match="no metadata 'optstate'"):
            native_checkpoint(tmp_path / NAME)
        with pytest.raises(CheckpointError, match="no such file"):
            native_checkpoint(tmp_path / "absent")
        with pytest.raises(CheckpointError, match=r"a folder with no \*\.safetensors\.index\.json"):
            native_checkpoint(tmp_path)

    def test_overwriting_is_asked_for_sets_too(self, tmp_path: Path) -> None:
        optimizer = saved(tmp_path, 600)
        before = files(tmp_path)
        with pytest.raises(CheckpointError, match=f"{INDEX}: exists already") as caught:
            optstate.save(optimizer, tmp_path / NAME, overwrite=False)
        assert caught.value.refused
        with pytest.raises(ValueError, match="at most 0 bytes in a file"):
            optstate.save(optimizer, tmp_path / NAME, max_shard_size=0)
        assert files(tmp_path) == before
        optstate.save(optimizer, tmp_path / NAME)
        assert files(tmp_path) == [NAME]
