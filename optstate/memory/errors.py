"""The error of questions that have no answer."""

from __future__ import annotations

from optstate.text import escaped

__all__ = ["QuestionError"]


class QuestionError(ValueError):
    """An argument of an estimate that cannot be: one line that says which, why and what would do."""

    def __init__(self, text: str) -> None:
        super().__init__(escaped(" ".join(text.split())))
