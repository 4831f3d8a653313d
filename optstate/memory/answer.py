"""The answer of `optstate.estimate`: figures that print and draw themselves, and the question they answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from optstate.memory import report
from optstate.memory.question import Question
from optstate.memory.result import Result

__all__ = ["Estimate"]


@dataclass(frozen=True)
class Estimate(Result):
    """The answer of `optstate.estimate`; `print` shows a table, `optstate.memory.solve` searches for what would fit.

    Attributes:
        question: what was asked; None in an answer that was put together by hand. Others: see `Result`.
    """

    question: Question | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return report.text(self)

    def plot(self, path: str | Path) -> None:
        """Draw the memory of each recipe, part by part, and that of the GPU as a line; needs matplotlib."""
        report.plot(self, path)
