"""The header of one safetensors file: read it, and say exactly what is wrong with it.

The format (https://github.com/huggingface/safetensors, section "Format"): eight bytes with the length of the header
(little endian), the header as JSON, then the tensors' bytes without a gap up to the end of the file. No tensor data
are read here and torch is not imported. The parser is our own since the library names neither the tensor nor the
numbers in half of its errors, keeps the last of two equal names silently, and calls a zip file "header too large".

Memory stays within a small multiple of the header that is really in the file: a length is compared with the size of
the file before it is read, and an entry is decoded alone, so no number in a file makes this module allocate.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, BinaryIO

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.dtypes import BITS
from optstate.checkpoint.files.file_kinds import (
    FOLDER,
    HINTS,
    MAX_HEADER,
    SAFETENSORS,
    UNKNOWN,
    kind_of,
    open_file,
    read_bytes,
    special_kind,
)
from optstate.checkpoint.files.opened_file import Opened
from optstate.checkpoint.files.strict_json import NotJSONError, Pairs, decode, decode_string, members, only_object
from optstate.text import has_controls, shown

__all__ = ["METADATA", "Entry", "Header", "Issue", "Report", "raising", "read", "read_stream"]


MAX_COUNT = (1 << 63) - 1  # no framework counts further
MOST_DIMENSIONS = 1000  # torch counts to 64 in most places, the format has no limit
ENDLESS = 1 << 63  # bytes in a pipe
METADATA = "__metadata__"
KNOWN = "header"
"""Under which an opened file keeps its header, and the warnings of it, for whoever asks next."""

FIELDS = ("dtype", "shape", "data_offsets")


_COUNT = r"(?:0|[1-9][0-9]{0,17})"
_ENTRY = (
    rf'\{{"dtype": ?"([A-Z0-9_]{{2,12}})", ?"shape": ?\[((?:{_COUNT}(?:, ?{_COUNT}){{0,{MOST_DIMENSIONS - 1}}})?)\]'
    rf', ?"data_offsets": ?\[({_COUNT}), ?({_COUNT})\]\}}'
)
_USUAL, _FOLLOWING = re.compile(_ENTRY), re.compile(rf', ?"([^"\\\x00-\x1f]*)": ?{_ENTRY}')
"""An entry as writers write it, and the next one with its name: most are read at once."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file. `start` and `stop` count from the beginning of the file, not of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stop - self.start

    @property
    def elements(self) -> int:
        """Numbers in the tensor."""
        return self.nbytes * 8 // BITS[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says before its data; `tensors` are in the order of their bytes.

    source: the file it was read from, as long as this is kept; None for what came through a pipe.
    """

    path: str
    metadata: dict[str, str]
    tensors: tuple[Entry, ...]
    data_start: int
    file_size: int
    source: Opened | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Issue:
    """One finding: `severity` is "error" (no reader should accept it) or "warning" (valid but odd)."""

    severity: str
    where: str
    what: str


class Report:
    """Where a reader puts what it finds: `add` may raise, to stop at once, or keep the issue, to find more."""

    def __init__(self, add: Callable[[Issue], None], within: str = "") -> None:
        self._add = add
        self._within = within

    def error(self, where: str, what: str) -> None:
        """What no reader should accept."""
        self._add(Issue("error", self._within + where, what))

    def warning(self, where: str, what: str) -> None:
        """What is valid but odd."""
        self._add(Issue("warning", self._within + where, what))

    def repeat(self, issues: Iterable[Issue]) -> None:
        """What was found before."""
        for issue in issues:
            self._add(replace(issue, where=self._within + issue.where))

    def noted(self, issues: list[Issue]) -> Report:
        """The same, which keeps what is found in a list, too."""

        def add(issue: Issue) -> None:
            issues.append(issue)
            self.repeat([issue])

        return Report(add)

    def within(self, where: str) -> Report:
        """The same for the parts of `where`."""
        return Report(self._add, f"{self._within}{where}, ")


def raising(path: str | os.PathLike[str]) -> Report:
    """A report that raises CheckpointError at the first error and passes over warnings."""

    def add(issue: Issue) -> None:
        if issue.severity == "error":
            raise CheckpointError(path, f"{issue.where}: {issue.what}")

    return Report(add)


def tensor_place(name: str) -> str:
    """How a message calls a tensor."""
    return f"tensor '{shown(name)}'"


def read(path: str | os.PathLike[str], report: Report) -> Header:
    """The header of a file, all findings given to `report`; raises CheckpointError if there is none."""
    special = special_kind(path)
    if special is not None:
        raise CheckpointError(path, f"{special}, not a safetensors file", _special_hint(path, special))
    with open_file(path) as file:
        source = file.opened
        if KNOWN not in source.known:
            size, found = source.size, list[Issue]()
            first = read_bytes(path, file, min(size, 512))
            length = _header_length(path, first, size)
            content = (first[8:] + read_bytes(path, file, 8 + length - len(first)))[:length]
            header = replace(_parsed(path, content, length, size, report.noted(found)), source=source)
            if not any(issue.severity == "error" for issue in found):
                source.known[KNOWN] = header, found
            return header
    known: tuple[Header, list[Issue]] = source.known[KNOWN]
    report.repeat(known[1])
    return replace(known[0], path=os.fspath(path))


def read_stream(path: str | os.PathLike[str], file: BinaryIO, report: Report) -> Header:
    """The header of a file that comes through a pipe: what follows it is neither read nor missed.

    `file_size` is where the last tensor ends.
    """
    first = read_bytes(path, file, 8)
    first += read_bytes(path, file, min(int.from_bytes(first, "little"), 512 - 8))
    size = ENDLESS if len(first) > 8 else len(first)
    kind = kind_of(first, size)
    if kind not in (SAFETENSORS, UNKNOWN):
        hint = "only a safetensors file can be inspected through a pipe: give a file"
        raise CheckpointError(path, f"{kind}, not a safetensors file", hint)
    length = _header_length(path, first, size)
    header = (first[8:] + read_bytes(path, file, 8 + length - len(first)))[:length]
    return _parsed(path, header, length, None, report)


def _parsed(path: str | os.PathLike[str], header: bytes, length: int, size: int | None, report: Report) -> Header:
    """A header in its own bytes, of a file of `size` bytes; None where the end is not known."""
    if len(header) < length:
        short = "became shorter while it was read" if size is not None else "ends within its header"
        raise CheckpointError(path, f"the file {short}")
    text = _header_text(path, header)
    start = 8 + length
    parser = _Parser(text, report, start)
    try:
        parser.parse()
    except NotJSONError as error:
        raise CheckpointError(path, f"the header is not valid JSON: {error}") from None
    if start % 8:
        report.warning("header", f"not padded: the data begin at byte {start}, which is no multiple of 8")
    tensors = _in_file_order(parser, size)
    end = tensors[-1].stop if tensors else start
    return Header(os.fspath(path), parser.metadata, tensors, start, end if size is None else size)


def _special_hint(path: str | os.PathLike[str], special: str) -> str:
    if special != FOLDER:
        return "copy it into a regular file first"
    try:
        names = os.listdir(path)
    except OSError:
        return ""
    if ".metadata" in names:
        return "this is a checkpoint of torch.distributed.checkpoint"
    return "give one of its files" if names else "it is empty"


def _header_length(path: str | os.PathLike[str], first: bytes, size: int) -> int:
    kind = kind_of(first, size)
    if kind not in (SAFETENSORS, UNKNOWN):
        raise CheckpointError(path, f"{kind}, not a safetensors file", HINTS.get(kind, ""))
    if size < 8:
        raise CheckpointError(path, f"not a safetensors file: {size} bytes are too short for the header's length")
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER:
        reason = f"the header's length is {length} bytes, above the format's limit of {MAX_HEADER}"
        raise CheckpointError(path, f"not a safetensors file: {reason}")
    if length > size - 8:
        reason = f"the header's length is {length} bytes, but only {size - 8} follow"
        kind = "truncated" if first[8:9] == b"{" else "truncated or not a safetensors file"
        raise CheckpointError(path, f"{kind}: {reason}")
    if length == 0:
        zeros = not first.strip(b"\0")
        raise CheckpointError(
            path,
            "the header's length is 0" + (", and the file begins with zeros only" if zeros and size > 8 else ""),
            "the write or the download was cut short" if zeros else "",
        )
    return length


def _header_text(path: str | os.PathLike[str], header: bytes) -> str:
    try:
        return header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(path, f"the header is not UTF-8: {error.reason} at byte {8 + error.start}") from None


class _Parser:
    """Goes through a header once; `start` is the byte of the file with which the data begin."""

    def __init__(self, text: str, report: Report, start: int) -> None:
        self.text = text
        self.report = report
        self.start = start
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        self.tensors = 0
        self._names: set[str] = set()
        self._has_metadata = False

    def parse(self) -> None:
        if not self.text.startswith("{") and self.text.lstrip(" \t\r\n").startswith("{"):
            self.report.warning("header", "begins with white space; the format asks for '{' as its first character")
        only_object(self.text, self._member)
        self._odd_names()

    def _member(self, name: str, at: int) -> int:
        if name == METADATA:
            if self._has_metadata:
                self.report.error("metadata", f"{METADATA} occurs twice in the header")
            self._has_metadata = True
            return self._metadata(at)
        if (found := _USUAL.match(self.text, at)) is not None:
            self._usual(name, *found.groups())
            end = found.end()
            while (found := _FOLLOWING.match(self.text, end)) is not None and found[1] != METADATA:
                self._usual(*found.groups())
                end = found.end()
            return end
        self._count(name)
        if not self.text.startswith("{", at):
            self.report.error(tensor_place(name), "its entry is not an object")
            return decode(self.text, at)[1]
        fields, end = decode(self.text, at)
        entry = self._entry(name, fields)
        if entry is not None:
            self.entries[name] = entry
        return end

    def _count(self, name: str) -> None:
        if name in self._names:
            self.report.error(tensor_place(name), "occurs twice in the header")
        self._names.add(name)
        self.tensors += 1

    def _usual(self, name: str, dtype: str, sizes: str, first: str, last: str) -> None:
        """Take an entry whose fields are there and of the right types."""
        self._count(name)
        shape = tuple(map(int, sizes.split(","))) if sizes else ()
        start, stop = int(first), int(last)
        elements = prod(shape)
        if (
            dtype in BITS
            and start <= stop
            and 0 < elements <= MAX_COUNT
            and elements * BITS[dtype] == 8 * (stop - start)
        ):
            self.entries[name] = Entry(name, dtype, shape, self.start + start, self.start + stop)
        elif (entry := self._checked(name, dtype, list(shape), [start, stop])) is not None:
            self.entries[name] = entry

    def _metadata(self, at: int) -> int:
        if self.text.startswith("null", at):
            self.report.warning("metadata", f"{METADATA} is null")
            return at + 4
        if not self.text.startswith("{", at):
            self.report.error("metadata", f"{METADATA} is not an object of strings")
            return decode(self.text, at)[1]
        return members(self.text, at, self._metadata_value)

    def _metadata_value(self, key: str, at: int) -> int:
        where = f"metadata '{shown(key)}'"
        if key in self.metadata:
            self.report.error(where, "occurs twice in the header")
        if not self.text.startswith('"', at):
            self.report.error(where, "its value is not a string")
            self.metadata[key] = ""
            return decode(self.text, at)[1]
        self.metadata[key], end = decode_string(self.text, at)
        return end

    def _entry(self, name: str, fields: Pairs) -> Entry | None:
        """One tensor's entry, or None after an error that leaves nothing to go on with."""
        where = tensor_place(name)
        found = dict(fields)
        counts = Counter(key for key, _ in fields)
        for key in FIELDS:
            if counts[key] != 1:
                self.report.error(where, f"its entry has {'no' if not counts[key] else 'two'} {key}")
                return None
        if len(counts) > len(FIELDS):
            extra = ", ".join(f"'{shown(key)}'" for key in list(counts) if key not in FIELDS)
            self.report.warning(where, f"its entry has fields the format does not know: {extra}")
        return self._checked(name, *(found[key] for key in FIELDS))

    def _checked(self, name: str, dtype: Any, shape: Any, offsets: Any) -> Entry | None:
        if not isinstance(dtype, str) or dtype not in BITS:
            self.report.error(tensor_place(name), f"unknown dtype {value_text(dtype)}")
            return None
        # An object arrives as `Pairs`, which is a list, too: an empty one would pass for the shape of a scalar.
        if type(shape) is not list or not all(type(n) is int and 0 <= n <= MAX_COUNT for n in shape):
            self.report.error(tensor_place(name), f"shape {value_text(shape)} is not a list of counts")
            return None
        if len(shape) > MOST_DIMENSIONS:
            self.report.error(tensor_place(name), f"{len(shape)} dimensions: at most {MOST_DIMENSIONS} are read")
            return None
        pair = isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets)
        if not pair or offsets[0] > offsets[1]:
            self.report.error(tensor_place(name), f"data_offsets {value_text(offsets)} are not a beginning and an end")
            return None
        start, stop = offsets
        self._size(name, dtype, shape, stop - start)
        return Entry(name, dtype, tuple(shape), self.start + start, self.start + stop)

    def _size(self, name: str, dtype: str, shape: list[int], nbytes: int) -> None:
        elements = 1
        for n in shape:
            elements *= max(n, 1)
            if elements > MAX_COUNT:  # at once: the product of a thousand such numbers would take long
                self.report.error(
                    tensor_place(name), f"shape {value_text(shape)} has more elements than can be counted"
                )
                return
        bits = BITS[dtype] * (0 if 0 in shape else elements)
        if bits % 8:
            self.report.error(tensor_place(name), f"shape {value_text(shape)} of {dtype} does not fill whole bytes")
        elif bits // 8 != nbytes:
            what = f"shape {value_text(shape)} of {dtype} takes {bits // 8} bytes, its data_offsets span {nbytes}"
            self.report.error(tensor_place(name), what)

    def _odd_names(self) -> None:
        normal: dict[str, str] = {}
        for name in self._names:
            if not name:
                self.report.warning(tensor_place(name), "its name is empty")
            elif not name.isprintable() and not has_controls(name):  # those are an error of the checker's
                self.report.warning(tensor_place(name), "its name has characters that cannot be printed")
            if not name.isascii():
                other = normal.setdefault(unicodedata.normalize("NFC", name), name)
                if other != name:
                    self.report.warning(
                        tensor_place(name), f"looks the same as '{shown(other)}' but is spelt differently"
                    )


