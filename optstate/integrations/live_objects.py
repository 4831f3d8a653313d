"""Find living objects of a class that nothing leads to, and import a module without keeping the caller's alive."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, ParamSpec, TypeVar

__all__ = ["family_of", "import_apart", "instances_of", "without_compiler"]


P = ParamSpec("P")
T = TypeVar("T")


def instances_of(*kinds: type) -> list[Any]:
    """Return the objects of these classes and their subclasses that are alive now, in some tens of milliseconds.

    An object refers to its class, so the collector finds it among what refers to the class. A list of all objects is
    no way: it would hold what other threads are just building, and CPython raises a SystemError in a thread whose
    half-built tuple somebody else holds.
    """
    family = {each for kind in kinds for each in family_of(kind)}
    return [item for item in gc.get_referrers(*family) if type(item) in family]


def import_apart(name: str) -> None:
    """Import a module in a thread of its own, if it is not imported yet.

    PyTorch imports `torch._dynamo` when the first optimizer of a process is built. That import leaves a circle that
    holds the frames of its callers, so their optimizer and model would stay alive until the collector of circles runs:
    a fused optimizer that was deleted would go on training. In a thread of its own the import has no such callers.
    """
    if name not in sys.modules:
        thread = threading.Thread(target=importlib.import_module, args=(name,))
        thread.start()
        thread.join()


def without_compiler(method: Callable[P, T]) -> Callable[P, T]:
    """Return a bound method of torch's optimizer without its guard, as long as nobody has imported `torch._dynamo`.

    The guard keeps the compiler out of the method, and imports the compiler for that.
    """
    plain = getattr(method, "__wrapped__", None)
    if plain is None or "torch._dynamo" in sys.modules:
        return method
    return MethodType(plain, method.__self__)  # type: ignore[attr-defined]


def family_of(kind: type) -> Iterator[type]:
    """Yield a class and all classes derived from it, some of them several times."""
    yield kind
    derived: type
    for derived in type.__subclasses__(kind):
        yield from family_of(derived)
