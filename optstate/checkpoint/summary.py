"""What a safetensors file holds, as far as it says: for people and for `optstate inspect`. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optstate.checkpoint.container import Entry, Header, read_header, read_index
from optstate.checkpoint.document import KEY, Document, document_of
from optstate.checkpoint.errors import CheckpointError

__all__ = ["GroupSummary", "Row", "SlotSummary", "Summary", "summarize"]

FP32_ADAMW = 8
"""Bytes of state per parameter element: two moments."""

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}
"""torch's names; others are shown as the file spells them."""

LARGEST_SIDE_FILE = 16 << 20
LEROBOT_KEY = re.compile(r"state/(\d{1,9})/([^/]+)")
LEROBOT_GROUPS = "optimizer_param_groups.json"

# By the slots alone: several optimizers share them, so this is a guess and is called one.
GUESSES = (
    ({"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}, "Adam or AdamW with amsgrad"),
    ({"exp_avg", "exp_avg_sq"}, "Adam or AdamW"),
    ({"row_var", "col_var"}, "torch's Adafactor"),
    ({"exp_avg_sq_row", "exp_avg_sq_col"}, "Adafactor"),
    ({"square_avg"}, "RMSprop"),
    ({"momentum_buffer"}, "SGD with momentum or Muon"),
    ({"exp_avg"}, "Lion"),
)


@dataclass(frozen=True)
class Row:
    """One tensor: whose it is, what of it, and how it is kept. `parameter` and `slot` are "" where unknown."""

    parameter: str
    slot: str
    field: str
    store: str
    entry: Entry
    path: str

    @property
    def dtype(self) -> str:
        """torch's name of its dtype."""
        return DTYPES.get(self.entry.dtype, self.entry.dtype)


@dataclass(frozen=True)
class SlotSummary:
    """All tensors of one statistic in one store.

    elements: of the parameters it is kept for, so that `nbytes / elements` is its price; of the tensors themselves
    where the file does not tell. store: "unknown" then.
    """

    slot: str
    store: str
    dtype: str
    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True)
class GroupSummary:
    """A param group; `elements` is None where the file does not tell the shapes of parameters."""

    parameters: int
    elements: int | None
    role: str
    head_size: int | None
    hyper: dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """What a file, or a sharded set, holds.

    kind: "optstate", "lerobot" or "safetensors". certainty: "declared" by the file, "layout" if names follow a known
    layout, "unknown". recipe: declared, None where it is not; guess: what the slots look like, "" for nothing.
    parameters: how many, None if unknown. elements: of parameters that have state; None if unknown.
    """

    path: str
    kind: str
    certainty: str
    recipe: str | None
    guess: str
    chains: tuple[str, ...]
    steps: tuple[int, ...]
    parameters: int | None
    elements: int | None
    frozen: int
    groups: tuple[GroupSummary, ...]
    slots: tuple[SlotSummary, ...]
    rows: tuple[Row, ...]
    headers: tuple[Header, ...]
    notes: tuple[str, ...] = ()
    document: Document | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(row.entry.nbytes for row in self.rows)

    @property
    def step(self) -> int | None:
        """How often the most updated parameter was updated."""
        return max(self.steps, default=None)

    @property
    def adamw_bytes(self) -> int | None:
        """What AdamW with fp32 moments would keep for the same parameters."""
        return None if self.elements is None else FP32_ADAMW * self.elements


def summarize(path: str | os.PathLike[str]) -> Summary:
    """Read the headers of a safetensors file, or of a sharded set (its folder or index), and sum up what they say.

    Raises:
        CheckpointError: if it is no such file, or not a valid one.
    """
    if os.path.isdir(path) or os.fspath(path).endswith(".json"):
        return _of_others(os.fspath(path), tuple(read_index(path).shards.values()))
    header = read_header(path)
    if KEY in header.metadata:
        return _of_native(header, document_of(header))
    if header.tensors and all(LEROBOT_KEY.fullmatch(entry.name) for entry in header.tensors):
        return _of_lerobot(header)
    return _of_others(os.fspath(path), (header,))


def _of_native(header: Header, document: Document) -> Summary:
    entries = {entry.name: entry for entry in header.tensors}
    rows, covered, found = [], dict[tuple[str, str], int](), set()
    for param in document.parameters:
        for name, slot in param.slots.items():
            covered[name, slot.store] = covered.get((name, slot.store), 0) + param.numel
            for part, key in slot.fields.items():
                if key in entries:
                    rows.append(Row(param.name, name, part, slot.store, entries[key], header.path))
                    found.add(key)
    rows += [Row("", "", "", "unknown", entry, header.path) for entry in header.tensors if entry.name not in found]
    with_state = [param for param in document.parameters if param.has_state]
    groups = []
    for i, group in enumerate(document.groups):
        elements = sum(param.numel for param in document.parameters if param.group == i)
        groups.append(GroupSummary(len(group.parameters), elements, group.role, group.head_size, group.hyper))
    return Summary(
        path=header.path,
        kind="optstate",
        certainty="declared",
        recipe=document.recipe or None,
        guess="",
        chains=tuple(dict.fromkeys(param.chain for param in document.parameters)),
        steps=document.steps,
        parameters=len(document.parameters),
        elements=sum(param.numel for param in with_state),
        frozen=len(document.parameters) - len(with_state),
        groups=tuple(groups),
        slots=_slots(rows, covered),
        rows=tuple(rows),
        headers=(header,),
        document=document,
    )


def _slots(rows: Iterable[Row], covered: dict[tuple[str, str], int] | None = None) -> tuple[SlotSummary, ...]:
    members: dict[tuple[str, str], list[Row]] = {key: [] for key in covered or {}}
    for row in rows:
        members.setdefault((row.slot, row.store), []).append(row)
    order = list(dict.fromkeys(slot for slot, _ in members))  # all stores of a statistic together
    return tuple(
        SlotSummary(
            slot,
            store,
            "+".join(dict.fromkeys(row.dtype for row in sorted(of_slot, key=lambda row: -row.entry.nbytes))),
            len(of_slot),
            (covered or {}).get((slot, store), sum(row.entry.elements for row in of_slot)),
            sum(row.entry.nbytes for row in of_slot),
        )
        for (slot, store), of_slot in sorted(members.items(), key=lambda item: order.index(item[0][0]))
    )


# --- LeRobot's layout: state/<id>/<slot>, groups in a JSON file beside it ------------------------------------------


def _of_lerobot(header: Header) -> Summary:
    rows, steps = [], set()
    for entry in header.tensors:
        match = LEROBOT_KEY.fullmatch(entry.name)
        assert match is not None  # `summarize` asked
        rows.append(Row(f"#{match[1]}", match[2], "", "unknown", entry, header.path))
        if match[2] == "step" and (step := _number(header.path, entry)) is not None:
            steps.add(step)
    rows.sort(key=lambda row: (int(row.parameter[1:]), row.slot))
    groups, notes = _lerobot_groups(Path(header.path).parent / LEROBOT_GROUPS)
    with_state = {row.parameter for row in rows}
    known = sum(group.parameters for group in groups) or None
    return Summary(
        path=header.path,
        kind="lerobot",
        certainty="layout",
        recipe=None,
        guess=_guess({row.slot for row in rows}),
        chains=(),
        steps=tuple(sorted(steps)),
        parameters=known if known is not None else len(with_state),
        elements=None,
        frozen=max((known or 0) - len(with_state), 0),
        groups=groups,
        slots=_slots(sorted(rows, key=lambda row: row.slot)),
        rows=tuple(rows),
        headers=(header,),
        notes=(*notes, "parameters are numbered, not named; how statistics are encoded is not said"),
    )


def _guess(slots: set[str]) -> str:
    return next((name for needed, name in GUESSES if needed <= slots), "")


def _number(path: str, entry: Entry) -> int | None:
    """A whole number kept as a 0-d tensor; None for anything else."""
    formats = {"F32": "<f", "F64": "<d", "I32": "<i", "I64": "<q"}
    if entry.elements != 1 or entry.dtype not in formats:
        return None
    with open(path, "rb") as file:
        file.seek(entry.start)
        (value,) = struct.unpack(formats[entry.dtype], file.read(entry.nbytes))
    return int(value) if value == value and abs(value) < 2**63 and value == int(value) else None


def _lerobot_groups(path: Path) -> tuple[tuple[GroupSummary, ...], tuple[str, ...]]:
    """The groups of the file beside, and what to say about them."""
    if not path.is_file():
        return (), (f"no {LEROBOT_GROUPS} beside it: groups are unknown",)
    try:
        if path.stat().st_size > LARGEST_SIDE_FILE:
            raise ValueError(f"it is larger than {LARGEST_SIDE_FILE} bytes")
        tree = json.loads(path.read_text(encoding="utf-8"))
        groups = []
        for group in tree:
            hyper = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            groups.append(GroupSummary(len(group["params"]), None, "", None, hyper))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(path, f"the param groups beside the file cannot be read: {error}") from None
    return tuple(groups), ()


# --- anything else ------------------------------------------------------------------------------------------------


def _of_others(path: str, headers: tuple[Header, ...]) -> Summary:
    """Tensors by dtype: what they are is not said."""
    rows = [Row("", "", "", "unknown", entry, header.path) for header in headers for entry in header.tensors]
    by_dtype: dict[str, list[Row]] = {}
    for row in rows:
        by_dtype.setdefault(row.dtype, []).append(row)
    slots = [slot for dtype in sorted(by_dtype) for slot in _slots(by_dtype[dtype])]
    what = "model weights or anything else" if rows else "nothing"
    notes = [f"not an optimizer's file as far as it says: {what}"]
    if any(KEY in header.metadata for header in headers):
        notes.append("shards with optstate documents are not put together: inspect them one by one")
    return Summary(
        path=path,
        kind="safetensors",
        certainty="unknown",
        recipe=None,
        guess="",
        chains=(),
        steps=(),
        parameters=None,
        elements=None,
        frozen=0,
        groups=(),
        slots=tuple(slots),
        rows=tuple(rows),
        headers=headers,
        notes=tuple(notes),
    )
