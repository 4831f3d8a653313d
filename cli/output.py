"""What every command shares: tables and JSON on stdout, errors on stderr, exit codes."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer

from optstate.checkpoint.errors import CheckpointError
from optstate.text import escaped

__all__ = ["FINDINGS", "JSON", "bytes_text", "failing", "print_json", "print_lines", "print_table", "progress"]

T = TypeVar("T")

FINDINGS, UNREADABLE, REFUSED, INTERRUPTED = 1, 3, 4, 130
"""Exit codes; 2, a wrong use of the command, is typer's."""

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


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
        _stop(str(error), REFUSED if error.refused else UNREADABLE)
    except BrokenPipeError:
        # `optstate inspect ... | head`: Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        _stop(escaped(str(error)), UNREADABLE)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _stop(message: str, code: int) -> None:
    typer.echo(f"optstate: {message}", err=True)
    raise typer.Exit(code) from None


def print_json(tree: Mapping[str, Any]) -> None:
    """One object on one line; ASCII, so that no name in a file reaches the terminal as it is."""
    typer.echo(json.dumps(tree, allow_nan=False))


def print_lines(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values, one pair a line."""
    width = max(len(name) for name, _ in pairs) if sys.stdout.isatty() else 0
    for name, value in pairs:
        typer.echo(f"{name.ljust(width)}  {escaped(value)}" if width else f"{name}\t{escaped(value)}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for a person on a terminal, else tab-separated columns under their names. Text from files is escaped."""
    cells: Sequence[Sequence[str]] = [[escaped(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in (columns, *cells):
            typer.echo("\t".join(line))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    columns, cells = _fitting(columns, cells, console.width)
    numbers = [all(NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(columns))]
    gap = 1 if _width(columns, cells) <= console.width else 0
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False)
    for column, right in zip(columns, numbers, strict=True):
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))  # Text: no markup in names
    console.print(table)


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
    """A table in fewer words, and without columns that say nothing, if it is wider than the terminal."""
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
    """A size for people: "1.50 MiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a bar on stderr if that is a terminal and they take long."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield from items
        return
    start, bar = time.monotonic(), None
    try:
        for done, item in enumerate(items):
            if bar is None and time.monotonic() - start > PATIENCE:
                bar = _Bar(total, what)
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
