"""Files of safetensors made for tests, and what is expected of the recorded hostile ones."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors import SafetensorError, safe_open

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.safetensors_check import structural_issues
from optstate.checkpoint.files.safetensors_header import Header, read_header
from optstate.text import escaped

FIELDS = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'


def file_of(folder: Path, header: str | bytes, body: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, a body, and the header's length or another number in its place."""
    blob = header.encode() if isinstance(header, str) else header
    path = folder / "made.safetensors"
    path.write_bytes((len(blob) if length is None else length).to_bytes(8, "little") + blob + body)
    return path


def refusal(path: str | os.PathLike[str], read: Any = read_header) -> str:
    """The message of the CheckpointError that reading raises: one printable line that begins with the path."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(escaped(os.fspath(path))[:50])
    assert not caught.value.refused
    return message


def assert_like_the_library(header: Header) -> None:
    content = Path(header.path).read_bytes()
    theirs = dict(safetensors.deserialize(content))
    assert {entry.name for entry in header.tensors} == set(theirs)
    assert len(header.tensors) == len(theirs)
    for entry in header.tensors:
        info = theirs[entry.name]
        assert (entry.dtype, list(entry.shape)) == (info["dtype"], info["shape"])
        assert content[entry.start : entry.stop] == bytes(info["data"])
        assert entry.nbytes == len(info["data"])
    with safe_open(header.path, "pt") as opened:
        assert header.metadata == (opened.metadata() or {})
        positions = {name: i for i, name in enumerate(opened.offset_keys())}
        for entry in header.tensors:
            assert list(entry.shape) == opened.get_slice(entry.name).get_shape()
            assert entry.dtype == opened.get_slice(entry.name).get_dtype()
    filled = [entry.name for entry in header.tensors if entry.nbytes]
    assert filled == sorted(filled, key=lambda name: positions[name])
    assert header.file_size == len(content)
    assert header.data_start == 8 + int.from_bytes(content[:8], "little")


def findings(path: Path) -> list[str]:
    """The errors among the issues, or the one reason why there is nothing to go through."""
    try:
        issues = structural_issues(path)
    except CheckpointError as error:
        return [str(error)]
    return [f"{issue.where}: {issue.what}" for issue in issues if issue.severity == "error"]


def the_library_opens(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as opened:
            opened.keys()
    except (SafetensorError, OSError):
        return False
    return True


# What is expected of every file in tests/data/hostile: a part of the message, or None if it is valid though odd.
HOSTILE: dict[str, str | None] = {
    "F4": None,
    "F6": None,
    "F8_E8M0": None,
    "NaN_literal": "the header is not valid JSON: NaN is not JSON",
    "bool_bad_value": None,  # the bytes of the data are not looked at
    "dup_inner_metadata_key": "metadata 'a': occurs twice in the header",
    "dup_metadata": "__metadata__ occurs twice in the header",
    "empty_file": "an empty file, not a safetensors file; the write or the download was cut short",
    "extra_field": None,
    "float_shape": "tensor 'a': shape [2.0] is not a list of counts",
    "gguf": "a GGUF file, not a safetensors file",
    "header_array": "the header is not valid JSON: '{' expected at character 0, found '['",
    "header_leading_space": None,
    "header_len_0": "the header's length is 0",
    "header_len_2e63": "the header's length is 9223372036854775808 bytes, above the format's limit of 100000000",
    "header_len_over_100MB": "the header's length is 100000001 bytes, above the format's limit of 100000000",
    "header_not_json": "the header is not valid JSON: a string in double quotes expected at character 1",
    "header_not_utf8": "the header is not UTF-8: invalid start byte at byte 8",
    "header_trailing_nul": "the header is not valid JSON: '\\x00' after its end, at character 2",
    "lowercase_dtype": "tensor 'a': unknown dtype 'f32'",
    "metadata_not_str": "metadata 'step': its value is not a string",
    "metadata_null": None,
    "metadata_only": None,
    "missing_field": "tensor 'a': its entry has no data_offsets",
    "name_empty": None,
    "name_surrogate": "half of a surrogate pair",
    "neg_shape": "tensor 'a': shape [-2] is not a list of counts",
    "no_tensors": None,
    "offsets_3": "tensor 'a': data_offsets [0, 8, 9] are not a beginning and an end",
    "offsets_float": "tensor 'a': data_offsets [0.0, 8.0] are not a beginning and an end",
    "offsets_hole": "tensor 'b': 8 bytes between tensor 'a' and this tensor belong to none",
    "offsets_not_start0": "tensor 'a': 8 bytes between the header and this tensor belong to none",
    "offsets_reversed": "tensor 'a': data_offsets [8, 0] are not a beginning and an end",
    "pickle_raw": "a pickle, not a safetensors file",
    "rank_100": None,
    "scalar": None,
    "seven_bytes": "7 bytes are too short for the header's length",
    "size_mismatch": "tensor 'a': shape [3] of F32 takes 12 bytes, its data_offsets span 8",
    "subbyte_odd": "tensor 'a': shape [3] of F4 does not fill whole bytes",
    "trailing_bytes": "data: 5 bytes after the last tensor belong to none",
    "truncated_body": "data: truncated: 3 of 8 bytes are missing at the end of the file",
    "unaligned_header": None,
    "unaligned_tensor": None,
    "unknown_dtype": "tensor 'a': unknown dtype 'F99'",
    "zero_tensor": None,
}


def torch_zip() -> bytes:
    file = io.BytesIO()
    torch.save({"state": {}, "param_groups": []}, file)
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


INDICES = {
    "absolute": "tensor 'a': weight_map leads to '/etc/passwd', an absolute path",
    "backslash": "tensor 'a': weight_map leads to '..\\..\\x.safetensors', outside the folder",
    "missing_shard": "shard 'model-00001-of-00002.safetensors': no such file",
    "no_weight_map": "it has no weight_map",
    "not_json": "the index is not valid JSON",
    "self": "shard 'model.safetensors.index.json': is the index itself",
    "tensor_in_two_shards": "tensor 'a': occurs twice in weight_map",
    "tensor_not_in_shard": "tensor 'a': is not in 's.safetensors', where the index puts it",
    "value_int": "tensor 'a': weight_map does not give a file name",
    "wrong_total": "metadata.total_size is -5, which is no number of bytes",
}


INDEX = "model.safetensors.index.json"
