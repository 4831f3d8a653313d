"""What a checkpoint holds, as far as it says: for people and for `optstate inspect`. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO

from optstate.checkpoint.document.checkpoint import OPTSTATE, Checkpoint
from optstate.checkpoint.document.contradictions import inconsistencies
from optstate.checkpoint.document.document import KEY, Parameter
from optstate.checkpoint.document.native_file import native_of
from optstate.checkpoint.document.prices import bytes_by_recipe
from optstate.checkpoint.document.rules import rule_issues
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.dtypes import TORCH_NAMES
from optstate.checkpoint.files.file_kinds import SAFETENSORS, identify
from optstate.checkpoint.files.issues import Issue
from optstate.checkpoint.files.opened_file import reading
from optstate.checkpoint.files.safetensors_header import Header, read_header, read_stream
from optstate.checkpoint.files.safetensors_index import read_index
from optstate.checkpoint.files.tensor_place import Stored, locate_entry
from optstate.checkpoint.open_checkpoint import STREAM, open_checkpoint
from optstate.collector import paused

__all__ = [
    "STREAM",
    "GroupSummary",
    "SlotSummary",
    "Summary",
    "TensorRow",
    "make_summary",
    "summarize",
    "summarize_stream",
]

FP32_ADAMW = 8
"""Bytes of state per parameter element: two moments."""

UNKNOWN = "unknown"


@dataclass(frozen=True)
class TensorRow:
    """One tensor: whose it is, what of it, and how it is kept. `parameter` and `slot` are "" where unknown."""

    name: str
    parameter: str
    slot: str
    field: str
    store: str
    stored: Stored

    @property
    def dtype(self) -> str:
        """torch's name of its dtype."""
        return TORCH_NAMES.get(self.stored.dtype, self.stored.dtype)


@dataclass(frozen=True)
class SlotSummary:
    """All tensors of one statistic in one store.

    elements: of the parameters it is kept for, so that `nbytes / elements` is its price; of the tensors themselves
    where the file does not tell.
    """

    slot: str
    store: str
    dtype: str
    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True)
class GroupSummary:
    """A param group; `elements` is None where the file does not tell the shapes of its parameters."""

    parameters: int
    elements: int | None
    role: str
    head_size: int | None
    hyper: dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """What a checkpoint holds, or a safetensors file or sharded set without optimizer state.

    kind: that of the checkpoint, or "safetensors". certainty: "declared" by the file, "layout" if names and shapes
    follow a known layout, "unknown". recipe: whose rule it is, None where unknown or none of this library's.
    optimizer: what another tool's file is taken for, "" for nothing. parameters: how many, None if unknown. elements:
    of parameters that have state; None if unknown. without_state: names of parameters that have none. prices: bytes
    that every recipe would keep for those that have; empty where shapes are unknown.
    """

    path: str
    kind: str
    certainty: str
    rows: tuple[TensorRow, ...]
    slots: tuple[SlotSummary, ...]
    notes: tuple[str, ...]
    recipe: str | None = None
    optimizer: str = ""
    chains: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    parameters: int | None = None
    elements: int | None = None
    without_state: tuple[str, ...] = ()
    groups: tuple[GroupSummary, ...] = ()
    prices: dict[str, int] = field(default_factory=dict)
    checkpoint: Checkpoint | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.stored.nbytes for row in self.rows)

    @property
    def step(self) -> int | None:
        """How often the most updated parameter was updated."""
        return max(self.steps, default=None)

    @property
    def frozen(self) -> int:
        """How many parameters have no state."""
        return len(self.without_state)

    @cached_property
    def issues(self) -> list[Issue]:
        """What names, shapes and dtypes alone tell to be wrong or odd."""
        if self.checkpoint is None:
            return []
        return [*inconsistencies(self.checkpoint), *rule_issues(self.checkpoint.document)]

    @property
    def adamw_bytes(self) -> int | None:
        """What AdamW with fp32 moments would keep for the same parameters."""
        return None if self.elements is None else FP32_ADAMW * self.elements


def summarize(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    names: str | None = None,
    optimizer: str | None = None,
) -> Summary:
    """Sum up what a checkpoint says, or a safetensors file or a sharded set without optimizer state.

    path: a file or a folder. key, names, optimizer: as `open_checkpoint` takes them.

    Raises:
        CheckpointError: if it is none of these, or not a valid one.
    """
    with reading(), paused():
        try:
            return make_summary(open_checkpoint(path, key=key, names=names, optimizer=optimizer))
        except CheckpointError:
            from optstate.checkpoint.formats.lerobot import is_lerobot

            headers = _headers(path)
            documents = [header for header in headers if KEY in header.metadata]
            if not documents and headers and not any(map(is_lerobot, headers)):
                return _of_others(os.fspath(path), headers)
            if len(documents) != 1:
                raise
        return make_summary(native_of(os.fspath(path), headers))


def summarize_stream(file: BinaryIO) -> Summary:
    """Sum up a safetensors file that comes through a pipe: read it up to the end of its header."""
    header = read_stream(STREAM, file)
    if KEY in header.metadata:
        return make_summary(native_of(STREAM, (header,)))
    return _of_others(STREAM, (header,))


