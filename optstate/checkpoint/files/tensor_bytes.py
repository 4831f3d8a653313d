"""The numbers in a file and in memory: bytes of tensors without copies, and statistics of tensors piece by piece."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optstate.checkpoint.files.dtypes import BITS, TORCH_NAMES
from optstate.checkpoint.files.tensor_place import Pieces, Stored

__all__ = [
    "DTYPES",
    "Statistics",
    "all_sound",
    "announce",
    "as_bits",
    "bytes_of",
    "iterate_pieces",
    "load_tensor",
    "measure_tensor",
    "read_into",
]

DTYPES: dict[torch.dtype, str] = {
    getattr(torch, torch_name): name
    for name, torch_name in TORCH_NAMES.items()
    if name not in ("C64", "U32", "U64", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
}
"""What safetensors calls the dtypes that stores use."""

if sys.byteorder != "little":
    raise ImportError("checkpoint files are little-endian and read into memory as they are: this machine is big-endian")

_TORCH = {name: dtype for dtype, name in DTYPES.items()}

PIECE = 1 << 19
"""Elements read at a time: 4 MiB as fp64."""


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor: its own memory if it is contiguous on the CPU, else that of a copy."""
    return _memory(tensor.detach().to("cpu").contiguous())


def _memory(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, to read and write. NumPy, which has this, may be missing."""
    count = tensor.numel() * tensor.element_size()
    if not count:
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * count).from_address(tensor.data_ptr())
    array._tensor = tensor  # type: ignore[attr-defined]  # the memory lives as long as the view of it
    return memoryview(array).cast("B")


def load_tensor(stored: Stored) -> Tensor:
    """Read a tensor of a file, contiguous and the caller's own.

    Raises:
        ValueError: for a dtype that torch does not have.
        OSError: if a file ends early or cannot be read.
    """
    if stored.dtype not in _TORCH:
        raise ValueError(f"{stored.dtype} numbers cannot be read")
    if not isinstance(stored, Pieces):
        return _as_it_lies(stored).contiguous()
    tensor = torch.empty(stored.whole, dtype=_TORCH[stored.dtype])
    for first, part in stored.parts:
        box = tuple(slice(start, start + size) for start, size in zip(first, part.shape, strict=True))
        tensor[box] = _as_it_lies(part)
    return tensor.view(stored.shape)


def _as_it_lies(stored: Stored) -> Tensor:
    """Read a tensor as it lies in the file, with what is between its elements."""
    dtype = _TORCH[stored.dtype]
    flat = torch.empty(stored.span // dtype.itemsize, dtype=dtype)
    _fill(flat, stored)
    return flat.view(stored.shape) if stored.stride is None else flat.as_strided(stored.shape, stored.stride)


def announce(stored: Stored) -> None:
    """Let the system read a tensor into its cache while something else is done; where it cannot, nothing happens."""
    if not isinstance(stored, Pieces):
        stored.opened.announce(stored.start, stored.span)


def as_bits(stored: Stored) -> Stored:
    """Return the place as one of whole numbers of the same width, which can be compared whatever they stand for."""
    width = BITS[stored.dtype]
    if width < 8:
        return replace(stored, dtype="U8", shape=(stored.nbytes,))
    dtype = {8: "U8", 16: "I16", 32: "I32", 64: "I64"}[width]
    if isinstance(stored, Pieces):
        return replace(stored, dtype=dtype, parts=tuple((first, as_bits(part)) for first, part in stored.parts))
    return replace(stored, dtype=dtype)


def read_into(own: Tensor, stored: Stored) -> None:
    """Fill `own` with a tensor of a file of as many elements.

    There is a copy in between only if one of the two is not plain memory.

    Raises:
        OSError: if the file ends early or cannot be read; `own` may then be filled in part.
    """
    plain = stored.stride is None and not isinstance(stored, Pieces)
    if plain and own.device.type == "cpu" and own.is_contiguous():
        _fill(own, stored)
    else:
        own.copy_(load_tensor(stored).view(own.shape))


def _fill(target: Tensor, stored: Stored) -> None:
    """Fill a contiguous tensor on the CPU with the bytes from the first of `stored` on."""
    stored.read_into(_memory(target))


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


def iterate_pieces(stored: Stored) -> Iterator[Tensor]:
    """Yield a tensor's numbers as flat fp64 tensors of a few MiB, in their order in the file.

    Nothing for a dtype that torch does not have.
    """
    if isinstance(stored, Pieces):
        for _, part in stored.parts:
            yield from iterate_pieces(part)
    elif stored.dtype in _TORCH:
        flat = stored if stored.stride is not None else replace(stored, shape=(stored.elements,), stride=(1,))
        for part in _parts(flat):
            yield _as_it_lies(part).double().flatten()


def _parts(stored: Stored) -> Iterator[Stored]:
    """Yield a tensor in small parts that lie within few bytes, cut along the dimension of the largest stride."""
    size = BITS[stored.dtype] // 8
    if max(stored.elements, stored.span // size) <= PIECE:
        yield stored
        return
    order = sorted(zip(stored.stride or (), stored.shape, strict=True), reverse=True)
    (stride, length), *rest = [(stride, length) for stride, length in order if length > 1]
    inner = replace(stored, shape=tuple(n for _, n in rest), stride=tuple(step for step, _ in rest))
    count = max(min(PIECE // inner.elements, (PIECE - inner.span // size) // max(stride, 1) + 1), 1)
    for first in range(0, length, count):
        shape, start = (min(count, length - first), *inner.shape), stored.start + first * stride * size
        yield from _parts(replace(stored, start=start, shape=shape, stride=(stride, *(step for step, _ in rest))))


def all_sound(tensors: Sequence[Stored]) -> bool:
    """Whether small tensors of one dtype hold finite numbers from zero on only; False where that is not known."""
    dtype = _TORCH.get(tensors[0].dtype)
    if dtype is None or any(isinstance(each, Pieces) or each.stride is not None for each in tensors):
        return False
    flat = torch.empty(sum(each.elements for each in tensors), dtype=dtype)
    memory, at = _memory(flat), 0
    for each in tensors:
        each.read_into(memory[at : at + each.nbytes])
        at += each.nbytes
    return bool(((flat := flat.float() if dtype.itemsize < 4 else flat) >= 0).logical_and_(flat < torch.inf).all())


def measure_tensor(stored: Stored) -> Statistics:
    """Statistics of one tensor, read piece by piece."""
    least, most, total, counts = torch.inf, -torch.inf, 0.0, dict.fromkeys(("zeros", "negative", "nan", "infinite"), 0)
    for piece in iterate_pieces(stored):
        finite = piece[piece.isfinite()]
        if finite.numel():
            least, most = min(least, finite.min().item()), max(most, finite.max().item())
            total += finite.sum().item()
        counts["zeros"] += int((piece == 0).sum())
        counts["negative"] += int((piece < 0).sum())
        counts["nan"] += int(piece.isnan().sum())
        counts["infinite"] += int(piece.isinf().sum())
    finite_count = stored.elements - counts["nan"] - counts["infinite"] if stored.dtype in _TORCH else 0
    if not finite_count:
        return Statistics(stored.elements, None, None, None, **counts)
    return Statistics(stored.elements, least, most, total / finite_count, **counts)
