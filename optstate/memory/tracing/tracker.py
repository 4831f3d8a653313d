"""Track every storage that operators make: when it is alive, its kind, and where in the program it was made."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward as _run_backward
from torch.utils._python_dispatch import TorchDispatchMode

from optstate.memory.model import KINDS, Alive
from optstate.memory.tracing.fakes import HOME, refuse_mixture

__all__ = ["Event", "Moment", "Timeline", "TrackedStorage", "Tracker"]


@dataclass(eq=False, slots=True)
class TrackedStorage:
    """A piece of memory that tensors share.

    Attributes:
        what: the operator that made the storage, or the name of its owner.
        kind: one of `KINDS`.
        shape, dtype: of the first tensor that was seen; torch's name of the dtype.
        nbytes: size of the storage, rounded up.
        place: where the program was when the storage was made.
        terms: storages of the same size whose sum the storage holds.
        over: the term that the sum is written over if nobody else holds it.
    """

    what: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    place: str
    terms: tuple[TrackedStorage, ...] = ()
    over: TrackedStorage | None = None


WRAPPERS = ("torch._compile", "torch._dynamo.eval_frame")
"""Modules of the functions that PyTorch puts around those of a mode."""

Event = tuple[TrackedStorage, bool]
"""A storage, and whether it is made (True) or freed (False)."""


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that notes every storage made and freed while it is active, of tensors on any device.

    Storages are watched by weak references, so views, saved tensors and gradients that autograd holds keep their
    storages alive here exactly as in memory. Memory that operators use inside themselves is not seen.

    While a mode like this one is active, autograd adds up gradients out of place; without one, autograd writes the sum
    over the first gradient if nobody else holds it. These sums count as if they were in place.

    Args:
        where: called for each new storage, returns the place in the program and the kind of the storage; `belongs`
            corrects the kind if it turns out to be wrong later.
        rounding: bytes of a storage are rounded up to a multiple of this number; CUDA's allocator has 512.
    """

    def __init__(self, where: Callable[[], tuple[str, str]], rounding: int = 512) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.last_operator: Any = None
        self.failed_in = ""
        """The place where an operator raised."""
        self.where = where
        self._rounding = rounding
        self._live: dict[int, tuple[TrackedStorage, weakref.ref[torch.UntypedStorage]]] = {}

    def seed(self, tensor: Tensor, kind: str, what: str) -> None:
        """Count a tensor that exists already."""
        self._note(tensor, kind, what, "")

    def belongs(self, tensor: Tensor, kind: str, what: str) -> None:
        """Correct whose a tensor's storage is, once that turns out, and the storages that it is a sum of."""
        found = self._live.get(tensor.untyped_storage()._cdata)
        if found is None:
            self.seed(tensor, kind, what)
            return
        waiting = [found[0]]
        while waiting:
            storage = waiting.pop()
            storage.kind, storage.what = kind, what
            waiting.extend(storage.terms)
            storage.terms = ()

    def restart(self) -> None:
        """Forget the past: storages alive now count as there from the beginning."""
        self.events = [(storage, True) for storage, _ in self._live.values()]
        for storage, _ in self._live.values():
            storage.place = ""

    def add_moment(self, storages: Iterable[TrackedStorage]) -> None:
        """Count storages that were alive together for a moment."""
        storages = list(storages)
        self.events += [(storage, True) for storage in storages]
        self.events += [(storage, False) for storage in storages]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "prim":  # questions such as which device a tensor is on: more than half of all calls
            return func(*args, **(kwargs or {}))
        self.last_operator = func
        try:
            refuse_mixture(func, args)
            result = func(*args, **(kwargs or {}))
        except BaseException:
            self.failed_in = self.where()[0]
            raise
        if isinstance(result, Tensor):
            self._see(result, func, args)
        elif isinstance(result, tuple | list):
            for item in result:
                if isinstance(item, Tensor):
                    self._see(item, func, args)
                elif isinstance(item, tuple | list):
                    for part in item:
                        if isinstance(part, Tensor):
                            self._see(part, func, args)
        return result

    def _see(self, tensor: Tensor, func: Any, args: tuple[Any, ...]) -> None:
        if tensor.untyped_storage()._cdata in self._live:
            return
        device: torch.device = getattr(tensor, "fake_device", HOME)
        if device.type not in (HOME.type, "meta"):
            raise RuntimeError(f"{func} makes a tensor on {device}, but all tensors are to be on one device")
        place, kind = self.where()
        storage = self._note(tensor, kind, str(func), place)
        if storage is not None and func is torch.ops.aten.add.Tensor and _called_by_autograd():
            storage.terms = tuple(self._terms(args, storage.nbytes))
            first = args[0]  # of a view, autograd holds what it is a view of
            storage.over = storage.terms[0] if len(storage.terms) == 2 and not first._is_view() else None

    def _terms(self, args: tuple[Any, ...], nbytes: int) -> Iterable[TrackedStorage]:
        """Yield the terms of a sum that are whole storages of its size."""
        for arg in args:
            found = self._live.get(arg.untyped_storage()._cdata) if isinstance(arg, Tensor) else None
            if found is not None and found[0].nbytes == nbytes:
                yield found[0]

    def _note(self, tensor: Tensor, kind: str, what: str, place: str) -> TrackedStorage | None:
        memory = tensor.untyped_storage()
        key, nbytes = memory._cdata, memory.nbytes()
        if key in self._live or not nbytes:
            return None
        nbytes = -(-nbytes // self._rounding) * self._rounding
        storage = TrackedStorage(
            what, kind, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), nbytes, place
        )

        def freed(_: object) -> None:
            del self._live[key]
            last, made = self.events[-1]
            in_place = made and last.over is storage  # freed by the sum that takes its place
            self.events.insert(len(self.events) - in_place, (storage, False))

        self._live[key] = (storage, weakref.ref(memory, freed))
        self.events.append((storage, True))
        return storage


