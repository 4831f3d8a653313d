"""Writing torch.save files without torch: torch's own bytes around the records, and what torch.load makes of them."""

from __future__ import annotations

import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.serialization import config

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.file_kinds import TORCH_ZIP, identify
from optstate.checkpoint.files.torch_archive_writer import (
    Constant,
    NewTensor,
    Subclass,
    create_torch,
    make_directory,
    make_foot,
    make_head,
    place_records,
)

NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def constant(tensor: Tensor) -> Constant:
    return Constant(NAMES[tensor.dtype], tuple(tensor.shape), raw(tensor))


def described(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree with a NewTensor for every tensor, which are put into `tensors` by their keys."""
    if isinstance(tree, Tensor):
        key = f"t{len(tensors)}"
        tensors[key] = tree
        return NewTensor(key, NAMES[tree.dtype], tuple(tree.shape))
    if type(tree) is dict:
        return {key: described(value, tensors) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(described(value, tensors) for value in tree)
    return tree


def write_tree(path: Path, tree: Any, **options: Any) -> None:
    tensors: dict[str, Tensor] = {}
    with create_torch(path, described(tree, tensors), **options) as file:
        for key, tensor in reversed(tensors.items()):
            file.put(key, raw(tensor))


def assert_equal(a: Any, b: Any, values: bool = True) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
        assert not values or raw(a) == raw(b)
    elif isinstance(a, dict):
        assert list(map(repr, a)) == list(map(repr, b))
        for x, y in zip(a.values(), b.values(), strict=True):
            assert_equal(x, y, values)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y, values)
    else:
        assert repr(a) == repr(b)


def said(path: Path) -> Any:
    """A file's pickle read without calling anything of torch: its values, the calls in it and their arguments."""

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full = f"{module}.{name}"
            return set if full == "builtins.set" else lambda *given: (full, *given) if given else full

        def persistent_load(self, pid: Any) -> Any:
            return pid

    def plain(value: Any) -> Any:
        if callable(value):  # a global that is not called
            return value()
        if isinstance(value, dict):
            return {repr(key): plain(item) for key, item in value.items()}
        return type(value)(map(plain, value)) if isinstance(value, list | tuple) else repr(value)

    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return plain(Reader(io.BytesIO(archive.read(name))).load())


def every_dtype() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for dtype, name in NAMES.items():
        values = torch.randint(0, 2 if dtype == torch.bool else 256, (3, 5 * dtype.itemsize), dtype=torch.uint8)
        tensors[name] = values.view(dtype)
    return tensors


def a_tree() -> dict[Any, Any]:
    return {
        "state": {
            0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(16, 9), "exp_avg_sq": torch.rand(16, 9)},
            1: {"step": 7, "momentum": torch.randn(5).bfloat16(), "nothing": None},
            -3: {"lists": [torch.ones(2, 1, 4), [None], []], "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))},
        },
        "every dtype": every_dtype(),
        "empty": [torch.zeros(0), torch.zeros(0, 4), torch.zeros(3, 0, 2, dtype=torch.uint16)],
        "after the empty": torch.tensor(True),
        "param_groups": [{"lr": torch.tensor(1e-3), "betas": (0.9, 0.999), "params": [0, 1], "fused": True}],
        "integers": [s * (2**n + d) for n in (0, 7, 8, 15, 16, 31, 32, 64, 2000) for d in (-1, 0) for s in (1, -1)],
        "floats": [0.0, -0.0, 1e-310, 1.5, float("inf"), float("nan")],
        "strings": ["", "ä\n\0", "😀", "\ud800", "x" * 300],
        "bytes": [b"x", bytes(range(256))],
        "keys": {True: 1, 2.5: 2, (1, "a"): 3, None: 4, b"k": 5, "": 6},
        "sets": [set(), {3}, {(1, "a")}],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- read by torch.load


@pytest.mark.parametrize(
    "options",
    [
        {"weights_only": True},
        {"weights_only": False},
        {"weights_only": True, "mmap": True},
        {"weights_only": True, "map_location": "meta"},
    ],
    ids=str,
)
def test_torch_reads_the_tree(options: dict[str, Any], tmp_path: Path) -> None:
    tree = a_tree()
    write_tree(tmp_path / "a.pt", tree)
    assert identify(tmp_path / "a.pt") == TORCH_ZIP
    loaded = torch.load(tmp_path / "a.pt", **options)
    if "map_location" in options:
        assert loaded["state"][0]["exp_avg"].is_meta
    assert_equal(loaded, tree, values="map_location" not in options)


def test_where_the_tensors_lie_can_be_computed(tmp_path: Path) -> None:
    """torch.load with this setting adds up sizes from the first tensor on, by the rules of torch's own writer."""
    tree = a_tree()
    write_tree(tmp_path / "a.pt", tree)
    with config.patch("load.calculate_storage_offsets", True):
        assert_equal(torch.load(tmp_path / "a.pt", mmap=True, weights_only=True), tree)
    meta = torch.load(tmp_path / "a.pt", map_location="meta", weights_only=True)
    content = (tmp_path / "a.pt").read_bytes()
    for name, tensor in tree["every dtype"].items():
        start = meta["every dtype"][name].untyped_storage()._checkpoint_offset
        assert start % 64 == 0
        assert content[start:].startswith(raw(tensor))


def test_the_pickle_says_what_torchs_own_says(tmp_path: Path) -> None:
    tree = a_tree()
    torch.save(tree, tmp_path / "theirs.pt")
    write_tree(tmp_path / "ours.pt", tree)
    assert said(tmp_path / "ours.pt") == said(tmp_path / "theirs.pt")


def test_no_bytes_are_read_with_weights_only(tmp_path: Path) -> None:
    """Python's own pickle calls `bytes` for them, which torch.load refuses."""
    write_tree(tmp_path / "a.pt", [b""])
    assert torch.load(tmp_path / "a.pt", weights_only=True) == [b""]


def test_an_optimizer_goes_on_from_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
    one = torch.optim.AdamW(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    one.step()
    write_tree(tmp_path / "a.pt", one.state_dict())
    others = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    two = torch.optim.AdamW(others, lr=0.5)
    two.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    for parameter, other in zip(parameters, others, strict=True):
        other.grad = parameter.grad
    one.step()
    two.step()
    for parameter, other in zip(parameters, others, strict=True):
        assert torch.equal(parameter, other)
        assert two.state[other]["step"] == 2


def test_one_object_is_one_storage_and_equal_objects_are_several(tmp_path: Path) -> None:
    """Steps that share a storage would be counted up once per parameter."""
    table, new = constant(torch.rand(256)), NewTensor("new", "F32", (2,))
    steps = [constant(torch.tensor(1.0)) for _ in range(2)]
    with create_torch(tmp_path / "a.pt", {"maps": [table, table], "new": (new, new), "steps": steps}) as file:
        file.put("new", bytes(8))
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    for pair in loaded["maps"], loaded["new"]:
        assert pair[0].data_ptr() == pair[1].data_ptr()
    assert raw(loaded["maps"][0]) == table.data
    torch._foreach_add_(loaded["steps"], 1)
    assert loaded["steps"] == [2, 2]
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 4


def test_tensor_subclasses_of_torchao(tmp_path: Path) -> None:
    from torchao.optim.subclass_8bit import OptimState8bit

    torch.manual_seed(0)
    state = OptimState8bit.zeros((24, 64), True, 256)
    state.copy_(torch.randn(24, 64))
    inner = {"codes": state.codes, "scale": state.scale, "qmap": state.qmap}
    tensors: dict[str, Tensor] = {}
    content = {**described(inner, tensors), "signed": True, "block_size": 256}
    name = "torchao.optim.subclass_8bit.OptimState8bit"
    with create_torch(tmp_path / "a.pt", {"exp_avg": Subclass(name, "F32", (24, 64), content)}) as file:
        for key, tensor in tensors.items():
            file.put(key, raw(tensor))
    torch.save({"exp_avg": state}, tmp_path / "theirs.pt")
    assert said(tmp_path / "a.pt") == said(tmp_path / "theirs.pt")
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=False)["exp_avg"]
    with torch.serialization.safe_globals([OptimState8bit]):
        safe = torch.load(tmp_path / "a.pt", weights_only=True)["exp_avg"]
    for loaded in safe, torch.load(tmp_path / "a.pt", weights_only=False)["exp_avg"]:
        assert type(loaded) is OptimState8bit
        assert loaded.__dict__.keys() == theirs.__dict__.keys()
        assert (loaded.dtype, loaded.shape, loaded.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert (loaded.signed, loaded.block_size) == (True, 256)
        for part, expected in inner.items():
            assert_equal(getattr(loaded, part), expected)
        assert torch.equal(loaded.dequantize(), state.dequantize())
    with pytest.raises(pickle.UnpicklingError, match="OptimState8bit was not an allowed global"):
        torch.load(tmp_path / "a.pt", weights_only=True)


# --------------------------------------------------------------------------------------------------- the bytes


def test_the_archive_is_torchs_own_byte_for_byte(tmp_path: Path) -> None:
    torch.save(a_tree(), tmp_path / "theirs.pt")
    with zipfile.ZipFile(tmp_path / "theirs.pt") as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    records = place_records((name, len(data)) for name, data in contents.items())
    checksums = [zlib.crc32(data) for data in contents.values()]
    ours = b"".join(
        make_head(record) + data + make_foot(record, checksum)
        for record, data, checksum in zip(records, contents.values(), checksums, strict=True)
    )
    assert ours + make_directory(records, checksums) == (tmp_path / "theirs.pt").read_bytes()


def test_archives_above_four_gigabytes_are_torchs_own_too(tmp_path: Path) -> None:
    """torch writes the archive without the tensors' bytes, into a file that is a hole but for what is compared."""
    sizes = [12, 2**32 + 5, 12, 0, 2**32 - 1, 2**32 - 2, 3]
    tensors = [
        torch.from_file(str(tmp_path / f"hole {i}"), shared=True, size=size, dtype=torch.uint8)
        if size
        else torch.empty(0, dtype=torch.uint8)
        for i, size in enumerate(sizes)
    ]
    with torch.serialization.skip_data():
        torch.save(tensors, tmp_path / "theirs.pt")
    with open(tmp_path / "theirs.pt", "rb") as file, zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        records = place_records((info.filename, info.file_size) for info in infos)
        assert [record.size for record in records if "/data/" in record.name] == sizes
        for record, info in zip(records, infos, strict=True):
            file.seek(info.header_offset)
            assert file.read(len(make_head(record))) == make_head(record)
            assert file.tell() == record.start
            file.seek(record.size, os.SEEK_CUR)
            assert file.read(len(make_foot(record, info.CRC))) == make_foot(record, info.CRC)
        assert file.read() == make_directory(records, [info.CRC for info in infos])


def test_more_records_than_the_old_end_record_counts() -> None:
    records = place_records((f"archive/data/{number}", 0) for number in range(70_000))
    archive = b"".join(
        make_head(record) + bytes(record.start - record.position - len(make_head(record))) for record in records
    )
    with zipfile.ZipFile(io.BytesIO(archive + make_directory(records, [0] * 70_000))) as opened:
        assert len(opened.infolist()) == 70_000
        assert opened.read("archive/data/69999") == b""


def test_other_readers_find_no_fault(tmp_path: Path) -> None:
    write_tree(tmp_path / "a.pt", a_tree())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None  # the checksums
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the file is called, in whatever order the tensors come, and however this process hashes strings."""
    script = (
        "import sys; from optstate.checkpoint.files.torch_archive_writer import *\n"
        "tree = [set('abcdefgh'), NewTensor('a', 'U8', (3,)), NewTensor('b', 'U8', (100,))]\n"
        "with create_torch(sys.argv[1], tree) as file:\n"
        "    for key in sys.argv[2]: file.put(key, key.encode() * {'a': 3, 'b': 100}[key])\n"
        "assert 'torch' not in sys.modules and 'pickle' not in sys.modules\n"
    )
    for name, order, seed in ("one.pt", "ab", "1"), ("two", "ba", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", script, tmp_path / name, order], env=environment, check=True)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two").read_bytes()


# ------------------------------------------------------------------------------------------ what cannot be written

A = NewTensor("a", "F32", (2,))
LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("tree", "error", "reason"),
    [
        ([A, NewTensor("a", "F32", (2,))], ValueError, "two tensors have the key 'a'"),
        (NewTensor("a", "F4", (2,)), ValueError, "tensor 'a': torch files hold no 'F4', known: BOOL, U8"),
        (NewTensor("a", "F32", (-2, -1)), ValueError, r"tensor 'a': impossible shape \(-2, -1\)"),
        (NewTensor("a", "F32", (2.0,)), ValueError, r"tensor 'a': impossible shape \(2.0,\)"),  # type: ignore[arg-type]
        (Constant("F32", (2,), bytes(7)), ValueError, r"a constant: 7 bytes for F32 of shape \(2,\)"),
        (Subclass("Class", "F32", (2,), {}), ValueError, "'Class' is not the full name of a class"),
        (Subclass("ä.b", "F32", (2,), {}), ValueError, "'ä.b' is not the full name of a class"),
        (Subclass("a.b\ncos\nsystem", "F32", (2,), {}), ValueError, r"'a.b\\ncos\\nsystem' is not the full name"),
        (LOOP, ValueError, "deeper than 100 levels, or one that contains itself"),
        (2**3000, ValueError, "an integer of 376 bytes cannot be written, 255 can"),
        ({"a": 1j}, TypeError, "a builtins.complex cannot be written"),
        ([torch.ones(2)], TypeError, "a torch.Tensor cannot be written"),
        ([torch.float32], TypeError, "a torch.dtype cannot be written"),
        ({torch.nn.Parameter: 1}, TypeError, "cannot be written"),
    ],
)
def test_trees_that_cannot_be_written(tree: Any, error: type[Exception], reason: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=reason), create_torch(tmp_path / "a", tree):
        raise AssertionError  # refused before any work
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("puts", "reason"),
    [
        ([("a", bytes(7))], "tensor 'a': a buffer of 7 bytes, 8 are needed"),
        ([("a", bytes(9))], "tensor 'a': a buffer of 9 bytes, 8 are needed"),
        ([("a", memoryview(bytes(16))[::2])], "tensor 'a': a buffer that is not contiguous"),
        ([("c", bytes(8))], "tensor 'c' is none of the 2 of the file"),
        ([("a", bytes(8)), ("a", bytes(8))], "tensor 'a' was written already"),
        ([("a", bytes(8))], "tensor 'b' was not written, one of 1"),
        ([], "tensor 'a' was not written, one of 2"),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_tensors_that_do_not_fit_leave_no_trace(
    puts: list[tuple[str, Any]], reason: str, existing: bool, tmp_path: Path
) -> None:
    if existing:
        (tmp_path / "a").write_bytes(b"old")
    with (
        pytest.raises(ValueError, match=reason),
        create_torch(tmp_path / "a", [A, NewTensor("b", "F32", (0,))], overwrite=True) as file,
    ):
        for key, data in puts:
            file.put(key, data)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"old"] if existing else [])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, OSError])
def test_an_exception_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), create_torch(tmp_path / "a", A, overwrite=True) as file:
        file.put("a", bytes(8))
        raise error
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_an_existing_file_is_refused_unless_overwriting(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(CheckpointError, match="a: exists already") as caught, create_torch(tmp_path / "a", A):
        raise AssertionError
    assert caught.value.refused
    write_tree(tmp_path / "a", torch.ones(2), overwrite=True)
    assert torch.load(tmp_path / "a").tolist() == [1, 1]


@pytest.fixture
def limited() -> Iterator[None]:
    """The system's limit on the size of a file stands in for a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("reserving", [True, False])
def test_a_full_disk_leaves_the_old_file(reserving: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"old")
    reached = []
    if not reserving:
        monkeypatch.delattr(os, "posix_fallocate")
    with (
        pytest.raises(CheckpointError, match="a: cannot be written: File too large"),
        create_torch(tmp_path / "a", NewTensor("a", "U8", (200_000,)), overwrite=True) as file,
    ):
        reached.append(True)
        file.put("a", bytes(200_000))
    assert bool(reached) is not reserving  # known before the work
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    child = os.fork()
    if child == 0:
        try:
            with create_torch(tmp_path / "a", A, overwrite=True) as file:
                file.put("a", bytes(8))
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == b"old"
    (temporary,) = (path.name for path in tmp_path.iterdir() if path.name != "a")
    assert temporary.startswith(".optstate-")
    assert temporary.endswith(".tmp")
