"""Check a checkpoint: its structure, its tensors against its document, and the numbers in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.issues import Issue
from optstate.checkpoint.files.opened_file import reading
from optstate.checkpoint.files.safetensors_check import second_opinion, structural_issues
from optstate.checkpoint.open_checkpoint import refuse_streams
from optstate.checkpoint.operations.summarize import Summary, summarize

__all__ = ["CheckResult", "check"]


@dataclass(frozen=True)
class CheckResult:
    """What was found in a checkpoint: errors, and warnings of what is odd."""

    path: str
    issues: tuple[Issue, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no errors; there may be warnings."""
        return all(issue.severity != "error" for issue in self.issues)


def check(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    names: str | None = None,
    optimizer: str | None = None,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> CheckResult:
    """Check whether a checkpoint can be trusted; read all of its numbers, a few MiB at a time.

    What cannot even be taken apart is not searched further.

    Args:
        path: a file or a folder of any kind that `summarize` takes.
        key: where in the file the state is, as for `open`.
        names: names for numbered parameters, as for `open`.
        optimizer: whose state it is, as for `open`.
        track: what the tensors go through while their numbers are read, such as a progress bar.

    Raises:
        CheckpointError: if it is not a checkpoint that can be checked at all.
    """
    refuse_streams(path)
    with reading():
        try:
            summary = summarize(path, key=key, names=names, optimizer=optimizer)
        except CheckpointError as error:
            result = CheckResult(os.fspath(path), tuple(_structure(error.path)))
            if result.ok:
                raise
            return result
        files = summary.checkpoint.files if summary.checkpoint is not None else (summary.path,)
        issues = [issue for file in files for issue in _structure(file)]
        return CheckResult(os.fspath(path), (*issues, *summary.issues, *_values(summary, track)))


def _structure(path: str) -> list[Issue]:
    """Find what is wrong or odd in the structure of a safetensors file or sharded set; nothing in other files."""
    try:
        issues = structural_issues(path)
    except CheckpointError:
        return []
    return issues + second_opinion(path, issues)


def _values(summary: Summary, track: Callable[[Sequence[Any]], Iterable[Any]]) -> list[Issue]:
    """Find what is wrong with the numbers: reads all data, and imports torch."""
    from optstate.checkpoint.operations.check_values import (
        find_plugged_store_issues,
        find_uneven_means,
        find_value_issues,
    )

    checkpoint = summary.checkpoint
    tensors = track([(row.name, row.stored) for row in summary.rows])
    issues = list(find_value_issues(tensors, checkpoint.document if checkpoint is not None else None))
    if checkpoint is None:
        return issues
    return [*issues, *find_plugged_store_issues(checkpoint), *find_uneven_means(checkpoint)]
