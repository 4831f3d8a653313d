"""Extrapolate the trace of a model with many identical layers from traces with a few layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from optstate.memory.model import KINDS, Model, Setting, Trace
from optstate.memory.tracing.position import phase_of
from optstate.memory.tracing.trace import Seen, choose_largest, observe, trace
from optstate.memory.tracing.tracker import Moment
from optstate.memory.tracing.updates import Known
from optstate.optimizer.optimizer import Optimizer

__all__ = ["trace_model"]

SHALLOW = (3, 4, 5)
"""Numbers of layers that are traced. The first, the last and those between differ, so there are at least three; two
traces give a line, and the third checks it."""


class Place(NamedTuple):
    """A place of a step that models of any depth have.

    The place's name is `before`, the number of the layer, then `after`.

    Attributes:
        layer: counted from the first from 0 on, or negative from the last; None outside of layers.
    """

    before: str
    layer: int | None = None
    after: str = ""

    def name(self, layers: int) -> str:
        """Return the name in a model of so many layers."""
        return self.before if self.layer is None else f"{self.before}{self.layer % layers}{self.after}"


Places = Mapping[Place, Moment]


def trace_model(
    model: Model,
    recipe: Callable[[Iterable[Any]], Optimizer],
    setting: Setting,
    *,
    exact: bool = False,
    device: str = "cuda",
) -> tuple[Trace, str]:
    """Trace a step of the whole model, or extrapolate it from shallow models if the model has more than 5 layers.

    With each layer more, the memory alive at a place of the step grows by the same bytes. Every place has its own rate,
    and the place of the peak may change with depth, so every place is extrapolated and the largest one taken. Along
    the layers, too, the memory changes by equal steps, but for the first and the last: the first two and the last two
    layers therefore hold the largest. A third trace checks all this at every place, to the byte; where the check fails,
    or with `exact`, the whole model is traced.

    Returns:
        The trace, and in words how it was made.

    Raises:
        UntraceableError: as `trace`.
    """
    if exact or model.layers is None or model.layers <= SHALLOW[-1]:
        return trace(model, recipe, setting, device=device), "traced in full"
    known: Known = {}
    seen = [observe(model, recipe, setting, layers=count, device=device, known=known) for count in SHALLOW]
    reason = _irregular(seen)
    if reason:
        return trace(model, recipe, setting, device=device), f"traced in full, because {reason}"
    shallow, deeper, deepest = (_places(one, count) for one, count in zip(seen, SHALLOW, strict=True))
    more = model.layers - SHALLOW[0]
    deep = {place: _along(shallow[place], deeper[place], more) for place in shallow}
    peak = max(deep, key=lambda place: deep[place].total)
    most = [max(moment.most[i] for moment in deep.values()) for i in range(len(KINDS))]
    result = Trace(
        peak=deep[peak].total,
        at_peak=dict(zip(KINDS, deep[peak].kinds, strict=True)),
        phase=phase_of(peak.name(model.layers)),
        alive=choose_largest(seen[-1].timeline.alive(deepest[peak].index)),
        most=dict(zip(KINDS, most, strict=True)),
        notes=seen[-1].notes,
    )
    counts = f"{', '.join(map(str, SHALLOW[:-1]))} and {SHALLOW[-1]}"
    return result, f"traced with {counts} layers, extrapolated to {model.layers}"


def _irregular(seen: list[Seen]) -> str:
    """Return in words why the traces do not extrapolate; "" if they do."""
    shallow, deeper, deepest = (_places(one, count) for one, count in zip(seen, SHALLOW, strict=True))
    if not seen[-1].stacks or not shallow.keys() == deeper.keys() == deepest.keys():
        return "its layers could not be told apart"
    for place in shallow:
        if _numbers(_along(shallow[place], deeper[place], 2)) != _numbers(deepest[place]):
            return f"layers add different numbers of bytes at {phase_of(place.name(SHALLOW[-1]))}"
    inner = _places(seen[-1], SHALLOW[-1], near=SHALLOW[-1] - 1)
    for place in inner:
        layers = [inner.get(place._replace(layer=number)) for number in (1, 2, 3)]
        if place.layer == 1 and None not in layers:
            first, middle, last = (_numbers(moment) for moment in layers if moment is not None)
            if any(a + c != 2 * b for a, b, c in zip(first, middle, last, strict=True)):
                return f"layers differ at {phase_of(place.name(SHALLOW[-1]))}"
    return ""


def _along(one: Moment, next_one: Moment, steps: int) -> Moment:
    """Return the moment that is `steps` steps away from `one`, on a line through `one` and the next moment."""

    def line(a: int, b: int) -> int:
        return a + steps * (b - a)

    return Moment(
        line(one.total, next_one.total),
        tuple(map(line, one.kinds, next_one.kinds)),
        tuple(map(line, one.most, next_one.most)),
        index=-1,
    )


def _numbers(moment: Moment) -> tuple[int, ...]:
    return (moment.total, *moment.kinds, *moment.most)


def _places(seen: Seen, layers: int, near: int = 2) -> dict[Place, Moment]:
    """Return the fullest moments of a trace, of layers those of the first few and of the last two."""
    found: dict[Place, Moment] = {}
    for name, moment in seen.timeline.moments.items():
        place = _place(name, seen.stacks)
        if place.layer is None:
            found[place] = moment
            continue
        if place.layer < near:
            found[place] = moment
        if place.layer >= layers - 2:
            found[place._replace(layer=place.layer - layers)] = moment
    return found


def _place(name: str, stacks: tuple[str, ...]) -> Place:
    """Take the number of the layer out of a name such as `2 backward:model.layers.3.mlp`."""
    phase, colon, path = name.partition(":")
    for stack in stacks:
        prefix = f"{stack}." if stack else ""
        number, dot, rest = path.removeprefix(prefix).partition(".")
        if colon and path.startswith(prefix) and number.isdigit():
            return Place(f"{phase}:{prefix}", int(number), dot + rest)
    return Place(name)
