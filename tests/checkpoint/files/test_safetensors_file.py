"""Reading safetensors headers: every accepted file agrees with the library, every other one is refused with a reason.

`safetensors` itself is what the reader is compared with: whatever the reader accepts, the library opens and says the
same; what only the reader refuses is listed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.dtypes import BITS
from optstate.checkpoint.files.file_kinds import identify_file
from optstate.checkpoint.files.safetensors_check import structural_issues
from optstate.checkpoint.files.safetensors_header import read_header
from optstate.checkpoint.files.safetensors_index import read_index
from tests.support.paths import DATA
from tests.support.safetensors_cases import (
    FIELDS,
    HOSTILE,
    LFS,
    assert_like_the_library,
    file_of,
    findings,
    refusal,
    the_library_opens,
    torch_zip,
)

# The library keeps the last of two equal keys; which one was meant, nobody can tell.
STRICTER = {"dup_inner_metadata_key"}


WARNINGS = {
    "F4": ["not padded"],
    "extra_field": ["fields the format does not know: 'strides'"],
    "header_leading_space": ["begins with white space"],
    "metadata_null": ["__metadata__ is null"],
    "name_empty": ["its name is empty"],
    "unaligned_header": ["not padded", "not aligned"],
    "unaligned_tensor": ["not padded", "not aligned"],
    "zero_tensor": ["not padded", "not aligned"],
}


def test_every_hostile_file_has_an_expectation() -> None:
    assert {path.stem for path in (DATA / "hostile").iterdir()} == set(HOSTILE)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file(name: str) -> None:
    path = DATA / "hostile" / f"{name}.safetensors"
    reason = HOSTILE[name]
    if reason is None:
        assert_like_the_library(read_header(path))
        issues = structural_issues(path)
        assert {issue.severity for issue in issues} <= {"warning"}
        assert all(any(part in issue.what for issue in issues) for part in WARNINGS.get(name, []))
    else:
        assert reason in refusal(path)
        assert the_library_opens(path) == (name in STRICTER)


@pytest.mark.parametrize("path", sorted(DATA.glob("*.safetensors")), ids=lambda path: path.stem)
def test_a_usual_file_has_no_issues(path: Path) -> None:
    assert_like_the_library(read_header(path))
    assert structural_issues(path) == []
    assert identify_file(path) == "a safetensors file"


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int16, torch.uint16, torch.float16, torch.bfloat16,
    torch.int32, torch.uint32, torch.float32, torch.complex64, torch.float64, torch.int64, torch.uint64,
]  # fmt: skip


def test_every_dtype_of_torch(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.zeros(3, 4).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4)}
    tensors["four bits"] = torch.zeros(3, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file(tensors, tmp_path / "all.safetensors", {"one": "ä\n", "two": ""})
    header = read_header(tmp_path / "all.safetensors")
    assert_like_the_library(header)
    assert {entry.dtype for entry in header.tensors} == set(BITS) - {"F6_E2M3", "F6_E3M2"}
    for entry in header.tensors:
        doubled = 2 if entry.dtype == "F4" else 1  # torch counts the pairs
        assert entry.elements == tensors[entry.name].numel() * doubled


MADE: dict[str, tuple[str, bytes, str]] = {
    "a metadata value is an object": ('{"__metadata__":{"a":{"b":"c"}}}', b"", "metadata 'a': its value is not"),
    "metadata are a list": ('{"__metadata__":["a"]}', b"", "__metadata__ is not an object of strings"),
    "a tensor twice": ("{" + f'"a":{{{FIELDS}}},"a":{{{FIELDS}}}' + "}", bytes(8), "tensor 'a': occurs twice"),
    "a field twice": ('{"a":{"dtype":"F32",' + FIELDS + "}}", bytes(8), "its entry has two dtype"),
    "an entry is a list": ('{"a":[1]}', b"", "tensor 'a': its entry is not an object"),
    "a long entry is a number": ('{"a":' + "1" * 600 + "}", b"", "tensor 'a': its entry is not an object"),
    "the dtype is a number": ('{"a":{"dtype":3,"shape":[2],"data_offsets":[0,8]}}', bytes(8), "unknown dtype 3"),
    "the shape is an object": (
        '{"a":{"dtype":"F32","shape":{"b":1},"data_offsets":[0,8]}}',
        bytes(8),
        "shape an object is not a list",
    ),
    "the shape is an empty object": (
        '{"a":{"dtype":"BOOL","shape":{},"data_offsets":[0,1]}}',
        b"\0",
        "is not a list of counts",
    ),
    "the shape has a boolean": (
        '{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}',
        bytes(8),
        "shape [True, 2] is not a list",
    ),
    "the shape has a minus zero": (
        '{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}',
        b"",
        "is not a list of counts",
    ),
    "too many elements to count": (
        '{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}',
        bytes(8),
        "has more elements than can be counted",
    ),
    "a length of twenty digits": (
        '{"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8]}}',
        bytes(8),
        "is not a list of counts",
    ),
    "a length of very many digits": (
        '{"a":{"dtype":"F32","shape":[' + "9" * 200_000 + '],"data_offsets":[0,8]}}',
        bytes(8),
        "is not a list of counts",
    ),
    "a product of many lengths": (
        '{"a":{"dtype":"F32","shape":[' + "9223372036854775807," * 999 + '2],"data_offsets":[0,8]}}',
        bytes(8),
        "has more elements than can be counted",
    ),
    "very many lengths": (
        '{"a":{"dtype":"F32","shape":[' + "1," * 16_000 + '2],"data_offsets":[0,8]}}',
        bytes(8),
        "16001 dimensions: at most 1000 are read",
    ),
    "offsets overlap": (
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        bytes(12),
        "tensor 'b': overlaps tensor 'a' by 4 bytes",
    ),
    "one tensor in another": (
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}',
        bytes(8),
        "tensor 'b': overlaps tensor 'a' by 4 bytes",
    ),
    "an offset above 2**64": (
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,99999999999999999999999]}}',
        bytes(8),
        "are not a beginning and an end",
    ),
    "no end": ('{"a":{' + FIELDS, bytes(8), "the header is not valid JSON"),
    "a comma too many": ('{"a":{' + FIELDS + "},}", bytes(8), "a string in double quotes expected"),
    "infinity": ('{"a":{' + FIELDS + ',"x":-Infinity}}', bytes(8), "-Infinity is not JSON"),
    "a number out of range": ('{"a":{' + FIELDS + ',"x":1e999}}', bytes(8), "a number is out of range"),
    "a control character in a name": ('{"a\n":{' + FIELDS + "}}", bytes(8), "Invalid control character"),
    "half a pair in an unknown field": ('{"a":{' + FIELDS + ',"x":["\\udc00"]}}', bytes(8), "half of a surrogate"),
    "a byte order mark": ("\ufeff{}", b"", "'{' expected at character 0, found '\\ufeff'"),
}


@pytest.mark.parametrize("name", MADE)
def test_a_made_file(name: str, tmp_path: Path) -> None:
    header, body, reason = MADE[name]
    path = file_of(tmp_path, header, body)
    assert reason in refusal(path)
    assert the_library_opens(path) == (name in ("a tensor twice", "very many lengths"))


def test_more_elements_than_can_be_counted_in_an_empty_tensor(tmp_path: Path) -> None:
    # The library opens this one and torch then fails: the strides overflow although there is no element.
    entry = '{"a":{"dtype":"F32","shape":[0,9223372036854775808,9223372036854775808],"data_offsets":[0,0]}}'
    path = file_of(tmp_path, entry)
    assert "is not a list of counts" in refusal(path)
    with safe_open(path, "pt") as opened, pytest.raises(TypeError):
        opened.get_tensor("a")


def test_a_header_that_goes_past_the_end(tmp_path: Path) -> None:
    path = file_of(tmp_path, "{}      ", length=64)
    assert "truncated: the header's length is 64 bytes, but only 8 follow" in refusal(path)
    assert not the_library_opens(path)


@pytest.mark.parametrize("before", ["", '{"a":', '{"__metadata__":{"a":', '{"a":{' + FIELDS + ',"x":'])
@pytest.mark.parametrize("bracket", ["[", '{"b":'])
def test_deep_nesting(before: str, bracket: str, tmp_path: Path) -> None:
    for depth in 5000, 500_000:
        path = file_of(tmp_path, before + bracket * depth)
        assert any(reason in refusal(path) for reason in ("not valid JSON", "is not a string", "is not an object"))
        assert not the_library_opens(path)
        assert "not valid JSON" in refusal(path, structural_issues)  # which reads on


# ------------------------------------------------------------------------------------------ files of another kind


def plain_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    return file.getvalue()


def torch_before_zip() -> bytes:
    file = io.BytesIO()
    torch.save({"state": {}}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


OTHER_KINDS: dict[str, tuple[bytes, str]] = {
    "torch zip": (torch_zip(), "a file written by torch.save"),
    # What DCP's HuggingFaceStorageWriter leaves if the state holds plain numbers: zips, then a safetensors file.
    "torch zip before safetensors": (torch_zip() + save({"a": torch.zeros(2)}), "a file written by torch.save"),
    "zip": (plain_zip(), "a zip archive"),
    "torch before 1.6": (torch_before_zip(), "a file written by torch.save before torch 1.6"),
    **{f"pickle {n}": (pickle.dumps({"state": [1.5] * 9}, n), "a pickle") for n in (2, 3, 4, 5)},
    "gguf": ((DATA / "hostile" / "gguf.safetensors").read_bytes(), "a GGUF file"),
    "git-LFS pointer": (LFS, "a git-LFS pointer"),
    "page": (b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n", "an HTML page"),
    "page without a type": (b"\xef\xbb\xbf<HTML><body>Sign in</body></HTML>", "an HTML page"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(20), "a gzip archive"),
    "json": (b'{"weight_map": {"a": "b.safetensors"}}', "a JSON file"),
    "json list": (b"[1, 2, 3, 4, 5, 6]", "a JSON file"),
    "empty": (b"", "an empty file"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_another_kind_of_file_is_named(name: str, tmp_path: Path) -> None:
    content, kind = OTHER_KINDS[name]
    path = tmp_path / "opt.safetensors"
    path.write_bytes(content)
    assert identify_file(path) == kind
    assert f"{kind}, not a safetensors file" in refusal(path)
    assert not the_library_opens(path)


def test_hints_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(LFS)
    assert "run git lfs pull" in refusal(path)
    path.write_bytes(bytes(64))
    assert "begins with zeros only; the write or the download was cut short" in refusal(path)
    (tmp_path / "folder").mkdir()
    assert "it is empty" in refusal(tmp_path / "folder")
    (tmp_path / "folder" / ".metadata").touch()
    assert "torch.distributed.checkpoint" in refusal(tmp_path / "folder")


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x227B, 0x4B50, 0x8B1F, 0x3C7B])
def test_a_header_whose_length_looks_like_another_kind(length: int, tmp_path: Path) -> None:
    header = f'{{"__metadata__":{{"a":"{"x" * (length - 25)}"}}}}'
    path = file_of(tmp_path, header)
    assert path.read_bytes()[:8] == length.to_bytes(8, "little")
    assert identify_file(path) == "a safetensors file"
    assert_like_the_library(read_header(path))
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated" in refusal(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "a folder, not a safetensors file" in refusal(tmp_path)
    assert identify_file(tmp_path) == "a folder"
    os.mkfifo(tmp_path / "pipe")
    assert "a named pipe, not a safetensors file" in refusal(tmp_path / "pipe")  # and does not wait for a writer
    assert identify_file(tmp_path / "pipe") == "a named pipe"
    assert "a device, not a safetensors file" in refusal("/dev/null")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path)  # the address of a socket is short
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
        assert "a socket, not a safetensors file" in refusal(tmp_path / "socket")


def test_what_is_not_there(tmp_path: Path) -> None:
    for read in read_header, identify_file, structural_issues, read_index:
        assert refusal(tmp_path / "nowhere", read).endswith("nowhere: no such file")
    (tmp_path / "link").symlink_to("gone")
    assert "a symbolic link to 'gone', which does not exist" in refusal(tmp_path / "link")
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read: Too many levels of symbolic links" in refusal(tmp_path / "loop")
    assert "cannot be read: File name too long" in refusal(tmp_path / ("x" * 300))
    assert "not a possible path" in refusal("a\0b")
    (tmp_path / "file").touch()
    assert "cannot be read: Not a directory" in refusal(tmp_path / "file" / "x")


def test_what_may_not_be_read(tmp_path: Path) -> None:
    path = file_of(tmp_path, "{}")
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # whom no permission stops
        tmp_path.chmod(0o755)
        os.seteuid(65534)
    try:
        assert "cannot be read: Permission denied" in refusal(path)
    finally:
        if root:
            os.seteuid(0)


# ---------------------------------------------------------------------------------------------------- odd names


ODD_NAMES = {
    "escape": ("\x1b[31mred\r\n", "control characters"),
    "right to left": ("a\u202eb", "control characters"),
    "slash": ("../../etc/passwd", None),
    "long": ("x" * 100_000, None),
    "emoji": ("😀", None),
    "separator": ("a\u2028b", "control characters"),
    "not assigned": ("a\u0378b", "cannot be printed"),
}


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_kept_and_shown_harmlessly(name: str, tmp_path: Path) -> None:
    tensor, warning = ODD_NAMES[name]
    path = tmp_path / "odd.safetensors"
    save_file({tensor: torch.ones(2)}, path)
    header = read_header(path)
    assert_like_the_library(header)
    assert header.tensors[0].name == tensor
    issues = structural_issues(path)
    assert [warning in issue.what for issue in issues] == ([True] if warning else [])
    assert all(issue.where.isprintable() and len(issue.where) < 300 for issue in issues)
    path.write_bytes(path.read_bytes()[:-1])  # now in an error
    assert len(refusal(path)) < 500


def test_names_that_look_the_same(tmp_path: Path) -> None:
    save_file({"\u00e4": torch.ones(2), "a\u0308": torch.ones(2)}, tmp_path / "a.safetensors")
    assert len(read_header(tmp_path / "a.safetensors").tensors) == 2
    issues = structural_issues(tmp_path / "a.safetensors")
    assert ["looks the same" in issue.what for issue in issues] == [True]


# --------------------------------------------------------------------------------------------------- all findings


def test_issues_do_not_stop_at_the_first(tmp_path: Path) -> None:
    entries = {
        "__metadata__": {"one": 1, "two": "2", "three": None},
        "bad dtype": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        "bad shape": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 16]},
        "bad size": {"dtype": "F32", "shape": [3], "data_offsets": [16, 24]},
        "overlapping": {"dtype": "F32", "shape": [2], "data_offsets": [20, 28]},
        "no object": 3,
    }
    path = file_of(tmp_path, json.dumps(entries), bytes(20))
    assert [(issue.where, issue.what) for issue in structural_issues(path) if issue.severity == "error"] == [
        ("metadata 'one'", "its value is not a string"),
        ("metadata 'three'", "its value is not a string"),
        ("tensor 'bad dtype'", "unknown dtype 'F99'"),
        ("tensor 'bad shape'", "shape [-2] is not a list of counts"),
        ("tensor 'bad size'", "shape [3] of F32 takes 12 bytes, its data_offsets span 8"),
        ("tensor 'no object'", "its entry is not an object"),
        ("tensor 'overlapping'", "overlaps tensor 'bad size' by 4 bytes"),
        ("data", "truncated: 8 of 28 bytes are missing at the end of the file"),
    ]
    assert "metadata 'one': its value is not a string" in refusal(path)


@pytest.mark.parametrize("name", [name for name, reason in HOSTILE.items() if reason is not None])
def test_issues_have_an_error_wherever_reading_fails(name: str) -> None:
    assert str(HOSTILE[name]) in findings(DATA / "hostile" / f"{name}.safetensors")[0]


def test_a_million_errors_take_little(tmp_path: Path) -> None:
    path = file_of(tmp_path, "{" + ",".join(f'"{i}":0' for i in range(300_000)) + "}")
    began = time.process_time()
    issues = structural_issues(path)
    assert time.process_time() - began < 5
    assert len(issues) == 1001
    assert "more than 1000 findings" in issues[-1].what


# ------------------------------------------------------------------------------------------------------- the error


def test_the_error_carries_its_parts() -> None:
    error = CheckpointError(Path("a\x1b[31m.safetensors"), "bad\n", "do this", refused=True)
    assert str(error) == "a\\x1b[31m.safetensors: bad\\n; do this"
    assert str(CheckpointError("a", "bad")) == "a: bad"
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.path, copy.reason, copy.hint, copy.refused) == (error.path, "bad\n", "do this", True)
    assert str(copy) == str(error)


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys; from optstate.checkpoint.files import safetensors_header, safetensors_writer;"
        f"safetensors_header.read_header({str(DATA / 'common.safetensors')!r});"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
