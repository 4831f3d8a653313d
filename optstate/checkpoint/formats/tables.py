"""Libraries that keep one flat tensor per statistic: a table says which, and one reader reads them all. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.parameter_reader import Draft, Meaning, Source, checkpoint_of, without
from optstate.checkpoint.formats.state_dict import StateDict
from optstate.other_libraries import OtherRule

__all__ = ["Kept", "Layout", "matching", "read"]


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
        """All keys it may have in the file."""
        return {self.whole, self.row, self.col} - {""}


@dataclass(frozen=True)
class Layout:
    """How a library keeps the state of one optimizer.

    rule: what its groups hold, and which recipe follows it. slots: our name -> how it is kept. step: the group's key of
    the count of updates, "" if parameters have their own. others: small values that are no statistic.
    """

    optimizer: str
    rule: OtherRule
    slots: Mapping[str, Kept]
    step: str = ""
    others: frozenset[str] = frozenset()

    def fits(self, found: StateDict) -> bool:
        """Whether the groups have its hyper-parameters and nothing else than its statistics is kept."""
        known = {"step"} | self.others | {key for kept in self.slots.values() for key in kept.keys}
        return self.rule.fits(found.keys) and found.kept <= known


def matching(found: StateDict, layouts: Iterable[Layout]) -> Layout | None:
    """The first layout that fits."""
    return next((layout for layout in layouts if layout.fits(found)), None)


def read(
    found: StateDict,
    layout: Layout,
    kind: str,
    tool: str,
    notes: Iterable[str] = (),
    optimizer: str = "",
    more: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """A checkpoint in this layout. optimizer: its name, if the layout is that of several. more: see `Source`.

    Raises:
        CheckpointError: naming the first parameter whose statistics contradict each other.
    """

    def say(draft: Draft) -> None:
        if layout.step and draft.left:
            draft.take_group_step(layout.step)
        draft.take_step()
        for slot, kept in layout.slots.items():
            _take(draft, slot, kept)

    source = Source(kind, tool, optimizer or layout.optimizer, layout.rule.recipe, more)
    return checkpoint_of(found, source, say, notes)


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
