"""What tests change in the examples before they run: they measure less, and train as they do."""

from __future__ import annotations

import importlib
from functools import partialmethod

WINDOWS = 16
"""Stretches of text that a run is validated on, instead of 128, which take longer than the few steps of a test."""


def validate_less() -> None:
    """Let runs of the language model validate on few windows."""
    run = importlib.import_module("lm").Run
    run.validate = partialmethod(run.validate, WINDOWS)
