"""The statistics of a checkpoint as numbers, whatever they are stored in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import store_name
from optstate.checkpoint.document.document import Parameter, SlotRecord
from optstate.checkpoint.files.tensor_bytes import DTYPES, announce, load
from optstate.checkpoint.files.tensor_place import Stored
from optstate.kernels import Codebook
from optstate.spec import ParamSpec
from optstate.stores import Block4, Block8, Fields, Float8, Shape, Store
from optstate.stores.registry import from_words

__all__ = ["UnreadableStatisticError", "Values"]


Reader = Callable[[Fields, Shape], Tensor]

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

    def announce(self, param: Parameter) -> None:
        """Let the system fetch a parameter's tensors, which are needed next."""
        for slot in param.slots.values():
            for stored in self.checkpoint.fields_of(slot).values():
                announce(stored)

    def read(self, param: Parameter, name: str) -> Tensor:
        """One statistic in the parameter's shape, fp32 (fp64 where it is stored so); the caller's own.

        Raises:
            UnreadableStatisticError: if its numbers cannot be had, with the reason.
            OSError: if the file cannot be read.
        """
        reader = self._reader(param, name)
        assert param.shape is not None  # `_reader` asked
        return reader(self.fields(param.slots[name]), param.shape)

    def check(self, param: Parameter, name: str) -> None:
        """Raise UnreadableStatisticError if `read` would, without reading anything."""
        self._reader(param, name)

    def _reader(self, param: Parameter, name: str) -> Reader:
        """What makes a statistic's numbers of its stored tensors."""
        slot, what = param.slots[name], f"{name} of {param.name!r}"
        kind, stored = store_name(slot.store), self.checkpoint.fields_of(slot)
        if param.shape is None:
            raise UnreadableStatisticError(f"{what}: the shape of the parameter is not known")
        if odd := sorted({field.dtype for field in stored.values()} - set(DTYPES.values())):
            raise UnreadableStatisticError(f"{what}: {' and '.join(odd)} numbers cannot be read")
        if kind in ("Full", "Unknown"):
            if list(stored) != [""] or stored[""].shape != param.shape:
                raise UnreadableStatisticError(f"{what} is in a format that is not known")
            return _as_it_is
        if kind == "Projected":
            if slot.of != "gradient":
                why = "squares of projected gradients say nothing of the squares of gradients"
                if slot.of != "square":
                    why = "what is made of projected gradients is scaled on its way back"
                raise UnreadableStatisticError(f"{what} is kept in {slot.store}, which has no inverse: {why}")
            if not _projects(stored, param.shape):
                raise UnreadableStatisticError(f"{what} is kept in {slot.store}, and its tensors do not fit")
            return _projected_back
        store = _store_of(slot, what)
        if kind == "Float8" and "scale" in stored:
            return lambda fields, shape: _scaled(fields["codes"], fields["scale"], slot.block or 256, shape)
        if store.codebook is not None and slot.codebook not in ("", store.codebook.id):
            if slot.codebook not in self._books:
                raise UnreadableStatisticError(f"{what} has codes of a map that is not in the file: {slot.codebook}")
            return partial(self._by_map, slot)
        return store.read

    def _by_map(self, slot: SlotRecord, fields: Fields, shape: Shape) -> Tensor:
        """Codes of a map that is not one of this library's own."""
        book, count = self._books[slot.codebook], torch.Size(shape).numel()
        packed = store_name(slot.store) == "Block4"
        value = book.decode_nibbles(fields["codes"], count) if packed else book.decode(fields["codes"])
        return _times_scales(value, fields["absmax"], slot.block).view(shape)


def _as_it_is(fields: Fields, shape: Shape) -> Tensor:
    """A number per element."""
    return fields[""] if fields[""].dtype == torch.float64 else fields[""].float()


def _projects(stored: Mapping[str, Stored], shape: Shape) -> bool:
    """Whether a basis and what it was multiplied with give this shape again."""
    if stored.keys() != {"", "basis"} or {len(shape), *(len(each.shape) for each in stored.values())} != {2}:
        return False
    low, basis = stored[""].shape, stored["basis"].shape
    products = (basis[0], low[1]), (low[0], basis[1])
    return (basis[1] == low[0] and products[0] == tuple(shape)) or (low[1] == basis[0] and products[1] == tuple(shape))


def _projected_back(fields: Fields, shape: Shape) -> Tensor:
    """GaLore's first moment as the average of gradients that it stands for: the basis is on the side that is short."""
    low, basis = fields[""].float(), fields["basis"].float()
    from_left = basis.shape[1] == low.shape[0] and basis.shape[0] == shape[0] and low.shape[1] == shape[1]
    return basis @ low if from_left else low @ basis


def _store_of(slot: SlotRecord, what: str) -> Store:
    """The store that reads a statistic: blocks as long and signed as the record says."""
    try:
        store = from_words(slot.store)
        if type(store).__name__ != store_name(slot.store):  # a short word, which is for people
            raise ValueError
    except ValueError:
        raise UnreadableStatisticError(
            f"{what} is kept in {slot.store}, which has no way back to its numbers"
        ) from None
    if isinstance(store, Block4) and store.rank1:
        return store.resolve(ANY_LARGE_MATRIX, slot.signed)[0]  # what it is for this parameter, too
    if isinstance(store, Block8 | Block4 | Float8):
        try:
            return replace(store, block=slot.block or store.block, signed=slot.signed)
        except ValueError as error:
            raise UnreadableStatisticError(f"{what}: {error}") from None
    return store


def _scaled(codes: Tensor, scale: Tensor, block: int, shape: Shape) -> Tensor:
    """torchao's 8-bit floats: the number itself times its block's scale."""
    return _times_scales(codes.float().view(-1), scale, block).view(shape)


def _times_scales(flat: Tensor, scales: Tensor, block: int) -> Tensor:
    """Every block of `flat` times its scale, in place; the last block may be short."""
    whole = flat.numel() // block
    flat[: whole * block].view(whole, block).mul_(scales.view(-1)[:whole, None])
    if whole * block < flat.numel():
        flat[whole * block :].mul_(scales.view(-1)[-1])
    return flat
