"""Files of torch.save read without torch: the same trees and numbers as torch.load, and nothing else whatever comes."""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files import dtypes, torch_archive_reader
from optstate.checkpoint.files.dtypes import BITS
from optstate.checkpoint.files.pickle_machine import Global, Stranger, Unread
from optstate.checkpoint.files.tensor_place import Stored
from optstate.text import escaped
from tests.support.paths import DATA

DATA = DATA / "hostile_torch"
LAYOUTS = pytest.mark.parametrize("layout", ["zip", "older"])

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def save(value: Any, path: Path, layout: str) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=layout == "zip")
    return path


def tensor_of(stored: Stored) -> Tensor:
    """The numbers of a tensor in a file, by its place and strides."""
    dtype = DTYPES[stored.dtype]
    if not stored.elements:
        return torch.empty(stored.shape, dtype=dtype)
    content = bytearray(Path(stored.path).read_bytes()[stored.start : stored.start + stored.span])
    assert len(content) == stored.span
    flat = torch.frombuffer(content, dtype=dtype)
    return flat.view(stored.shape) if stored.stride is None else flat.as_strided(stored.shape, stored.stride)


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Tensor):
        read = tensor_of(ours)
        assert (read.dtype, read.shape) == (theirs.dtype, theirs.shape)
        assert ours.stride is None or ours.stride == theirs.stride()
        assert (ours.stride is None) == theirs.is_contiguous()
        as_bytes = [
            t.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (read, theirs)
        ]
        assert torch.equal(*as_bytes)
    elif isinstance(theirs, torch.dtype):
        assert ours == Global(str(theirs))
    elif isinstance(theirs, torch.Size):
        assert type(ours) is tuple
        assert ours == tuple(theirs)
    elif isinstance(theirs, dict):
        assert type(ours) is dict
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs)
        assert len(ours) == len(theirs)
        for mine, value in zip(ours, theirs, strict=True):
            assert_same(mine, value)
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs or (ours != ours and theirs != theirs)


def assert_like_torch(path: Path) -> Any:
    ours = torch_archive_reader.read_torch_file(path)
    assert_same(ours, torch.load(path, weights_only=True))
    return ours


