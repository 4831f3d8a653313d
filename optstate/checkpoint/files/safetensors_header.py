"""The header of one safetensors file: read it, and say exactly what is wrong with it.

The format (https://github.com/huggingface/safetensors, section "Format"): eight bytes with the length of the header
(little endian), the header as JSON, then the tensors' bytes without a gap up to the end of the file. No tensor data
are read here and torch is not imported. The library's own parser is asked for a second opinion only
(`safetensors_check`): it names neither the tensor nor the numbers in half of its errors, keeps the last of two equal
names silently, and calls a zip file "header too large".

Memory stays within a small multiple of the header that is really in the file: a length is compared with the size of
the file before it is read, and few entries are decoded at a time, so no number in a file makes this module allocate.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any, BinaryIO, NamedTuple

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.dtypes import BITS, MAX_COUNT, MOST_DIMENSIONS
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
from optstate.checkpoint.files.issues import Issue, IssueLog, raising
from optstate.checkpoint.files.opened_file import Opened
from optstate.checkpoint.files.strict_json import NotJSONError, Pairs, members
from optstate.collector import paused
from optstate.text import has_controls, shown

__all__ = ["METADATA", "Entry", "Header", "log_header", "read_header", "read_stream", "tensor_place", "value_text"]


ENDLESS = 1 << 63  # bytes in a pipe
METADATA = "__metadata__"
KNOWN = "header"
"""Under which an opened file keeps its header, and the warnings of it, for whoever asks next."""

FIELDS = ("dtype", "shape", "data_offsets")

MANY = 1 << 20
"""Bytes of a header from which on the collector waits: it would go through all entries again and again."""


class Entry(NamedTuple):
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


def tensor_place(name: str) -> str:
    """Return how messages call a tensor."""
    return f"tensor '{shown(name)}'"


def read_header(path: str | os.PathLike[str]) -> Header:
    """Return the header of a safetensors file.

    Raises:
        CheckpointError: unless the path is such a file and the whole file agrees with its header.
    """
    return log_header(path, raising(path))


def log_header(path: str | os.PathLike[str], log: IssueLog) -> Header:
    """Return the header of a file and give all findings to `log`; raise CheckpointError if there is no header."""
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
            header = replace(_parsed(path, content, length, size, log.noted(found)), source=source)
            if not any(issue.severity == "error" for issue in found):
                source.known[KNOWN] = header, found
            return header
    known: tuple[Header, list[Issue]] = source.known[KNOWN]
    log.repeat(known[1])
    return replace(known[0], path=os.fspath(path))


def read_stream(path: str | os.PathLike[str], file: BinaryIO) -> Header:
    """Return the header of a safetensors file that comes through a pipe: what follows is neither read nor missed.

    Args:
        path: what errors call the pipe.
        file: the pipe. The header's `file_size` is where its last tensor ends.

    Raises:
        CheckpointError: unless it is a safetensors file, as far as a header shows.
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
    return _parsed(path, header, length, None, raising(path))


def _parsed(path: str | os.PathLike[str], header: bytes, length: int, size: int | None, log: IssueLog) -> Header:
    """Parse a header in its own bytes, of a file of `size` bytes; None where the end is not known."""
    if len(header) < length:
        short = "became shorter while it was read" if size is not None else "ends within its header"
        raise CheckpointError(path, f"the file {short}")
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(path, f"the header is not UTF-8: {error.reason} at byte {8 + error.start}") from None
    start = 8 + length
    parser = _Parser(log, start)
    try:
        with paused() if length > MANY else nullcontext():  # a header is no cyclic garbage
            parser.parse(text)
    except NotJSONError as error:
        raise CheckpointError(path, f"the header is not valid JSON: {error}") from None
    if start % 8:
        log.warning("header", f"not padded: the data begin at byte {start}, which is no multiple of 8")
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


_START, _STOP = itemgetter(3), itemgetter(4)
_new_entry = partial(tuple.__new__, Entry)
"""`Entry` of a tuple of its fields, in a third of the time."""


