"""The `optstate` command."""

from __future__ import annotations

import atexit
import gc
import sys
from typing import Annotated

import typer

from optstate.collector import paused

from .check import check
from .convert import convert
from .diff import diff
from .estimate import estimate
from .inspect import inspect
from .options import JSON
from .output import columns_of_tuples, print_json, print_table

HELP = (
    "Optimizer state: what training needs in memory, what a checkpoint holds, whether it is sound, how two differ, and "
    "which recipes there are."
)

NEED_TORCH = ("estimate", "recipes")
"""Commands that import torch whatever they are asked, and keep little else in memory."""

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help=HELP)


def show_version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        from importlib.metadata import version

        typer.echo(f"optstate {version('optstate')}")
        raise typer.Exit


@app.callback(help=HELP)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of the command itself."""
    if context.invoked_subcommand in NEED_TORCH:
        context.with_resource(paused())
        atexit.register(gc.freeze)  # else the interpreter searches all objects twice at its end: a second


app.command()(inspect)
app.command()(check)
app.command()(convert)
app.command()(diff)
app.command()(estimate)


@app.command()
def recipes(as_json: JSON = False) -> None:
    """List the installed recipes, those of other packages included."""
    from optstate.recipes import describe, names  # imports torch: not for --help

    rows = [describe(name) for name in names()]
    if as_json:
        print_json({"schema": "optstate.recipes/1", "recipes": rows})
    elif sys.stdout.isatty():
        cells = [(row["name"], row["class"], row["summary"]) for row in rows]
        print_table(columns_of_tuples("recipe", "class", "what it does"), cells)
    else:
        for row in rows:  # without a heading
            typer.echo(f"{row['name']}\t{row['class']}\t{row['summary']}")
