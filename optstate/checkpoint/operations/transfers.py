"""How every statistic of a new file comes about from those of another: decided before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from optstate.checkpoint.document.document import WEIGHT, Parameter, SlotRecord, tensor_key
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.files.tensor_bytes import DTYPES
from optstate.checkpoint.files.tensor_place import Stored
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores import MEANINGS, Full, Store

__all__ = ["Transfer", "copied", "described_slot", "recoded", "spec_of", "taken_over"]

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


def spec_of(param: Parameter, role: str = "", head_size: int | None = None) -> ParamSpec:
    """A parameter as stores see it; fp32 where its dtype is unknown.

    Raises:
        ValueError: if its shape is unknown.
    """
    if param.shape is None:
        raise ValueError(f"the shape of {param.name!r} is not in the file: give --names with shapes, or a model")
    dtype = getattr(torch, param.dtype, None) if param.dtype else torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{param.name!r} has dtype {param.dtype!r}, which is none of torch's for parameters")
    return ParamSpec(name=param.name, shape=param.shape, dtype=dtype, role=role, head_size=head_size)


def copied(param: Parameter, name: str, stored: Mapping[str, Stored], as_param: str = "") -> Transfer:
    """A statistic whose tensors stay as they are, under the same parameter name or another."""
    was, owner = param.slots[name], as_param or param.name
    record = replace(was, fields={field: tensor_key(owner, name, field) for field in was.fields})
    entries = {f: NewEntry(record.fields[f], stored[f].dtype, stored[f].shape) for f in was.fields}
    return Transfer(param, name, record, entries, source=name, was=was)


def recoded(param: Parameter, name: str, stored: Mapping[str, Stored], store: Store, spec: ParamSpec) -> Transfer:
    """A statistic that goes into another store; copied if that is the one it is in.

    Raises:
        ValueError: if the store cannot hold it.
    """
    was = param.slots[name]
    store.check(was.signed, 1.0)
    resolved, _ = store.resolve(spec, was.signed)
    record, specs = described_slot(param.name, name, resolved, spec, was)
    return _made(param, name, stored, record, resolved, specs, source=name, factor=1.0)


def taken_over(
    param: Parameter,
    stored: Mapping[str, Mapping[str, Stored]],
    name: str,
    record: SlotRecord,
    store: Store,
    specs: Mapping[str, FieldSpec],
    by_name: bool = True,
) -> Transfer:
    """A statistic that another recipe keeps, from the one of the source with the same meaning.

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


def described_slot(
    owner: str, name: str, store: Store, spec: ParamSpec, was: SlotRecord
) -> tuple[SlotRecord, dict[str, FieldSpec]]:
    """The record and tensors of the statistic `was` when it is kept in a resolved store."""
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
    """Copied where the source's tensors are what is wanted, else put into the store."""
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
    """The slot of the source that holds what `record` describes: of the same name if several do."""
    same = [slot for slot, was in param.slots.items() if was.of == record.of and slot != WEIGHT and was.of]
    if by_name and (not record.of or (name in param.slots and not param.slots[name].of)):
        same = [name] if name in param.slots else same
    return name if name in same else same[0] if same else None


def _correction(param: Parameter, record: SlotRecord) -> float:
    """What a statistic is of the average proper: `1 - beta**step`; 1 where it did not begin at zero."""
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
