"""The errors of estimates: a question that has no answer, and a source that is no model's."""

from __future__ import annotations

import torch

from optstate.text import escaped, shown

__all__ = ["QuestionError", "SourceError", "checked_dtype", "in_words"]

DTYPES = ("bfloat16", "float16", "float32", "float64")


class QuestionError(ValueError):
    """Raised for an impossible argument of an estimate, with one line that says which, why and what would do."""

    def __init__(self, text: str) -> None:
        super().__init__(escaped(" ".join(text.split())))


class SourceError(ValueError):
    """Raised for a source that no model can be made of, with one line that says what, why and what to do.

    Args:
        text: the line.
        usage: whether the argument itself is wrong (an unknown name: exit code 2 of the command line), rather than what
            the argument leads to (an unreadable file, a factory that fails: 3).
    """

    def __init__(self, text: str, usage: bool = False) -> None:
        super().__init__(escaped(text))
        self.usage = usage


def in_words(error: BaseException) -> str:
    """Return type and message of an error on one line, its middle left out if it is long."""
    text = " ".join(str(error).split())
    return shown(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def checked_dtype(name: str) -> torch.dtype:
    """Return the dtype of weights that torch calls so; raise SourceError for another."""
    if name not in DTYPES:
        raise SourceError(f"dtype={name!r} is none for weights: {', '.join(DTYPES)}", usage=True)
    dtype: torch.dtype = getattr(torch, name)
    return dtype
