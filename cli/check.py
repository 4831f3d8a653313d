"""`optstate check`: whether a file of optimizer state can be trusted."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from optstate.checkpoint.container import Issue, structural_issues
from optstate.checkpoint.summary import summarize

from .findings import structure_of, values_of
from .output import FINDINGS, JSON, failing, print_json, print_table

SCHEMA = "optstate.check/1"


def check(
    path: Annotated[Path, typer.Argument(help="A safetensors file, a *.index.json, or the folder of one.")],
    as_json: JSON = False,
) -> None:
    """Check a file: its structure, its tensors against what it says of them, and the numbers in them.

    Exit code 0: no errors, warnings at most. 1: errors. 3: not a file that can be checked at all.
    """
    with failing():
        issues = _issues(path)
        errors = [issue for issue in issues if issue.severity == "error"]
        if as_json:
            print_json({"schema": SCHEMA, "path": str(path), "ok": not errors, "issues": [asdict(i) for i in issues]})
        else:
            _print(issues)
        if errors:
            raise typer.Exit(FINDINGS)


def _issues(path: Path) -> list[Issue]:
    """Everything found. What cannot even be taken apart is not searched further."""
    issues = structural_issues(path)
    if any(issue.severity == "error" for issue in issues):
        return issues
    summary = summarize(path)
    issues += structure_of(summary)
    return issues + values_of(summary)


def _print(issues: list[Issue]) -> None:
    if not issues:
        typer.echo("no issues")
        return
    print_table(("SEVERITY", "WHERE", "WHAT"), [(issue.severity, issue.where, issue.what) for issue in issues])
