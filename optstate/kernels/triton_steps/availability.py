"""Whether Triton's kernels can run on a device, found out without importing Triton."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

__all__ = ["interprets", "is_installed", "why_no_triton"]

INTERPRETER = "TRITON_INTERPRET"
"""Triton's own environment variable: kernels then run in Python, on a CPU, one program after the other."""


@cache
def is_installed() -> bool:
    """Return whether the package triton can be imported."""
    found = find_spec("triton")
    return found is not None and found.origin is not None  # a mere folder of that name has none


def interprets() -> bool:
    """Return whether Triton's interpreter is switched on, which runs the kernels on a CPU, for tests."""
    return os.environ.get(INTERPRETER, "").strip().lower() in ("1", "true", "on", "yes", "y")


def why_no_triton(device: torch.device) -> str:
    """Return why Triton's kernels cannot run on this device, as the end of a sentence; "" if they can."""
    if not is_installed():
        return "the package triton is not installed: pip install 'optstate[triton]'"
    if device.type == "cuda" or (device.type == "cpu" and interprets()):
        return ""
    return f"Triton's kernels run on CUDA devices, not on {device.type}"
