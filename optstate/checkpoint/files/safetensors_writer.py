"""Write a safetensors file one tensor at a time, atomically, and with the same bytes for the same input.

The library's own `save_file` needs all tensors at once, shuffles the metadata, leaves every file readable by its owner
only and puts a regular file in the place of a symbolic link (safetensors 0.8; issues #584 and #782). The layout here
is the library's, so that a file with one metadata key is byte for byte the one it would write.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from optstate.checkpoint.files.atomic_write import as_bytes, replacing, reported, reserve_room, write_all, write_at
from optstate.checkpoint.files.dtypes import BITS
from optstate.checkpoint.files.file_kinds import MAX_HEADER
from optstate.checkpoint.files.safetensors_header import METADATA
from optstate.text import shown

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["NewEntry", "SafetensorsFile", "create_safetensors", "header_size", "layout", "write_safetensors"]

_RANK = {dtype: rank for rank, dtype in enumerate(BITS)}


@dataclass(frozen=True, slots=True)
class NewEntry:
    """A tensor to be written: `dtype` is the format's name of it ("F32", "BF16", "U8" ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Numbers in the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.elements * BITS[self.dtype] // 8


def layout(entries: Iterable[NewEntry]) -> list[NewEntry]:
    """Return the entries in the order of their bytes: wide dtypes first, so that all are aligned; then by name.

    This is the library's order. Raises ValueError for a name that occurs twice or is reserved, an unknown dtype, a
    shape that is not one of counts or does not fill whole bytes.
    """
    ordered = sorted(entries, key=lambda entry: (-_RANK.get(entry.dtype, 0), entry.name))
    names: set[str] = set()
    for entry in ordered:
        if entry.name in names:
            raise ValueError(f"two tensors are called '{shown(entry.name)}'")
        if entry.name == METADATA:
            raise ValueError(f"no tensor can be called {METADATA}: the format keeps this name for the metadata")
        if entry.dtype not in BITS:
            raise ValueError(f"tensor '{shown(entry.name)}': unknown dtype {entry.dtype!r}, known: {', '.join(BITS)}")
        if any(n < 0 for n in entry.shape) or entry.elements * BITS[entry.dtype] % 8:
            raise ValueError(f"tensor '{shown(entry.name)}': impossible shape {entry.shape} for {entry.dtype}")
        names.add(entry.name)
    return ordered


def write_safetensors(
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    entries: Sequence[NewEntry],
    data: Iterable[Buffer],
    *,
    overwrite: bool = False,
) -> None:
    """Write a safetensors file; at every moment `path` is what it was before or the complete new file.

    Args:
        path: where; a symbolic link is followed. An existing file keeps its permissions, a new one gets those of the
            process (0666 less the umask).
        metadata: the strings of `__metadata__`; written sorted by key, left out if empty.
        entries: the tensors, in any order.
        data: C-contiguous buffers, those of the tensors in the order of `layout(entries)`; a tensor may come in
            several buffers, a buffer holds bytes of one tensor only. Consumed one by one: memory is the caller's.
        overwrite: replace an existing file.

    Raises:
        CheckpointError: the target exists (refused), is no regular file, or cannot be written.
        ValueError, TypeError: entries, metadata or data that do not fit together.

    On any exception, KeyboardInterrupt included, the temporary file is removed. A killed process may leave
    `.optstate-<random>.tmp` in the target's folder: never read, safe to delete.
    """
    ordered = layout(entries)
    header = _with_length(_header(metadata, ordered))
    with replacing(path, overwrite) as descriptor:
        with reported(path):
            write_all(descriptor, memoryview(header))
        for part in _checked(ordered, data):
            with reported(path):
                write_all(descriptor, part)


@contextmanager
def create_safetensors(
    path: str | os.PathLike[str],
    entries: Iterable[NewEntry],
    *,
    room: int,
    overwrite: bool = False,
    permissions: int | None = None,
    temporary: str | None = None,
) -> Iterator[SafetensorsFile]:
    """Write a safetensors file whose tensors come in any order, and whose metadata are known only at the end.

    The body calls `put` until every tensor is complete, then `finish`. Until it ends `path` is what it was before; as
    with `write`, an exception leaves no trace. The disk's room for the whole file is taken at the beginning.

    Args:
        path: where, as in `write`.
        entries: the tensors, in any order.
        room: bytes kept for the header, what `header_size` says for metadata at least as long as the real ones will
            be; rounded up to a multiple of eight. What is left of it is filled with spaces.
        overwrite: replace an existing file.
        permissions: of a new file; those of the process if None.
        temporary: the name of the file while it is incomplete, as for `replacing`.

    Raises:
        CheckpointError: the target exists (refused), is no regular file, or cannot be written; the disk is full.
        ValueError: entries that cannot be, too little room for them or more than the format allows, or a body that
            ends without `finish`.
    """
    ordered = layout(entries)
    room += -room % 8
    if room > MAX_HEADER:
        raise ValueError(f"room for a header of {room} bytes, above the format's limit of {MAX_HEADER}")
    if (least := len(_header({}, ordered))) > room:
        raise ValueError(f"room for a header of {room} bytes, without metadata it has {least} already")
    with replacing(path, overwrite, permissions, temporary) as descriptor:
        file = SafetensorsFile(path, descriptor, ordered, room)
        with reported(path):
            reserve_room(descriptor, file.size)
        yield file
        if not file.finished:
            raise ValueError(f"{shown(os.fspath(path))}: the writing ended without finish()")


