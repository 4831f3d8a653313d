"""Which backend makes the steps: the one place where that is decided.

eager: operations of PyTorch, one after the other, on any device; the reference that the others are tested against.
native: steps compiled from C, on a CPU.
triton: steps in Triton, on CUDA devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar, cast

import torch

from optstate.kernels import native
from optstate.kernels.triton_steps import why_no_triton

__all__ = ["BACKENDS", "check_backend", "choose_backend", "compiled_functions", "run_with_loops"]

T = TypeVar("T")

BACKENDS = ("auto", "eager", "native", "triton")

VARIABLE = "OPTSTATE_BACKEND"
"""The environment variable that decides where an optimizer leaves the choice open; read when this is imported."""

CHOSEN_OUTSIDE = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"


_CHOSEN: ContextVar[str] = ContextVar("_CHOSEN", default="auto")
"""The backend of the loops of the step at hand."""


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


def compiled_functions() -> Mapping[str, Callable[..., Any]] | None:
    """Return the compiled functions if the loops of the step at hand are theirs on a CPU; None if they are eager."""
    return _functions_of(_CHOSEN.get())


@cache
def _functions_of(backend: str) -> Mapping[str, Callable[..., Any]] | None:
    """Return the compiled functions if a backend uses them; found once, as every call counts in a small step."""
    chosen, _ = choose_backend(backend, torch.device("cpu"))
    return native.opened()[0] if chosen == "native" else None


def run_with_loops(backend: str, requests: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
    """Run a computation that asks for sums, with the loops of a backend; what runs in between is not concerned."""
    reply = None
    while True:
        token = _CHOSEN.set(backend)
        try:
            request = requests.send(reply)
        except StopIteration as stop:
            return cast(T, stop.value)
        finally:
            _CHOSEN.reset(token)
        reply = yield request


def _why_not(backend: str, device: torch.device) -> str:
    """Return why a backend makes no steps on a device; "" if it does."""
    if backend == "triton":
        why = why_no_triton(device)
        return f"no steps in Triton: {why}" if why else ""
    if device.type != "cpu":
        return f"no compiled steps for {device.type}"
    missing = native.why_missing()
    return f"no compiled steps: {missing}" if missing else ""
