"""Parts that are broken on purpose: each is caught by the law that it breaks, and by no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import optstate
from optstate import kernels, testing
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores import Fields, Noise, Requests, Shape, Slot, Store
from optstate.updates import Context, State, Transform, Update


def broken_laws(check: Callable[..., None], part: Any, names: tuple[str, ...]) -> dict[str, testing.LawError]:
    """Every law of these that a part breaks, with what is said of it."""
    found = {}
    for name in names:
        try:
            check(part, laws=[name])
        except testing.LawError as error:
            found[name] = error
    return found


# --- stores -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound(Store):
    """Numbers in units of 1/256, 32 bits wide: right, and what the broken ones differ from."""

    unit: float = 2.0**-8

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        return {"units": FieldSpec(spec.shape, torch.int32, tuple(range(spec.ndim)))}

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        return fields["units"].view(shape) * (self.unit / 256)

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        return {"units": value.float().div(self.unit / 256).round().to(torch.int32)}


@dataclass(frozen=True)
class OtherWords(Sound):
    def __str__(self) -> str:
        return "OtherWords()"


@dataclass(frozen=True)
class WiderThanDeclared(Sound):
    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        return {"units": super().encode(value, noise)["units"].long()}


@dataclass(frozen=True)
class Doubled(Sound):
    def read(self, fields: Fields, shape: Shape) -> Tensor:
        return super().read(fields, shape) * 2


@dataclass(frozen=True)
class FirstOfASlice(Sound):
    """The first element of whatever is written is rounded to zero, if it is small."""

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        units = super().encode(value, noise)["units"]
        units.view(-1)[:1] &= ~0xFF
        return {"units": units}


@dataclass(frozen=True)
class HiddenSign(Sound):
    """Signed statistics are kept otherwise, and what a file says of the sign is not asked."""

    signed: bool = False

    def __str__(self) -> str:
        return "HiddenSign()"

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        return HiddenSign(signed=True) if signed else self, ""

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        return super().read(fields, shape) * (-1 if self.signed else 1)

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        return super().encode(-value if self.signed else value, noise)


BROKEN_STORES: list[tuple[Store, str]] = [
    (OtherWords(0.5), "words"),
    (WiderThanDeclared(), "store sizes"),
    (Doubled(), "numbers"),
    (FirstOfASlice(), "store slices"),
    (HiddenSign(), "file"),
]


def test_a_sound_store_passes() -> None:
    testing.check_store(Sound())


OF_STORES_ALONE = tuple(name for name in testing.LAWS_OF_STORES if name not in testing.LAWS_OF_RULES)


@pytest.mark.parametrize(("store", "law"), BROKEN_STORES, ids=[type(store).__name__ for store, _ in BROKEN_STORES])
def test_each_broken_store_breaks_its_law_and_no_other(store: Store, law: str) -> None:
    found = broken_laws(testing.check_store, store, OF_STORES_ALONE)
    assert list(found) == [law], {name: str(error) for name, error in found.items()}


def test_every_law_of_stores_has_a_store_that_breaks_it() -> None:
    assert {law for _, law in BROKEN_STORES} == set(OF_STORES_ALONE)


# --- transforms ---------------------------------------------------------------------------------------------------


def scaled(update: Update, ctx: Context, factor: float) -> Update:
    return update.whole(ctx).scaled(factor)


@dataclass(frozen=True)
class OnlyMatrices(Transform):
    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        if ctx.spec.ndim == 1:
            raise IndexError("too many indices for tensor of dimension 1")
        return update


@dataclass(frozen=True)
class OnePlan(Transform):
    """Keeps a statistic where its parameter lies in memory only."""

    store: Store = Sound()

    def declared_slots(self, group: Any) -> dict[str, Slot]:
        return {"kept": Slot(self.store, smallest_weight=0.5)}

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        yield from state["kept"].ema(update, 0.5)
        return update


@dataclass(frozen=True)
class Counting(Store):
    """Declares one more element each time it is asked."""

    asked: ClassVar[list[int]] = []

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        self.asked.append(1)
        return {
            "": FieldSpec(spec.shape, torch.float32, tuple(range(spec.ndim))),
            "n": FieldSpec((len(self.asked),), torch.float32, ()),
        }

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        return fields[""].view(shape)

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        return {"": value}


@dataclass(frozen=True)
class InBackward(Transform):
    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        inside = torch._C._current_graph_task_id() != -1
        return scaled(update, ctx, 2.0 if inside else 1.0)


@dataclass(frozen=True)
class Remembering(OnePlan):
    """Counts its steps on the stored tensor itself, where no file sees it."""

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        units: Any = state["kept"].fields["units"]
        units = units if units._base is None else units._base
        units.steps = getattr(units, "steps", 0) + 1
        yield from state["kept"].ema(update, 0.5)
        return scaled(update, ctx, float(units.steps))


@dataclass(frozen=True)
class Reading(Transform):
    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        return scaled(update, ctx, 1.0 + 0.0 * float(kernels.evaluate(update).sum()))


@dataclass(frozen=True)
class OwnNorm(Transform):
    """Divides by the norm of the part that is here."""

    elementwise: ClassVar[bool] = False

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        return update.scaled(1 / (1 + kernels.sum_of_squares(update)))


@dataclass(frozen=True)
class ByPlace(OnePlan):
    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        yield from state["kept"].ema(update, 0.5)
        return scaled(update, ctx, 2.0 if ctx.start else 1.0)


@dataclass(frozen=True)
class SaysItGuards(Transform):
    def guards(self, spec: ParamSpec) -> bool:
        return True

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        return update


@dataclass(frozen=True)
class NoWayBack(OnePlan):
    """Keeps its statistic under a meaning of its own, in a store that takes nothing from fp32."""


BROKEN_TRANSFORMS: list[tuple[Transform, str]] = [
    (OnlyMatrices(), "any shape"),
    (InBackward(), "fused is stepped"),
    (Remembering(), "resume"),
    (Reading(), "no value is read"),
    (OwnNorm(), "parts are whole"),
    (ByPlace(), "slices are whole"),
    (SaysItGuards(), "bad gradients"),
]


def test_a_sound_transform_passes() -> None:
    testing.check_transform(OnePlan(optstate.stores.Full()))


@pytest.mark.parametrize(
    ("transform", "law"), BROKEN_TRANSFORMS, ids=[type(transform).__name__ for transform, _ in BROKEN_TRANSFORMS]
)
def test_each_broken_transform_breaks_its_law_and_no_other(transform: Transform, law: str) -> None:
    with optstate.stores.registry.known_also(Sound):
        found = broken_laws(testing.check_transform, transform, testing.LAWS_OF_RULES)
    assert list(found) == [law], {name: str(error) for name, error in found.items()}
