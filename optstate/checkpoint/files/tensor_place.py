"""Where the numbers of a tensor lie in a file. Imports no torch."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from math import prod

from optstate.checkpoint.files.dtypes import BITS, FORMS
from optstate.checkpoint.files.opened_file import Opened, opened_at
from optstate.checkpoint.files.safetensors_header import Entry, Header
from optstate.text import shown

__all__ = ["Pieces", "Stored", "locate_entry", "read_numbers"]

MOST_NUMBERS = 1024
"""Elements of a tensor that is read as plain numbers: a step, a learning rate, not a statistic."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: nothing of it has been read.

    start: the byte of its first element, from the beginning of the file. dtype: the safetensors format's name of it.
    stride: elements between neighbours along each dimension; None if it is contiguous in C order. source: the file that
    was opened to find it, from which it is read; None opens the path when it is read.
    """

    path: str
    start: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    source: Opened | None = field(default=None, compare=False, repr=False)

    @property
    def opened(self) -> Opened:
        """The file it is in."""
        return opened_at(self.path) if self.source is None else self.source

    def read_into(self, buffer: memoryview) -> None:
        """Fill a buffer of bytes from its first element on.

        Raises:
            OSError: if the file ends before the buffer is full, was overwritten, or cannot be read.
        """
        if self.opened.read_into(buffer, self.start) < len(buffer):
            raise OSError(f"{shown(self.path)} ends within a tensor that begins at byte {self.start}")

    @property
    def elements(self) -> int:
        """Numbers in the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers, without what lies between them if it is not contiguous."""
        return self.elements * BITS[self.dtype] // 8

    @property
    def span(self) -> int:
        """Bytes from its first to the end of its last element."""
        if self.stride is None:
            return self.nbytes
        if not self.elements:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Pieces(Stored):
    """A tensor of which several ranks wrote a part each: boxes that fill it, each in a place of its own.

    path: the folder of the parts; it has no start. whole: the shape that the boxes fill, which has the same elements
    in the same order as `shape`. parts: for every box the index of its first element, and where it is.
    """

    whole: tuple[int, ...] = ()
    parts: tuple[tuple[tuple[int, ...], Stored], ...] = ()


def locate_entry(header: Header, entry: Entry) -> Stored:
    """Return the place of a safetensors file's tensor."""
    return Stored(header.path, entry.start, entry.dtype, entry.shape, source=header.source)


def read_numbers(stored: Stored) -> tuple[float | int, ...]:
    """All numbers of a small contiguous tensor, flat.

    Raises:
        ValueError: for a large one, one that is not contiguous or in pieces, or one of a dtype that is no number's.
        OSError: if the file ends early.
    """
    if stored.elements > MOST_NUMBERS or stored.span != stored.nbytes or isinstance(stored, Pieces):
        raise ValueError(f"a tensor of shape {stored.shape} is not one of a few numbers")
    if stored.dtype != "BF16" and stored.dtype not in FORMS:
        raise ValueError(f"{stored.dtype} numbers cannot be read here")
    data = bytearray(stored.nbytes)
    stored.read_into(memoryview(data))
    if stored.dtype == "BF16":  # the upper half of an fp32 number
        data = bytearray(b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2)))
    code = FORMS.get(stored.dtype, "f")
    return struct.unpack(f"<{stored.elements}{code}", data)
