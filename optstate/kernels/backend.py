"""Which backend makes the steps: the one place where that is decided.

eager: operations of PyTorch, one after the other, on any device; the reference that the others are tested against.
native: steps compiled from C, on a CPU.
triton: steps in Triton, on CUDA devices.
bitsandbytes: its kernels for moments in its own 8-bit blocks, where it is installed; never taken unless asked for.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar, cast

import torch

from optstate.kernels import native
from optstate.kernels.bitsandbytes_blocks import why_no_bitsandbytes
from optstate.kernels.triton_steps import why_no_triton

__all__ = [
    "BACKENDS",
    "asked_in_words",
    "check_backend",
    "choose_backend",
    "compiled_functions",
    "fastest_backend",
    "named_backend",
    "require_device",
    "run_with_loops",
    "warn_if_slow",
]

T = TypeVar("T")

BACKENDS = ("auto", "eager", "native", "triton", "bitsandbytes")

VARIABLE = "OPTSTATE_BACKEND"
"""The environment variable that decides where an optimizer leaves the choice open; read when this is imported."""

CHOSEN_OUTSIDE = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"

_WARNED: set[str] = set()
"""Types of devices of which this process has said that the steps there are slow."""


def named_backend(backend: str) -> str:
    """Return the backend that was asked for by name, by the optimizer or else by the environment; "auto" if none was.

    Raises:
        ValueError: if the environment variable holds another word.
    """
    if backend != "auto":
        return backend
    if CHOSEN_OUTSIDE not in BACKENDS:
        raise ValueError(f"{VARIABLE}={CHOSEN_OUTSIDE!r} is no backend: give {', '.join(BACKENDS)}, or leave it out")
    return CHOSEN_OUTSIDE


def fastest_backend(device: torch.device) -> str:
    """Return the backend that "auto" wants on a device, which may not be installed."""
    return "triton" if device.type == "cuda" else "native"


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
    backend = named_backend(backend)
    if backend == "eager":
        return "eager", "eager was chosen"
    if backend == "auto":
        backend = fastest_backend(device)
    why = _why_not(backend, device)
    return ("eager", why) if why else (backend, "")


def check_backend(backend: str) -> None:
    """Check that a backend can be used here.

    Raises:
        ValueError: if it cannot.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: give one of {', '.join(BACKENDS)}")
    missing = _why_missing(backend)
    if missing:
        raise ValueError(_refusal(backend, missing))


def require_device(backend: str, device: torch.device) -> None:
    """Check that a backend that was asked for by name makes steps on a device; "auto" always does.

    Raises:
        ValueError: if it does not, or if the environment variable holds another word.
    """
    named = named_backend(backend)
    why = "" if named in ("auto", "eager") else _why_missing(named) or _why_not(named, device)
    if why:
        raise ValueError(_refusal(backend, why))


def asked_in_words(backend: str) -> str:
    """Return how a backend was asked for: by the optimizer, or by the environment variable."""
    return f"{VARIABLE}={CHOSEN_OUTSIDE}" if backend == "auto" else f'backend="{backend}"'


def warn_if_slow(device: torch.device) -> None:
    """Warn once in a process where nobody chose a backend and the fast one for a kind of device is not installed.

    Raises:
        ValueError: if the environment variable holds another word.
    """
    if device.type in _WARNED or device.type not in _WHAT or named_backend("auto") != "auto":
        return
    why = _why_missing(fastest_backend(device))
    if why:
        _WARNED.add(device.type)
        what, get = _WHAT[device.type]
        warnings.warn(
            f"optstate makes the steps of parameters on {device.type} with PyTorch's operations, several times as "
            f"slowly as it could: {what} {why}; {get}. {VARIABLE}=eager says that this is meant and is silent",
            stacklevel=_level_of_caller(),
        )


_WHAT = {
    "cpu": (
        "the library of compiled steps cannot be used, as",
        "to get them install a C compiler, then optstate again (pip install --force-reinstall --no-deps)",
    ),
    "cuda": ("the steps in Triton cannot be used, as", "that brings them"),
}
"""For each type of device that may be slow for want of a package: what is missing, and how to get it."""


def _level_of_caller() -> int:
    """Return how many calls up the caller of this function was called by somebody else's code, which builds."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and (
        frame.f_globals.get("__name__", "").partition(".")[0] == "optstate" or frame.f_code.co_name == "__init__"
    ):
        frame, level = frame.f_back, level + 1
    return level


def _refusal(backend: str, why: str) -> str:
    return f'{asked_in_words(backend)} cannot be used: {why}; "auto" takes what there is'


def _why_missing(backend: str) -> str:
    """Return why a backend cannot be used on any device here; "" if it can on some."""
    match backend:
        case "native":
            return native.why_missing()
        case "triton":
            return why_no_triton(torch.device("cuda"))
        case "bitsandbytes":
            return why_no_bitsandbytes()
    return ""


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
    if backend == "bitsandbytes":
        return why_no_bitsandbytes(device)
    if backend == "triton":
        why = why_no_triton(device)
        return f"no steps in Triton: {why}" if why else ""
    if device.type != "cpu":
        return f"no compiled steps for {device.type}"
    missing = native.why_missing()
    return f"no compiled steps: {missing}" if missing else ""