class SafetensorsFile:
    """A file that `create` writes: `size` bytes in the end. `descriptor`: of the temporary file, open until then."""

    def __init__(self, path: str | os.PathLike[str], descriptor: int, ordered: Sequence[NewEntry], room: int) -> None:
        self.finished = False
        self._path = path
        self.descriptor = descriptor
        self._ordered = ordered
        self._room = room
        self._start: dict[str, int] = {}
        self._given: dict[str, _Spans] = {}
        position = 8 + room
        for entry in ordered:
            self._start[entry.name] = position
            self._given[entry.name] = _Spans(entry.nbytes)
            position += entry.nbytes
        self.size = position

    def put(self, name: str, buffer: Buffer, offset: int = 0) -> None:
        """Write bytes of a tensor: all of them, or those from its byte `offset` on, in any order.

        Raises:
            ValueError: no such tensor, bytes beyond its end or that it has already, a buffer that is not contiguous.
            CheckpointError: the file cannot be written.
        """
        if self.finished:
            raise ValueError(f"tensor '{shown(name)}': the file is finished")
        if name not in self._given:
            raise ValueError(f"tensor '{shown(name)}' is none of the {len(self._given)} of the file")
        what = f"tensor '{shown(name)}'"
        view = as_bytes(buffer, what)
        stop = offset + view.nbytes
        given = self._given[name]
        if offset < 0 or stop > given.size:
            raise ValueError(f"{what}: bytes {offset} to {stop} of {given.size}")
        if given.overlap(offset, stop):
            raise ValueError(f"{what}: bytes {offset} to {stop} were written already, in whole or in part")
        with reported(self._path):
            write_at(self.descriptor, view, self._start[name] + offset)
        given.add(offset, stop)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header, after the last tensor.

        Raises:
            ValueError: a tensor is not complete, or the header does not fit into its room.
            TypeError: metadata that are not strings.
            CheckpointError: the file cannot be written.
        """
        if self.finished:
            raise ValueError("finish() was called before")
        for name, given in self._given.items():
            if given.missing:
                raise ValueError(f"tensor '{shown(name)}': {given.missing} of {given.size} bytes were not written")
        text = _header(metadata, self._ordered)
        if len(text) > self._room:
            raise ValueError(f"the header needs {len(text)} bytes, {self._room} were kept for it: give more room")
        with reported(self._path):
            write_at(self.descriptor, memoryview(_with_length(text.ljust(self._room))), 0)
        self.finished = True


class _Spans:
    """Which of a tensor's bytes were given: disjoint spans in order, those that touch made one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.missing = size
        self._spans: list[tuple[int, int]] = []

    def overlap(self, start: int, stop: int) -> bool:
        """Whether one of the bytes was given before."""
        following = bisect_left(self._spans, (stop, 0))
        return start < stop and following > 0 and self._spans[following - 1][1] > start

    def add(self, start: int, stop: int) -> None:
        """Note bytes that were not given before."""
        if start == stop:
            return
        self.missing -= stop - start
        where = bisect_left(self._spans, (start, stop))
        if where < len(self._spans) and self._spans[where][0] == stop:
            stop = self._spans.pop(where)[1]
        if where and self._spans[where - 1][1] == start:
            where -= 1
            start = self._spans.pop(where)[0]
        self._spans.insert(where, (start, stop))


def header_size(metadata: Mapping[str, str], entries: Iterable[NewEntry]) -> int:
    """Bytes of the header, a multiple of eight; metadata and entries as in `write`, the same errors."""
    return len(_header(metadata, layout(entries)))


def _with_length(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def _header(metadata: Mapping[str, str], ordered: Sequence[NewEntry]) -> bytes:
    """Return the header's JSON, padded so that the data begin at a multiple of eight."""
    content: dict[str, object] = {}
    if metadata:
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError(f"metadata are strings, not {key!r}: {type(value).__name__}")
        content[METADATA] = dict(sorted(metadata.items()))
    start = 0
    for entry in ordered:
        stop = start + entry.nbytes
        content[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header would have {len(text)} bytes, above the format's limit of {MAX_HEADER}")
    return text


def _checked(ordered: Sequence[NewEntry], data: Iterable[Buffer]) -> Iterator[memoryview]:
    """Return the buffers as bytes; raise ValueError unless they are exactly those of the entries."""
    buffers = iter(data)
    for entry in ordered:
        missing = entry.nbytes
        while missing:
            buffer = next(buffers, None)
            if buffer is None:
                raise ValueError(f"tensor '{shown(entry.name)}': the data end {missing} bytes before it is complete")
            view = as_bytes(buffer, f"tensor '{shown(entry.name)}'")
            if view.nbytes > missing:
                raise ValueError(f"tensor '{shown(entry.name)}': a buffer of {view.nbytes} bytes, {missing} fit")
            missing -= view.nbytes
            yield view
    for buffer in buffers:
        if nbytes := memoryview(buffer).nbytes:
            raise ValueError(f"a buffer of {nbytes} bytes is left after the last tensor")
