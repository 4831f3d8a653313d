"""Write a torch.save file without torch, one tensor at a time, atomically, with the same bytes for the same input."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optstate.checkpoint.files.atomic_write import as_bytes, replacing, reported, reserve, write_at
from optstate.checkpoint.files.torch_pickle_writer import Constant, NewTensor, Subclass, pickle_tree
from optstate.text import shown

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "ALIGNMENT",
    "Constant",
    "NewTensor",
    "Record",
    "Subclass",
    "TorchFile",
    "create_torch",
    "make_directory",
    "make_foot",
    "make_head",
    "place_records",
]

_FOLDER = "archive"  # of the records; torch takes the file's name, here the bytes do not depend on it
_VERSION = b"3\n"


@contextmanager
def create_torch(
    path: str | os.PathLike[str], tree: Any, *, overwrite: bool = False, permissions: int | None = None
) -> Iterator[TorchFile]:
    """Write a file that `torch.load` reads, also with `weights_only`, `mmap` or `map_location="meta"`.

    The body calls `put` for every NewTensor of the tree. Until it ends `path` is what it was before, and an exception
    leaves no trace. The disk's room for the whole file is taken at the beginning.

    Args:
        path: where; a symbolic link is followed. An existing file keeps its permissions.
        tree: dicts, lists, tuples, sets, strings, bytes, integers, floats, booleans and None, with NewTensor, Constant
            and Subclass for the tensors.
        overwrite: replace an existing file.
        permissions: of a new file; those of the process if None.

    Raises:
        CheckpointError: the target exists (refused), is no regular file, or cannot be written; the disk is full.
        TypeError, ValueError: a tree that cannot be written, a tensor without its bytes when the body ends.
    """
    pickled, storages = pickle_tree(tree)
    with replacing(path, overwrite, permissions) as descriptor:
        file = TorchFile(path, descriptor, pickled, storages)
        yield file
        file._complete()


class TorchFile:
    """A file that `create_torch` writes."""

    def __init__(
        self, path: str | os.PathLike[str], descriptor: int, pickled: bytes, storages: list[NewTensor | Constant]
    ) -> None:
        self._path = path
        self._descriptor = descriptor
        known: dict[str, bytes] = {
            "data.pkl": pickled,
            ".format_version": b"1",
            ".storage_alignment": str(ALIGNMENT).encode(),
            "byteorder": b"little",
        }
        names = [*known, *(f"data/{number}" for number in range(len(storages))), "version"]
        sizes = [*map(len, known.values()), *(storage.nbytes for storage in storages), len(_VERSION)]
        self._records = place_records(zip((f"{_FOLDER}/{name}" for name in names), sizes, strict=True))
        self._checksums: dict[Record, int] = {}
        self._tensors: dict[str, Record] = {}
        with reported(path):
            reserve(descriptor, self._records[-1].stop)
        for record, data in zip(self._records, known.values(), strict=False):
            self._write(record, memoryview(data))
        for record, storage in zip(self._records[len(known) : -1], storages, strict=True):
            if isinstance(storage, Constant):
                self._write(record, memoryview(storage.data))
            else:
                self._tensors[storage.key] = record

    def put(self, key: str, buffer: Buffer) -> None:
        """Write all bytes of one tensor.

        Raises:
            ValueError: no such tensor, one that was written already, bytes that are too few or too many, or a buffer
                that is not contiguous.
            CheckpointError: the file cannot be written.
        """
        what = f"tensor '{shown(key)}'"
        if key not in self._tensors:
            raise ValueError(f"{what} is none of the {len(self._tensors)} of the file")
        record = self._tensors[key]
        if record in self._checksums:
            raise ValueError(f"{what} was written already")
        view = as_bytes(buffer, what)
        if view.nbytes != record.size:
            raise ValueError(f"{what}: a buffer of {view.nbytes} bytes, {record.size} are needed")
        self._write(record, view)

    def _write(self, record: Record, data: memoryview) -> None:
        checksum = zlib.crc32(data)
        with reported(self._path):
            write_at(self._descriptor, memoryview(make_head(record)), record.position)
            write_at(self._descriptor, data, record.start)
            write_at(self._descriptor, memoryview(make_foot(record, checksum)), record.start + record.size)
        self._checksums[record] = checksum

    def _complete(self) -> None:
        missing = [key for key, record in self._tensors.items() if record not in self._checksums]
        if missing:
            raise ValueError(f"tensor '{shown(missing[0])}' was not written, one of {len(missing)}")
        self._write(self._records[-1], memoryview(_VERSION))
        checksums = [self._checksums[record] for record in self._records]
        with reported(self._path):
            write_at(self._descriptor, memoryview(make_directory(self._records, checksums)), self._records[-1].stop)


ALIGNMENT = 64


_HEAD = struct.Struct("<4s5H3I2H")


_ENTRY = struct.Struct("<4s6H3I5H2I")


_END_64 = struct.Struct("<4sQ2H2I4Q")


_LOCATOR = struct.Struct("<4sIQI")


_END = struct.Struct("<4s4H2IH")


_FULL = 0xFFFFFFFF  # in place of a 32-bit number: it stands in the zip64 field


_FULL_COUNT = 0xFFFF


@dataclass(frozen=True, slots=True)
class Record:
    """A file in the archive: `size` bytes at `start`, behind the head at `position`."""

    name: str
    size: int
    position: int

    @property
    def start(self) -> int:
        """The byte of the archive with which the data begin."""
        end = self.position + _HEAD.size + len(self.name.encode()) + len(_zip64(self, 0)) + 4
        return end + -end % ALIGNMENT

    @property
    def stop(self) -> int:
        """The byte after the foot."""
        return self.start + self.size + len(make_foot(self, 0))


def place_records(sizes: Iterable[tuple[str, int]]) -> list[Record]:
    """Return the records one after the other, by their names and sizes."""
    records = []
    position = 0
    for name, size in sizes:
        record = Record(name, size, position)
        records.append(record)
        position = record.stop
    return records


def make_head(record: Record) -> bytes:
    """Return what stands before the data."""
    name = record.name.encode()
    extra = _zip64(record, 0)  # of a size that is not known yet, as torch has it
    padding = record.start - record.position - _HEAD.size - len(name) - len(extra) - 4
    extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return _HEAD.pack(b"PK\3\4", 0, _flags(record), 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra


def make_foot(record: Record, checksum: int) -> bytes:
    """Return what stands after the data, for their CRC-32; nothing after no data."""
    if not record.size:
        return b""
    numbers = "2Q" if _zip64(record, 0) else "2I"
    return struct.pack(f"<4sI{numbers}", b"PK\7\b", checksum, record.size, record.size)


def make_directory(records: Sequence[Record], checksums: Sequence[int]) -> bytes:
    """Return the central directory and the end of the archive, for all of its records and their CRC-32."""
    directory = b"".join(_entry(record, checksum) for record, checksum in zip(records, checksums, strict=True))
    start, size, count = records[-1].stop, len(directory), len(records)
    end = _END_64.pack(b"PK\6\6", _END_64.size - 12, 0x031E, 45, 0, 0, count, count, size, start)
    locator = _LOCATOR.pack(b"PK\6\7", 0, start + size, 1)
    short = min(count, _FULL_COUNT)
    return directory + end + locator + _END.pack(b"PK\5\6", 0, 0, short, short, min(size, _FULL), min(start, _FULL), 0)


def _entry(record: Record, checksum: int) -> bytes:
    name, extra, size = record.name.encode(), _zip64(record, record.size), min(record.size, _FULL)
    numbers = checksum, size, size, len(name), len(extra), 0, 0, 0, 0, min(record.position, _FULL)
    return _ENTRY.pack(b"PK\1\2", 0, 0, _flags(record), 0, 0, 0, *numbers) + name + extra


def _flags(record: Record) -> int:
    """Names are UTF-8; a foot follows the data."""
    return 0x0808 if record.size else 0x0800


def _zip64(record: Record, compressed: int) -> bytes:
    """Return the extra field with the numbers that need more than 32 bits, or nothing if there are none."""
    numbers = [record.size, compressed] if record.size >= _FULL else []
    if record.position >= _FULL:
        numbers.append(record.position)
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
