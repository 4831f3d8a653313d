"""Relatives of Adam: with no second moment of its own, with a slow moment besides, or with moving betas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate import kernels
from optstate.spec import ParamSpec
from optstate.stores import Full, Requests, Slot, Store
from optstate.updates.base import Context, State, Transform, Update
from optstate.updates.hyper import Hyper, Rule
from optstate.updates.moments import BETAS, average
from optstate.updates.schedules import Schedule, power_decay

__all__ = [
    "fading_momentum",
    "scale_by_ademamix",
    "scale_by_momentum_square",
    "scale_by_moving_adam",
    "scale_by_second_moment",
]

SMALLEST_EPS = 1e-38
"""An element that never had a gradient would be zero divided by zero."""


@dataclass(frozen=True)
class scale_by_momentum_square(Transform):
    """Replace the update by `m / (sqrt(beta2 m_old**2 + (1 - beta2) u**2) + eps)`, with `m` its running average.

    The square of the last average stands for Adam's second moment, so that one average is all that is kept. Nothing is
    corrected for starting at zero. Source: AdamS (arXiv 2505.16363).

    Args:
        store: of `m`, slot `exp_avg`.
        betas: group key `betas`.
        eps: outside the root; group key `eps`.
    """

    store: Store = Full()
    betas: tuple[float | Hyper, float | Hyper] = (0.9, 0.95)
    eps: float | Hyper = 1e-8

    absorbs_decay: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"betas": BETAS, "eps": Rule("eps", low=SMALLEST_EPS)}

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        return {"exp_avg": average(self.store, True, "gradient", self.betas[0], group)}

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        return 3 + self.store.resolve(spec, True)[0].reads_anew

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        update = update.whole(ctx)
        beta1, beta2 = map(ctx.read, self.betas)
        square = state["exp_avg"].read().square().mul_(beta2)  # one that overflows makes an update of 0, and no NaN
        square.add_(kernels.values(update).square(), alpha=1 - beta2)
        yield from state["exp_avg"].ema(update, 1 - beta1)
        inverse = square.sqrt_().add_(ctx.read(self.eps)).reciprocal_()
        return Update(state["exp_avg"].read(), (inverse,), finite=update.finite)


@dataclass(frozen=True)
class scale_by_second_moment(Transform):
    """Replace the update by `u / (sqrt(v / c2) + eps)` with `c2 = 1 - beta2**t`: Adam without a first moment.

    Args:
        store: of `v`, slot `exp_avg_sq`, never negative.
        beta: weight of the past; group key `betas`, second place.
        eps: outside the root and after the bias correction; group key `eps`.
    """

    store: Store = Full()
    beta: float | Hyper = 0.999
    eps: float | Hyper = 1e-8

    absorbs_decay: ClassVar[bool] = True
    prepares: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"beta": BETAS[1], "eps": Rule("eps", low=SMALLEST_EPS)}

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        return {"exp_avg_sq": average(self.store, False, "square", self.beta, group)}

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        return 2 + self.store.resolve(spec, False)[0].reads_anew

    def prepare(self, update: Update, state: State, ctx: Context) -> Requests[None]:
        yield from state["exp_avg_sq"].ema_of_square(update.whole(ctx), 1 - ctx.read(self.beta))

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        update, beta = update.whole(ctx), ctx.read(self.beta)
        yield from state["exp_avg_sq"].ema_of_square(update, 1 - beta)
        root = state["exp_avg_sq"].compact().sqrt().div_(math.sqrt(1 - beta**ctx.step))
        return update.times(root.add_(ctx.read(self.eps)).reciprocal_())


@dataclass(frozen=True)
class scale_by_ademamix(Transform):
    """Replace the update by `(m1 / c1 + alpha m2) / (sqrt(v / c2) + eps)`: Adam with a second, slow average.

    `m1`, `v` and `m2` are averages with betas 1, 2 and 3; `c1, c2 = 1 - beta1**t, 1 - beta2**t`. During the first
    `warmup` steps alpha grows linearly, and beta3 from beta1 on so that its half-life grows linearly. Source: AdEMAMix
    (Pagliardini et al. 2024, arXiv 2409.03137, algorithm 1 and section 3).

    Args:
        first: store of `m1`, slot `exp_avg`.
        slow: store of `m2`, slot `exp_avg_slow`.
        second: store of `v`, slot `exp_avg_sq`.
        betas: three numbers; group key `betas`.
        alpha: weight of `m2`; group key `alpha`.
        eps: outside the root and after the bias correction; group key `eps`.
        warmup: steps until alpha and beta3 have their values; 0 for none.

    Raises:
        ValueError: if `warmup` is no whole number of 0 at least.
    """

    first: Store = Full()
    slow: Store = Full()
    second: Store = Full()
    betas: tuple[float | Hyper, float | Hyper, float | Hyper] = (0.9, 0.999, 0.9999)
    alpha: float | Hyper = 5.0
    eps: float | Hyper = 1e-8
    warmup: int = 0

    absorbs_decay: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {
        "betas": (*BETAS, Rule("betas", 2, below=1.0)),
        "alpha": Rule("alpha"),
        "eps": Rule("eps", low=SMALLEST_EPS),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 0:
            raise ValueError(f"warmup={self.warmup!r}: give a whole number of steps, 0 for none")

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        slow = average(self.slow, True, "gradient", self.betas[2], group)
        return {
            "exp_avg": average(self.first, True, "gradient", self.betas[0], group),
            "exp_avg_slow": replace(slow, beta=None) if self.warmup else slow,
            "exp_avg_sq": average(self.second, False, "square", self.betas[1], group),
        }

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        stores = (self.first.resolve(spec, True), self.slow.resolve(spec, True), self.second.resolve(spec, False))
        return 3 + sum(store.reads_anew for store, _ in stores)

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        update = update.whole(ctx)
        beta1, beta2, last = map(ctx.read, self.betas)
        alpha, beta3 = ctx.read(self.alpha), last
        if ctx.step < self.warmup:
            alpha, beta3 = alpha * ctx.step / self.warmup, slower_beta(beta1, last, ctx.step / self.warmup)
        yield from state["exp_avg_sq"].ema_of_square(update, 1 - beta2)  # first: it may refuse the gradient
        yield from state["exp_avg"].ema(update, 1 - beta1)
        yield from state["exp_avg_slow"].ema(update, 1 - beta3)
        mixed = torch.add(state["exp_avg"].read() / (1 - beta1**ctx.step), state["exp_avg_slow"].read(), alpha=alpha)
        root = state["exp_avg_sq"].compact().sqrt().div_(math.sqrt(1 - beta2**ctx.step))
        return Update(mixed, (root.add_(ctx.read(self.eps)).reciprocal_(),), finite=update.finite)


def slower_beta(first: float, last: float, share: float) -> float:
    """Return the beta at a share of the way from `first` to `last` along which the half-life grows linearly."""
    if not (first > 0 and last > 0):
        return last
    start, end = math.log(first), math.log(last)
    return min(math.exp(start * end / ((1 - share) * end + share * start)), last)


@dataclass(frozen=True)
class fading_momentum(Schedule):
    """A schedule whose beta falls by a factor at every step: `beta(t) = beta * growth**(t - 1)`.

    Source: SMMF (arXiv 2412.08894), whose name for the factor is the growth rate.

    Args:
        beta: at the first step; group key `beta`.
        growth: the factor; group key `growth_rate`.
    """

    beta: float | Hyper = 0.9
    growth: float | Hyper = 0.999

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", Rule("beta", below=1.0).bind(self.beta))
        object.__setattr__(self, "growth", Rule("growth_rate", high=1.0).bind(self.growth))

    @property
    def hypers(self) -> tuple[Hyper, ...]:
        assert isinstance(self.beta, Hyper)
        assert isinstance(self.growth, Hyper)
        return self.beta, self.growth

    def smallest_weight(self, group: Mapping[str, Any]) -> float:
        return 1.0 - float(self.hypers[0].get(group))

    def weight(self, step: int, group: Mapping[str, Any]) -> float:
        beta, growth = (hyper.read(group) for hyper in self.hypers)
        return float(1.0 - beta * growth ** (step - 1))


@dataclass(frozen=True)
class scale_by_moving_adam(Transform):
    """Replace the update by `m / (sqrt(v) + eps)`, where the betas of both averages are functions of the step.

    No average is corrected for starting at zero: the schedule of `v` must replace the zeros at the first step, as
    `power_decay` does. The step uses both averages as they are before a store compresses them. Source: SMMF (arXiv
    2412.08894, algorithm 1).

    Args:
        first: store of `m`, slot `exp_avg`.
        second: store of `v`, slot `exp_avg_sq`.
        first_decay, second_decay: the schedules.
        eps: outside the root; group key `eps`.
    """

    first: Store = Full()
    second: Store = Full()
    first_decay: Schedule = fading_momentum()
    second_decay: Schedule = power_decay(0.5)
    eps: float | Hyper = 1e-8

    absorbs_decay: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"eps": Rule("eps", low=SMALLEST_EPS)}

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        weights = self.first_decay.smallest_weight(group), self.second_decay.smallest_weight(group)
        return {
            "exp_avg": Slot(self.first, smallest_weight=weights[0], of="gradient"),
            "exp_avg_sq": Slot(self.second, signed=False, smallest_weight=weights[1], of="square"),
        }

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        return 2 + self.first.resolve(spec, True)[0].reads_anew + self.second.resolve(spec, False)[0].reads_anew

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        update = update.whole(ctx)
        yield from state["exp_avg_sq"].ema_of_square(update, self.second_decay.weight(ctx.step, ctx.group))
        yield from state["exp_avg"].ema(update, self.first_decay.weight(ctx.step, ctx.group))
        inverse: Tensor = state["exp_avg_sq"].compact().sqrt().add_(ctx.read(self.eps)).reciprocal_()
        return Update(state["exp_avg"].read(), (inverse,), finite=update.finite)