class _Parser:
    """Goes through a header once. start: the byte of the file with which the data begin.

    entries: by name, None where nothing is known but that. count: of all that were met, of equal names, too.
    """

    def __init__(self, log: IssueLog, start: int) -> None:
        self.log = log
        self.start = start
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, Entry | None] = {}
        self.count = 0
        self._repeated = 0
        self._has_metadata = False

    def parse(self, text: str) -> None:
        if not text.startswith("{") and text.lstrip(" \t\r\n").startswith("{"):
            self.log.warning("header", "begins with white space; the format asks for '{' as its first character")
        entries = self.entries
        for name, value in members(text, (METADATA,)):
            if name == METADATA:
                self._metadata(value)
                continue
            entry = self._usual(name, value)
            if entry is None:  # faulty, or unusual
                entry = self._entry(name, value)
            entries[name] = entry
            self.count += 1
            if len(entries) < self.count - self._repeated:
                self._repeated += 1
                self.log.error(tensor_place(name), "occurs twice in the header")
        self._odd_names()

    def _metadata(self, value: Any) -> None:
        if self._has_metadata:
            self.log.error("metadata", f"{METADATA} occurs twice in the header")
        self._has_metadata = True
        if value is None:
            self.log.warning("metadata", f"{METADATA} is null")
        elif not isinstance(value, Pairs | Iterator):
            self.log.error("metadata", f"{METADATA} is not an object of strings")
        else:
            for key, text in value:
                self._metadata_value(key, text)

    def _metadata_value(self, key: str, value: Any) -> None:
        where = f"metadata '{shown(key)}'"
        if key in self.metadata:
            self.log.error(where, "occurs twice in the header")
        if not isinstance(value, str):
            self.log.error(where, "its value is not a string")
        self.metadata[key] = value if isinstance(value, str) else ""

    def _usual(self, name: str, value: Any) -> Entry | None:
        """Return an entry without fault, with elements and its fields in the usual order; None for all others."""
        try:
            (key, dtype), (shape_key, shape), (offsets_key, (start, stop)) = value
            bits = BITS[dtype]
        except (ValueError, TypeError, KeyError):
            return None
        if value.__class__ is not Pairs or shape.__class__ is not list or len(shape) > MOST_DIMENSIONS:
            return None
        for n in shape:
            if n.__class__ is not int or n < 1:
                return None
            bits *= n
        usual = (
            (key, shape_key, offsets_key) == FIELDS
            and start.__class__ is stop.__class__ is int
            and 0 <= start <= stop <= MAX_COUNT >> 8
            and 8 * (stop - start) == bits
        )
        return _new_entry((name, dtype, tuple(shape), self.start + start, self.start + stop)) if usual else None

    def _entry(self, name: str, fields: Any) -> Entry | None:
        """Return one tensor's entry, or None after an error that leaves nothing to go on with."""
        where = tensor_place(name)
        if not isinstance(fields, Pairs):
            self.log.error(where, "its entry is not an object")
            return None
        found = dict(fields)
        counts = Counter(key for key, _ in fields)
        for key in FIELDS:
            if counts[key] != 1:
                self.log.error(where, f"its entry has {'no' if not counts[key] else 'two'} {key}")
                return None
        if len(counts) > len(FIELDS):
            extra = ", ".join(f"'{shown(key)}'" for key in list(counts) if key not in FIELDS)
            self.log.warning(where, f"its entry has fields the format does not know: {extra}")
        return self._checked(name, *(found[key] for key in FIELDS))

    def _checked(self, name: str, dtype: Any, shape: Any, offsets: Any) -> Entry | None:
        if not isinstance(dtype, str) or dtype not in BITS:
            self.log.error(tensor_place(name), f"unknown dtype {value_text(dtype)}")
            return None
        # An object arrives as `Pairs`, which is a list, too: an empty one would pass for the shape of a scalar.
        if type(shape) is not list or not all(type(n) is int and 0 <= n <= MAX_COUNT for n in shape):
            self.log.error(tensor_place(name), f"shape {value_text(shape)} is not a list of counts")
            return None
        if len(shape) > MOST_DIMENSIONS:
            self.log.error(tensor_place(name), f"{len(shape)} dimensions: at most {MOST_DIMENSIONS} are read")
            return None
        pair = (
            isinstance(offsets, list)
            and len(offsets) == 2
            and all(type(n) is int and 0 <= n < 1 << 64 for n in offsets)
        )
        if not pair or offsets[0] > offsets[1]:
            self.log.error(tensor_place(name), f"data_offsets {value_text(offsets)} are not a beginning and an end")
            return None
        start, stop = offsets
        self._size(name, dtype, shape, stop - start)
        return Entry(name, dtype, tuple(shape), self.start + start, self.start + stop)

    def _size(self, name: str, dtype: str, shape: list[int], nbytes: int) -> None:
        elements = 1
        for n in shape:
            elements *= max(n, 1)
            if elements > MAX_COUNT:  # at once: the product of a thousand such numbers would take long
                self.log.error(tensor_place(name), f"shape {value_text(shape)} has more elements than can be counted")
                return
        bits = BITS[dtype] * (0 if 0 in shape else elements)
        if bits % 8:
            self.log.error(tensor_place(name), f"shape {value_text(shape)} of {dtype} does not fill whole bytes")
        elif bits // 8 != nbytes:
            what = f"shape {value_text(shape)} of {dtype} takes {bits // 8} bytes, its data_offsets span {nbytes}"
            self.log.error(tensor_place(name), what)

    def _odd_names(self) -> None:
        normal: dict[str, str] = {}
        together = "".join(self.entries)
        usual = together.isascii() and together.isprintable() and "" not in self.entries
        for name in () if usual else self.entries:
            if not name:
                self.log.warning(tensor_place(name), "its name is empty")
            elif not name.isprintable() and not has_controls(name):  # those are an error of the checker's
                self.log.warning(tensor_place(name), "its name has characters that cannot be printed")
            if not name.isascii():
                other = normal.setdefault(unicodedata.normalize("NFC", name), name)
                if other != name:
                    what = f"looks the same as '{shown(other)}' but is spelt differently"
                    self.log.warning(tensor_place(name), what)


