"""A conversion on paper: the new document, and how each of its statistics comes about. Nothing has been read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import refuse_contradictions
from optstate.checkpoint.document.document import WEIGHT, Document, Parameter, SlotRecord, tensor_key
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.files.tensor_bytes import DTYPES
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.shared.statistics import RULES
from optstate.checkpoint.operations.read_values import UnreadableStatisticError, Values, make_spec
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores import MEANINGS, Full, Store
from optstate.stores.registry import parse_store

__all__ = [
    "Conversion",
    "Transfer",
    "copy_statistic",
    "describe_slot",
    "parse_slot_target",
    "plan_copy",
    "plan_stores",
    "recode_statistic",
    "take_over_statistic",
]

DROP = "drop"
NOT_STATISTICS = (WEIGHT, "master")
"""What is kept for weights: a default store is not meant for it."""

MADE_FROM_ZERO = {"gradient", "update", "update_sum"}
"""Averages that may begin at zero in a run that goes on: steps are damped until they have filled, never too long.
A second moment that begins at zero would divide by almost nothing."""


@dataclass(frozen=True)
class Transfer:
    """How one statistic of one parameter of a new file comes about.

    parameter: the source's. name, record: the slot in the new file. entries: its tensors by field.
    source: the slot it is made from; None if it begins at zero. factor: what the numbers are multiplied by, for another
    correction of a beginning at zero. store: what they are put into; None if the tensors are copied as they are.
    was: the source's record. exact: whether every number read from the new tensors will be the number read from the
    old ones.
    """

    parameter: Parameter
    name: str
    record: SlotRecord
    entries: dict[str, NewEntry]
    source: str | None
    store: Store | None = None
    specs: Mapping[str, FieldSpec] | None = None
    factor: float = 1.0
    was: SlotRecord | None = None
    exact: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the new tensors."""
        return sum(entry.nbytes for entry in self.entries.values())


@dataclass(frozen=True)
class Conversion:
    """What a checkpoint becomes.

    document: the new one, as if it had always been so; this conversion is not in its history yet.
    transfers: by name of the source's parameter, in the new document's order.
    dropped: parameters and slots of statistics that the new file will not have. changes: what a step will do otherwise
    than it did, whatever becomes of the numbers.
    """

    checkpoint: Checkpoint
    document: Document
    transfers: Mapping[str, tuple[Transfer, ...]]
    dropped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @property
    def lossless(self) -> bool:
        """Whether the run goes on as it was: the same numbers under the same rule."""
        return not self.changes and self.keeps_numbers

    @property
    def keeps_numbers(self) -> bool:
        """Whether everything read from the new file will be what was read from the old one."""
        return not self.dropped and all(transfer.exact for transfer in self.all_transfers)

    @property
    def changes_nothing(self) -> bool:
        """Whether all tensors are copied and none is left out."""
        return not self.dropped and all(transfer.store is None for transfer in self.all_transfers)

    @property
    def all_transfers(self) -> list[Transfer]:
        """Every statistic of the new file."""
        return [transfer for transfers in self.transfers.values() for transfer in transfers]

    @property
    def entries(self) -> list[NewEntry]:
        """Every tensor of the new file."""
        return [entry for transfer in self.all_transfers for entry in transfer.entries.values()]

    @property
    def bytes_before(self) -> int:
        """Of the old file's tensors."""
        return self.checkpoint.nbytes

    @property
    def bytes_after(self) -> int:
        """Of the new file's tensors."""
        return sum(entry.nbytes for entry in self.entries)

    def check(self) -> None:
        """Raise if a statistic cannot be what is said of it, must be read and cannot be, or none is there at all.

        Raises:
            CheckpointError: for a file that contradicts itself.
            UnreadableStatisticError: for numbers that cannot be had.
        """
        refuse_contradictions(self.checkpoint)
        document, said = self.checkpoint.document, self.checkpoint.notes
        keeps_none = RULES.get(document.recipe, "") in ("", "sgd")
        if document.parameters and not keeps_none and not any(param.has_state for param in document.parameters):
            raise UnreadableStatisticError(said[0] if said else "no statistics are in the file: no step was made")
        values = Values(self.checkpoint)
        for transfer in self.all_transfers:
            if transfer.store is not None and transfer.source is not None:
                values.check(transfer.parameter, transfer.source)


# --- the same recipe ----------------------------------------------------------------------------------------------


def plan_copy(checkpoint: Checkpoint) -> Conversion:
    """Plan to copy every statistic as it is: for another container, or into an optimizer that keeps it so."""
    transfers = {param.name: _copies(checkpoint, param) for param in checkpoint.document.parameters}
    return Conversion(checkpoint, checkpoint.document, transfers)


