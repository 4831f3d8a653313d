"""Safetensors files and sharded sets: their headers, what they are, and what is wrong with them. Imports no torch.

No tensor data are read here: `Entry.start` and `Entry.stop` say where they are.
"""

from __future__ import annotations

import os
from typing import BinaryIO

from optstate.checkpoint.files import safetensors_header, safetensors_index
from optstate.checkpoint.files.dtypes import BITS
from optstate.checkpoint.files.file_kinds import MAX_HEADER, SAFETENSORS, identify
from optstate.checkpoint.files.safetensors_header import METADATA, Entry, Header, Issue, Report, raising, tensor_place
from optstate.checkpoint.files.safetensors_index import Index
from optstate.text import has_controls

__all__ = [
    "BITS",
    "CONTROLS",
    "MAX_HEADER",
    "METADATA",
    "SAFETENSORS",
    "Entry",
    "Header",
    "Index",
    "Issue",
    "identify",
    "read_header",
    "read_index",
    "read_stream",
    "structural_issues",
]

CONTROLS = "its name has control characters, which change what a terminal shows"

MOST_ISSUES = 1000  # a hostile file may have millions


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a safetensors file; raises CheckpointError unless the whole file agrees with it."""
    return safetensors_header.read(path, raising(path))


def read_stream(path: str | os.PathLike[str], file: BinaryIO) -> Header:
    """The header of a safetensors file that comes through a pipe, whose data are left unread; `path` is for errors.

    Raises CheckpointError unless it is one, as far as a header shows.
    """
    return safetensors_header.read_stream(path, file, raising(path))


def read_index(path: str | os.PathLike[str]) -> Index:
    """The index of a sharded set and the headers of its shards; `path` is the *.index.json or the folder with it.

    Raises CheckpointError unless every shard is a valid file in the folder of the index, or below it, and holds the
    tensors that the index says it holds.
    """
    return safetensors_index.read(path, raising(path))


def structural_issues(path: str | os.PathLike[str]) -> list[Issue]:
    """Everything that is wrong or odd in the structure of a safetensors file, a sharded index or its folder.

    "error" is what `read_header` and `read_index` refuse, and a name with control characters, which they accept so that
    one can look into the file; "warning" is what is odd. Raises
    CheckpointError if there is nothing to go through: no such file, another kind of file, no JSON.
    """
    issues: list[Issue] = []

    def collect(issue: Issue) -> None:
        issues.append(issue)
        if len(issues) == MOST_ISSUES:
            raise _EnoughError

    sharded = os.path.isdir(path) or os.fspath(path).endswith(".json")
    try:
        if sharded:
            headers = list(safetensors_index.read(path, Report(collect)).shards.values())
        else:
            headers = [safetensors_header.read(path, Report(collect))]
        for name in (entry.name for each in headers for entry in each.tensors if has_controls(entry.name)):
            collect(Issue("error", tensor_place(name), CONTROLS))
    except _EnoughError:
        issues.append(Issue("error", "file", f"more than {MOST_ISSUES} findings: the rest was not looked at"))
    return issues


class _EnoughError(Exception):
    """Ends a search that finds no end."""
