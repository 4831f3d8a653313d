"""What is wrong with a file, gathered from the library's checks."""

from __future__ import annotations

from optstate.checkpoint.consistency import inconsistencies
from optstate.checkpoint.container import Issue
from optstate.checkpoint.summary import Summary

__all__ = ["structure_of", "values_of"]


def structure_of(summary: Summary) -> list[Issue]:
    """What headers alone tell, for a file that has been summed up."""
    if summary.document is None:
        return []
    return inconsistencies(summary.headers[0], summary.document)


def values_of(summary: Summary) -> list[Issue]:
    """What the numbers tell: reads all data, and imports torch."""
    from optstate.checkpoint.health import value_issues

    return [issue for header in summary.headers for issue in value_issues(header, summary.document)]