def _headers(path: str | os.PathLike[str]) -> tuple[Header, ...]:
    """Read the headers of a safetensors file or a sharded set; none for anything else."""
    try:
        if os.path.isdir(path) or os.fspath(path).endswith(".json"):
            return tuple(read_index(path).shards.values())
        return (read_header(path),) if identify(path) == SAFETENSORS else ()
    except CheckpointError:
        return ()


def make_summary(checkpoint: Checkpoint) -> Summary:
    """Sum up what a checkpoint says."""
    document = checkpoint.document
    with_state = [param for param in document.parameters if param.has_state]
    rows = _rows(checkpoint)
    shapes = [param.shape for param in with_state if param.shape is not None]
    known = len(shapes) == len(with_state)
    groups = [
        GroupSummary(
            len(group.parameters),
            _elements(held),
            group.role,
            group.head_size,
            group.hyper,
        )
        for group, held in zip(document.groups, document.members, strict=True)
    ]
    return Summary(
        path=checkpoint.path,
        kind=checkpoint.kind,
        certainty=checkpoint.certainty,
        rows=tuple(rows),
        slots=_slots(rows, _covered(checkpoint)),
        notes=checkpoint.notes,
        recipe=document.recipe or None,
        optimizer=_optimizer(checkpoint),
        chains=tuple(dict.fromkeys(param.chain for param in document.parameters if param.chain)),
        steps=document.steps,
        parameters=len(document.parameters),
        elements=_elements(with_state),
        without_state=tuple(param.name for param in document.parameters if not param.has_state),
        groups=tuple(groups),
        prices=bytes_by_recipe(shapes) if known and shapes else {},
        checkpoint=checkpoint,
    )


def _optimizer(checkpoint: Checkpoint) -> str:
    """Say what another tool's file is taken for."""
    name = str(checkpoint.document.source.get("optimizer", ""))
    return "" if checkpoint.kind == OPTSTATE or name == UNKNOWN else name


def _elements(parameters: Sequence[Parameter]) -> int | None:
    """Elements of parameters, None where a shape is unknown."""
    return None if any(param.shape is None for param in parameters) else sum(param.numel for param in parameters)


def _rows(checkpoint: Checkpoint) -> list[TensorRow]:
    """List the document's tensors in its order, then those that it does not name."""
    rows = [
        TensorRow(key, param.name, name, part, slot.store, checkpoint.tensors[key])
        for param in checkpoint.document.parameters
        for name, slot in param.slots.items()
        for part, key in slot.fields.items()
        if key in checkpoint.tensors
    ]
    found = {row.name for row in rows}
    return rows + [
        TensorRow(k, "", "", "", "unknown", stored) for k, stored in checkpoint.tensors.items() if k not in found
    ]


def _covered(checkpoint: Checkpoint) -> dict[tuple[str, str], int]:
    """Elements of the parameters that have a statistic in a store, or of its tensors where shapes are unknown."""
    covered: dict[tuple[str, str], int] = {}
    for param in checkpoint.document.parameters:
        for name, slot in param.slots.items():
            held = (checkpoint.tensors[key] for key in slot.fields.values() if key in checkpoint.tensors)
            count = sum(stored.elements for stored in held) if param.shape is None else param.numel
            covered[name, slot.store] = covered.get((name, slot.store), 0) + count
    return covered


def _slots(rows: Iterable[TensorRow], covered: dict[tuple[str, str], int]) -> tuple[SlotSummary, ...]:
    members: dict[tuple[str, str], list[TensorRow]] = {key: [] for key in covered}
    for row in rows:
        members.setdefault((row.slot, row.store), []).append(row)
    slots = dict.fromkeys(slot for slot, _ in members)
    order = {slot: place for place, slot in enumerate(slots)}  # all stores of a statistic together
    return tuple(
        SlotSummary(
            slot,
            store,
            "+".join(dict.fromkeys(row.dtype for row in sorted(of_slot, key=lambda row: -row.stored.nbytes))),
            len(of_slot),
            covered.get((slot, store), sum(row.stored.elements for row in of_slot)),
            sum(row.stored.nbytes for row in of_slot),
        )
        for (slot, store), of_slot in sorted(members.items(), key=lambda item: order[item[0][0]])
    )


# --- safetensors files that are no optimizer's ---------------------------------------------------------------------


def _of_others(path: str, headers: tuple[Header, ...]) -> Summary:
    """Tensors by dtype: what they are is not said."""
    rows = [
        TensorRow(entry.name, "", "", "", "unknown", locate_entry(header, entry))
        for header in headers
        for entry in header.tensors
    ]
    by_dtype: dict[str, list[TensorRow]] = {}
    for row in rows:
        by_dtype.setdefault(row.dtype, []).append(row)
    what = "model weights or anything else" if rows else "nothing"
    return Summary(
        path=path,
        kind="safetensors",
        certainty="unknown",
        rows=tuple(rows),
        slots=tuple(slot for dtype in sorted(by_dtype) for slot in _slots(by_dtype[dtype], {})),
        notes=(f"not an optimizer's file as far as it says: {what}",),
    )