def plan_stores(checkpoint: Checkpoint, default: str | None, by_slot: Mapping[str, str]) -> Conversion:
    """Plan the same recipe with statistics in other stores.

    Args:
        checkpoint: the source.
        default: words of a store (`optstate.stores.registry`) for all statistics; None leaves them as they are.
        by_slot: words by slot, before the default; "drop" leaves the statistic out.

    Raises:
        ValueError: for words that name no store, a slot that the file does not have, or a store that cannot hold a
            statistic.
    """
    present = dict.fromkeys(slot for param in checkpoint.document.parameters for slot in param.slots)
    for slot in by_slot:
        if slot not in present:
            raise ValueError(f"the file keeps no {slot!r}: it has {', '.join(present) or 'no statistics'}")
    stores: dict[str, Store | None] = {}
    if default is not None:
        everywhere = parse_store(default)  # dropping everything is no conversion
        stores = {slot: everywhere for slot in present if slot not in NOT_STATISTICS}
    stores |= {slot: parse_slot_target(words) for slot, words in by_slot.items()}
    parameters, transfers, dropped = [], {}, []
    for param in checkpoint.document.parameters:
        made = []
        for slot in param.slots:
            if slot in stores and stores[slot] is None:
                dropped.append((param.name, slot))
            else:
                made.append(_in_store(checkpoint, param, slot, stores.get(slot)))
        parameters.append(replace(param, slots={transfer.name: transfer.record for transfer in made}))
        transfers[param.name] = tuple(made)
    document = replace(checkpoint.document, parameters=tuple(parameters), codebooks=_books(checkpoint, transfers))
    return Conversion(checkpoint, document, transfers, tuple(dropped))


def parse_slot_target(words: str) -> Store | None:
    """Return the store that words name, None for "drop".

    Raises:
        ValueError: if they name none.
    """
    return None if words == DROP else parse_store(words)


def _in_store(checkpoint: Checkpoint, param: Parameter, slot: str, store: Store | None) -> Transfer:
    stored = checkpoint.fields_of(param.slots[slot])
    if store is None:
        return copy_statistic(param, slot, stored)
    group = checkpoint.document.groups[param.group]
    try:
        measured = param.measured_by(param.slots[slot])
        return recode_statistic(param, slot, stored, store, make_spec(measured, group.role, group.head_size))
    except ValueError as error:
        raise ValueError(f"{slot} of {param.name!r} cannot go into {store}: {error}") from None


def _copies(checkpoint: Checkpoint, param: Parameter) -> tuple[Transfer, ...]:
    return tuple(copy_statistic(param, slot, checkpoint.fields_of(record)) for slot, record in param.slots.items())


def _books(checkpoint: Checkpoint, transfers: Mapping[str, tuple[Transfer, ...]]) -> dict[str, tuple[float, ...]]:
    """Return the values of all codes in the new file."""
    books, theirs = {}, checkpoint.document.codebooks
    for made in transfers.values():
        for transfer in made:
            book = transfer.store.codebook if transfer.store is not None else None
            if book is not None:
                books[book.id] = tuple(book.values.tolist())
            elif transfer.record.codebook in theirs:
                books[transfer.record.codebook] = theirs[transfer.record.codebook]
    return dict(sorted(books.items()))


# --- one statistic ------------------------------------------------------------------------------------------------


def copy_statistic(param: Parameter, name: str, stored: Mapping[str, Stored], as_param: str = "") -> Transfer:
    """Copy a statistic: its tensors stay as they are, under the same parameter name or another."""
    was, owner = param.slots[name], as_param or param.name
    record = replace(was, fields={field: tensor_key(owner, name, field) for field in was.fields})
    entries = {f: NewEntry(record.fields[f], stored[f].dtype, stored[f].shape) for f in was.fields}
    return Transfer(param, name, record, entries, source=name, was=was)


def recode_statistic(
    param: Parameter, name: str, stored: Mapping[str, Stored], store: Store, spec: ParamSpec
) -> Transfer:
    """Put a statistic into another store; copy it if it is in that store.

    Raises:
        ValueError: if the store cannot hold it.
    """
    was = param.slots[name]
    store.check(was.signed, 1.0)
    resolved, _ = store.resolve(spec, was.signed)
    record, specs = describe_slot(param.name, name, resolved, spec, was)
    return _made(param, name, stored, record, resolved, specs, source=name, factor=1.0)


