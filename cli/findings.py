"""What is wrong with a checkpoint, gathered from the library's checks."""

from __future__ import annotations

from optstate.checkpoint.document.contradictions import inconsistencies
from optstate.checkpoint.document.rules import rule_issues
from optstate.checkpoint.files.issues import Issue
from optstate.checkpoint.operations.summarize import Summary

from .output import progress

__all__ = ["structure_of", "values_of"]


def structure_of(summary: Summary) -> list[Issue]:
    """What names, shapes and dtypes alone tell."""
    if summary.checkpoint is None:
        return []
    return [*inconsistencies(summary.checkpoint), *rule_issues(summary.checkpoint.document)]


def values_of(summary: Summary) -> list[Issue]:
    """What the numbers tell: reads all data, and imports torch."""
    from optstate.checkpoint.operations.check_values import uneven_means, value_issues

    checkpoint = summary.checkpoint
    tensors = progress([(row.name, row.stored) for row in summary.rows], len(summary.rows), "tensors")
    issues = list(value_issues(tensors, checkpoint.document if checkpoint is not None else None))
    return issues if checkpoint is None else [*issues, *uneven_means(checkpoint)]
