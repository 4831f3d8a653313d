"""What a law is, and how a part that breaks one is named in a line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["BrokenLawError", "Law", "LawError", "at", "enforce", "expect", "expect_close", "expect_same", "one_line"]

T = TypeVar("T")


class LawError(AssertionError):
    """A part breaks a law of the library. The message is one line.

    law: its name. part: the part in words. what: what was found. where: the shape, dtype or setting. why: what goes
    wrong in a training run.
    """

    def __init__(self, law: str, part: str, what: str, where: str, why: str) -> None:
        self.law, self.part, self.what, self.where, self.why = law, part, what, where, why
        place = f" [{where}]" if where else ""
        super().__init__(f"{part} breaks the law {law!r}: {what}{place}; {why}")


class BrokenLawError(Exception):
    """Raised inside of a law: what was found, and where."""

    def __init__(self, what: str, where: str = "") -> None:
        self.what, self.where = what, where
        super().__init__(what)


@dataclass(frozen=True)
class Law(Generic[T]):
    """One law. why: what goes wrong where it is broken. holds: raises BrokenLawError, or anything, if it is."""

    name: str
    why: str
    holds: Callable[[T], None]


def enforce(laws: Sequence[Law[T]], part: T, words: str, named: Collection[str] | None) -> None:
    """Raise LawError for the first law that a part breaks; of those named, None for all.

    Raises:
        ValueError: for a name that no law has.
    """
    known = [law.name for law in laws]
    if unknown := sorted(set(named or ()) - set(known)):
        raise ValueError(f"no law is called {unknown[0]!r}: there are {', '.join(known)}")
    for law in laws:
        if named is not None and law.name not in named:
            continue
        try:
            law.holds(part)
        except BrokenLawError as broken:
            raise LawError(law.name, words, broken.what, broken.where, law.why) from broken.__cause__
        except Exception as error:
            raise LawError(law.name, words, one_line(error), "", law.why) from error


@contextmanager
def at(shape: Sequence[int], dtype: torch.dtype | None = None, *more: str) -> Iterator[None]:
    """Say of what breaks inside where that was."""
    sizes = "x".join(map(str, shape)) or "0-d"
    where = ", ".join([f"shape {sizes}", *([str(dtype)] if dtype else []), *more])
    try:
        yield
    except BrokenLawError as broken:
        broken.where = broken.where or where
        raise
    except Exception as error:
        raise BrokenLawError(one_line(error), where) from error


def one_line(error: BaseException) -> str:
    """Return the class and the message of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def expect(condition: bool, what: str) -> None:
    """Raise BrokenLawError unless the condition holds."""
    if not condition:
        raise BrokenLawError(what)


def expect_same(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raise BrokenLawError unless two tensors agree in shape, dtype and every bit; NaN equals NaN."""
    expect(found.shape == wanted.shape, f"{what}: shape {list(found.shape)} instead of {list(wanted.shape)}")
    expect(found.dtype == wanted.dtype, f"{what}: {found.dtype} instead of {wanted.dtype}")
    if found.dtype.is_floating_point and found.dtype.itemsize == 1:
        found, wanted = found.view(torch.uint8), wanted.view(torch.uint8)
    differ = (found != wanted) & ~((found != found) & (wanted != wanted))
    expect(not bool(differ.any()), f"{what}: {int(differ.sum())} of {differ.numel()} elements differ")


def expect_close(found: Tensor, wanted: Tensor, what: str, tolerance: float) -> None:
    """Raise BrokenLawError unless the largest difference is small beside the largest of the wanted numbers."""
    expect(found.shape == wanted.shape, f"{what}: shape {list(found.shape)} instead of {list(wanted.shape)}")
    if not found.numel():
        return
    largest = float(wanted.double().abs().max())
    error = float((found.double() - wanted.double()).abs().max())
    expect(error <= tolerance * max(largest, 1e-30), f"{what}: off by {error:.3g} where the largest is {largest:.3g}")