def refusal(path: Path, read: Any = torch_archive_reader.read_torch_file, refused: bool = False) -> str:
    """The message of the CheckpointError that reading raises: one printable line that begins with the path."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(escaped(os.fspath(path))[:50])
    assert caught.value.refused == refused
    return message


def trained(make: Any, **named: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    optimizer = make(model.named_parameters() if named.pop("named", False) else model.parameters(), **named)
    for _ in range(2):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    state: dict[str, Any] = optimizer.state_dict()
    return state


BASE = torch.arange(60.0).view(6, 10)

VALUES: dict[str, Any] = {
    "adamw": lambda: trained(torch.optim.AdamW, lr=1e-3),
    "named groups": lambda: trained(torch.optim.AdamW, named=True, lr=torch.tensor(1e-3), amsgrad=True),
    "adafactor": lambda: trained(torch.optim.Adafactor),
    "stateless": lambda: trained(torch.optim.SGD, lr=0.1),
    "training": lambda: {"epoch": 3, "model": nn.Linear(3, 2).state_dict(), "optimizer": trained(torch.optim.Adagrad)},
    "nested": lambda: {"a": [1, 2.5, None, True, "é", b"\x00\xff", (), ((1,), [{}])], 7: {0: {1: torch.ones(2)}}},
    "containers": lambda: [collections.OrderedDict(b=1, a=2), collections.Counter("aab"), {1, 2}, 1 + 2j, BASE.shape],
    "numbers": lambda: [0, -1, 2**40, 2**80, -(2**63), 1e-300, math.inf, math.nan, -0.0],
    "dtypes": lambda: [*DTYPES.values(), torch.zeros(2).dtype],
    "0-d": lambda: [torch.tensor(3.0), torch.tensor(5), torch.tensor(True), BASE[2, 3]],
    "empty": lambda: [torch.empty(0), torch.empty(3, 0, 2), BASE[6:], BASE[:, :0], torch.empty(0, 5)[:, 2:]],
    "sliced": lambda: [BASE[1:3], BASE[:, 2:4], BASE[::2, ::3], BASE[5], BASE[5, 9], BASE[:, 9]],
    "transposed": lambda: [BASE.T, BASE.view(2, 3, 10).permute(2, 0, 1), BASE[None, :, None], BASE.view(3, 20).T[4:7]],
    "shared": lambda: [BASE, BASE, BASE[2:], BASE.view(-1)],
    "expanded": lambda: [
        torch.ones(1, 7)[:, :3].expand(1, 3),
        torch.arange(9.0)[4:5].expand(3),
        torch.ones(()).expand(1),
    ],
    "parameter": lambda: [nn.Parameter(torch.randn(3)), nn.Parameter(torch.tensor([1, 2]), requires_grad=False)],
    "gradient": lambda: [torch.randn(3, requires_grad=True)],
    "storages": lambda: [torch.ones(3).bfloat16(), torch.tensor([True, False]), torch.tensor([1], dtype=torch.int8)],
}


@LAYOUTS
@pytest.mark.parametrize("name", VALUES)
def test_what_torch_saves_is_read(name: str, layout: str, tmp_path: Path) -> None:
    assert_like_torch(save(VALUES[name](), tmp_path / "a.pt", layout))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_with_a_name(dtype: torch.dtype, layout: str, tmp_path: Path) -> None:
    raw = torch.arange(48, dtype=torch.uint8) % 2 if dtype == torch.bool else torch.arange(48, dtype=torch.uint8)
    whole = raw.view(dtype)
    value = {"whole": whole, "part": whole.view(-1, 2)[1:, 1]}
    assert_same(
        torch_archive_reader.read_torch_file(save(value, tmp_path / "a.pt", layout)), value
    )  # torch itself cannot read some of these


def test_the_dtypes_are_those_of_the_format() -> None:
    assert {str(dtype): name for name, dtype in DTYPES.items()} == dtypes.SAFETENSORS_NAMES
    assert set(dtypes.SAFETENSORS_NAMES.values()) | {"F4", "F6_E2M3", "F6_E3M2"} == set(BITS)
    for name, ours in dtypes.STORAGES.items():
        if name != "UntypedStorage":
            assert getattr(torch, name).dtype == DTYPES[ours]


@LAYOUTS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(protocol: int, layout: str, tmp_path: Path) -> None:
    value = {"a": BASE[2:], "b": [b"bytes", 2**70, {1}, collections.OrderedDict(x=torch.ones(2).bfloat16())]}
    torch.save(value, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=layout == "zip")
    assert_same(torch_archive_reader.read_torch_file(tmp_path / "a.pt"), value)


def test_a_tensor_with_attributes_is_a_tensor(tmp_path: Path) -> None:
    tensor, parameter = torch.arange(3.0), nn.Parameter(torch.arange(4.0))
    tensor.note = parameter.note = "kept by torch"  # type: ignore[attr-defined]
    assert_like_torch(save([tensor, parameter], tmp_path / "a.pt", "zip"))


def test_a_storage_itself_is_a_flat_tensor(tmp_path: Path) -> None:
    save(BASE.untyped_storage(), tmp_path / "a.pt", "zip")
    ours = torch_archive_reader.read_torch_file(tmp_path / "a.pt")
    assert isinstance(ours, Stored)
    assert (ours.dtype, ours.shape) == ("U8", (240,))
    assert torch.equal(tensor_of(ours).view(torch.float32), BASE.view(-1))


def test_many_storages_and_any_name_of_the_folder(tmp_path: Path) -> None:
    value = {i: torch.full((i % 5,), float(i)) for i in range(300)}
    assert_like_torch(save(value, tmp_path / "so.me na\u00efme.bin", "zip"))


# Classes of optimizers and training stacks.


@pytest.mark.parametrize("bits", ["8bit", "4bit", "Fp8"])
@pytest.mark.parametrize("older", [False, True])
def test_torchao_statistics_are_objects_with_their_tensors(
    bits: str, older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip(f"torchao.optim.subclass_{bits.lower()}")
    kind = getattr(module, f"OptimState{bits}")
    theirs = kind.zeros((64, 128)) if bits == "Fp8" else kind.zeros((64, 128), signed=True)
    for name in theirs.tensor_attrs:
        getattr(theirs, name).view(torch.uint8).random_()
    state = {"state": {0: {"exp_avg": theirs}}}
    if older:  # the place that it had before
        home = kind.__module__.replace("torchao.optim", "torchao.prototype.low_bit_optim")
        monkeypatch.setitem(sys.modules, home, types.ModuleType(home))
        monkeypatch.setattr(sys.modules[home], kind.__name__, kind, raising=False)
        monkeypatch.setattr(kind, "__module__", home)
    ours = torch_archive_reader.read_torch_file(save(state, tmp_path / "a.pt", "zip"))["state"][0]["exp_avg"]
    assert ours.name == f"{kind.__module__}.{kind.__name__}"
    assert ours.args[:3] == (Global(ours.name), Global("torch.float32"), (64, 128))
    assert set(theirs.tensor_attrs) < set(ours.state)
    for name in theirs.tensor_attrs:
        assert_same(ours.state[name], getattr(theirs, name))
    if bits != "Fp8":
        assert ours.state["signed"] is True


KEPT = [
    ("galore_torch.galore_projector", "GaLoreProjector"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
]


@LAYOUTS
@pytest.mark.parametrize(("module", "name"), KEPT, ids=str)
def test_objects_that_are_kept(
    module: str, name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(name, (), {"__module__": module})
    for end in range(len(module.split("."))):
        above = module.rsplit(".", end)[0]
        monkeypatch.setitem(sys.modules, above, types.ModuleType(above))
    monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
    value = kind()
    value.__dict__.update(rank=8, ortho_matrix=BASE.T, proj_type="std")
    ours = torch_archive_reader.read_torch_file(save({"projector": value}, tmp_path / "a.pt", layout))["projector"]
    assert (ours.name, ours.args) == (f"{module}.{name}", ())
    assert_same(ours.state, value.__dict__)


def test_numpys_numbers_are_numbers_and_its_arrays_are_inert(tmp_path: Path) -> None:
    value = {"scalar": np.float64(1.5), "array": np.arange(3, dtype=np.uint32)}
    ours = torch_archive_reader.read_torch_file(save(value, tmp_path / "a.pt", "zip"))
    scalar, array = ours["scalar"], ours["array"]
    assert (type(scalar), scalar) == (float, 1.5)
    assert array.name == "numpy._core.multiarray._reconstruct"
    assert array.args[0] == Global("numpy.ndarray")
    assert array.state[4] == value["array"].tobytes()


def test_the_files_of_torch_distributed_checkpoint(tmp_path: Path) -> None:
    state = {"optim": trained(torch.optim.AdamW)["state"], "lr": 0.25, "matrix": BASE.bfloat16()}
    dcp.save(state, checkpoint_id=tmp_path / "folder", no_dist=True)
    metadata = torch_archive_reader.read_pickle(tmp_path / "folder" / ".metadata")
    assert metadata.name == "torch.distributed.checkpoint.metadata.Metadata"
    matrix = metadata.state["state_dict_metadata"]["matrix"]
    assert matrix.state["size"] == (6, 10)
    assert matrix.state["properties"].state[0] == Global("torch.bfloat16")
    read = {}
    for index, info in metadata.state["storage_data"].items():
        place = info.state
        file = tmp_path / "folder" / place["relative_path"]
        read[index.state["fqn"]] = torch_archive_reader.read_torch_part(file, place["offset"], place["length"])
    assert read["lr"] == 0.25
    assert_same(read["matrix"], state["matrix"])
    assert_same(read["optim.0.exp_avg"], state["optim"][0]["exp_avg"])
    assert "instead of 0; if it is a part of a checkpoint of torch.distributed.checkpoint" in refusal(file)
    assert refusal(tmp_path / "folder" / ".metadata").endswith("a pickle, not written by torch.save")
    length = file.stat().st_size
    for start, count in ((0, length + 1), (-1, 5), (5, -1), (length, 1)):
        assert f"has no {count} bytes from {start}" in refusal(
            file, lambda p, s=start, n=count: torch_archive_reader.read_torch_part(p, s, n)
        )
    assert "without a valid directory" in refusal(file, lambda p: torch_archive_reader.read_torch_part(p, 3, 500))
    assert "a folder" in refusal(file.parent, lambda p: torch_archive_reader.read_torch_part(p, 0, 0))
    assert "not a pickle" in refusal(file, torch_archive_reader.read_pickle)


# Files that are no such files, damaged or hostile.

HOSTILE = {
    "empty": "an empty file, not one written by torch.save; the write or the download was cut short",
    "missing_storage": "storage '1' is missing: a tensor refers to it",
    "plain_zip": "a zip archive without data.pkl, not one written by torch.save",
    "short_storage": "storage '1' has 16 bytes, its tensors need 24576",
    "truncated": "a zip archive without a valid directory; the write or the download was cut short",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str) -> None:
    assert HOSTILE[name] in refusal(DATA / f"{name}.pt")


def test_odd_but_valid_files() -> None:
    assert assert_like_torch(DATA / "not_a_dict.pt") == [1, 2, 3]
    assert_like_torch(DATA / "dangling_id.pt")


def test_every_hostile_file_is_tested() -> None:
    tested = {*HOSTILE, "evil_print", "not_a_dict", "dangling_id"}
    assert {path.stem for path in DATA.glob("*.pt")} == tested


class Evil:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


EVIL = "asks for 'posix.system' when it is read, which is not on the list of what optstate reads; it was not executed"


def test_an_evil_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(DATA / "evil_print.pt", refused=True)
    assert "'builtins.print'" in message
    assert "it was not executed; if you trust it, load it in a sandbox" in message
    assert capsys.readouterr().out == ""


@LAYOUTS
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_executed(layout: str, protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    value = {"state": {0: {"exp_avg": torch.ones(3)}}, "x": Evil(os.system, f"touch {marker}")}
    path = tmp_path / "a.pt"
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=layout == "zip")
    written = zipfile.ZipFile(path).read("a/data.pkl") if layout == "zip" else path.read_bytes()
    assert (b"\x93" in written) == (protocol == 4)  # STACK_GLOBAL; checksums beside the pickle may have such a byte
    assert EVIL.replace("posix", os.system.__module__) in refusal(path, refused=True)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_pickle_of_its_own_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps([Evil(os.system, "true")]))
    assert "a pickle, not written by torch.save; it asks for" in refusal(path, refused=True)
    assert EVIL.replace("posix", os.system.__module__) in refusal(path, torch_archive_reader.read_pickle, refused=True)
    path.write_bytes(pickle.dumps({"state": {}, "param_groups": []}))
    assert refusal(path).endswith("a pickle, not written by torch.save")
    assert torch_archive_reader.read_pickle(path) == {"state": {}, "param_groups": []}
    path.write_bytes(pickle.dumps({"state": {}})[:-3])
    assert refusal(path).endswith("a pickle, not written by torch.save")
    path.write_bytes(pickle.dumps(nn.Linear(2, 2)))
    assert "asks for 'torch.nn.modules.linear.Linear'" in refusal(path, refused=True)


@LAYOUTS
def test_a_whole_module_is_inert(layout: str, tmp_path: Path) -> None:
    module = nn.Linear(2, 3)
    ours = torch_archive_reader.read_torch_file(save(module, tmp_path / "a.pt", layout))
    assert isinstance(ours, Stranger)
    assert (ours.name, ours.args) == ("torch.nn.modules.linear.Linear", ())
    assert (ours.state["in_features"], ours.state["training"]) == (2, True)
    assert_same(ours.state["_parameters"], dict(module._parameters))


def test_reading_imports_nothing_and_executes_nothing(tmp_path: Path) -> None:
    """Python's own audit: from the first byte read to the last no module is imported and nothing is called."""
    marker = tmp_path / "marker"
    paths = []
    for layout in ("zip", "older"):
        for protocol in (2, 4):
            paths.append(tmp_path / f"{layout}{protocol}.pt")
            value = {
                "t": BASE,
                "x": [Evil(os.system, f"touch {marker}"), Evil(eval, "1"), Evil(open, str(marker), "w")],
            }
            torch.save(value, paths[-1], pickle_protocol=protocol, _use_new_zipfile_serialization=layout == "zip")
    paths.append(save(BASE, tmp_path / "good.pt", "zip"))
    script = """
import os
import sys
from optstate.checkpoint.files import torch_archive_reader
from optstate.checkpoint.errors import CheckpointError
assert "torch" not in sys.modules and "pickle" not in sys.modules and "numpy" not in sys.modules
torch_archive_reader.read_torch_file(sys.argv[-1])
events = set()
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
sys.addaudithook(lambda event, args: events.add(f"open {bool(args[2] & WRITES)}" if event == "open" else event))
for path in sys.argv[1:]:
    try:
        torch_archive_reader.read_torch_file(path)
    except CheckpointError as error:
        assert error.refused
print(*events, sep="\\n")
"""
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()) == {"open False", "builtins.id"}
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF\x03\0\0\0", "a GGUF file, not one written by torch.save; GGUF holds model weights"),
        (b"<!DOCTYPE html><html>", "an HTML page, not one written by torch.save; a download gave a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer, not one written by torch.save; the file"),
        (b"\x1f\x8b\x08\0", "a gzip archive, not one written by torch.save"),
        (struct.pack("<Q", 2) + b"{}", "a safetensors file, not one written by torch.save"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "a tar archive, perhaps of torch before 0.1.10, not one written by"),
        (b"\x01\x02\x03", "a file of unknown kind, not one written by torch.save"),
        (b"\x80\x02}q\x00.", "a pickle, not written by torch.save"),
        (b"PK\x03\x04" + b"\0" * 40, "a zip archive without a valid directory"),
        (b"PK\x05\x06" + b"\0" * 18, "a zip archive without data.pkl, not one written by torch.save"),
    ],
)
def test_other_files_are_called_what_they_are(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    assert words in refusal(tmp_path / "a.pt")


def test_no_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "a.pt")
    assert "a folder, not one" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "a named pipe, not one" in refusal(tmp_path / "pipe")


