"""Writing safetensors files: read by the library with equal tensors, the library's own bytes, and never half a file."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files import safetensors_writer
from optstate.checkpoint.files.safetensors_check import structural_issues
from optstate.checkpoint.files.safetensors_header import read_header
from optstate.checkpoint.files.safetensors_writer import NewEntry, create, header_size, layout, write

NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip


def raw(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def entries_of(tensors: dict[str, Tensor]) -> list[NewEntry]:
    return [NewEntry(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], **options: Any) -> None:
    entries = entries_of(tensors)
    write(path, metadata, entries, (raw(tensors[entry.name]) for entry in layout(entries)), **options)


def every_dtype() -> dict[str, Tensor]:
    """One tensor of every dtype, random bytes where they mean something, names that need care."""
    torch.manual_seed(0)
    tensors = {}
    for i, (dtype, name) in enumerate(NAMES.items()):
        values = torch.randint(0, 2 if dtype == torch.bool else 256, (3, 5 * dtype.itemsize), dtype=torch.uint8)
        tensors[f"{i % 3}.weight/{name}"] = values.view(dtype)
    tensors |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        'ä\n"\\\x7f\x1b/😀': torch.ones(3),
        "\ue000": torch.ones(3),  # sorts after the emoji in UTF-16, before it in UTF-8
        "": torch.zeros(2),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    return tensors


def test_the_library_reads_every_dtype(tmp_path: Path) -> None:
    tensors = every_dtype()
    metadata = {"optstate": '{"a": 1}', "format": "pt", "ä\n": "\x1b \u2028", "": ""}
    write_tensors(tmp_path / "a.safetensors", tensors, metadata)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert raw(loaded[name]) == raw(tensor)
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert opened.metadata() == metadata
    assert read_header(tmp_path / "a.safetensors").metadata == metadata
    assert [i for i in structural_issues(tmp_path / "a.safetensors") if "its name" not in i.what] == []


@pytest.mark.parametrize("metadata", [{}, {"optstate": '{"ä": "\\n\x1b\u2028"}'}], ids=["without", "one key"])
def test_the_bytes_are_the_librarys(metadata: dict[str, str], tmp_path: Path) -> None:
    tensors = every_dtype()
    write_tensors(tmp_path / "ours", tensors, metadata)
    assert (tmp_path / "ours").read_bytes() == save(tensors, metadata or None)
    for some in {}, {"a": torch.ones(2)}, {"x": torch.zeros(0)}:
        write_tensors(tmp_path / "some", some, metadata, overwrite=True)
        assert (tmp_path / "some").read_bytes() == save(some, metadata or None)


def test_four_bit_floats_are_the_librarys_too(tmp_path: Path) -> None:
    tensor = torch.arange(12, dtype=torch.uint8).reshape(3, 4).view(torch.float4_e2m1fn_x2)
    write(tmp_path / "ours", {}, [NewEntry("a", "F4", (3, 8))], [bytes(range(12))])
    assert (tmp_path / "ours").read_bytes() == save({"a": tensor})


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors, metadata = every_dtype(), {str(i): "x" for i in range(20)}
    write_tensors(tmp_path / "one", tensors, metadata)
    backwards = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    write_tensors(tmp_path / "two", *backwards)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_tensor_may_come_in_several_buffers_of_any_kind(tmp_path: Path) -> None:
    values = torch.arange(10, dtype=torch.int64)
    parts = [values[:3].numpy(), b"", bytearray(raw(values[3:4])), memoryview(raw(values[4:])), b""]
    write(tmp_path / "a", {}, [NewEntry("a", "I64", (10,)), NewEntry("e", "F32", (0, 3))], iter(parts))
    assert torch.equal(load_file(tmp_path / "a")["a"], values)


def test_data_are_asked_for_one_after_another(tmp_path: Path) -> None:
    sizes = []

    def data() -> Iterator[bytes]:
        for _ in range(4):
            (temporary,) = tmp_path.iterdir()
            sizes.append(temporary.stat().st_size)
            yield bytes(1000)

    write(tmp_path / "a", {}, [NewEntry(name, "U8", (1000,)) for name in "abcd"], data())
    start = read_header(tmp_path / "a").data_start
    assert sizes == [start + 1000 * i for i in range(4)]


# ------------------------------------------------------------------------------------------ what cannot be written

A = NewEntry("a", "F32", (2,))


@pytest.mark.parametrize(
    ("entries", "data", "reason"),
    [
        ([A], [bytes(7)], "tensor 'a': the data end 1 bytes before it is complete"),
        ([A], [], "tensor 'a': the data end 8 bytes before it is complete"),
        ([A], [bytes(9)], "tensor 'a': a buffer of 9 bytes, 8 fit"),
        ([A], [bytes(4), bytes(5)], "tensor 'a': a buffer of 5 bytes, 4 fit"),
        ([A], [bytes(8), b"", bytes(1)], "a buffer of 1 bytes is left after the last tensor"),
        ([A], [memoryview(bytes(16))[::2]], "tensor 'a': a buffer that is not contiguous"),
        ([A, A], [bytes(8), bytes(8)], "two tensors are called 'a'"),
        ([NewEntry("__metadata__", "U8", ())], [b"1"], "no tensor can be called __metadata__"),
        ([NewEntry("a", "f32", (2,))], [bytes(8)], "unknown dtype 'f32'"),
        ([NewEntry("a", "F32", (-2,))], [bytes(8)], r"impossible shape \(-2,\)"),
        ([NewEntry("a", "F4", (3,))], [bytes(2)], r"impossible shape \(3,\) for F4"),
        ([NewEntry("\ud800", "F32", (2,))], [bytes(8)], "surrogates not allowed"),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_what_does_not_fit_leaves_no_trace(
    entries: list[NewEntry], data: list[Any], reason: str, existing: bool, tmp_path: Path
) -> None:
    if existing:
        (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ValueError, match=reason):
        write(tmp_path / "a", {}, entries, data, overwrite=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"old"] if existing else [])


def test_metadata_are_strings_within_the_formats_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for metadata in {"step": 3}, {3: "step"}, {"a": None}:
        with pytest.raises(TypeError, match="metadata are strings"):
            write(tmp_path / "a", metadata, [], [])  # type: ignore[arg-type]
    monkeypatch.setattr(safetensors_writer, "MAX_HEADER", 1000)
    with pytest.raises(ValueError, match="the header would have 1032 bytes, above the format's limit of 1000"):
        write(tmp_path / "a", {"a": "x" * 1000}, [], [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError, OSError])
@pytest.mark.parametrize("existing", [False, True])
def test_an_exception_from_the_data_passes_and_leaves_no_trace(
    error: type[BaseException], existing: bool, tmp_path: Path
) -> None:
    def data() -> Iterator[bytes]:
        yield bytes(4)
        raise error

    if existing:
        (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error):
        write(tmp_path / "a", {}, [A], data(), overwrite=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"old"] if existing else [])


@pytest.mark.parametrize("limit", [10, 4096, 1_000_000])
def test_a_full_disk_leaves_the_old_file(limit: int, tmp_path: Path) -> None:
    """The system's limit on the size of a file stands in for a full disk: a write fails in the middle of the data."""
    (tmp_path / "a").write_bytes(b"old")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written: File too large") as caught:
            write(tmp_path / "a", {}, [NewEntry("a", "U8", (2_000_000,))], [bytes(2_000_000)], overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not caught.value.refused
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod", "open"])
def test_a_failing_system_call_leaves_the_old_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(CheckpointError, match=r"a: cannot be written: No space left on device$"):
            write(tmp_path / "a", {}, [A], [bytes(8)], overwrite=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, view: real(descriptor, view[:3]))
    write(tmp_path / "a", {}, [A], [bytes(range(8))])
    assert read_header(tmp_path / "a").tensors[0].nbytes == 8
    assert (tmp_path / "a").read_bytes().endswith(bytes(range(8)))


def test_a_folder_that_is_not_there_or_may_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: No such file or directory; is its folder there"):
        write(tmp_path / "no" / "a", {}, [], [])
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        write(tmp_path / "file" / "a", {}, [], [])
    tmp_path.chmod(0o500)
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match="cannot be written: Permission denied"):
            write(tmp_path / "a", {}, [], [])
    finally:
        if root:
            os.seteuid(0)
        tmp_path.chmod(0o700)


