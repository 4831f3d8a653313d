"""The statistics of a checkpoint as numbers, whatever they are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from optstate.checkpoint.checkpoint import Checkpoint
from optstate.checkpoint.consistency import store_name
from optstate.checkpoint.document import Parameter, SlotRecord
from optstate.checkpoint.tensors import load
from optstate.kernels import Codebook
from optstate.spec import ParamSpec
from optstate.stores import Block4, Block8, Float8, Store
from optstate.stores.words import from_words

__all__ = ["UnreadableStatisticError", "Values"]


ANY_LARGE_MATRIX = ParamSpec(name="", shape=(128, 128), dtype=torch.float32)


class UnreadableStatisticError(ValueError):
    """A statistic whose numbers cannot be had: in a format that is not known, or one without a way back."""


class Values:
    """Reads the statistics of one checkpoint. Holds nothing but the tables of its codebooks.

    Memory: one statistic in fp32 and its stored tensors at a time.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        books = checkpoint.document.codebooks.items()
        self._books = {key: Codebook(values, name=key.partition(":")[0]) for key, values in books}

    def fields(self, slot: SlotRecord) -> dict[str, Tensor]:
        """The stored tensors of a statistic, by field name, as they are."""
        return {name: load(stored) for name, stored in self.checkpoint.fields_of(slot).items()}

    def read(self, param: Parameter, name: str) -> Tensor:
        """One statistic in the parameter's shape, fp32 (fp64 where it is stored so); the caller's own.

        Raises:
            UnreadableStatisticError: if its numbers cannot be had, with the reason.
            OSError: if the file cannot be read.
        """
        slot = param.slots[name]
        what = f"{name} of {param.name!r}"
        if param.shape is None:
            raise UnreadableStatisticError(f"{what}: the shape of the parameter is not known")
        if store_name(slot.store) in ("Full", "Unknown"):
            return self._full(slot, param.shape, what)
        store = _store_of(slot, what)
        fields = self.fields(slot)
        if store_name(slot.store) == "Float8" and "scale" in fields:
            return _scaled(fields["codes"], fields["scale"], slot.block or 256, param.shape)
        if store.codebook is not None and slot.codebook not in ("", store.codebook.id):
            return self._by_map(slot, fields, param.shape, what)
        return store.read(fields, param.shape)

    def _full(self, slot: SlotRecord, shape: tuple[int, ...], what: str) -> Tensor:
        stored = self.checkpoint.fields_of(slot)
        if list(stored) != [""] or stored[""].shape != shape:
            raise UnreadableStatisticError(f"{what} is in a format that is not known")
        value = load(stored[""])
        return value if value.dtype == torch.float64 else value.float()

    def _by_map(self, slot: SlotRecord, fields: Mapping[str, Tensor], shape: tuple[int, ...], what: str) -> Tensor:
        """Codes of a map that is not one of this library's own."""
        book = self._books.get(slot.codebook)
        if book is None:
            raise UnreadableStatisticError(f"{what} has codes of a map that is not in the file: {slot.codebook}")
        if "absmax" not in fields or store_name(slot.store) not in ("Block8", "Block4"):
            raise UnreadableStatisticError(f"{what} has codes in a format that is not known")
        count = torch.Size(shape).numel()
        packed = store_name(slot.store) == "Block4"
        value = book.decode_nibbles(fields["codes"], count) if packed else book.decode(fields["codes"])
        return _times_scales(value, fields["absmax"], slot.block).view(shape)


def _store_of(slot: SlotRecord, what: str) -> Store:
    """The store that reads a statistic: blocks as long and signed as the record says."""
    try:
        store = from_words(slot.store)
    except ValueError:
        raise UnreadableStatisticError(
            f"{what} is kept in {slot.store}, which has no way back to its numbers"
        ) from None
    if isinstance(store, Block4) and store.rank1:
        return store.resolve(ANY_LARGE_MATRIX, slot.signed)[0]  # what it is for this parameter, too
    if isinstance(store, Block8 | Block4 | Float8):
        return replace(store, block=slot.block or store.block, signed=slot.signed)
    return store


def _scaled(codes: Tensor, scale: Tensor, block: int, shape: tuple[int, ...]) -> Tensor:
    """torchao's 8-bit floats: the number itself times its block's scale."""
    return _times_scales(codes.float().view(-1), scale, block).view(shape)


def _times_scales(flat: Tensor, scales: Tensor, block: int) -> Tensor:
    """Every block of `flat` times its scale, in place; the last block may be short."""
    whole = flat.numel() // block
    flat[: whole * block].view(whole, block).mul_(scales.view(-1)[:whole, None])
    if whole * block < flat.numel():
        flat[whole * block :].mul_(scales.view(-1)[-1])
    return flat
