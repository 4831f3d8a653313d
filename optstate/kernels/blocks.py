"""Codes with one scale per block of consecutive elements: how the compiled loops read and write them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from optstate.kernels import native
from optstate.kernels.addresses import Functions, functions_reading, has_address
from optstate.kernels.backend import compiled_functions
from optstate.kernels.codebook import Codebook
from optstate.kernels.decades import find_decades
from optstate.kernels.native import MomentKind, MomentOperand
from optstate.kernels.primitives import FP32_ON_CPU, note_written

__all__ = ["BlockCodes", "decode_blocks", "encode_blocks", "write_blocks"]

HALVES = (MomentKind.SIGNED4, MomentKind.LINEAR4)
FLOATS = (MomentKind.SIGNED_E4M3, MomentKind.UNSIGNED_E4M3)


@dataclass(frozen=True, eq=False)
class BlockCodes:
    """A format of codes as the compiled loops know it.

    Attributes:
        kind: of the format.
        values: what the codes stand for; of 4-bit codes, both numbers of every byte, `[256, 2]`.
        places: the bounds between 4-bit codes; of 8-bit codes, where the decades of the map begin, `[4, 8]`, then its
            255 bounds between NaN, than which nothing is less, and infinity.
    """

    kind: MomentKind
    values: Tensor
    places: Tensor

    @staticmethod
    def of(book: Codebook, kind: MomentKind) -> BlockCodes:
        """Make the tables of a codebook."""
        if kind in HALVES:
            byte = torch.arange(256, device="cpu")
            pairs = book.values[torch.stack([byte >> 4, byte & 15], dim=1)].contiguous()
            return BlockCodes(kind, pairs, torch.cat([book.bounds, book.bounds.new_zeros(1)]))
        decades = None if kind in FLOATS else find_decades(book)
        if decades is None:
            return BlockCodes(kind, book.values.contiguous(), book.values)
        ends = book.bounds.new_tensor([torch.nan]), book.bounds.new_tensor([torch.inf])
        return BlockCodes(kind, book.values.contiguous(), torch.cat([decades.view(-1), ends[0], book.bounds, ends[1]]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor of codes."""
        return torch.float8_e4m3fn if self.kind in FLOATS else torch.uint8

    def count_codes(self, elements: int) -> int:
        """Return how many entries the tensor of codes has."""
        return -(-elements // 2) if self.kind in HALVES else elements

    def operand(self, codes: Tensor, absmax: Tensor, block: int) -> MomentOperand:
        """Return tensors of this format as C code reads and writes them."""
        return MomentOperand(
            codes.data_ptr(),
            absmax.data_ptr(),
            self.values.data_ptr(),
            self.places.data_ptr(),
            block=block,
            kind=self.kind,
        )


def encode_blocks(value: Tensor, form: BlockCodes, block: int) -> tuple[Tensor, Tensor] | None:
    """Return the codes and the largest magnitude of every block, both flat; None where C code cannot read `value`.

    Args:
        value: flat fp32, kept.
        form: the format.
        block: elements per scale; the last block may be short.
    """
    if compiled_functions() is None or not has_address(value):
        return None
    codes = torch.empty(form.count_codes(value.numel()), dtype=form.dtype, device="cpu")
    absmax = torch.empty(-(-value.numel() // block), **FP32_ON_CPU)
    return (codes, absmax) if write_blocks(value, codes, absmax, form, block) else None


def write_blocks(value: Tensor, codes: Tensor, absmax: Tensor, form: BlockCodes, block: int) -> bool:
    """Write the codes and the largest magnitude of every block; return False where C code cannot, with nothing written.

    Args:
        value: fp32, contiguous, kept.
        codes: written, contiguous.
        absmax: written, contiguous.
        form: the format.
        block: elements per scale; the last block may be short.
    """
    functions = functions_reading(value) if value.dtype == torch.float32 and value.numel() else None
    if functions is None or not _fits(codes, absmax, form, block, value.numel()):
        return False
    _share(functions, "encode_blocks", form.operand(codes, absmax, block), value, block)
    note_written(codes)
    note_written(absmax)
    return True


def decode_blocks(codes: Tensor, absmax: Tensor, form: BlockCodes, block: int, count: int) -> Tensor | None:
    """Return the values of `count` elements, flat and new; None where C code cannot read the tensors."""
    functions = compiled_functions()
    if functions is None or not count or not _fits(codes, absmax, form, block, count):
        return None
    value = torch.empty(count, **FP32_ON_CPU)
    _share(functions, "decode_blocks", form.operand(codes, absmax, block), value, block)
    return value


def _fits(codes: Tensor, absmax: Tensor, form: BlockCodes, block: int, count: int) -> bool:
    """Whether tensors are those of a number of elements, as C code reads them."""
    if codes.dtype != form.dtype or absmax.dtype != torch.float32:
        return False
    if codes.numel() != form.count_codes(count) or absmax.numel() != -(-count // block):
        return False
    return all(has_address(tensor) and tensor.is_contiguous() for tensor in (codes, absmax))


def _share(functions: Functions, name: str, operand: MomentOperand, value: Tensor, block: int) -> None:
    """Call a function on ranges of whole blocks."""
    count, step = value.numel(), max(block, native.TILE // block * block)
    native.share(functions[name], (ctypes.byref(operand), value.data_ptr()), count, step, count)
