"""`optstate diff`: what differs between two checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optstate import checkpoint
from optstate.text import shown

from .options import JSON, KEY, NAMES, OPTIMIZER
from .output import (
    FINDINGS,
    Columns,
    columns_of_tuples,
    failing,
    finite,
    print_json,
    print_lines,
    print_table,
    progress,
)

if TYPE_CHECKING:
    from optstate.checkpoint.document.checkpoint import Checkpoint
    from optstate.checkpoint.operations.compare import Deviation, Difference, SlotDifference, StatisticDifference

SCHEMA = "optstate.diff/1"


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint of any kind that `inspect` reads.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same or of another kind.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every statistic of every parameter.")] = False,
    tolerance: Annotated[
        float, typer.Option(metavar="REL", min=0.0, help="Largest relative difference (L2) of what is close.")
    ] = 1e-6,
    key: KEY = None,
    names: NAMES = None,
    optimizer: OPTIMIZER = None,
    as_json: JSON = False,
) -> None:
    """Compare two checkpoints by the numbers in them, whatever these are stored in, and by what is said of them.

    Statistics are "equal" (the same bytes in the same store), "equal values", "close" (within the tolerance) or
    "different". --names and --optimizer are of both sides, --key is of those that need one.

    Exit code 0: equal or close. 1: different.
    """
    with failing():
        track = partial(progress, what="statistics")
        found = checkpoint.compare(a, b, tolerance=tolerance, key=key, names=names, optimizer=optimizer, track=track)
        if as_json:
            print_json(_tree(found, tolerance, tensors))
        else:
            _print(found, tensors)
        if not found.close:
            raise typer.Exit(FINDINGS)


# --- JSON ---------------------------------------------------------------------------------------------------------


def _tree(found: Difference, tolerance: float, tensors: bool) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "schema": SCHEMA,
        "a": _side_tree(found.a),
        "b": _side_tree(found.b),
        "equal": found.equal,
        "verdict": found.verdict,
        "tolerance": tolerance,
        "slots": [
            {"slot": slot.slot, "parameters": len(slot.statistics), "different": slot.differing, **_verdict_tree(slot)}
            for slot in found.slots
        ],
        "differences": [asdict(finding) for finding in found.findings],
        "notes": list(found.notes),
    }
    if tensors:
        tree["tensors"] = [
            {"parameter": one.parameter, "slot": one.slot, "why": one.why or None, **_verdict_tree(one)}
            for one in found.statistics
        ]
    return tree


def _side_tree(side: Checkpoint) -> dict[str, Any]:
    return {"path": side.path, "kind": side.kind, "recipe": side.document.recipe or None}


def _verdict_tree(one: SlotDifference | StatisticDifference) -> dict[str, Any]:
    figures: dict[str, Any] = dict.fromkeys(("max_abs", "relative_l2", "cosine"))
    if one.deviation is not None:
        figures = {key: finite(getattr(one.deviation, key)) for key in figures}
    return {"equal": one.equal, "verdict": one.verdict, "stores": list(one.stores), **figures}


# --- text ---------------------------------------------------------------------------------------------------------


def _figure(name: str, digits: str) -> Any:
    """Return what a column shows of a deviation; nothing where one of its figures is missing."""

    def show(row: SlotDifference | StatisticDifference) -> str | None:
        found: Deviation | None = row.deviation
        return None if found is None or found.lone else format(getattr(found, name), digits)

    return show


FIGURES: Columns = {
    "A": lambda row: row.stores[0],
    "B": lambda row: row.stores[1],
    "MAX ABS": _figure("max_abs", ".4g"),
    "RELATIVE L2": _figure("relative_l2", ".4g"),
    "COSINE": _figure("cosine", ".8f"),
}
SLOTS: Columns = {
    "SLOT": attrgetter("slot"),
    "VERDICT": attrgetter("verdict"),
    "PARAMETERS": lambda slot: len(slot.statistics),
    "DIFFERENT": attrgetter("differing"),
    **FIGURES,
}
STATISTICS: Columns = {
    "PARAMETER": attrgetter("parameter"),
    "SLOT": attrgetter("slot"),
    "VERDICT": attrgetter("verdict"),
    **FIGURES,
    "WHY": lambda one: one.why or None,
}


def _print(found: Difference, tensors: bool) -> None:
    facts = [("a", _side(found.a)), ("b", _side(found.b)), ("verdict", found.verdict)]
    print_lines(facts + [("note", note) for note in found.notes])
    if found.slots:
        typer.echo()
        print_table(SLOTS, found.slots)
    if found.findings:
        typer.echo()
        print_table(columns_of_tuples("WHAT", "A", "B"), [(one.where, one.a, one.b) for one in found.findings])
    if tensors:
        typer.echo()
        print_table(STATISTICS, found.statistics)


def _side(side: Checkpoint) -> str:
    recipe = f", {side.document.recipe}" if side.document.recipe else ""
    return f"{shown(side.path)} ({side.kind}{recipe})"
