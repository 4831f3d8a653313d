"""Parts that are broken on purpose: each is caught by the law that it breaks, and by no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import optstate
from optstate import kernels, testing, updates
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores import Factored, Fields, Noise, Requests, Shape, Slot, Store
from optstate.stores.registry import known_also
from optstate.updates import Context, State, Transform, Update

pytestmark = pytest.mark.slow


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
    label: str = ""

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
    """The first element of whatever is written loses a bit."""

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        units = super().encode(value, noise)["units"]
        units.view(-1)[:1] &= ~1
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
    (OtherWords(label="mine"), "words"),
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
class Averaging(Transform):
    """Keeps an average that nothing uses."""

    store: Store = Sound()

    def slots(self, spec: ParamSpec, group: Any) -> dict[str, Slot]:
        return {"kept": Slot(self.store, smallest_weight=0.5)}

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        yield from state["kept"].ema(update, 0.5)
        return update


@dataclass(frozen=True)
class InBackward(Transform):
    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        inside = torch._C._current_graph_task_id() != -1
        return scaled(update, ctx, 2.0 if inside else 1.0)


@dataclass(frozen=True)
class Remembering(Averaging):
    """Notes its first step on the stored tensor itself, where no file sees it."""

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        units: Any = state["kept"].fields["units"]
        units = units if units._base is None else units._base
        units.first = getattr(units, "first", ctx.step)
        yield from state["kept"].ema(update, 0.5)
        return scaled(update, ctx, float(1 + ctx.step - units.first))


@dataclass(frozen=True)
class Reading(Transform):
    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        return scaled(update, ctx, 1.0 + 0.0 * float(kernels.multiply_out(update).sum()))


@dataclass(frozen=True)
class OwnNorm(Transform):
    """Divides by the norm of the part that is here."""

    elementwise: ClassVar[bool] = False

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        return update.scaled(1 / (1 + kernels.sum_of_squares(update)))


@dataclass(frozen=True)
class ByPlace(Averaging):
    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        yield from state["kept"].ema(update, 0.5)
        return scaled(update, ctx, 2.0 if ctx.start else 1.0)


@dataclass(frozen=True)
class SumsUnseen(Factored):
    """Sums of squares that nobody looks at."""

    def ema_of_square(self, statistic: Any, value: Any, weight: Any, eps: float, minus: Any = None) -> Requests[None]:
        statistic.guard.checked = True
        yield from super().ema_of_square(statistic, value, weight, eps, minus)


@dataclass(frozen=True)
class Unreadable(Sound):
    def as_recorded(self, signed: bool, block: int) -> Store:
        raise ValueError("nothing reads this")


class Boasting(optstate.recipes.AdamW):
    def state_nbytes(self) -> int:
        return 0


BROKEN_TRANSFORMS: list[tuple[Transform, str]] = [
    (OnlyMatrices(), "any shape"),
    (InBackward(), "fused is stepped"),
    (Remembering(), "resume"),
    (Reading(), "no value is read"),
    (OwnNorm(), "parts are whole"),
    (ByPlace(), "slices are whole"),
    (updates.scale_by_rms(SumsUnseen()), "bad gradients"),
    (Averaging(Unreadable()), "conversion"),
]


def test_a_sound_transform_passes() -> None:
    testing.check_transform(Averaging(optstate.stores.Full()))


@pytest.mark.parametrize(
    ("transform", "law"), BROKEN_TRANSFORMS, ids=[type(transform).__name__ for transform, _ in BROKEN_TRANSFORMS]
)
def test_each_broken_transform_breaks_its_law_and_no_other(transform: Transform, law: str) -> None:
    with known_also(Sound), known_also(Unreadable), known_also(SumsUnseen):
        found = broken_laws(testing.check_transform, transform, testing.LAWS_OF_RULES)
    assert list(found) == [law], {name: str(error) for name, error in found.items()}


def test_a_recipe_that_says_it_keeps_nothing_is_caught_by_its_sizes() -> None:
    found = broken_laws(testing.check_recipe, Boasting, testing.LAWS_OF_RULES)
    assert list(found) == ["declared sizes"]


def test_every_law_of_rules_has_a_part_that_breaks_it() -> None:
    assert {law for _, law in BROKEN_TRANSFORMS} | {"declared sizes"} == set(testing.LAWS_OF_RULES)


def test_a_broken_part_is_told_in_one_line() -> None:
    with pytest.raises(testing.LawError) as caught:
        testing.check_store(Doubled())
    assert str(caught.value) == (
        "Doubled() breaks the law 'numbers': 2.0 was stored, and what is read is: off by 2 where the largest is 2 "
        "[shape 0-d, torch.float32, signed=True]; a step would use other statistics than were kept"
    )
    assert isinstance(caught.value, AssertionError)


@dataclass(frozen=True)
class CutBlocks(Sound):
    """One unit per 64 elements, and nothing is said of devices that have parts of 64."""

    alignment: ClassVar[int] = 64  # type: ignore[assignment]

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        return {**super().fields(spec, signed), "unit": FieldSpec((-(-spec.numel // 64),), torch.float32, (), per=64)}

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        count = -(-value.numel() // 64)
        return {**super().encode(value, noise), "unit": torch.full((count,), self.unit)}


def test_a_store_whose_blocks_devices_cut_is_told_what_to_do() -> None:
    with pytest.raises(testing.LawError, match="devices cut a block here, for which `resolve` must return another"):
        testing.check_store(CutBlocks(), laws=["parts are whole"])


def test_an_unknown_law_is_a_value_error() -> None:
    for check, part in ((testing.check_store, Sound()), (testing.check_transform, OnlyMatrices())):
        with pytest.raises(ValueError, match="no law is called 'speed': there are"):
            check(part, laws=["speed"])
