"""`optstate check`: whether a checkpoint can be trusted."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.issues import Issue
from optstate.checkpoint.files.opened_file import reading
from optstate.checkpoint.files.safetensors_check import structural_issues
from optstate.checkpoint.operations.summarize import summarize

from .findings import structure_of, values_of
from .opening import KEY, NAMES, OPTIMIZER, not_a_stream
from .output import FINDINGS, JSON, failing, print_json, print_table

SCHEMA = "optstate.check/1"


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
    with failing(), reading():
        not_a_stream(path)
        issues = _issues(path, key, names, optimizer)
        errors = [issue for issue in issues if issue.severity == "error"]
        if as_json:
            print_json({"schema": SCHEMA, "path": str(path), "ok": not errors, "issues": [asdict(i) for i in issues]})
        else:
            _print(issues)
        if errors:
            raise typer.Exit(FINDINGS)


def _issues(path: Path, key: str | None, names: str | None, optimizer: str | None) -> list[Issue]:
    """Everything found. What cannot even be taken apart is not searched further."""
    try:
        summary = summarize(path, key=key, names=names, optimizer=optimizer)
    except CheckpointError as error:
        issues = _structure(error.path)
        if any(issue.severity == "error" for issue in issues):
            return issues
        raise
    files = summary.checkpoint.files if summary.checkpoint is not None else (summary.path,)
    issues = [issue for file in files for issue in _structure(file)]
    return issues + structure_of(summary) + values_of(summary)


def _structure(path: str) -> list[Issue]:
    """What is wrong or odd in the structure of a safetensors file or a sharded set; nothing for other files."""
    try:
        return structural_issues(path)
    except CheckpointError:
        return []


def _print(issues: list[Issue]) -> None:
    if not issues:
        typer.echo("no issues")
        return
    print_table(("SEVERITY", "WHERE", "WHAT"), [(issue.severity, issue.where, issue.what) for issue in issues])
