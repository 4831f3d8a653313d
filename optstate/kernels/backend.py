"""Which backend makes the steps: the one place where that is decided.

eager: operations of PyTorch, one after the other, on any device; the reference that the others are tested against.
native: steps compiled from C, on a CPU.
triton: steps in Triton, on CUDA devices.
"""

from __future__ import annotations

import os

import torch

from optstate.kernels import native
from optstate.kernels.triton_steps import why_no_triton

__all__ = ["BACKENDS", "check_backend", "choose_backend"]

BACKENDS = ("auto", "eager", "native", "triton")

VARIABLE = "OPTSTATE_BACKEND"
"""The environment variable that decides where an optimizer leaves the choice open; read when this is imported."""

CHOSEN_OUTSIDE = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"


def choose_backend(backend: str, device: torch.device) -> tuple[str, str]:
    """Return the backend for parameters on a device, and why it is not a faster one; "" if it is the fastest.

    Args:
        backend: one of `BACKENDS`, as the optimizer was told.
        device: where the parameters are.

    Raises:
        ValueError: if the environment variable holds another word.
    """
    if backend == "auto":
        backend = CHOSEN_OUTSIDE
        if backend not in BACKENDS:
            raise ValueError(f"{VARIABLE}={backend!r} is no backend: give {', '.join(BACKENDS)}, or leave it out")
    if backend == "eager":
        return "eager", "eager was chosen"
    if backend == "auto":
        backend = {"cpu": "native", "cuda": "triton"}.get(device.type, "auto")
    why = _why_not(backend, device)
    return ("eager", why) if why else (backend, "")


def check_backend(backend: str) -> None:
    """Check that a backend can be used here.

    Raises:
        ValueError: if it cannot.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: give one of {', '.join(BACKENDS)}")
    missing = {"native": native.why_missing(), "triton": why_no_triton(torch.device("cuda"))}.get(backend, "")
    if missing:
        raise ValueError(f'backend="{backend}" cannot be used: {missing}; "auto" takes what there is')


def _why_not(backend: str, device: torch.device) -> str:
    """Return why a backend makes no steps on a device; "" if it does."""
    if backend == "triton":
        why = why_no_triton(device)
        return f"no steps in Triton: {why}" if why else ""
    if device.type != "cpu":
        return f"no compiled steps for {device.type}"
    missing = native.why_missing()
    return f"no compiled steps: {missing}" if missing else ""
