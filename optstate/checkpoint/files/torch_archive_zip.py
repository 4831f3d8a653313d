"""The zip archive of a torch.save file: where its records lie, and the bytes around them.

This is the layout of torch's own writer (2.13), byte for byte: nothing is compressed, the data of each record begin at
a multiple of 64 behind a padding field "FB", their checksum and size follow them, and numbers that need more than 32
bits stand in zip64 fields. `torch.load` can compute where the tensors lie from their sizes alone and relies on it. The
time of every record is zero.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["ALIGNMENT", "Record", "foot", "head", "place", "tail"]

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
        return self.start + self.size + len(foot(self, 0))


def place(sizes: Iterable[tuple[str, int]]) -> list[Record]:
    """The records one after the other, by their names and sizes."""
    records = []
    position = 0
    for name, size in sizes:
        record = Record(name, size, position)
        records.append(record)
        position = record.stop
    return records


def head(record: Record) -> bytes:
    """What stands before the data."""
    name = record.name.encode()
    extra = _zip64(record, 0)  # of a size that is not known yet, as torch has it
    padding = record.start - record.position - _HEAD.size - len(name) - len(extra) - 4
    extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return _HEAD.pack(b"PK\3\4", 0, _flags(record), 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra


def foot(record: Record, checksum: int) -> bytes:
    """What stands after the data, for their CRC-32; nothing after no data."""
    if not record.size:
        return b""
    numbers = "2Q" if _zip64(record, 0) else "2I"
    return struct.pack(f"<4sI{numbers}", b"PK\7\b", checksum, record.size, record.size)


def tail(records: Sequence[Record], checksums: Sequence[int]) -> bytes:
    """The central directory and the end of the archive, for all of its records and their CRC-32."""
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
    """The extra field with the numbers that need more than 32 bits, or nothing if there are none."""
    numbers = [record.size, compressed] if record.size >= _FULL else []
    if record.position >= _FULL:
        numbers.append(record.position)
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
