"""`optstate inspect`: what a checkpoint of optimizer state holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import Enum
from fnmatch import fnmatchcase
from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Annotated, Any

import typer

from optstate.checkpoint.document.checkpoint import OPTSTATE
from optstate.checkpoint.document.document import TensorValue
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.open_checkpoint import STREAM
from optstate.checkpoint.operations.summarize import GroupSummary, Summary, TensorRow, summarize, summarize_stream
from optstate.text import shown

from .options import JSON, KEY, NAMES, OPTIMIZER
from .output import (
    Columns,
    bytes_text,
    columns_of_tuples,
    failing,
    print_json,
    print_lines,
    print_table,
    progress,
)

SCHEMA = "optstate.inspect/1"

PATH_HELP = "A file or a folder: optstate's or another library's state. - for a safetensors file through a pipe."

MOST_NAMES = 5
"""Names listed before a count."""


class Sort(str, Enum):
    """What to order tensors by."""

    name = "name"
    slot = "slot"
    dtype = "dtype"
    elements = "elements"
    bytes = "bytes"


def inspect(
    path: Annotated[Path, typer.Argument(help=PATH_HELP)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="List minimum, maximum, mean, zeros and non-finite numbers: reads the data.")
    ] = False,
    pattern: Annotated[
        str | None, typer.Option("--filter", metavar="GLOB", help="List tensors with a matching name or parameter.")
    ] = None,
    sort: Annotated[
        Sort | None, typer.Option(help="Order the list: by text ascending, by size descending. Else the file's order.")
    ] = None,
    key: KEY = None,
    names: NAMES = None,
    optimizer: OPTIMIZER = None,
    as_json: JSON = False,
) -> None:
    """Show what a checkpoint of optimizer state holds.

    That is: recipe, step, groups, what every statistic costs, and what other recipes would keep.

    The groups and statistics shown are always those of the whole file; --filter and --sort are about the list.
    """
    with failing():
        if str(path) == STREAM:
            summary = _from_stdin(stats)
        else:
            summary = summarize(path, key=key, names=names, optimizer=optimizer)
        listed = tensors or stats or pattern is not None or sort is not None
        rows = _selected(summary.rows, pattern, sort) if listed else []
        numbers = [_statistics(row) for row in progress(rows, "tensors")] if stats else None
        if as_json:
            print_json(_tree(summary, rows if listed else None, numbers))
        else:
            _print(summary, rows if listed else None, numbers)


def _from_stdin(stats: bool) -> Summary:
    if stats:
        reason = "--stats reads the data, and of a pipe only the header is read"
        raise CheckpointError(STREAM, reason, "give a file", refused=True)
    return summarize_stream(sys.stdin.buffer)


def _selected(rows: Sequence[TensorRow], pattern: str | None, sort: Sort | None) -> list[TensorRow]:
    kept = [
        row for row in rows if pattern is None or fnmatchcase(row.name, pattern) or fnmatchcase(row.parameter, pattern)
    ]
    keys = {
        Sort.name: lambda row: row.name,
        Sort.slot: lambda row: (row.slot, row.field, row.name),
        Sort.dtype: lambda row: (row.dtype, row.name),
        Sort.elements: lambda row: (-row.stored.elements, row.name),
        Sort.bytes: lambda row: (-row.stored.nbytes, row.name),
    }
    return kept if sort is None else sorted(kept, key=keys[sort])


def _statistics(row: TensorRow) -> dict[str, Any]:
    from optstate.checkpoint.files.tensor_bytes import measure_tensor  # imports torch

    return asdict(measure_tensor(row.stored))


# --- JSON ---------------------------------------------------------------------------------------------------------


def _tree(summary: Summary, rows: list[TensorRow] | None, numbers: list[dict[str, Any]] | None) -> dict[str, Any]:
    issues = [asdict(issue) for issue in summary.issues]
    tree: dict[str, Any] = {
        "schema": SCHEMA,
        "path": summary.path,
        "kind": summary.kind,
        "certainty": summary.certainty,
        "recipe": summary.recipe,
        "looks_like": summary.optimizer or None,
        "chains": list(summary.chains),
        "step": summary.step,
        "steps": list(summary.steps),
        "parameters": summary.parameters,
        "parameter_elements": summary.elements,
        "frozen": summary.frozen,
        "without_state": list(summary.without_state),
        "state_bytes": summary.nbytes,
        "fp32_adamw_bytes": summary.adamw_bytes,
        "slots": [
            {
                "slot": slot.slot,
                "store": slot.store,
                "dtype": slot.dtype,
                "tensors": slot.tensors,
                "elements": slot.elements,
                "bytes": slot.nbytes,
            }
            for slot in summary.slots
        ],
        "groups": [_group_tree(i, group) for i, group in enumerate(summary.groups)],
        "recipes": [{"recipe": name, "bytes": nbytes} for name, nbytes in summary.prices.items()],
        "notes": list(summary.notes),
        "issues": issues,
    }
    if rows is not None:
        tree["tensors"] = [_row_tree(row) for row in rows]
        for entry, found in zip(tree["tensors"], numbers or [], strict=False):
            entry["stats"] = {key: value for key, value in found.items() if key != "elements"}
    return tree


def _group_tree(index: int, group: GroupSummary) -> dict[str, Any]:
    return {
        "group": index,
        "parameters": group.parameters,
        "elements": group.elements,
        "role": group.role or None,
        "head_size": group.head_size,
        "hyper": _json_value(group.hyper),
    }


def _row_tree(row: TensorRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "parameter": row.parameter or None,
        "slot": row.slot or None,
        "field": row.field,
        "store": row.store,
        "dtype": row.dtype,
        "shape": list(row.stored.shape),
        "elements": row.stored.elements,
        "bytes": row.stored.nbytes,
    }


def _json_value(value: Any) -> Any:
    """Return a hyper-parameter as plain JSON: lists for tuples, numbers for tensors, text for what is not finite."""
    if isinstance(value, TensorValue):
        return _json_value(value.values[0] if value.shape == () else list(value.values))
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_json_value(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --- text ---------------------------------------------------------------------------------------------------------


def _print(summary: Summary, rows: list[TensorRow] | None, numbers: list[dict[str, Any]] | None) -> None:
    print_lines(_facts(summary))
    if summary.groups:
        typer.echo()
        print_table(GROUPS, list(enumerate(summary.groups)))
    if summary.slots:
        typer.echo()
        known = summary.elements is not None
        per_element = {"B/PARAM": lambda slot: _ratio(slot.nbytes, slot.elements if known else 0)}
        print_table({**SLOTS, **per_element}, summary.slots)
    if summary.prices:
        typer.echo()
        print_table(columns_of_tuples("RECIPE", "BYTES", "B/PARAM", "SHARE OF FP32 ADAMW"), _price_cells(summary))
    if rows is not None:
        typer.echo()
        if numbers is None:
            print_table(TENSORS, rows)
        else:
            columns = {name: partial(_of_pair, 0, show) for name, show in TENSORS.items()}
            columns |= {name: partial(_of_pair, 1, show) for name, show in NUMBERS.items()}
            print_table(columns, list(zip(rows, numbers, strict=True)))


def _of_pair(side: int, show: Callable[[Any], Any], pair: tuple[TensorRow, dict[str, Any]]) -> Any:
    """Show a tensor, or the statistics of its numbers."""
    return show(pair[side])


GROUPS: Columns = {
    "GROUP": lambda row: row[0],
    "PARAMETERS": lambda row: row[1].parameters,
    "ELEMENTS": lambda row: row[1].elements,
    "ROLE": lambda row: _role(row[1]) or None,
    "HYPER-PARAMETERS": lambda row: " ".join(f"{k}={_value_text(v)}" for k, v in sorted(row[1].hyper.items())) or None,
}
SLOTS: Columns = {
    "SLOT": lambda slot: slot.slot or None,
    "STORE": attrgetter("store"),
    "DTYPE": attrgetter("dtype"),
    "TENSORS": attrgetter("tensors"),
    "ELEMENTS": attrgetter("elements"),
    "BYTES": attrgetter("nbytes"),
}
TENSORS: Columns = {
    "NAME": lambda row: row.parameter or row.name,
    "SLOT": lambda row: (f"{row.slot}.{row.field}" if row.field else row.slot) or None,
    "STORE": attrgetter("store"),
    "SHAPE": lambda row: "x".join(map(str, row.stored.shape)) or "scalar",
    "DTYPE": attrgetter("dtype"),
    "BYTES": lambda row: row.stored.nbytes,
}
NUMBERS: Columns = {
    "MIN": lambda found: _six_digits(found["minimum"]),
    "MAX": lambda found: _six_digits(found["maximum"]),
    "MEAN": lambda found: _six_digits(found["mean"]),
    "ZEROS": itemgetter("zeros"),
    "NAN": itemgetter("nan"),
    "INF": itemgetter("infinite"),
}


def _six_digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"


def _role(group: GroupSummary) -> str:
    return group.role + (f" (heads of {group.head_size} rows)" if group.head_size else "")


def _price_cells(summary: Summary) -> list[tuple[str, ...]]:
    """Return what the same parameters would cost under other recipes."""
    whole = summary.adamw_bytes or 0
    return [
        (name, str(nbytes), _ratio(nbytes, summary.elements), f"{100 * nbytes / whole:.1f} %" if whole else "-")
        for name, nbytes in summary.prices.items()
    ]


def _facts(summary: Summary) -> list[tuple[str, str]]:
    certain = {"declared": "says the file", "layout": "by its layout", "unknown": "nothing says more"}
    facts = [("file", shown(summary.path)), ("kind", f"{summary.kind} ({certain[summary.certainty]})")]
    if summary.optimizer:
        facts.append(("optimizer", summary.optimizer))
    if summary.recipe is not None or summary.kind == OPTSTATE:
        facts.append(("recipe", summary.recipe or "a chain of its own"))
    facts += [("chain", chain) for chain in summary.chains]
    if summary.steps:
        steps = [str(step) for step in summary.steps]
        uneven = f" (fewest: {steps[0]})" if len(steps) > 1 else ""
        facts.append(("step", f"{steps[-1]}{uneven}"))
    if summary.parameters is not None:
        elements = f", {summary.elements} elements with state" if summary.elements is not None else ""
        facts.append(("parameters", f"{summary.parameters}{elements}"))
    if summary.frozen:
        names = ", ".join(shown(name) for name in summary.without_state[:MOST_NAMES])
        more = f" and {summary.frozen - MOST_NAMES} more" if summary.frozen > MOST_NAMES else ""
        facts.append(("without state", f"{summary.frozen}: {names}{more}"))
    per = f", {_ratio(summary.nbytes, summary.elements)} per element" if summary.elements else ""
    facts.append(("state", f"{summary.nbytes} bytes ({bytes_text(summary.nbytes)}){per}"))
    if summary.adamw_bytes:
        share = f"{100 * summary.nbytes / summary.adamw_bytes:.1f} %"
        facts.append(("fp32 AdamW", f"{summary.adamw_bytes} bytes: this is {share} of it"))
    facts += [("note", note) for note in summary.notes]
    facts += [(issue.severity, f"{issue.where}: {issue.what}") for issue in summary.issues]
    return facts


def _value_text(value: Any) -> str:
    if isinstance(value, TensorValue):
        return f"tensor({', '.join(map(str, value.values))})"
    return shown(repr(value))


def _ratio(nbytes: int, elements: int | None) -> str:
    return f"{nbytes / elements:.4f}" if elements else "-"
