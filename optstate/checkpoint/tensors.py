"""The numbers in a file and in memory: bytes of tensors without copies, and statistics of tensors piece by piece."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optstate.checkpoint.container import Entry
from optstate.checkpoint.kinds import open_file
from optstate.checkpoint.stored import Stored

__all__ = ["DTYPES", "Statistics", "bytes_of", "load", "pieces", "read_into", "statistics"]

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}
"""What safetensors calls the dtypes that stores use."""

PIECE = 1 << 19
"""Elements read at a time: 4 MiB as fp64."""


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor: its own memory if it is contiguous on the CPU, else that of a copy."""
    return _memory(tensor.detach().to("cpu").contiguous())


def _memory(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to read and write. NumPy, which could do this, may be missing."""
    count = tensor.numel() * tensor.element_size()
    if not count:
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * count).from_address(tensor.data_ptr())
    array._tensor = tensor  # type: ignore[attr-defined]  # the memory lives as long as the view of it
    return memoryview(array).cast("B")


def load(stored: Stored) -> Tensor:
    """A tensor of a file, contiguous and the caller's own.

    Raises:
        ValueError: for a dtype that torch does not have.
        OSError: if the file ends early or cannot be read.
    """
    dtype = next((own for own, name in DTYPES.items() if name == stored.dtype), None)
    if dtype is None:
        raise ValueError(f"{stored.dtype} numbers cannot be read")
    flat = torch.empty(stored.span // dtype.itemsize, dtype=dtype)
    with open_file(stored.path) as file:
        file.seek(stored.start)
        _fill(_memory(flat), file, stored.path)
    if stored.stride is None:
        return flat.view(stored.shape)
    return flat.as_strided(stored.shape, stored.stride).contiguous() if stored.elements else flat.view(stored.shape)


def read_into(own: Tensor, stored: Stored) -> None:
    """Fill `own` with a contiguous tensor of a file, by way of a copy only if it is not plain memory.

    Raises:
        OSError: if the file ends early or cannot be read; `own` may then be filled in part.
    """
    target = own if own.device.type == "cpu" and own.is_contiguous() else torch.empty(own.shape, dtype=own.dtype)
    with open_file(stored.path) as file:
        file.seek(stored.start)
        _fill(_memory(target), file, stored.path)
    if target is not own:
        own.copy_(target)


def _fill(buffer: memoryview, file: Any, what: str) -> None:
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise OSError(f"the file ends within the tensor '{what}'")
        done += count


@dataclass(frozen=True)
class Statistics:
    """Counts over a tensor; minimum, maximum and mean of its finite numbers, None if there are none."""

    elements: int
    minimum: float | None
    maximum: float | None
    mean: float | None
    zeros: int
    negative: int
    nan: int
    infinite: int


def pieces(file: Any, entry: Entry) -> Iterator[Tensor]:
    """A tensor's numbers in order as flat fp64 tensors of a few MiB. Nothing for a dtype that torch cannot read."""
    dtype = next((own for own, name in DTYPES.items() if name == entry.dtype), None)
    if dtype is None:
        return
    file.seek(entry.start)
    for first in range(0, entry.elements, PIECE):
        piece = torch.empty(min(PIECE, entry.elements - first), dtype=dtype)
        _fill(_memory(piece), file, entry.name)
        yield piece.double()


def statistics(file: Any, entry: Entry) -> Statistics:
    """Statistics of one tensor, read piece by piece."""
    least, most, total, counts = torch.inf, -torch.inf, 0.0, dict.fromkeys(("zeros", "negative", "nan", "infinite"), 0)
    for piece in pieces(file, entry):
        finite = piece[piece.isfinite()]
        if finite.numel():
            least, most = min(least, finite.min().item()), max(most, finite.max().item())
            total += finite.sum().item()
        counts["zeros"] += int((piece == 0).sum())
        counts["negative"] += int((piece < 0).sum())
        counts["nan"] += int(piece.isnan().sum())
        counts["infinite"] += int(piece.isinf().sum())
    known = entry.dtype in DTYPES.values()
    finite_count = entry.elements - counts["nan"] - counts["infinite"] if known else 0
    if not finite_count:
        return Statistics(entry.elements, None, None, None, **counts)
    return Statistics(entry.elements, least, most, total / finite_count, **counts)
