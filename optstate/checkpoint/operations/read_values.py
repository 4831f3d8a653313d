"""The statistics of a checkpoint as numbers, whatever they are stored in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import is_plugged, store_name
from optstate.checkpoint.document.document import Parameter, SlotRecord
from optstate.checkpoint.files.tensor_bytes import DTYPES, announce, load_tensor
from optstate.checkpoint.files.tensor_place import Stored
from optstate.kernels import Codebook
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores import Fields, Shape, Store
from optstate.stores.blockwise import Blockwise
from optstate.stores.registry import parse_store

__all__ = ["UnreadableStatisticError", "Values", "make_spec", "store_of_words"]


Reader = Callable[[Fields, Shape], Tensor]


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
        """Load the stored tensors of a statistic, by field name, as they are."""
        return {name: load_tensor(stored) for name, stored in self.checkpoint.fields_of(slot).items()}

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
        slot = param.slots[name]
        shape = param.measured_by(slot).shape
        assert shape is not None  # `_reader` asked
        return reader(self.fields(slot), shape)

    def check(self, param: Parameter, name: str) -> None:
        """Raise UnreadableStatisticError if `read` would, without reading anything."""
        self._reader(param, name)

    def _reader(self, param: Parameter, name: str) -> Reader:
        """Find what makes a statistic's numbers of its stored tensors."""
        slot, what = param.slots[name], f"{name} of {param.name!r}"
        param = param.measured_by(slot)
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
        store = _store_of(param, slot, stored, what)
        if isinstance(store, Blockwise) and "scale" in stored:
            return lambda fields, shape: _scaled(fields["codes"], fields["scale"], store.block, shape)
        if store.codebook is not None and slot.codebook not in ("", store.codebook.id):
            if slot.codebook not in self._books or not isinstance(store, Blockwise):
                raise UnreadableStatisticError(f"{what} has codes of a map that is not in the file: {slot.codebook}")
            return partial(_by_map, self._books[slot.codebook], store)
        return store.read


def _by_map(book: Codebook, store: Blockwise, fields: Fields, shape: Shape) -> Tensor:
    """Codes of a map that is not one of this library's own."""
    count = torch.Size(shape).numel()
    value = book.decode_nibbles(fields["codes"], count) if store.per_byte == 2 else book.decode(fields["codes"])
    return _times_scales(value, fields["absmax"], store.block).view(shape)


def _as_it_is(fields: Fields, shape: Shape) -> Tensor:
    """Read a number per element."""
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


def store_of_words(words: str) -> Store:
    """Return the installed store that a file names.

    Raises:
        ValueError: if there is none. Short words such as "fp32" are for people: a file does not use them.
    """
    store = parse_store(words)
    if type(store).__name__ != store_name(words):
        raise ValueError(f"{words!r} is no store")
    return store


def _store_of(param: Parameter, slot: SlotRecord, stored: Mapping[str, Stored], what: str) -> Store:
    """Find the store that reads a statistic, whose tensors are what the store keeps."""
    try:
        store = store_of_words(slot.store)
    except ValueError as error:
        reason = f": {error}" if is_plugged(slot.store) else ""
        raise UnreadableStatisticError(
            f"{what} is kept in {slot.store}, which has no way back to its numbers{reason}"
        ) from None
    try:
        store = store.as_recorded(slot.signed, slot.block)
        problem = _misfit(store.fields(make_spec(param), slot.signed), stored) if is_plugged(slot.store) else ""
    except Exception as error:  # stores of other packages may raise anything about a file's numbers
        raise UnreadableStatisticError(f"{what}: {error}") from None
    if problem:
        raise UnreadableStatisticError(f"{what} is kept in {slot.store}: {problem}")
    return store


def _misfit(specs: Mapping[str, FieldSpec], stored: Mapping[str, Stored]) -> str:
    """Where stored tensors are not what a store keeps, "" if they are."""
    if stored.keys() != specs.keys():
        return f"it keeps {', '.join(map(repr, specs)) or 'nothing'}, the file has {', '.join(map(repr, stored))}"
    for name, spec in specs.items():
        here, there = (DTYPES[spec.dtype], tuple(spec.shape)), (stored[name].dtype, stored[name].shape)
        if here != there:
            return f"{name or 'its tensor'} is {there[0]} {list(there[1])}, not {here[0]} {list(here[1])}"
    return ""


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


def make_spec(param: Parameter, role: str = "", head_size: int | None = None) -> ParamSpec:
    """Return a parameter as stores see it; fp32 where its dtype is unknown.

    Raises:
        ValueError: if its shape is unknown.
    """
    if param.shape is None:
        raise ValueError(f"the shape of {param.name!r} is not in the file: give --names with shapes, or a model")
    dtype = getattr(torch, param.dtype, None) if param.dtype else torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{param.name!r} has dtype {param.dtype!r}, which is none of torch's for parameters")
    return ParamSpec(name=param.name, shape=param.shape, dtype=dtype, role=role, head_size=head_size)
