"""What every command shares: tables and JSON on stdout, errors and progress on stderr, exit codes."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, TypeVar

import typer

from optstate.checkpoint import CheckpointError, UsageError
from optstate.text import escaped

__all__ = [
    "FINDINGS",
    "Columns",
    "bytes_text",
    "columns_of_tuples",
    "failing",
    "finite",
    "print_json",
    "print_lines",
    "print_table",
    "progress",
    "stop_with",
]

T = TypeVar("T")

FINDINGS, USAGE, UNREADABLE, REFUSED, INTERRUPTED = 1, 2, 3, 4, 130
"""Exit codes; 2, a wrong use of the command, is typer's, too."""

PATIENCE = 1.0
"""Seconds before a progress bar appears."""


@contextmanager
def failing() -> Iterator[None]:
    """Turn an unreadable or refused file into one line on stderr and the exit code for it."""
    try:
        yield
    except CheckpointError as error:
        if os.environ.get("OPTSTATE_DEBUG") == "1":
            raise
        stop_with(str(error), REFUSED if error.refused else UNREADABLE)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None
    except BrokenPipeError:
        # `optstate inspect ... | head`: Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        stop_with(escaped(str(error)), UNREADABLE)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def stop_with(message: str, code: int) -> None:
    """End the command with one line on stderr and an exit code."""
    typer.echo(f"optstate: {message}", err=True)
    raise typer.Exit(code) from None


def print_json(tree: Mapping[str, Any]) -> None:
    """Print one object on one line; ASCII, so that no name in a file reaches the terminal as it is."""
    typer.echo(json.dumps(tree, allow_nan=False))


def print_lines(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one pair a line."""
    width = max(len(name) for name, _ in pairs) if sys.stdout.isatty() else 0
    for name, value in pairs:
        typer.echo(f"{name.ljust(width)}  {escaped(value)}" if width else f"{name}\t{escaped(value)}")


Columns = Mapping[str, Callable[[Any], Any]]
"""The columns of a table: heading -> what it shows of a row. A number is shortened, None is "-"."""


def columns_of_tuples(*headings: str) -> Columns:
    """Return the columns of a table whose rows are tuples of what is shown."""
    return {heading: itemgetter(place) for place, heading in enumerate(headings)}


def print_table(columns: Columns, rows: Sequence[Any]) -> None:
    """Print a table for a person on a terminal, else tab-separated columns under their headings; escape all text."""
    headings: Sequence[str] = tuple(columns)
    cells: Sequence[Sequence[str]] = [[_cell(show(row)) for show in columns.values()] for row in rows]
    if not sys.stdout.isatty():
        for line in (headings, *cells):
            typer.echo("\t".join(line))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    headings, cells = _fitting(headings, cells, console.width)
    numbers = [all(NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(headings))]
    gap = 1 if _width(headings, cells) <= console.width else 0
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False)
    for column, right in zip(headings, numbers, strict=True):
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))  # Text: no markup in names
    console.print(table)


def _cell(value: Any) -> str:
    """Return the text of one cell."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else escaped(str(value))


NUMBER = re.compile(r"-?[\dx.]*(e[-+]\d+)?( %| B| [KMG]iB)?|-?inf|nan")
"""Cells that are aligned at the right: numbers, sizes, shapes, and nothing."""

SHORT = {
    "PARAMETERS": "PARAMS",
    "DIFFERENT": "DIFFER",
    "RELATIVE L2": "REL L2",
    "Full(dtype='bfloat16')": "bf16",
    "Full(dtype='float16')": "fp16",
}
"""Words for a narrow terminal."""


def _fitting(
    columns: Sequence[str], cells: Sequence[Sequence[str]], width: int
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return a table in fewer words, and without columns that say nothing, if it is wider than the terminal."""
    if _width(columns, cells) > width:
        columns = [SHORT.get(column, column) for column in columns]
        cells = [[SHORT.get(cell, cell.removesuffix("()")) for cell in row] for row in cells]
    if _width(columns, cells) > width:
        said = [i for i in range(len(columns)) if any(row[i] not in ("", "-", "0") for row in cells)]
        columns, cells = [columns[i] for i in said], [[row[i] for i in said] for row in cells]
    return columns, cells


def _width(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    longest = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    return sum(longest) + 2 * len(longest)


def bytes_text(count: int) -> str:
    """Return a size for people: "1.50 MiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def finite(value: float | None) -> float | str | None:
    """Return a number as JSON has it, which has no infinity: the text "inf" there."""
    return value if value is None or math.isfinite(value) else str(value)


def progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items, with a bar on stderr if that is a terminal and they take long."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield from items
        return
    start, bar = time.monotonic(), None
    try:
        for done, item in enumerate(items):
            if bar is None and time.monotonic() - start > PATIENCE:
                bar = _Bar(len(items), what)
            if bar is not None:
                bar.show(done)
            yield item
    finally:
        if bar is not None:
            bar.stop()


class _Bar:
    """rich's bar, which is imported once it is needed and gone once it is not."""

    def __init__(self, total: int, what: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(what, total=total)
        self._progress.start()

    def show(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def stop(self) -> None:
        self._progress.stop()
