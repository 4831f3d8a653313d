"""Checkpoints of optimizer state: open, summarize, check, compare, convert, save, load.

These are plain functions; `open`, `summarize`, `check`, `compare` and `convert` take a file or folder of any library.
Importing this package does not import torch: a tool that only looks into a file starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from optstate.checkpoint.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from optstate.checkpoint.live.load import load
    from optstate.checkpoint.live.save import save
    from optstate.checkpoint.open_checkpoint import open_checkpoint as open
    from optstate.checkpoint.operations.check import check
    from optstate.checkpoint.operations.compare import compare
    from optstate.checkpoint.operations.convert import convert
    from optstate.checkpoint.operations.summarize import summarize

__all__ = [
    "CheckpointError",
    "UsageError",
    "check",
    "compare",
    "convert",
    "load",
    "open",
    "save",
    "summarize",
]

_HOMES = {
    "check": ("operations.check", "check"),
    "compare": ("operations.compare", "compare"),
    "convert": ("operations.convert", "convert"),
    "load": ("live.load", "load"),
    "open": ("open_checkpoint", "open_checkpoint"),
    "save": ("live.save", "save"),
    "summarize": ("operations.summarize", "summarize"),
}

if not TYPE_CHECKING:

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'optstate.checkpoint' has no attribute {name!r}")
        module, attribute = _HOMES[name]
        value = globals()[name] = getattr(import_module(f"optstate.checkpoint.{module}"), attribute)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
