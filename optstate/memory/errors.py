"""The error that an estimate raises for arguments it cannot answer."""

from __future__ import annotations

from optstate.text import escaped

__all__ = ["QuestionError"]


class QuestionError(ValueError):
    """Raised for an impossible argument of an estimate, with one line that says which, why and what would do."""

    def __init__(self, text: str) -> None:
        super().__init__(escaped(" ".join(text.split())))
