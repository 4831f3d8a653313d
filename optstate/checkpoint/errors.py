"""The one error of checkpoint files, and how text from a file is shown to a person."""

from __future__ import annotations

import os
from unicodedata import category

__all__ = ["CheckpointError", "escaped", "has_controls", "shown"]

LONGEST = 200  # characters of one name or path in a message
LONGEST_REASON, LONGEST_HINT = 500, 250
CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")


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
        text = f"{shown(self.path)}: {_limited(self.reason, LONGEST_REASON)}"
        return f"{text}; {_limited(self.hint, LONGEST_HINT)}" if self.hint else text


def has_controls(text: str) -> bool:
    """Whether a name has characters that no name needs and that change what is shown around it.

    These are control and formatting characters, halves of surrogate pairs, and separators of lines and paragraphs.
    """
    return not text.isprintable() and any(category(c) in CONTROLS for c in text)


def escaped(text: str) -> str:
    """`text` on one line, without the control, formatting and surrogate characters that would reach a terminal.

    A tensor may be called "\\x1b[31mred\\n" in a file that every reader accepts; "\\u202e" reverses what follows.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(text: str) -> str:
    """`text` escaped and, if it is very long, with its middle left out."""
    return _limited(text, LONGEST)


def _limited(text: str, most: int) -> str:
    """`text` escaped in at most about `most` characters, which escapes may make of fewer."""
    return _shortened(escaped(_shortened(text, most)), most)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}...{text[len(text) - most // 2 :]}"