def _called_by_autograd() -> bool:
    """Return whether autograd's engine itself called the operator at hand, with no Python code in between."""
    frame = sys._getframe(3)
    while frame.f_globals.get("__name__") in WRAPPERS and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code is _run_backward.__code__


@dataclass(frozen=True)
class Moment:
    """The fullest moment of a place.

    Attributes:
        total: bytes alive.
        kinds: bytes alive by kind, in the order of `KINDS`.
        most: the most bytes of each kind at any moment of the place.
        index: of the event.
    """

    total: int
    kinds: tuple[int, ...]
    most: tuple[int, ...]
    index: int


class Timeline:
    """The memory alive at each moment, replayed from the events of a tracker."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events
        self.moments = self._replay()
        """The fullest moment of each place at which a storage was made."""

    def _replay(self) -> dict[str, Moment]:
        number = {kind: i for i, kind in enumerate(KINDS)}
        now = [0] * len(KINDS)
        fullest: dict[str, tuple[int, tuple[int, ...], int]] = {}
        most: dict[str, list[int]] = {}
        total = 0
        for index, (storage, made) in enumerate(self._events):
            kind, nbytes, place = number[storage.kind], storage.nbytes, storage.place
            if not made:
                total -= nbytes
                now[kind] -= nbytes
                continue
            total += nbytes
            now[kind] += nbytes
            if place not in fullest:
                fullest[place], most[place] = (total, tuple(now), index), list(now)
            elif total > fullest[place][0]:
                fullest[place] = (total, tuple(now), index)
            most[place][kind] = max(most[place][kind], now[kind])
        return {place: Moment(total, kinds, tuple(most[place]), i) for place, (total, kinds, i) in fullest.items()}

    def alive(self, index: int) -> tuple[Alive, ...]:
        """Return what was alive after an event, the largest first."""
        living: dict[int, TrackedStorage] = {}
        for storage, made in self._events[: index + 1]:
            if made:
                living[id(storage)] = storage
            else:
                del living[id(storage)]
        largest = sorted(living.values(), key=lambda storage: -storage.nbytes)
        return tuple(Alive(s.what, s.kind, s.shape, s.dtype, s.nbytes) for s in largest)
