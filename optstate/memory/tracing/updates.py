"""Updates under a tracker: the real one for one parameter of each class, its memory counted for the others."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from torch import Tensor

from optstate.kernels import Scalar
from optstate.memory.tracing.position import Position
from optstate.memory.tracing.tracker import Event, TrackedStorage, Tracker
from optstate.optimizer.optimizer import Optimizer
from optstate.optimizer.parameters import Leaf
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.step_runner import UpdateOne

__all__ = ["Known", "follow_updates"]

Known = dict[Hashable, tuple[TrackedStorage, ...]]
"""The storages alive at the fullest moment of an update, by class of parameters."""


def follow_updates(optimizer: Optimizer, tracker: Tracker, position: Position, known: Known) -> None:
    """Track the optimizer's updates from now on, and make each update once for parameters that are alike.

    Parameters with the same shapes, dtypes, strides, chain, stores, way of writing and group are alike: the memory of
    an update depends on nothing else. An update that leaves something behind is made for every parameter.
    """

    def around(update: UpdateOne, leaf: Leaf, param: Tensor, grad_scale: Scalar) -> None:
        grad, plan, state = param.grad, leaf.plan, optimizer.state[param]
        if grad is not None:
            tracker.belongs(grad, "gradients", plan.spec.name)
        with position.during("update", plan.spec.name):
            place, _ = position.where()
            alike = (*_class_of(plan, param, grad), leaf.group, type(grad_scale))
            if alike in known:
                tracker.add_moment(replace(storage, place=place) for storage in known[alike])
                state["step"] += 1
                return
            first = len(tracker.events)
            update(leaf, param, grad_scale)
            fullest = _fullest(tracker.events[first:])
            if fullest is not None:
                known[alike] = fullest

    optimizer.runner.around = around


def _class_of(plan: ParamPlan, param: Tensor, grad: Tensor | None) -> tuple[Any, ...]:
    of_grad = None if grad is None else (grad.dtype, grad.stride())
    stores = tuple((name, slot.store) for name, slot in plan.slots.items())
    spec = replace(plan.spec, name="")
    return spec, param.stride(), of_grad, plan.chain, stores, plan.weights


def _fullest(events: list[Event]) -> tuple[TrackedStorage, ...] | None:
    """Return what of these events was alive at the fullest moment; None if they free others' or leave something."""
    alive: dict[int, TrackedStorage] = {}
    fullest: tuple[TrackedStorage, ...] = ()
    total = most = 0
    for storage, made in events:
        if made:
            alive[id(storage)] = storage
            total += storage.nbytes
            if total > most:
                most, fullest = total, tuple(alive.values())
        elif id(storage) in alive:
            del alive[id(storage)]
            total -= storage.nbytes
        else:
            return None
    return fullest if not alive else None
