"""`optstate check`: whether a checkpoint can be trusted."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from optstate import checkpoint

from .options import JSON, KEY, NAMES, OPTIMIZER
from .output import FINDINGS, failing, print_json, print_table, progress

SCHEMA = "optstate.check/1"
COLUMNS = {
    "SEVERITY": lambda issue: issue.severity,
    "WHERE": lambda issue: issue.where,
    "WHAT": lambda issue: issue.what,
}


def check(
    path: Annotated[Path, typer.Argument(help="A checkpoint of any kind that `inspect` reads, a file or a folder.")],
    key: KEY = None,
    names: NAMES = None,
    optimizer: OPTIMIZER = None,
    as_json: JSON = False,
) -> None:
    """Check a checkpoint: its structure, its tensors against what it says of them, and the numbers in them.

    Exit code 0: no errors, warnings at most. 1: errors. 3: not a checkpoint that can be checked at all.
    """
    with failing():
        track = partial(progress, what="tensors")
        found = checkpoint.check(path, key=key, names=names, optimizer=optimizer, track=track)
        if as_json:
            issues = [asdict(issue) for issue in found.issues]
            print_json({"schema": SCHEMA, "path": found.path, "ok": found.ok, "issues": issues})
        elif found.issues:
            print_table(COLUMNS, found.issues)
        else:
            typer.echo("no issues")
        if not found.ok:
            raise typer.Exit(FINDINGS)
