"""Two readers of safetensors files against each other: ours, and the library's in Rust.

The library speaks for itself: nothing of ours is behind what it says. Where the two disagree, the difference must be
one of those that `safetensors_check` describes.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from optstate import checkpoint
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.issues import Issue
from optstate.checkpoint.files.opened_file import reading
from optstate.checkpoint.files.safetensors_check import refusal_by_safetensors, second_opinion, structural_issues
from optstate.checkpoint.files.safetensors_header import read_header
from tests.support.paths import DATA

SAMPLES = sorted(DATA.rglob("*.safetensors"))
LAXER = {"dup_inner_metadata_key": "occurs twice"}
"""Recorded files that the library takes though we do not, and why."""

KNOWN = ("occurs twice", "is not a list of counts", "dimensions: at most", "is out of range", "two dtype", "two shape")
"""Reasons for which only ours refuses, see `safetensors_check`."""


def reason(path: Path) -> str:
    """Why our reader refuses a file; "" if it takes the file."""
    try:
        read_header(path)
    except CheckpointError as error:
        return error.reason
    return ""


def opinion(path: Path) -> list[Issue]:
    return second_opinion(path, structural_issues(path))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: str(path.relative_to(DATA)))
def test_every_recorded_file_is_read_or_refused_by_both(path: Path) -> None:
    ours, theirs = reason(path), refusal_by_safetensors(path)
    if path.stem in LAXER:
        assert LAXER[path.stem] in ours
        assert not theirs
        assert ["reads it all the same" in issue.what for issue in opinion(path)] == [True]
        return
    assert bool(ours) == bool(theirs), (ours, theirs)
    if not ours:
        assert opinion(path) == []


TYPES = ("F32", "BF16", "U8", "I64", "F16", "BOOL", "F8_E4M3", "F64")


def sound_header(random: Random) -> tuple[str, int]:
    """A header without fault, in one of the usual spellings, and how many bytes of data follow."""
    entries: dict[str, Any] = {}
    at = 0
    for i in range(random.randrange(1, 5)):
        dtype, shape = random.choice(TYPES), [random.randrange(4) for _ in range(random.randrange(4))]
        size = torch.Size(shape).numel() * {"F32": 4, "BF16": 2, "I64": 8, "F16": 2, "F64": 8}.get(dtype, 1)
        entries[random.choice(["w", "model.layers.0.é", "a b"]) + str(i)] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [at, at + size],
        }
        at += size
    if random.random() < 0.3:
        entries = {"__metadata__": {"format": "pt", "x": '{"y": 1}'}, **entries}
    separators = random.choice([(",", ":"), (", ", ": ")])
    return json.dumps(entries, separators=separators, ensure_ascii=random.random() < 0.5), at


def mutated(text: str, random: Random) -> str:
    """The header with one to three of its characters or parts changed, in ways that go wrong in practice."""
    for _ in range(random.randrange(1, 4)):
        at = random.randrange(len(text))
        match random.randrange(6):
            case 0:
                text = text[:at] + random.choice('{}[],:"0123456789-.eEnul\\ tf') + text[at + 1 :]
            case 1:
                text = text[:at] + text[at + random.randrange(1, 12) :]
            case 2:
                text = text[:at] + text[max(at - random.randrange(1, 30), 0) : at] + text[at:]
            case 3:
                old, new = random.choice(
                    [("F32", "F99"), ("shape", "dtype"), ("[0", "[-0"), ("0]", "0.0]"), ("1", "01")]
                )
                text = text.replace(old, new, 1)
            case 4:
                old, new = random.choice(
                    [(",", ",,"), ("}", "},"), ("null", "NaN"), ('"', "'"), ("]", "]]"), (" ", "\t")]
                )
                text = text.replace(old, new, 1)
            case 5:
                digit = next((i for i in range(at, len(text)) if text[i].isdigit()), None)
                if digit is not None:
                    text = text[:digit] + str(random.choice([0, 3, 7, 1 << 31, 1 << 63, 10**25])) + text[digit + 1 :]
    return text


@pytest.mark.slow
def test_two_thousand_mutated_headers_are_judged_alike(tmp_path: Path) -> None:
    """A header is taken by one and refused by the other for reasons that are known, and for no others."""
    random = Random(2026)
    path = tmp_path / "mutated.safetensors"
    taken = refused = 0
    laxer = set[str]()
    for _ in range(2000):
        text, size = sound_header(random)
        header = mutated(text, random).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
        ours, theirs = reason(path), refusal_by_safetensors(path)
        if ours and not theirs:
            assert any(known in ours for known in KNOWN), (ours, header)
            laxer.update(known for known in KNOWN if known in ours)
        else:
            assert bool(ours) == bool(theirs), (ours, theirs, header)
        taken, refused = taken + (not ours), refused + bool(ours)
    assert taken > 100
    assert refused > 1000
    assert laxer


def test_check_says_that_the_library_reads_what_is_refused(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    header = f'{{"a":{entry},"a":{entry}}}'.encode()
    path = tmp_path / "twice.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    found = [(issue.severity, issue.what) for issue in checkpoint.check(path).issues]
    assert ("error", "occurs twice in the header") in found
    assert ("warning", "the safetensors library reads it all the same: programs that use it see no error") in found


def test_check_says_that_the_library_refuses_what_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such file is known: the library's word is put in its mouth."""
    path = tmp_path / "sound.safetensors"
    path.write_bytes(save({"a": torch.ones(2)}))
    monkeypatch.setattr(
        "optstate.checkpoint.files.safetensors_check.refusal_by_safetensors", lambda path: "odd\x1b[31m"
    )
    assert [(issue.severity, issue.where) for issue in opinion(path)] == [("warning", "file")]
    assert "refuses it" in opinion(path)[0].what
    assert opinion(path)[0].what.isprintable()


def test_a_set_is_judged_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "s.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "s.safetensors"}}))
    assert opinion(index) == opinion(tmp_path) == []
    monkeypatch.setattr("optstate.checkpoint.files.safetensors_check.refusal_by_safetensors", lambda path: "no")
    assert [issue.where for issue in opinion(index)] == ["shard 's.safetensors'"]


def test_a_file_that_was_replaced_meanwhile_is_not_spoken_of(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with reading():
        assert structural_issues(path) == []
        (tmp_path / "new").write_bytes(b"no safetensors file")
        (tmp_path / "new").replace(path)
        assert opinion(path) == []
    assert refusal_by_safetensors(path)