def value_text(value: object) -> str:
    """Return a value from a file as it goes into a message."""
    if isinstance(value, Pairs):
        return "an object"
    return shown(repr(value[:50]) if isinstance(value, list | str) else repr(value))


def _in_file_order(parser: _Parser, size: int | None) -> tuple[Entry, ...]:
    """Return the entries by position; gaps, overlaps and missing bytes go to the log."""
    log = parser.log
    ordered = [entry for entry in parser.entries.values() if entry is not None]
    complete = len(ordered) == parser.count  # otherwise a gap may be that of a tensor already reported
    reached = ordered[-1].stop if ordered else parser.start
    if [parser.start, *map(_STOP, ordered)][:-1] != list(map(_START, ordered)):
        ordered.sort(key=itemgetter(3, 4))
        reached = _check_between(ordered, parser.start, complete, log)
    unaligned = [name for name, dtype, _, start, stop in ordered if start % (BITS[dtype] // 8 or 1) and start < stop]
    if unaligned:
        more = f" and {len(unaligned) - 1} more" if len(unaligned) > 1 else ""
        log.warning(tensor_place(unaligned[0]) + more, "not aligned to the size of an element")
    present = size if size is not None else reached
    if reached > present:
        what = f"{reached - present} of {reached - parser.start} bytes are missing at the end of the file"
        log.error("data", f"truncated: {what}")
    elif reached < present and complete:
        log.error("data", f"{present - reached} bytes after the last tensor belong to none")
    return tuple(ordered)


def _check_between(ordered: list[Entry], reached: int, complete: bool, log: IssueLog) -> int:
    """Look for gaps and overlaps between entries in the order of their bytes; return where the last byte ends."""
    last: str | None = None
    for name, _, _, start, stop in ordered:
        if start > reached and complete:
            what = f"{start - reached} bytes between {_before(last)} and this tensor belong to none"
            log.error(tensor_place(name), what)
        elif start < reached:
            log.error(tensor_place(name), f"overlaps {_before(last)} by {min(reached, stop) - start} bytes")
        if stop >= reached:
            reached, last = stop, name
    return reached


def _before(last: str | None) -> str:
    """Return how messages call what lies before a tensor."""
    return "the header" if last is None else tensor_place(last)