def test_torchscript_is_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a.pt")
    assert "a TorchScript archive" in refusal(tmp_path / "a.pt")


def rezipped(path: Path, change: Any, **options: Any) -> Path:
    """The archive written anew with `change(name, data)` instead of each record, which is left out for None."""
    made = path.with_name("made.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w", **options) as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return made


def test_an_archive_written_by_others_is_read(tmp_path: Path) -> None:
    path = save({"a": BASE, "b": BASE.T.contiguous()}, tmp_path / "a.pt", "zip")
    assert_like_torch(rezipped(path, lambda name, data: data))


def test_zip_archives_that_are_not_torchs(tmp_path: Path) -> None:
    path = save({"a": BASE, "b": torch.ones(5000)}, tmp_path / "a.pt", "zip")
    deflated = rezipped(path, lambda name, data: data, compression=zipfile.ZIP_DEFLATED)
    assert "record 'byteorder' is compressed" in refusal(deflated)
    without = rezipped(path, lambda name, data: None if "byteorder" in name else data, compression=zipfile.ZIP_DEFLATED)
    assert "record 'data.pkl' is compressed" in refusal(without)
    big = rezipped(path, lambda name, data: b"big" if "byteorder" in name else data)
    assert "its byte order is b'big'" in refusal(big)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"N.")
    assert "two top folders" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_records_of_one_name(tmp_path: Path) -> None:
    path = save({"a": BASE}, tmp_path / "a.pt", "zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
    assert "two records of one name" in refusal(path)


def test_a_deflated_bomb_is_not_unpacked(tmp_path: Path) -> None:
    made = tmp_path / "made.pt"
    with zipfile.ZipFile(made, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 20_000_000 + b"N.")
    tracemalloc.start()
    assert "record 'data.pkl' is compressed" in refusal(made)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def tensor_pickle(
    size: tuple[Any, ...], stride: tuple[Any, ...], offset: Any = 0, numel: Any = 60, **other: Any
) -> bytes:
    """The pickle of a tensor that torch would not write."""

    class Pickler(pickle._Pickler):  # the one in Python, which can be told to write any name
        def persistent_id(self, obj: Any) -> Any:
            return obj.saved if isinstance(obj, Saved) else None

        def save_global(self, obj: Any, name: str | None = None) -> None:
            module, _, last = names.get(obj, "").rpartition(".")
            self.write(f"c{module}\n{last}\n".encode()) if module else super().save_global(obj, name)

    class Saved:
        saved: Any

    def function() -> None: ...

    def storage_class() -> None: ...

    def dtype() -> None: ...

    names = {
        function: other.get("function", "torch._utils._rebuild_tensor_v2"),
        storage_class: other.get("storage", "torch.FloatStorage"),
        dtype: other.get("dtype", "torch.float32"),
    }
    Pickler.dispatch = {**pickle._Pickler.dispatch, types.FunctionType: Pickler.save_global}
    storage = Saved()
    storage.saved = other.get("saved", ("storage", storage_class, "0", "cpu", numel, *other.get("tail", ())))
    args = (storage, offset, size, stride, False, {}, *other.get("more", ()))
    file = io.BytesIO()
    Pickler(file, 2).dump(Evil(function, *(dtype if a is torch.dtype else a for a in args)))
    return file.getvalue()


def described(tmp_path: Path, *args: Any, **other: Any) -> Path:
    path = save(BASE, tmp_path / "a.pt", "zip")
    return rezipped(path, lambda name, data: tensor_pickle(*args, **other) if name.endswith(".pkl") else data)


def test_a_described_tensor_is_the_one_that_torch_reads(tmp_path: Path) -> None:
    assert_like_torch(described(tmp_path, (6, 10), (10, 1)))
    assert_like_torch(described(tmp_path, (2, 1, 3), (7, 999, 2), 5))
    assert_like_torch(described(tmp_path, (0, 5), (3, 1), 0))
    assert_like_torch(described(tmp_path, (30,), (2,), 1))
    v3 = {"function": "torch._utils._rebuild_tensor_v3", "storage": "torch.storage.UntypedStorage", "numel": 240}
    assert_like_torch(described(tmp_path, (119,), (1,), 1, **v3, dtype="torch.uint16", more=(torch.dtype,)))


@pytest.mark.parametrize(
    ("size", "stride", "offset", "words"),
    [
        (
            (10**6, 10**5),
            (0, 0),
            0,
            "of shape (1000000, 100000) in storage '0' has 100000000000 elements, more than the 60",
        ),
        ((61,), (0,), 0, "in storage '0' has 61 elements, more than the 60 that are stored"),
        ((2**62,) * 60, (0,) * 60, 0, "more than the 60 that are stored"),
        ((60,), (1,), 1, "in storage '0' reaches to element 60 of 60"),
        ((6, 10), (11, 1), 0, "in storage '0' reaches to element 64 of 60"),
        ((2,), (2**62,), 0, "in storage '0' reaches to element 4611686018427387904 of 60"),
        ((1,), (1,), 60, "reaches to element 60 of 60"),
        ((1,), (1,), 2**62, "reaches to element 4611686018427387904 of 60"),
        ((1,), (1,), -1, "whose shape, strides or place are no counts"),
        ((-1,), (1,), 0, "no counts"),
        ((2,), (-1,), 5, "no counts"),
        ((True,), (1,), 0, "no counts"),
        ((1.0,), (1,), 0, "no counts"),
        ((2**63,), (0,), 0, "no counts"),
        ([6, 10], (10, 1), 0, "no counts"),
        ((6, 10), (10,), 0, "2 dimensions and 1 strides"),
        ((1,) * 65, (1,) * 65, 0, "65 dimensions"),
    ],
)
def test_a_tensor_that_is_not_within_its_storage(
    size: Any, stride: Any, offset: Any, words: str, tmp_path: Path
) -> None:
    assert words in refusal(described(tmp_path, size, stride, offset))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"numel": 61}, "storage '0' has 240 bytes, its tensors need 244"),
        ({"numel": -1}, "storage '0' with -1 elements"),
        ({"numel": 2**63}, "storage '0' with 9223372036854775808 elements"),
        ({"numel": 1.0}, "does not say which storage"),
        ({"saved": ("storage",)}, "no storage"),
        ({"saved": ("module", None, "0", "cpu", 1)}, "no storage"),
        ({"saved": 5}, "no storage"),
        ({"saved": ("storage", "FloatStorage", "0", "cpu", 1)}, "does not say which"),
        ({"storage": "torch.ComplexDoubleStorage", "numel": 16}, "has 240 bytes, its tensors need 256"),
        ({"function": "torch._utils._rebuild_parameter"}, "a malformed pickle"),
        ({"function": "torch._tensor._rebuild_from_type_v2"}, "a malformed pickle"),
    ],
    ids=str,
)
def test_a_tensor_that_is_described_wrongly(other: Any, words: str, tmp_path: Path) -> None:
    assert words in refusal(described(tmp_path, (1,), (1,), **other))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"storage": "torch.ComplexDoubleStorage", "numel": 15}, "numbers in a 'torch.ComplexDoubleStorage'"),
        ({"storage": "torch.float32"}, "numbers in a 'torch.float32'"),
        ({"function": "torch._utils._rebuild_sparse_tensor"}, "a sparse tensor"),
        ({"more": ({"conj": True},)}, "a tensor stored as its conjugate"),
    ],
    ids=str,
)
def test_a_tensor_without_a_form_here(other: Any, words: str, tmp_path: Path) -> None:
    ours = torch_archive_reader.read_torch_file(described(tmp_path, (1,), (1,), **other))
    assert isinstance(ours, Unread)
    assert words in ours.what


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda: torch.zeros(2, device="meta"), "a tensor on the meta device, without numbers"),
        (lambda: torch.eye(2).to_sparse(), "a sparse tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "a quantized tensor"),
        (lambda: torch.zeros(2, dtype=torch.complex128), "a tensor of numbers in a 'torch.ComplexDoubleStorage'"),
        (lambda: torch.zeros(2, dtype=torch.complex64).conj(), "a tensor stored as its conjugate or negative"),
    ],
    ids=["meta", "sparse", "quantized", "complex128", "conjugate"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_not_read(value: Any, words: str, tmp_path: Path) -> None:
    ours = torch_archive_reader.read_torch_file(save({"a": [value()], "b": BASE}, tmp_path / "a.pt", "zip"))
    assert isinstance(ours["a"][0], Unread)
    assert words in ours["a"][0].what
    assert_same(ours["b"], BASE)


def test_an_unknown_tensor_class_is_named(tmp_path: Path) -> None:
    class Own(Tensor):
        pass

    Own.__qualname__ = "Own"
    globals()["Own"] = Own
    try:
        path = save(torch.ones(2).as_subclass(Own), tmp_path / "a.pt", "zip")
    finally:
        del globals()["Own"]
    ours = torch_archive_reader.read_torch_file(path)
    assert isinstance(ours, Stranger)
    assert ours.name == f"{__name__}.Own"
    assert_same(ours.args[0], torch.ones(2))


def test_a_tree_that_contains_itself_is_refused(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"a": []}
    tree["a"].append(tree)
    assert "a value that contains itself" in refusal(save(tree, tmp_path / "a.pt", "zip"))


# The layout before torch 1.6.


def older(tmp_path: Path, find: bytes, replace: bytes) -> Path:
    path = save({"a": BASE, "b": torch.ones(3).long()}, tmp_path / "a.pt", "older")
    content = path.read_bytes()
    assert content.count(find) >= 1
    path.write_bytes(content.replace(find, replace, 1))
    return path


@pytest.mark.parametrize(
    ("find", "replace", "words"),
    [
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89", "not little-endian"),
        (b"\x80\x02M\xe9\x03.", b"\x80\x02M\xea\x03.", "not 1001"),
        (b"\x80\x02M\xe9\x03.", b"\x80\x02N.", "not 1001"),
        (b"FloatStorage", b"Float8torage", "numbers in a 'torch.Float8torage', whose size is not known"),
        (struct.pack("<q", 60), struct.pack("<q", 61), "has 61 elements, its tensors say 60"),
        (struct.pack("<q", 60), struct.pack("<q", -1), "has -1 elements, its tensors say 60"),
    ],
)
def test_damage_in_the_older_layout(find: bytes, replace: bytes, words: str, tmp_path: Path) -> None:
    assert words in refusal(older(tmp_path, find, replace))


def test_the_older_layout_cut_short(tmp_path: Path) -> None:
    path = save({"a": BASE, "b": torch.ones(3).long()}, tmp_path / "a.pt", "older")
    whole = path.read_bytes()
    for size in range(len(whole) - 1, 0, -3):
        path.write_bytes(whole[:size])
        message = refusal(path)
        if size > len(whole) - 24:
            assert "ends within storage" in message
    path.write_bytes(whole + b"more")
    torch_archive_reader.read_torch_file(path)


def test_storages_of_the_older_layout_must_be_those_referred_to(tmp_path: Path) -> None:
    path = save({"a": BASE}, tmp_path / "a.pt", "older")
    content = path.read_bytes()
    at = content.rindex(b"\x80\x02]")
    path.write_bytes(content[:at] + pickle.dumps([], 2))
    assert "not those that its tensors refer to" in refusal(path)
    path.write_bytes(content[:at] + pickle.dumps(["other"], 2) + content[at:])
    assert "not those that its tensors refer to" in refusal(path)


@pytest.mark.parametrize(("view", "start"), [(None, 0), (("1", 10, 20), 10), (("1", 0, 60), 0), (("1", 60, 0), None)])
def test_views_of_storages_as_torch_before_0_4_wrote_them(view: Any, start: int | None, tmp_path: Path) -> None:
    path = older_of(tmp_path, tensor_pickle((2, 3), (3, 1), 4, tail=(view,)))
    if start is None:
        assert "6 elements, more than the 0 that are stored" in refusal(path)
    else:
        assert_same(torch_archive_reader.read_torch_file(path), BASE.view(-1)[start + 4 : start + 10].view(2, 3))


@pytest.mark.parametrize("view", [("1", 50, 20), ("1", -1, 5), ("1", 5, -1), (1, 0, 1), ("1", 0), "100"])
def test_a_view_that_is_not_within_its_storage(view: Any, tmp_path: Path) -> None:
    path = older_of(tmp_path, tensor_pickle((1,), (1,), tail=(view,)))
    assert "a view that is not within storage '0'" in refusal(path)


def older_of(tmp_path: Path, values: bytes) -> Path:
    """A file of the older layout that has this pickle, and a storage '0' with 0 to 59."""
    path = tmp_path / "a.pt"
    machine = {"little_endian": True}
    before = b"".join(
        pickle.dumps(value, 2) for value in (torch_archive_reader.MAGIC, torch_archive_reader.PROTOCOL, machine)
    )
    storage = struct.pack("<q", 60) + BASE.numpy().tobytes()
    path.write_bytes(before + values + pickle.dumps(["0"], 2) + storage)
    return path


# Whatever comes.


def tensors_in(tree: Any) -> list[Stored]:
    if isinstance(tree, Stored):
        return [tree]
    items = [*tree.keys(), *tree.values()] if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else []
    return [stored for item in items for stored in tensors_in(item)]


@LAYOUTS
def test_damaged_files_give_a_tree_or_a_checkpoint_error(layout: str, tmp_path: Path) -> None:
    random.seed(1)
    value = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": BASE.T}, 1: {"s": {1}, "o": collections.Counter("a")}}}
    whole = save(value, tmp_path / "whole.pt", layout).read_bytes()
    path = tmp_path / "a.pt"
    outcomes = collections.Counter[str]()
    messages: list[str] = []
    started = time.perf_counter()
    for case in range(400):
        content = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            content[random.randrange(len(content))] = random.choice([0, 1, 0xFF, random.randrange(256)])
        if case % 4 == 0:
            del content[random.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            tree = torch_archive_reader.read_torch_file(path)
            outcomes["read"] += 1
            for stored in tensors_in(tree):
                assert path.stat().st_size >= stored.start + stored.span
        except CheckpointError as error:
            outcomes["refused"] += 1
            messages.append(str(error))
    assert "".join(messages).isprintable()
    assert min(outcomes["read"], outcomes["refused"]) > 30
    assert time.perf_counter() - started < 10


@LAYOUTS
def test_no_numbers_are_read(layout: str, tmp_path: Path) -> None:
    path = save({"a": torch.zeros(1 << 22), "b": BASE}, tmp_path / "a.pt", layout)
    tracemalloc.start()
    torch_archive_reader.read_torch_file(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
