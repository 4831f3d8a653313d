"""Findings about a file, and where a reader puts them: the first one may end the reading, or all are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from optstate.checkpoint.errors import CheckpointError

__all__ = ["Issue", "IssueLog", "raising"]


@dataclass(frozen=True, slots=True)
class Issue:
    """One finding: `severity` is "error" (no reader should accept the file) or "warning" (valid but odd)."""

    severity: str
    where: str
    what: str


class IssueLog:
    """Where a reader puts its findings: `add` may raise, to stop at once, or keep the issue, to find more."""

    def __init__(self, add: Callable[[Issue], None], within: str = "") -> None:
        self._add = add
        self._within = within

    def error(self, where: str, what: str) -> None:
        """Add a defect for which no reader should accept the file."""
        self._add(Issue("error", self._within + where, what))

    def warning(self, where: str, what: str) -> None:
        """Add an oddity of a valid file."""
        self._add(Issue("warning", self._within + where, what))

    def repeat(self, issues: Iterable[Issue]) -> None:
        """Add issues that were found before."""
        for issue in issues:
            self._add(replace(issue, where=self._within + issue.where))

    def noted(self, issues: list[Issue]) -> IssueLog:
        """Return the same log, which appends its issues to a list, too."""

        def add(issue: Issue) -> None:
            issues.append(issue)
            self.repeat([issue])

        return IssueLog(add)

    def within(self, where: str) -> IssueLog:
        """Return a log for the parts of `where`, which puts that before the place of each issue."""
        return IssueLog(self._add, f"{self._within}{where}, ")


def raising(path: str | os.PathLike[str]) -> IssueLog:
    """Return a log that raises CheckpointError at the first error and passes over warnings."""

    def add(issue: Issue) -> None:
        if issue.severity == "error":
            raise CheckpointError(path, f"{issue.where}: {issue.what}")

    return IssueLog(add)
