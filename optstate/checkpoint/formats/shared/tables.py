"""Libraries that keep one flat tensor per statistic: a table says which, to read and to write them all. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Group, Parameter, SlotRecord
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.shared.any_statistics import write_any
from optstate.checkpoint.formats.shared.hyper_parameters import translate
from optstate.checkpoint.formats.shared.parameter_reader import Draft, FormatSource, build_checkpoint, without
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.checkpoint.formats.shared.statistics import CAME, Meaning
from optstate.checkpoint.formats.shared.tree_writer import (
    FACTORED,
    Tree,
    TreeWriter,
    check_rule,
    check_statistics,
    make_scalar_constant,
)
from optstate.other_libraries import OtherRule

__all__ = [
    "CAME_SLOTS",
    "Kept",
    "Layout",
    "by_key",
    "factored",
    "read_table",
    "read_tables",
    "whole",
    "write_kept",
    "write_tables",
]

Hypers = Callable[[TreeWriter, int, Group], Tree]
"""Makes the hyper-parameters of the group at a place."""


@dataclass(frozen=True)
class Kept:
    """One statistic: its meaning, and its keys in the file: whole, or as means over rows and columns.

    squeezed: whether rows are `[n, 1]` and columns `[1, m]`.
    """

    meaning: Meaning
    whole: str = ""
    row: str = ""
    col: str = ""
    squeezed: bool = False

    @property
    def keys(self) -> set[str]:
        """All keys that the statistic may have in the file."""
        return {self.whole, self.row, self.col} - {""}


def whole(meanings: Mapping[str, Meaning]) -> dict[str, Kept]:
    """Statistics that are in full, each under its own name."""
    return {slot: Kept(meaning, slot) for slot, meaning in meanings.items()}


def factored(slot: str, meaning: Meaning) -> dict[str, Kept]:
    """Return a statistic that is in full for vectors, and as `<slot>_row` and `<slot>_col` for matrices."""
    return {slot: Kept(meaning, slot, f"{slot}_row", f"{slot}_col")}


CAME_SLOTS = {
    "exp_avg": Kept(CAME["exp_avg"], "exp_avg"),
    **factored("exp_avg_sq", CAME["exp_avg_sq"]),
    "exp_avg_res": Kept(CAME["exp_avg_res"], row="exp_avg_res_row", col="exp_avg_res_col"),
}
"""How CAME is kept by its authors' package, and by pytorch_optimizer."""


def by_key(words: Mapping[str, Any]) -> Hypers:
    """Hyper-parameters under the keys of a class, which have these defaults; see `translate`."""
    return lambda writer, place, group: translate(writer, place, writer.common(group), words)


@dataclass(frozen=True)
class Layout:
    """How a library keeps the state of one optimizer.

    rule: what its groups hold, and which recipe follows it. slots: our name -> how the statistic is kept, in the order
    of the file. step: the group's key of the count of updates, "" if parameters have their own. step_form: see
    `TreeWriter.step`. others: small values that are no statistic. anew: those of them that a new file needs, with a
    number that the first step replaces. hypers: how hyper-parameters are written.
    """

    optimizer: str
    rule: OtherRule
    slots: Mapping[str, Kept]
    step: str = ""
    step_form: str = ""
    others: frozenset[str] = frozenset()
    anew: Mapping[str, float] = field(default_factory=dict)
    hypers: Hypers | None = None

    def fits(self, found: StateDict) -> bool:
        """Whether the groups have its hyper-parameters and nothing else than its statistics is kept."""
        known = {"step", *self.others, *self.anew, *(key for kept in self.slots.values() for key in kept.keys)}
        return self.rule.fits(found.keys) and found.kept <= known


# --- reading ------------------------------------------------------------------------------------------------------


def read_tables(found: StateDict, layouts: Iterable[Layout], library: str) -> Checkpoint | None:
    """Return a checkpoint in the first layout that fits; None if none does."""
    layout = next((layout for layout in layouts if layout.fits(found)), None)
    return None if layout is None else read_table(found, layout, library)