# ------------------------------------------------------------------------------------------------------ the target


def test_an_existing_file_is_refused_unless_overwriting(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    asked = []

    def data() -> Iterator[bytes]:
        asked.append(True)
        yield bytes(8)

    with pytest.raises(CheckpointError, match="exists already; choose another name or allow overwriting") as caught:
        write(tmp_path / "a", {}, [A], data())
    assert caught.value.refused
    assert not asked  # refused before any work
    assert (tmp_path / "a").read_bytes() == b"old"
    write(tmp_path / "a", {}, [A], data(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert read_header(tmp_path / "a").tensors[0].name == "a"


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    def data() -> Iterator[bytes]:
        (tmp_path / "a").write_bytes(b"theirs")
        yield bytes(8)

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(CheckpointError, match="exists already") as caught:
        write(tmp_path / "a", {}, [A], data())
    assert caught.value.refused
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"theirs"]
    write(tmp_path / "b", {}, [A], [bytes(8)])  # where there are no links as where there are
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "b").stat().st_nlink == 1


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027])
def test_permissions(umask: int, tmp_path: Path) -> None:
    def mode(name: str) -> int:
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    old = os.umask(umask)
    try:
        write(tmp_path / "new", {}, [A], [bytes(8)])
        assert mode("new") == 0o666 & ~umask
        for kept in 0o600, 0o664, 0o444, 0o755:
            (tmp_path / "old").touch()
            (tmp_path / "old").chmod(kept)
            write(tmp_path / "old", {}, [A], [bytes(8)], overwrite=True)
            assert mode("old") == kept
    finally:
        os.umask(old)