def value_text(value: object) -> str:
    """A value from a file as it goes into a message."""
    if isinstance(value, Pairs):
        return "an object"
    return shown(repr(value[:50]) if isinstance(value, list | str) else repr(value))


def _in_file_order(parser: _Parser, size: int | None) -> tuple[Entry, ...]:
    """The entries by position; reports gaps, overlaps, missing bytes."""
    report = parser.report
    ordered = sorted(parser.entries.values(), key=lambda entry: (entry.start, entry.stop))
    complete = len(ordered) == parser.tensors  # otherwise a gap may be that of a tensor already reported
    reached = parser.start
    last: Entry | None = None
    unaligned = []
    for entry in ordered:
        if entry.start > reached and complete:
            what = f"{entry.start - reached} bytes between {_before(last)} and this tensor belong to none"
            report.error(tensor_place(entry.name), what)
        elif entry.start < reached:
            what = f"overlaps {_before(last)} by {min(reached, entry.stop) - entry.start} bytes"
            report.error(tensor_place(entry.name), what)
        if entry.nbytes and entry.start % max(BITS[entry.dtype] // 8, 1):
            unaligned.append(entry.name)
        if entry.stop >= reached:
            reached, last = entry.stop, entry
    if unaligned:
        more = f" and {len(unaligned) - 1} more" if len(unaligned) > 1 else ""
        report.warning(tensor_place(unaligned[0]) + more, "not aligned to the size of an element")
    present = size if size is not None else reached
    if reached > present:
        what = f"{reached - present} of {reached - parser.start} bytes are missing at the end of the file"
        report.error("data", f"truncated: {what}")
    elif reached < present and complete:
        report.error("data", f"{present - reached} bytes after the last tensor belong to none")
    return tuple(ordered)


def _before(last: Entry | None) -> str:
    """What lies before a tensor."""
    return tensor_place(last.name) if last is not None else "the header"
