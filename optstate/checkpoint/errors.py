"""The errors of checkpoint files: a file or an operation on it, and a question that makes no sense of any file."""

from __future__ import annotations

import os

from optstate.text import LONGEST_HINT, LONGEST_REASON, limited, shown

__all__ = ["CheckpointError", "UsageError"]


class UsageError(ValueError):
    """Raised for a wrong use that no checkpoint makes right; exit code 2 of the command line.

    Examples are options that exclude each other, and words that name nothing.
    """


class CheckpointError(Exception):
    """A file that cannot be read or written, or an operation on it that is refused.

    Args:
        path: the file or folder concerned.
        reason: what is wrong, without the path and without a full stop.
        hint: what to do about it, or an empty string.
        refused: True if the file is readable but the operation is not carried out, as overwriting without consent
            (exit code 4 of the command line); False if the file is unreadable or invalid (exit code 3).
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, hint: str = "", refused: bool = False) -> None:
        super().__init__(os.fspath(path), reason, hint, refused)
        self.path: str = os.fspath(path)
        self.reason = reason
        self.hint = hint
        self.refused = refused

    def __str__(self) -> str:
        text = f"{shown(self.path)}: {limited(self.reason, LONGEST_REASON)}"
        return f"{text}; {limited(self.hint, LONGEST_HINT)}" if self.hint else text