def test_a_private_file_is_private_while_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "a").chmod(0o600)
    modes = set()

    def data() -> Iterator[bytes]:
        modes.update(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir())
        yield bytes(8)

    write(tmp_path / "a", {}, [A], data(), overwrite=True)
    assert modes == {0o600}


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/a")
    write(tmp_path / "link", {}, [A], [bytes(8)])  # to a file that is not there yet
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["a"]
    with pytest.raises(CheckpointError, match="link: exists already"):
        write(tmp_path / "link", {}, [A], [bytes(8)])
    write(tmp_path / "link", {"new": "1"}, [A], [bytes(8)], overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert read_header(tmp_path / "there" / "a").metadata == {"new": "1"}
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="a symbolic link that leads to itself"):
        write(tmp_path / "loop", {}, [A], [bytes(8)], overwrite=True)
    assert (tmp_path / "loop").is_symlink()


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, what in {"folder": "is a folder", "pipe": "is not a regular file"}.items():
        with pytest.raises(CheckpointError, match=what) as caught:
            write(tmp_path / name, {}, [A], [bytes(8)], overwrite=True)
        assert caught.value.refused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_paths_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("relative", {}, [A], [bytes(8)])
    longest = "x" * 255  # a name cannot be longer, and the temporary file's must not be
    write(longest, {}, [A], [bytes(8)])
    assert sorted(os.listdir()) == ["relative", longest]


