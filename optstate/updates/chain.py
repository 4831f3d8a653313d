"""Chains: transforms applied one after the other; and routes, which choose the chain of each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from functools import cached_property
from types import FunctionType
from typing import Any, cast

from optstate.spec import ANY_MATRIX, ParamSpec
from optstate.stores import Requests, Slot
from optstate.updates.base import Context, State, Transform, Update, run_transform
from optstate.updates.clip import clip_by_value
from optstate.updates.hyper import Hyper
from optstate.updates.scale import add_decayed_weights

__all__ = ["Chain", "Route", "as_chain", "as_route", "chain", "route", "transform_words"]

Selector = str | Callable[[ParamSpec], bool]
"""A rule that selects parameters: a glob matched against the name, or a predicate on the `ParamSpec`."""


@dataclass(frozen=True)
class Chain(Transform):
    """Transforms applied one after the other; an empty chain is plain gradient descent. Made by `chain`."""

    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        for item in self.transforms:
            if not isinstance(item, Transform):
                raise TypeError(
                    f"chain() got {item!r}, a {type(item).__name__}: give transforms, such as updates.clip_by_rms(1.0)"
                )
        applied = [t for t in self.transforms if t.applies_lr]
        if len(applied) > 1:
            raise ValueError("the chain multiplies by the learning rate twice: keep one scale_by_learning_rate()")
        _ = self.hyper  # raises where two transforms disagree on a default
        self.slots(ANY_MATRIX, {})

    @cached_property
    def elementwise(self) -> bool:  # type: ignore[override]
        return all(t.elementwise for t in self.transforms)

    @cached_property
    def knows_no_shape(self) -> bool:
        """Whether each element, or block of elements, is stepped alone, so that a parameter may be cut or flattened."""
        return self.elementwise and all(slot.store.elementwise for slot in self.slots(ANY_MATRIX, {}).values())

    @cached_property
    def reads_param(self) -> bool:  # type: ignore[override]
        return any(t.reads_param for t in self.transforms)

    @cached_property
    def applies_lr(self) -> bool:  # type: ignore[override]
        return any(t.applies_lr for t in self.transforms)

    @property
    def period(self) -> int:
        return math.lcm(*(t.period for t in self.transforms))

    @property
    def hypers(self) -> tuple[Hyper, ...]:
        return tuple(h for t in self.transforms for h in t.hypers)

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        return _merge([t.slots(spec, group) for t in self.transforms])

    def temporaries(self, spec: ParamSpec, head: bool = True, until: int | None = None) -> int:
        """Return how many fp32 tensors of the parameter's size the chain needs at once.

        Args:
            spec: the parameter's specification.
            head: whether the chain gets the gradient itself.
            until: count only the transforms before this place, as the rest runs slice by slice; None for all.
        """
        count, decayed = 0, False
        for i, transform in enumerate(self.transforms):
            if i == until:  # its sums may come first: they need a decay multiplied out
                return count + (decayed and transform.absorbs_decay and transform.prepares)
            count += transform.temporaries(spec, head) + (decayed and transform.absorbs_decay)
            decayed = isinstance(transform, add_decayed_weights) or (decayed and not transform.absorbs_decay)
            head = head and isinstance(transform, clip_by_value)
        return count

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        for transform in self.transforms:
            update = yield from run_transform(transform, update, state, ctx)
        return update

    def check_slots(self, group: Mapping[str, Any]) -> None:
        for transform in self.transforms:
            transform.check_slots(group)

    def __str__(self) -> str:
        return " > ".join(map(transform_words, self.transforms)) or "gradient"


def transform_words(transform: Transform) -> str:
    """Return a transform's name with what decides its rule: switches, functions, numbers, choices and inner chains.

    Hyper-parameters are left out, as they are in the param groups, and stores, as they are told slot by slot.
    """
    values = [(f.name, getattr(transform, f.name)) for f in fields(cast(Any, transform)) if f.name != "slot"]
    switches = [name for name, value in values if value is True]
    functions = [value.__name__ for _, value in values if isinstance(value, FunctionType)]
    numbers = [f"{name}={value}" for name, value in values if type(value) in (int, float, str)]
    inner = [f"{name}=[{value}]" for name, value in values if isinstance(value, Chain)]
    decisive = ", ".join([*switches, *functions, *numbers, *inner])
    return f"{type(transform).__name__}({decisive})" if decisive else type(transform).__name__


def chain(*transforms: Transform) -> Chain:
    """Combine transforms into a recipe that applies them to the gradient in order.

    Args:
        *transforms: any transforms; a chain among them is replaced by its transforms. Without any, the recipe is plain
            gradient descent.

    Raises:
        TypeError: if something that is not a transform is given.
        ValueError: if two transforms keep a slot of the same name or disagree on a hyper-parameter's default.
    """
    flat: list[Transform] = []
    for transform in transforms:
        flat += transform.transforms if isinstance(transform, Chain) else [transform]
    return Chain(tuple(flat))


class Route:
    """A recipe that chooses the chain of each parameter: the first rule that matches, else the default.

    Args:
        rules: pairs of a rule and a chain, tried in order; see `route`, which makes routes.
        default: the chain of every other parameter.
    """

    def __init__(self, rules: Sequence[tuple[Selector, Chain]], default: Chain) -> None:
        self.rules, self.default = tuple(rules), default

    @property
    def chains(self) -> tuple[Chain, ...]:
        """Every chain that a parameter can get."""
        return (*(c for _, c in self.rules), self.default)

    def pick(self, spec: ParamSpec) -> tuple[Chain, str]:
        """Return the chain of a parameter, and the name of the rule that chose it ("" if there are no rules)."""
        for rule, candidate in self.rules:
            names = (spec.name, spec.given) if spec.given else (spec.name,)
            if any(fnmatchcase(name, rule) for name in names) if isinstance(rule, str) else rule(spec):
                return candidate, rule if isinstance(rule, str) else getattr(rule, "__name__", repr(rule))
        return self.default, "default" if self.rules else ""


def route(rules: Sequence[tuple[Selector, Transform]], *, default: Transform) -> Route:
    """Combine chains into a recipe that gives different parameters different chains.

    Args:
        rules: pairs of a rule and a chain, tried in order. A rule is a glob (`"*embed*"`) matched against the
            parameter's name, with and without wrappers' prefixes, or a predicate on its `ParamSpec`
            (`optstate.is_matrix`).
        default: the chain of every parameter that no rule matches.

    Raises:
        TypeError: if a rule is neither a string nor callable.
    """
    for rule, _ in rules:
        if not (isinstance(rule, str) or callable(rule)):
            raise TypeError(f"route() got the rule {rule!r}: give a name glob or a function of the ParamSpec")
    return Route([(rule, as_chain(item)) for rule, item in rules], as_chain(default))


def as_chain(transform: Transform) -> Chain:
    """Return a chain as it is, and any other transform as a chain of one."""
    return transform if isinstance(transform, Chain) else chain(transform)


def as_route(item: Transform | Route) -> Route:
    """Return as a route whatever an optimizer accepts as its recipe: a route, a chain or one transform.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(item, Route):
        return item
    if not isinstance(item, Transform):
        raise TypeError(f"the recipe is a {type(item).__name__}: give optstate.chain(...) or optstate.route(...)")
    return Route([], as_chain(item))


def _merge(parts: list[dict[str, Slot]]) -> dict[str, Slot]:
    merged: dict[str, Slot] = {}
    for part in parts:
        for name, slot in part.items():
            if name in merged:
                raise ValueError(
                    f"two transforms keep a slot named {name!r}: give the scale_by_rms or momentum among them another "
                    'name with slot="..."'
                )
            if not name.isidentifier() or name in ("step", "weight"):
                raise ValueError(f"slot={name!r} is not usable: give an identifier other than 'step' and 'weight'")
            merged[name] = slot
    return merged
