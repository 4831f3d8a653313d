"""The `optstate` command."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=True, help="Optimizer state: recipes and what they keep.")

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def show_version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        typer.echo(f"optstate {version('optstate')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Optimizer state: recipes and what they keep."""


@app.command()
def recipes(as_json: JSON = False) -> None:
    """List the installed recipes, those of other packages included."""
    from optstate.recipes import describe, names  # imports torch: not for --help

    rows = [describe(name) for name in names()]
    if as_json:
        typer.echo(json.dumps({"schema": "optstate.recipes/1", "recipes": rows}))
    elif sys.stdout.isatty():
        _print_table(rows)
    else:
        for row in rows:
            typer.echo(f"{row['name']}\t{row['class']}\t{row['summary']}")


def _print_table(rows: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "class", "what it does")
    for row in rows:
        table.add_row(row["name"], row["class"], row["summary"])
    Console().print(table)
