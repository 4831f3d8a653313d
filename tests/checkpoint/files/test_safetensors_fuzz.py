"""Random and damaged safetensors files: the reader agrees with the library, or refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.dtypes import BITS
from optstate.checkpoint.files.file_kinds import identify_file
from optstate.checkpoint.files.safetensors_check import CONTROLS
from optstate.checkpoint.files.safetensors_header import read_header, tensor_place
from optstate.checkpoint.files.safetensors_index import read_index
from optstate.text import has_controls
from tests.support.safetensors_cases import (
    INDEX,
    LFS,
    assert_like_the_library,
    file_of,
    findings,
    refusal,
    the_library_opens,
    torch_zip,
)

# Reasons for which a file is refused that the library takes: it keeps the last of two equal keys, ignores fields it
# does not know however large their numbers, and lets more elements than can be counted pass if one length is 0.
ONLY_HERE = ("occurs twice", "more elements than can be counted", "is not a list of counts", "is out of range")


FUZZ = settings(
    max_examples=200,
    deadline=None,  # of the clock; the processor's time is looked at below
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def assert_agrees_or_refuses(path: Path) -> None:
    """Nothing but a header or a CheckpointError comes out, and the library has the same opinion."""
    began = time.process_time()
    found = findings(path)
    identify_file(path)
    assert time.process_time() - began < 1
    try:
        header = read_header(path)
    except CheckpointError as error:
        reason = str(error)
    else:
        assert_like_the_library(header)
        assert found == [f"{tensor_place(e.name)}: {CONTROLS}" for e in header.tensors if has_controls(e.name)]
        return
    assert reason.isprintable()
    assert found
    # The reason is the first that was found; what the library passes over may come later, as a second entry of a name.
    assert not the_library_opens(path) or any(known in what for what in found for known in ONLY_HERE), reason


NUMBERS = st.one_of(st.integers(-2, 16), st.sampled_from([1 << 31, 1 << 62, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30]))


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)


NAMES = st.one_of(st.sampled_from(["a", "b", "__metadata__", "", "\x1b[31m", "\u00e4", "a\u0308"]), st.text(max_size=4))


@st.composite
def headers(draw: st.DrawFn) -> tuple[str, int]:
    """A header that is right, or nearly, and the size of the data it describes."""
    at = 0
    parts = []
    for name in draw(st.lists(NAMES, max_size=4, unique=draw(st.booleans()))):
        dtype = draw(st.sampled_from([*BITS, "F32", "F32", "F99"]))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        count = 1
        for n in shape:
            count *= n
        nbytes = count * BITS.get(dtype, 8) // 8
        fields: dict[str, Any] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
        match draw(st.integers(0, 11)):
            case 0:
                fields[draw(st.sampled_from([*fields, "extra"]))] = draw(JUNK)
            case 1:
                del fields[draw(st.sampled_from([*fields]))]
            case 2:
                fields["data_offsets"] = draw(st.lists(NUMBERS, max_size=3))
            case 3:
                fields["shape"] = draw(st.lists(NUMBERS, max_size=3))
        value = draw(JUNK) if draw(st.integers(0, 19)) == 0 else fields
        if name == "__metadata__" and draw(st.booleans()):
            value = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=3))
        parts.append(f"{json.dumps(name)}:{json.dumps(value, ensure_ascii=draw(st.booleans()))}")
    return draw(st.sampled_from(["", "", "", " ", "\n"])) + "{" + ",".join(parts) + "}" + draw(
        st.sampled_from(["", "    ", "\0", "x"])
    ) * draw(st.booleans()), at


@FUZZ
@given(made=headers(), more=st.sampled_from([0, 0, 0, 0, -1, 1]))
def test_random_headers(made: tuple[str, int], more: int, tmp_path: Path) -> None:
    header, nbytes = made
    assert_agrees_or_refuses(file_of(tmp_path, header.encode("utf-8", "surrogatepass"), bytes(max(nbytes + more, 0))))


REAL = [
    save({"w/exp_avg": torch.ones(4, 3), "w/codes": torch.zeros(5, dtype=torch.uint8), "s": torch.tensor(1.0)}),
    save({"a": torch.zeros(0, 2), "b": torch.zeros(3, dtype=torch.bfloat16)}, {"optstate": '{"x": "\\u00e4"}'}),
    torch_zip(),
    LFS,
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A real file with a few bytes changed, cut, repeated or inserted, mostly in its header."""
    content = bytearray(draw(st.sampled_from(REAL)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(content), 300)))
        match draw(st.integers(0, 4)):
            case 0:
                content[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                content[at : at + 1] = draw(st.sampled_from(list('{}[],:"0123456789-.eEnul\\ '))).encode()
            case 2:
                del content[at : at + draw(st.integers(1, 20))]
            case 3:
                content[at:at] = content[at : at + draw(st.integers(1, 40))]
            case 4:
                content[at:at] = draw(st.binary(max_size=6))
    if len(content) > 8 and draw(st.booleans()):  # keep the header's length right
        end = content.find(b"}}") + 2
        content[:8] = max(end - 8, 0).to_bytes(8, "little")
    return bytes(content)


@FUZZ
@given(content=mutated())
def test_mutated_real_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(content)
    assert_agrees_or_refuses(path)


@FUZZ
@given(content=st.binary(max_size=200))
def test_random_bytes(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "random"
    path.write_bytes(content)
    assert_agrees_or_refuses(path)
    (tmp_path / INDEX).write_bytes(content)
    refusal(tmp_path, read_index)
