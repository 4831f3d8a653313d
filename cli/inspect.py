"""`optstate inspect`: what a checkpoint of optimizer state holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

from optstate.checkpoint.document.checkpoint import OPTSTATE
from optstate.checkpoint.document.document import TensorValue
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.operations.summarize import STREAM, GroupSummary, Row, Summary, summarize, summarize_stream
from optstate.text import shown

from .findings import structure_of
from .opening import KEY, NAMES, OPTIMIZER
from .output import JSON, bytes_text, failing, print_json, print_lines, print_table, progress

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
    """Show what a checkpoint of optimizer state holds: recipe, step, groups, what every statistic costs, and what other
    recipes would keep.

    The groups and statistics shown are always those of the whole file; --filter and --sort are about the list.
    """
    with failing():
        if str(path) == STREAM:
            summary = _from_stdin(stats)
        else:
            summary = summarize(path, key=key, names=names, optimizer=optimizer)
        listed = tensors or stats or pattern is not None or sort is not None
        rows = _selected(summary.rows, pattern, sort) if listed else []
        numbers = [_statistics(row) for row in progress(rows, len(rows), "tensors")] if stats else None
        if as_json:
            print_json(_tree(summary, rows if listed else None, numbers))
        else:
            _print(summary, rows if listed else None, numbers)


def _from_stdin(stats: bool) -> Summary:
    if stats:
        reason = "--stats reads the data, and of a pipe only the header is read"
        raise CheckpointError(STREAM, reason, "give a file", refused=True)
    return summarize_stream(sys.stdin.buffer)


def _selected(rows: Sequence[Row], pattern: str | None, sort: Sort | None) -> list[Row]:
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


def _statistics(row: Row) -> dict[str, Any]:
    from optstate.checkpoint.files.tensor_bytes import statistics  # imports torch

    return asdict(statistics(row.stored))


# --- JSON ---------------------------------------------------------------------------------------------------------


def _tree(summary: Summary, rows: list[Row] | None, numbers: list[dict[str, Any]] | None) -> dict[str, Any]:
    issues = [asdict(issue) for issue in structure_of(summary)]
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


def _row_tree(row: Row) -> dict[str, Any]:
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
    """A hyper-parameter as plain JSON: lists for tuples, numbers for tensors, text for what is not finite."""
    if isinstance(value, TensorValue):
        return _json_value(value.values[0] if value.shape == () else list(value.values))
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_json_value(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --- text ---------------------------------------------------------------------------------------------------------


def _print(summary: Summary, rows: list[Row] | None, numbers: list[dict[str, Any]] | None) -> None:
    print_lines(_facts(summary))
    if summary.groups:
        typer.echo()
        columns = ("GROUP", "PARAMETERS", "ELEMENTS", "ROLE", "HYPER-PARAMETERS")
        print_table(columns, [_group_cells(i, group) for i, group in enumerate(summary.groups)])
    if summary.slots:
        typer.echo()
        headings = ("SLOT", "STORE", "DTYPE", "TENSORS", "ELEMENTS", "BYTES", "B/PARAM")
        known = summary.elements is not None
        cells = [
            (
                slot.slot or "-",
                slot.store,
                slot.dtype,
                str(slot.tensors),
                str(slot.elements),
                str(slot.nbytes),
                _ratio(slot.nbytes, slot.elements if known else 0),
            )
            for slot in summary.slots
        ]
        print_table(headings, cells)
    if summary.prices:
        typer.echo()
        print_table(("RECIPE", "BYTES", "B/PARAM", "SHARE OF FP32 ADAMW"), _price_cells(summary))
    if rows is not None:
        typer.echo()
        _print_rows(rows, numbers)


def _price_cells(summary: Summary) -> list[tuple[str, ...]]:
    """What the same parameters would cost under other recipes."""
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
    facts += [(issue.severity, f"{issue.where}: {issue.what}") for issue in structure_of(summary)]
    return facts


def _group_cells(index: int, group: GroupSummary) -> tuple[str, ...]:
    role = group.role + (f" (heads of {group.head_size} rows)" if group.head_size else "")
    hyper = " ".join(f"{key}={_value_text(value)}" for key, value in sorted(group.hyper.items()))
    elements = str(group.elements) if group.elements is not None else "-"
    return (str(index), str(group.parameters), elements, role or "-", hyper or "-")


def _value_text(value: Any) -> str:
    if isinstance(value, TensorValue):
        return f"tensor({', '.join(map(str, value.values))})"
    return shown(repr(value))


def _print_rows(rows: list[Row], numbers: list[dict[str, Any]] | None) -> None:
    columns = ["NAME", "SLOT", "STORE", "SHAPE", "DTYPE", "BYTES"]
    cells = [_row_cells(row) for row in rows]
    if numbers is not None:
        columns += ["MIN", "MAX", "MEAN", "ZEROS", "NAN", "INF"]
        for cell, found in zip(cells, numbers, strict=True):
            values = [found[key] for key in ("minimum", "maximum", "mean")]
            cell += ["-" if value is None else f"{value:.6g}" for value in values]
            cell += [str(found[key]) for key in ("zeros", "nan", "infinite")]
    print_table(columns, cells)


def _row_cells(row: Row) -> list[str]:
    shape = "x".join(map(str, row.stored.shape)) or "scalar"
    slot = (f"{row.slot}.{row.field}" if row.field else row.slot) or "-"
    return [row.parameter or row.name, slot, row.store, shape, row.dtype, str(row.stored.nbytes)]


def _ratio(nbytes: int, elements: int | None) -> str:
    return f"{nbytes / elements:.4f}" if elements else "-"
