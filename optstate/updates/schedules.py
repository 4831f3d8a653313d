"""Schedules of a moving average: how much of the past is kept, as a function of the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from optstate.updates.hyper import Hyper, Rule

__all__ = ["Schedule", "constant", "power_decay"]


class Schedule:
    """A schedule of averaging weights: `1 - beta(t)` at step t = 1, 2, ... Subclasses are frozen dataclasses."""

    @property
    def hypers(self) -> tuple[Hyper, ...]:
        """The hyper-parameters that the schedule reads from the param group."""
        raise NotImplementedError

    def smallest_weight(self, group: Mapping[str, Any]) -> float:
        """Return the least averaging weight of any step, with the group's numbers or, where it has none, defaults."""
        raise NotImplementedError

    def beta_from_zero(self, group: Mapping[str, Any]) -> float | None:
        """Return beta if it is the same at every step and the average begins at zero, else None; see `Slot.beta`."""
        return None

    def weight(self, step: int, group: Mapping[str, Any]) -> float:
        """Return the averaging weight `1 - beta(step)`; `step` is 1 at the first update."""
        raise NotImplementedError


@dataclass(frozen=True)
class power_decay(Schedule):
    """Adafactor's schedule `beta(t) = 1 - t**-exponent` (arXiv 1804.04235, section 7.2; AdaLomo: exponent 0.8).

    The first step replaces the initial zeros, so no bias correction is needed. The param-group key `decay_rate`
    holds `-exponent`, the sign that other libraries use.

    Raises:
        TypeError: if the exponent is no number.
        ValueError: if the exponent is not from 0 to 2.
    """

    exponent: float | Hyper = 0.8

    def __post_init__(self) -> None:
        given = self.exponent
        if not isinstance(given, Real | Hyper):
            raise TypeError(f"power_decay({given!r}) needs a number: the exponent, such as 0.8")
        if not isinstance(given, Hyper) and not 0.0 <= float(given) <= 2.0:
            raise ValueError(
                f"decay_rate={-float(given)!r} is out of range: it must be from -2 to 0, power_decay takes it negated"
            )
        value = given if isinstance(given, Hyper) else Hyper("decay_rate", -float(given))
        object.__setattr__(self, "exponent", Rule("decay_rate", low=-2.0, high=0.0).bind(value))

    @property
    def hypers(self) -> tuple[Hyper, ...]:
        assert isinstance(self.exponent, Hyper)
        return (self.exponent,)

    def smallest_weight(self, group: Mapping[str, Any]) -> float:
        return 0.0

    def weight(self, step: int, group: Mapping[str, Any]) -> float:
        return float(step ** self.exponent.read(group))  # type: ignore[union-attr]


@dataclass(frozen=True)
class constant(Schedule):
    """A schedule with the same `beta` at every step, as in the AdaLomo paper's algorithm 1; param-group key `beta2`.

    The average is not corrected for starting at zero.
    """

    beta: float | Hyper = 0.99

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", Rule("beta2", below=1.0).bind(self.beta))

    @property
    def hypers(self) -> tuple[Hyper, ...]:
        assert isinstance(self.beta, Hyper)
        return (self.beta,)

    def smallest_weight(self, group: Mapping[str, Any]) -> float:
        return 1.0 - float(self.hypers[0].get(group))

    def beta_from_zero(self, group: Mapping[str, Any]) -> float | None:
        return float(self.hypers[0].get(group))

    def weight(self, step: int, group: Mapping[str, Any]) -> float:
        return float(1.0 - self.beta.read(group))  # type: ignore[union-attr]