def test_a_reader_that_maps_the_old_file_keeps_it(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a")
    old = load_file(tmp_path / "a")["a"]
    write(tmp_path / "a", {}, [A], [bytes(8)], overwrite=True)
    assert old.tolist() == [1, 1]
    assert load_file(tmp_path / "a")["a"].tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------ tensors in any order


@pytest.mark.parametrize("positioned", [True, False])
def test_tensors_in_any_order_make_the_same_file(
    positioned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not positioned:
        monkeypatch.delattr(os, "pwrite")
    tensors, metadata = every_dtype(), {"optstate": "x" * 77, "a": "1"}
    write_tensors(tmp_path / "one", tensors, metadata)
    entries = entries_of(tensors)
    with create(tmp_path / "two", entries, room=header_size(metadata, entries)) as file:
        for name in sorted(tensors, reverse=True):
            file.put(name, raw(tensors[name]))
        file.finish(metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert file.size == (tmp_path / "two").stat().st_size


def test_room_that_is_left_is_padding(tmp_path: Path) -> None:
    tensors = every_dtype()
    entries = entries_of(tensors)
    room = header_size({"optstate": "x" * 500}, entries) + 3
    with create(tmp_path / "a", entries, room=room) as file:
        for name, tensor in tensors.items():
            file.put(name, raw(tensor))
        file.finish({"optstate": "ä"})
    assert {name: raw(tensor) for name, tensor in load_file(tmp_path / "a").items()} == {
        name: raw(tensor) for name, tensor in tensors.items()
    }
    header = read_header(tmp_path / "a")
    assert header.metadata == {"optstate": "ä"}
    assert header.data_start == 8 + room + 5  # a multiple of eight
    assert [i for i in structural_issues(tmp_path / "a") if "its name" not in i.what] == []


def test_a_tensor_may_come_in_parts_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, view, position: real(descriptor, view[:3], position))
    values = torch.arange(64, dtype=torch.int64)
    data = raw(values)
    parts = [(start, min(start + 17, 512)) for start in range(0, 512, 17)]
    random.Random(0).shuffle(parts)
    entries = [NewEntry("a", "I64", (64,)), NewEntry("e", "F32", (0, 3)), NewEntry("b", "U8", (2,))]
    with create(tmp_path / "a", entries, room=1000) as file:
        file.put("b", b"2", 1)
        for start, stop in parts:
            file.put("a", memoryview(data)[start:stop], start)
            file.put("a", b"", start)
        file.put("b", b"1")
        file.finish({})
    loaded = load_file(tmp_path / "a")
    assert torch.equal(loaded["a"], values)
    assert loaded["b"].tolist() == [49, 50]
    assert loaded["e"].shape == (0, 3)


@pytest.mark.parametrize(
    ("puts", "reason"),
    [
        ([("a", bytes(4), 0)], "tensor 'a': 4 of 8 bytes were not written"),
        ([("a", bytes(2), 0), ("a", bytes(5), 3)], "tensor 'a': 1 of 8 bytes were not written"),
        ([], "tensor 'a': 8 of 8 bytes were not written"),
        ([("a", bytes(8), 0), ("a", bytes(8), 0)], "tensor 'a': bytes 0 to 8 were written already"),
        (
            [("a", bytes(2), 3), ("a", bytes(8), 0)],
            "tensor 'a': bytes 0 to 8 were written already, in whole or in part",
        ),
        ([("a", bytes(2), 3), ("a", bytes(4), 0)], "tensor 'a': bytes 0 to 4 were written already"),
        ([("a", bytes(2), 3), ("a", bytes(1), 4)], "tensor 'a': bytes 4 to 5 were written already"),
        ([("a", bytes(2), 3), ("a", bytes(2), 0), ("a", bytes(2), 2)], "tensor 'a': bytes 2 to 4 were written already"),
        ([("a", bytes(9), 0)], "tensor 'a': bytes 0 to 9 of 8"),
        ([("a", bytes(4), 5)], "tensor 'a': bytes 5 to 9 of 8"),
        ([("a", bytes(4), -1)], "tensor 'a': bytes -1 to 3 of 8"),
        ([("b", bytes(8), 0)], "tensor 'b' is none of the 1 of the file"),
        ([("a", memoryview(bytes(16))[::2], 0)], "tensor 'a': a buffer that is not contiguous"),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_parts_that_do_not_fit_leave_no_trace(
    puts: list[tuple[str, Any, int]], reason: str, existing: bool, tmp_path: Path
) -> None:
    if existing:
        (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ValueError, match=reason), create(tmp_path / "a", [A], room=100, overwrite=True) as file:
        for name, data, offset in puts:
            file.put(name, data, offset)
        file.finish({})
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"old"] if existing else [])


ROOM = header_size({}, [A])


@pytest.mark.parametrize(
    ("finishes", "error", "reason"),
    [
        (
            [{"optstate": ""}],
            ValueError,
            f"the header needs {ROOM + 32} bytes, {ROOM} were kept for it: give more room",
        ),
        ([], ValueError, r"the writing ended without finish\(\)"),
        ([{"step": 3}], TypeError, "metadata are strings"),
        ([{}, {}], ValueError, r"finish\(\) was called before"),
        ([{}, None], ValueError, "tensor 'a': the file is finished"),
    ],
)
def test_the_header_comes_once_and_must_fit(
    finishes: list[Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason), create(tmp_path / "a", [A], room=ROOM) as file:
        file.put("a", bytes(8))
        for metadata in finishes:
            if metadata is None:
                file.put("a", b"")
            else:
                file.finish(metadata)
    assert list(tmp_path.iterdir()) == []


def test_impossible_room_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_writer, "MAX_HEADER", 1000)
    for room, reason in {
        8: f"room for a header of 8 bytes, without metadata it has {ROOM} already",
        1001: "room for a header of 1008 bytes, above the format's limit of 1000",
    }.items():
        with pytest.raises(ValueError, match=reason), create(tmp_path / "a", [A], room=room):
            raise AssertionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, OSError])
