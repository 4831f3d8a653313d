"""Reading a safetensors header takes memory and time as its text does, whatever the header claims."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.safetensors_check import structural_issues
from optstate.checkpoint.files.safetensors_header import read_header
from optstate.checkpoint.files.strict_json import MAX_VALUE
from tests.support.safetensors_cases import FIELDS, file_of, refusal


def peak(path: Path, read: Any = read_header) -> int:
    """Bytes allocated at most while reading, whatever comes of it."""
    tracemalloc.start()
    try:
        read(path)
    except CheckpointError:
        pass
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return most


@pytest.mark.parametrize("length", [99_999_999, 1 << 40, (1 << 64) - 1])
def test_a_claimed_header_is_not_allocated(length: int, tmp_path: Path) -> None:
    assert peak(file_of(tmp_path, "{}", length=length)) < 100_000


def test_claimed_tensors_are_not_allocated(tmp_path: Path) -> None:
    count = 1 << 50
    header = f'{{"a":{{"dtype":"F32","shape":[{count}],"data_offsets":[0,{4 * count}]}}}}'
    path = file_of(tmp_path, header)
    assert "truncated" in refusal(path)
    assert peak(path) < 100_000


def test_the_data_are_not_read(tmp_path: Path) -> None:
    count = 1 << 34  # a hole in the file takes no space on the disk
    path = file_of(tmp_path, f'{{"a":{{"dtype":"U8","shape":[{count}],"data_offsets":[0,{count}]}}}}')
    os.truncate(path, path.stat().st_size + count)
    assert peak(path) < 100_000
    assert read_header(path).tensors[0].nbytes == count


MANY_OF = ("[]", "{}", '{"":0}', "[0]", '""', "0")


PLACES = ("field", "shape", "entry", "names", "metadata", "entries")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "where", "read"),
    [
        (what, where, (read_header, structural_issues)[(i + j) % 2])
        for i, what in enumerate(MANY_OF)
        for j, where in enumerate(PLACES)
    ],
)
def test_memory_is_a_small_multiple_of_the_header(what: str, where: str, read: Any, tmp_path: Path) -> None:
    """Both readers by turns, with every value and in every place."""
    size = 1 << 20
    many = ",".join([what] * (size // (len(what) + 1)))
    header = {
        "field": f'{{"a":{{{FIELDS},"x":[{many}]}}}}',
        "shape": f'{{"a":{{"dtype":"F32","shape":[{many}],"data_offsets":[0,8]}}}}',
        "entry": f'{{"a":[{many}]}}',
        "names": "{" + ",".join(f'"{i}":{what}' for i in range(size // (len(what) + 9))) + "}",
        "metadata": '{"__metadata__":{' + ",".join(f'"{i}":{what}' for i in range(size // (len(what) + 9))) + "}}",
        "entries": f'{{"a":{{{FIELDS},"x":[{many[: MAX_VALUE // 2].rpartition(",")[0]}]}}}}',
    }[where]
    path = file_of(tmp_path, header, bytes(8))
    assert peak(path, read) < 12 * len(header) + 40 * MAX_VALUE  # json.loads takes 25 to 50 times the text


@pytest.mark.slow
def test_a_large_honest_header_is_read_quickly(tmp_path: Path) -> None:
    entries = {
        f"model.layers.{i}.weight/exp_avg_sq.absmax": {
            "dtype": "F32",
            "shape": [1, 1],
            "data_offsets": [4 * i, 4 * i + 4],
        }
        for i in range(30_000)
    }
    path = file_of(tmp_path, json.dumps(entries), bytes(4 * len(entries)))
    began = time.process_time()
    header = read_header(path)
    assert time.process_time() - began < 5
    assert len(header.tensors) == 30_000
    assert peak(path) < 12 * path.stat().st_size