def read_table(
    found: StateDict,
    layout: Layout,
    library: str,
    notes: Iterable[str] = (),
    optimizer: str = "",
    more: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Return a checkpoint in this layout. optimizer: its name, if the layout is that of several. more: see `Source`.

    Raises:
        CheckpointError: naming the first parameter whose statistics contradict each other.
    """

    def say(draft: Draft) -> None:
        if layout.step and draft.left:
            draft.take_group_step(layout.step)
        draft.take_step()
        for slot, kept in layout.slots.items():
            _take(draft, slot, kept)

    source = FormatSource(library, library, optimizer or layout.optimizer, layout.rule.recipe, more)
    return build_checkpoint(found, source, say, notes)


def _take(draft: Draft, slot: str, kept: Kept) -> None:
    if kept.whole and isinstance(draft.left.get(kept.whole), Stored):
        draft.whole(slot, draft.tensor(kept.whole), kept.meaning, kept.whole)
    elif kept.row and (kept.row in draft.left or kept.col in draft.left):
        row, col = draft.tensor(kept.row), draft.tensor(kept.col)
        if kept.squeezed:
            row, col = _squeezed(draft, kept, row, col)
        draft.factors(slot, row, col, kept.meaning)


def _squeezed(draft: Draft, kept: Kept, row: Stored, col: Stored) -> tuple[Stored, Stored]:
    ndim = len(row.shape)
    if ndim < 2 or len(col.shape) != ndim or row.shape[-1] != 1 or col.shape[-2] != 1:
        shapes = f"{kept.row} has shape {list(row.shape)} and {kept.col} {list(col.shape)}"
        raise draft.error(f"{shapes}: they must be [..., n, 1] and [..., 1, m]")
    return without(row, ndim - 1), without(col, ndim - 2)


# --- writing ------------------------------------------------------------------------------------------------------


def write_tables(writer: TreeWriter, own: Iterable[Layout], by_rule: Mapping[str, Layout]) -> Tree:
    """Return the state_dict of a document: a file of the library itself as it was, another in the layout of its rule.

    own: the layouts of the library's files. by_rule: those that other documents can be written in.

    Raises:
        LayoutError: for the first thing that the layout has no place for.
    """
    if writer.same:
        optimizer = writer.document.source.get("optimizer")
        layout = next((layout for layout in own if layout.optimizer == optimizer), None)
        slots: Mapping[str, Kept] = layout.slots if layout is not None else {}
    else:
        layout = by_rule[check_rule(writer, *by_rule)]
        slots = layout.slots
    meanings = {slot: kept.meaning for slot, kept in slots.items()}

    def state_of(param: Parameter) -> Tree:
        check_statistics(writer, param, meanings, lambda: hyper_of(param.group, writer.document.groups[param.group]))
        state = writer.step(param, layout.step_form if layout is not None and param.has_state else "")
        extra = writer.extra(param)
        for slot in sorted(param.slots, key=lambda slot: [*slots].index(slot) if slot in slots else len(slots)):
            if slot in slots:
                state |= write_kept(writer, param, slot, slots[slot])
            else:
                state |= write_any(writer, param, slot, extra)
        if state and layout is not None and not writer.same:
            state |= {key: make_scalar_constant("F32", number) for key, number in layout.anew.items()}
        return state | extra

    def hyper_of(place: int, group: Group) -> Tree:
        assert layout is not None  # else the file is as it was, and so are its groups
        assert layout.hypers is not None
        return layout.hypers(writer, place, group)

    writer.warn_of_casts()
    return writer.tree(state_of, hyper_of)


def write_kept(writer: TreeWriter, param: Parameter, slot: str, kept: Kept) -> Tree:
    """Return the tensors of one statistic, by key."""
    record = param.slots[slot]
    if kept.row and record.store == FACTORED:
        return _write_factors(writer, record, kept)
    tensor = writer.full(param, slot, record)
    if not kept.whole or (kept.row and len(tensor.shape) > 1):
        raise writer.misfit(param, slot, record, "row and column means of matrices", "factored")
    return {kept.whole: tensor}


def _write_factors(writer: TreeWriter, record: SlotRecord, kept: Kept) -> Tree:
    row, col = writer.tensor(record.fields["row"]), writer.tensor(record.fields["col"])
    if kept.squeezed:
        row = writer.tensor(row.key, (*row.shape, 1))
        col = writer.tensor(col.key, (*col.shape[:-1], 1, col.shape[-1]))
    return {kept.row: row, kept.col: col}