@pytest.mark.parametrize("finished", [False, True])
def test_an_exception_in_the_body_passes_and_leaves_the_old_file(
    error: type[BaseException], finished: bool, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), create(tmp_path / "a", [A], room=100, overwrite=True) as file:
        file.put("a", bytes(8))
        if finished:
            file.finish({})
        raise error
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_an_existing_file_is_refused_before_the_body(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(CheckpointError, match="a: exists already") as caught, create(tmp_path / "a", [A], room=100):
        raise AssertionError
    assert caught.value.refused
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("reserving", ["yes", "not by the file system", "not by the system"])
def test_a_disk_that_is_too_small_is_known_before_the_work(
    reserving: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_supported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if reserving == "not by the file system":
        monkeypatch.setattr(os, "posix_fallocate", not_supported)
    elif reserving == "not by the system":
        monkeypatch.delattr(os, "posix_fallocate")
    (tmp_path / "a").write_bytes(b"old")
    reached = False
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, old[1]))
    try:
        with (
            pytest.raises(CheckpointError, match="cannot be written: File too large") as caught,
            create(tmp_path / "a", [NewEntry("a", "U8", (2_000_000,))], room=100, overwrite=True) as file,
        ):
            reached = True
            file.put("a", bytes(2_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert reached == (reserving != "yes")
    assert not caught.value.refused
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


# ------------------------------------------------------------------------------------------------ a killed process

# For every line it reads: forks a child that says its number and writes files for ever, waits for its end.
WRITER = """
import os, signal, sys
from optstate.checkpoint.files.safetensors_writer import NewEntry, write

def write_for_ever():
    number = 0
    while True:
        number = number % 200 + 1
        entries = [NewEntry(f"t{i:02d}", "U8", (20_000,)) for i in range(40)]
        data = (bytes([number]) * 20_000 for _ in entries)
        write(sys.argv[1], {"number": str(number)}, entries, data, overwrite=True)

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            print(os.getpid(), flush=True)  # by the child: a signal that comes before its fork is done would be lost
            write_for_ever()
        finally:
            os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


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
            while not path.exists():
                time.sleep(0.001)
            time.sleep(delay)
            os.kill(child, how)
            yield int(process.stdout.readline())
        process.stdin.close()


def assert_complete(path: Path) -> None:
    header = read_header(path)
    number = int(header.metadata["number"])
    assert len(header.tensors) == 40
    assert set(path.read_bytes()[header.data_start :]) == {number}


def test_a_killed_writer_leaves_one_complete_file(tmp_path: Path) -> None:
    """Forty kills at times that run through a write; only temporary files may stay, and later writes ignore them."""
    path = tmp_path / "a.safetensors"
    for code in stop_writers(path, [0.0007 * i for i in range(40)], signal.SIGKILL):
        assert code == -signal.SIGKILL
        assert_complete(path)
        names = {other.name for other in tmp_path.iterdir()} - {path.name}
        assert all(name.startswith(".optstate-") and name.endswith(".tmp") for name in names)
    assert names  # else no kill came in the middle of a write, and this shows nothing
    entries = [NewEntry(f"t{i:02d}", "U8", (1,)) for i in range(40)]
    write(path, {"number": "0"}, entries, [b"\0"] * 40, overwrite=True)
    assert_complete(path)
    assert {other.name for other in tmp_path.iterdir()} == names | {path.name}


def test_an_interrupted_writer_cleans_up(tmp_path: Path) -> None:
    """The same with the signal of Ctrl-C: not even a temporary file stays."""
    path = tmp_path / "a.safetensors"
    for code in stop_writers(path, [0.0007 * i for i in range(20)], signal.SIGINT):
        assert code == 7  # it ended by itself
        assert [other.name for other in tmp_path.iterdir()] == [path.name]
        assert_complete(path)