def take_over_statistic(
    param: Parameter,
    stored: Mapping[str, Mapping[str, Stored]],
    name: str,
    record: SlotRecord,
    store: Store,
    specs: Mapping[str, FieldSpec],
    by_name: bool = True,
) -> Transfer:
    """Make a statistic that another recipe keeps from the one of the source with the same meaning.

    by_name: whether one of the same name may be it, where the source does not tell its meaning.

    Raises:
        ValueError: if there is none and it cannot begin at zero, or the number of steps that its correction needs is
            unknown.
    """
    source = _same_meaning(param, name, record, by_name)
    if source is None:
        if record.of in MADE_FROM_ZERO or not param.has_state or param.step == 0:
            begins = not param.has_state or param.step == 0
            return Transfer(param, name, record, _entries(record, specs), None, store, specs, exact=begins)
        kept = ", ".join(f"{slot} ({_words(was)})" for slot, was in param.slots.items()) or "nothing"
        raise ValueError(
            f"{param.name!r}: {name} ({_words(record)}) cannot be made from what the file keeps: {kept}; begin the new "
            "recipe with a fresh optimizer"
        )
    was, factor = param.slots[source], 1.0
    if record.beta != was.beta or record.of == "square":  # which is corrected by the number of steps in any case
        factor = _correction(param, record) / _correction(param, was)
    return _made(param, name, stored[source], record, store, specs, source, factor)


def describe_slot(
    owner: str, name: str, store: Store, spec: ParamSpec, was: SlotRecord
) -> tuple[SlotRecord, dict[str, FieldSpec]]:
    """Describe the record and tensors of the statistic `was` when it is kept in a resolved store."""
    specs, book = store.fields(spec, was.signed), store.codebook
    record = replace(
        was,
        store=str(store),
        fields={field: tensor_key(owner, name, field) for field in specs},
        codebook="" if book is None else book.id,
        block=store.scale_block,
    )
    return record, specs


def _made(
    param: Parameter,
    name: str,
    stored: Mapping[str, Stored],
    record: SlotRecord,
    store: Store,
    specs: Mapping[str, FieldSpec],
    source: str,
    factor: float,
) -> Transfer:
    """Copy the source's tensors where they are what is wanted, else put the statistic into the store."""
    was, entries = param.slots[source], _entries(record, specs)
    same = factor == 1.0 and (was.store, was.block) == (record.store, record.block)
    same = same and was.codebook in ("", record.codebook)  # without one it is the store's own
    there = {field: (stored[field].dtype, stored[field].shape) for field in stored}
    if same and there == {field: (entry.dtype, entry.shape) for field, entry in entries.items()}:
        return Transfer(param, name, record, entries, source, was=was)
    exact = factor == 1.0 and isinstance(store, Full) and _holds(entries[""].dtype, there)
    return Transfer(param, name, record, entries, source, store, specs, factor, was, exact)


def _holds(dtype: str, stored: Mapping[str, tuple[str, tuple[int, ...]]]) -> bool:
    """Whether numbers of a full statistic keep their values in this dtype: those of all formats are fp32 when read."""
    return dtype == "F64" or (dtype == "F32" and all(theirs != "F64" for theirs, _ in stored.values()))


def _entries(record: SlotRecord, specs: Mapping[str, FieldSpec]) -> dict[str, NewEntry]:
    return {f: NewEntry(record.fields[f], DTYPES[spec.dtype], spec.shape) for f, spec in specs.items()}


def _same_meaning(param: Parameter, name: str, record: SlotRecord, by_name: bool) -> str | None:
    """Find the slot of the source that holds what `record` describes: of the same name if several do."""
    found = {slot: was for slot, was in param.slots.items() if slot != WEIGHT and _is_of_same_tensor(was, record)}
    same = [slot for slot, was in found.items() if was.of == record.of and was.of]
    if by_name and (not record.of or (name in found and not found[name].of)):
        same = [name] if name in found else same
    return name if name in same else same[0] if same else None


def _is_of_same_tensor(was: SlotRecord, record: SlotRecord) -> bool:
    """Return whether two statistics are of the same tensor, made of the gradient by the same rule."""
    return (was.shape, was.within) == (record.shape, record.within)


def _correction(param: Parameter, record: SlotRecord) -> float:
    """Return what part of the average proper a statistic is: `1 - beta**step`; 1 where it did not begin at zero."""
    if record.beta is None or param.step == 0:
        return 1.0
    if param.step is None:
        raise ValueError(
            f"{param.name!r}: the file does not say how many steps it was updated, which {_words(record)} of "
            f"beta={record.beta} depends on"
        )
    return -math.expm1(param.step * math.log(record.beta)) if record.beta else 1.0


def _words(record: SlotRecord) -> str:
    return MEANINGS.get(record.of, "a statistic of its own")
