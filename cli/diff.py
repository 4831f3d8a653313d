"""`optstate diff`: what differs between two checkpoints."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import refuse_contradictions
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.text import shown

from .opening import KEY, NAMES, OPTIMIZER, not_a_stream
from .output import FINDINGS, JSON, failing, print_json, print_lines, print_table, progress

if TYPE_CHECKING:
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
        not_a_stream(a, b)
        first, second = (_opened(path, key, names, optimizer) for path in (a, b))
        from optstate.checkpoint.operations.compare import DIFFERENT, compare  # imports torch

        def track(tasks: Any) -> Any:
            return progress(tasks, len(tasks), "statistics")

        difference = compare(first, second, tolerance=tolerance, track=track)
        if as_json:
            print_json(_tree(first, second, difference, tolerance, tensors))
        else:
            _print(first, second, difference, tensors)
        if difference.verdict == DIFFERENT:
            raise typer.Exit(FINDINGS)


def _opened(path: Path, key: str | None, names: str | None, optimizer: str | None) -> Checkpoint:
    """A checkpoint whose tensors are what it says."""
    checkpoint = _with_or_without(path, key, names, optimizer)
    refuse_contradictions(checkpoint)
    return checkpoint


def _with_or_without(path: Path, key: str | None, names: str | None, optimizer: str | None) -> Checkpoint:
    """What is under the key, or all of a file that needs none: the key is given for one side, or for both."""
    try:
        return open_checkpoint(path, key=key, names=names, optimizer=optimizer)
    except CheckpointError:
        if key is not None:
            with suppress(CheckpointError):
                return open_checkpoint(path, names=names, optimizer=optimizer)
        raise


# --- JSON ---------------------------------------------------------------------------------------------------------


def _tree(a: Checkpoint, b: Checkpoint, difference: Difference, tolerance: float, tensors: bool) -> dict[str, Any]:
    from optstate.checkpoint.operations.compare import EQUAL, EQUAL_VALUES

    tree: dict[str, Any] = {
        "schema": SCHEMA,
        "a": _side_tree(a),
        "b": _side_tree(b),
        "equal": difference.verdict in (EQUAL, EQUAL_VALUES),
        "verdict": difference.verdict,
        "tolerance": tolerance,
        "slots": [
            {
                "slot": slot.slot,
                "equal": slot.verdict in (EQUAL, EQUAL_VALUES),
                "verdict": slot.verdict,
                "stores": list(slot.stores),
                "parameters": len(slot.statistics),
                "different": slot.differing,
                **_figures(slot.deviation),
            }
            for slot in difference.slots
        ],
        "differences": [asdict(finding) for finding in difference.findings],
        "notes": list(difference.notes),
    }
    if tensors:
        tree["tensors"] = [
            {
                "parameter": one.parameter,
                "slot": one.slot,
                "equal": one.verdict in (EQUAL, EQUAL_VALUES),
                "verdict": one.verdict,
                "stores": list(one.stores),
                **_figures(one.deviation),
                "why": one.why or None,
            }
            for one in _all(difference)
        ]
    return tree


def _side_tree(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"path": checkpoint.path, "kind": checkpoint.kind, "recipe": checkpoint.document.recipe or None}


def _figures(found: Deviation | None) -> dict[str, Any]:
    """Numbers, None where there is none; JSON has no infinity."""
    if found is None:
        return {"max_abs": None, "relative_l2": None, "cosine": None}
    relative = "inf" if found.relative_l2 == float("inf") else found.relative_l2
    return {"max_abs": found.max_abs, "relative_l2": relative, "cosine": found.cosine}


def _all(difference: Difference) -> list[StatisticDifference]:
    return [one for slot in difference.slots for one in slot.statistics]


# --- text ---------------------------------------------------------------------------------------------------------


def _print(a: Checkpoint, b: Checkpoint, difference: Difference, tensors: bool) -> None:
    facts = [("a", _side(a)), ("b", _side(b)), ("verdict", difference.verdict)]
    print_lines(facts + [("note", note) for note in difference.notes])
    if difference.slots:
        typer.echo()
        columns = ("SLOT", "VERDICT", "PARAMETERS", "DIFFERENT", "A", "B", "MAX ABS", "RELATIVE L2", "COSINE")
        print_table(columns, [_slot_cells(slot) for slot in difference.slots])
    if difference.findings:
        typer.echo()
        print_table(("WHAT", "A", "B"), [(found.where, found.a, found.b) for found in difference.findings])
    if tensors:
        typer.echo()
        columns = ("PARAMETER", "SLOT", "VERDICT", "A", "B", "MAX ABS", "RELATIVE L2", "COSINE", "WHY")
        print_table(columns, [_statistic_cells(one) for one in _all(difference)])


def _side(checkpoint: Checkpoint) -> str:
    recipe = f", {checkpoint.document.recipe}" if checkpoint.document.recipe else ""
    return f"{shown(checkpoint.path)} ({checkpoint.kind}{recipe})"


def _slot_cells(slot: SlotDifference) -> tuple[str, ...]:
    return (
        slot.slot,
        slot.verdict,
        str(len(slot.statistics)),
        str(slot.differing),
        *slot.stores,
        *_figure_cells(slot.deviation),
    )


def _statistic_cells(one: StatisticDifference) -> tuple[str, ...]:
    return (one.parameter, one.slot, one.verdict, *one.stores, *_figure_cells(one.deviation), one.why or "-")


def _figure_cells(found: Deviation | None) -> tuple[str, str, str]:
    if found is None or found.max_abs is None or found.relative_l2 is None or found.cosine is None:
        return ("-", "-", "-")
    return (f"{found.max_abs:.4g}", f"{found.relative_l2:.4g}", f"{found.cosine:.8f}")
