"""Transforms that keep moments: running averages and sums of the update or of its square."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from optstate import kernels
from optstate.spec import ParamSpec
from optstate.stores import Factored, Full, Requests, Slot, Store
from optstate.updates.base import Context, State, Transform, Update
from optstate.updates.hyper import Hyper, Rule
from optstate.updates.schedules import Schedule, power_decay

__all__ = ["momentum", "scale_by_adam", "scale_by_rms", "scale_by_rss", "sign_momentum"]

BETAS = (Rule("betas", 0, below=1.0), Rule("betas", 1, below=1.0))


def average(store: Store, signed: bool, of: str, beta: float | Hyper, group: Mapping[str, Any]) -> Slot:
    """Return the slot of a moving average that begins at zero.

    Args:
        store: how the average is kept.
        signed: whether the average can be negative.
        of: what is averaged, a key of `optstate.stores.MEANINGS`.
        beta: weight of the past.
        group: hyper-parameters, whose value of `beta` counts if there is one.
    """
    value = float(beta.get(group) if isinstance(beta, Hyper) else beta)
    return Slot(store, signed, smallest_weight=1.0 - value, of=of, beta=value)


@dataclass(frozen=True)
class scale_by_rms(Transform):
    """Divide the update by the root of a running mean of its square: `u / sqrt(ema(u**2 + eps))`.

    With `Factored()` the mean is Adafactor's and AdaLomo's second moment (arXiv 1804.04235, section 3; arXiv
    2310.10195, algorithm 1, lines 7-10), with `Full()` RMSprop's. No bias correction: see `power_decay`.

    Args:
        store: how the mean square is kept, slot `exp_avg_sq`, never negative.
        decay: the averaging weight as a function of the step.
        eps: added to every square before it is averaged; group key `eps`. Without `eps` a floor is needed, as elements
            that never had a gradient would be zero divided by zero.
        floor: bounds the mean square below by `floor**2`, as `torch.optim.Adafactor` does; group key `floor`. With a
            factored store this costs an fp32 tensor of the parameter's size.
        slot: another name for the slot, where a chain keeps two mean squares.

    Raises:
        ValueError: if both `eps` and `floor` are zero or None.
    """

    store: Store
    decay: Schedule = power_decay()
    eps: float | Hyper | None = 1e-30
    floor: float | Hyper | None = None
    slot: str = "exp_avg_sq"

    absorbs_decay: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {
        "eps": Rule("eps", omittable=True),
        "floor": Rule("floor", omittable=True),
    }

    def check_slots(self, group: Mapping[str, Any]) -> None:
        super().check_slots(group)
        bounds = [h.get(group) for h in (self.eps, self.floor) if isinstance(h, Hyper)]
        if not any(bounds):
            raise ValueError(
                "scale_by_rms() with eps=0 needs a floor: a second moment of zero cannot be divided by; give an eps, "
                "such as 1e-30, or a floor"
            )

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        smallest, beta = self.decay.smallest_weight(group), self.decay.beta_from_zero(group)
        return {self.slot: Slot(self.store, signed=False, smallest_weight=smallest, of="square", beta=beta)}

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        store, _ = self.store.resolve(spec, signed=False)
        if store.exact_sums:
            return 2 * (self.floor is not None and isinstance(store, Factored))
        return 2 + 2 * store.reads_anew

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        update = update.whole(ctx)
        weight = self.decay.weight(ctx.step, ctx.group)
        yield from state[self.slot].ema_of_square(update, weight, ctx.read(self.eps) or 0.0)
        return update.times(*state[self.slot].inverse_root(ctx.read(self.floor) or 0.0))


@dataclass(frozen=True)
class scale_by_adam(Transform):
    """Replace the update by Adam's: `m / c1 / (sqrt(v / c2) + eps)` with `c1, c2 = 1 - beta1**t, 1 - beta2**t`.

    `m <- beta1 m + (1 - beta1) u` and `v <- beta2 v + (1 - beta2) u**2` (Kingma and Ba 2015, arXiv 1412.6980,
    algorithm 1). A weight decay placed before this transform is Adam's L2 penalty; after it, AdamW's decoupled decay.

    Args:
        first: store of `m`, slot `exp_avg`.
        second: store of `v`, slot `exp_avg_sq`, never negative.
        betas: group key `betas`.
        eps: outside the root and after the bias correction, as in torch; group key `eps`. Positive, as an element that
            never had a gradient would be zero divided by zero.
        eps_hat: add `eps` before the bias correction, `m / c1 * sqrt(c2) / (sqrt(v) + eps)`, as Kingma and Ba's last
            remark of section 2 and Hugging Face's and GaLore's AdamW do.
    """

    first: Store = Full()
    second: Store = Full()
    betas: tuple[float | Hyper, float | Hyper] = (0.9, 0.999)
    eps: float | Hyper = 1e-8
    eps_hat: bool = False

    absorbs_decay: ClassVar[bool] = True
    prepares: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {
        "betas": BETAS,
        "eps": Rule("eps", low=1e-38),  # zero by zero, where an element never had a gradient
    }

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        return {
            "exp_avg": average(self.first, True, "gradient", self.betas[0], group),
            "exp_avg_sq": average(self.second, False, "square", self.betas[1], group),
        }

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        return 2 + self.first.resolve(spec, True)[0].reads_anew + self.second.resolve(spec, False)[0].reads_anew

    def prepare(self, update: Update, state: State, ctx: Context) -> Requests[None]:
        yield from state["exp_avg_sq"].ema_of_square(update.whole(ctx), 1 - ctx.read(self.betas[1]))

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        update = update.whole(ctx)
        beta1, beta2 = map(ctx.read, self.betas)
        first, second = state["exp_avg"], state["exp_avg_sq"]
        yield from second.ema_of_square(update, 1 - beta2)  # first: it may refuse the gradient
        yield from first.ema(update, 1 - beta1)
        correction, scale = math.sqrt(1 - beta2**ctx.step), 1 / (1 - beta1**ctx.step)
        if self.eps_hat:
            scale, correction = scale * correction, 1.0
        inverse_root = kernels.inverse_root(second.compact(), correction, ctx.read(self.eps))
        return Update(first.read(), (inverse_root,), scale=scale, finite=update.finite)


@dataclass(frozen=True)
class momentum(Transform):
    """Replace the update by its running average, `m <- beta m + (1 - beta) u`, or by a decaying sum.

    Args:
        store: how `m` is kept.
        beta: weight of the past; group key `momentum`.
        nesterov: the new update is `beta m + (1 - beta) u` (`u + beta m` for the heavy ball) instead of `m`.
        heavy_ball: accumulate as `torch.optim.SGD` does: `m <- beta m + (1 - dampening) u`, and `m <- u` at the first
            step.
        dampening: of the heavy ball; group key `dampening`.
        decoupled: leave a weight decay that is already in the update out of the average and carry it past.
        slot: name of the slot; "" for `exp_avg`, or `momentum_buffer` for the heavy ball.
    """

    store: Store = Full()
    beta: float | Hyper = 0.9
    nesterov: bool = False
    heavy_ball: bool = False
    dampening: float | Hyper = 0.0
    decoupled: bool = False
    slot: str = ""

    absorbs_decay: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {
        "beta": Rule("momentum", below=1.0),
        "dampening": Rule("dampening", high=1.0),
    }

    def __post_init__(self) -> None:
        if not self.slot:
            object.__setattr__(self, "slot", "momentum_buffer" if self.heavy_ball else "exp_avg")
        super().__post_init__()

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        slot = average(self.store, True, "update", self.beta, group)
        return {self.slot: replace(slot, of="update_sum", beta=None) if self.heavy_ball else slot}

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        return max(2 * (self.heavy_ball + self.nesterov), 3 * self.store.resolve(spec, True)[0].reads_anew)

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        carried = update.decay if self.decoupled else 0.0
        update = replace(update, decay=0.0) if self.decoupled else update.whole(ctx)
        statistic, beta = state[self.slot], ctx.read(self.beta)
        if self.heavy_ball:
            share = 1.0 if ctx.step == 1 else 1 - ctx.read(self.dampening)
            value = kernels.multiply_out(update)
            statistic.hold(statistic.read().mul(beta).add_(value, alpha=share), weight=1 - beta)
            ahead = statistic.read().mul(beta).add_(value) if self.nesterov else statistic.read()
        else:
            yield from statistic.ema(update, 1 - beta)
            ahead = statistic.read()
            if self.nesterov:
                ahead = torch.lerp(ahead, kernels.multiply_out(update), 1 - beta)
        return Update(ahead, finite=update.finite, decay=carried)


@dataclass(frozen=True)
class sign_momentum(Transform):
    """Replace the update by the sign of a mix of momentum and update: `sign(beta1 m + (1 - beta1) u)`.

    The old `m` is mixed; afterwards `m <- beta2 m + (1 - beta2) u`. Source: Lion (Chen et al. 2023, arXiv 2302.06675),
    algorithm 2.

    Args:
        store: how `m` is kept, slot `exp_avg`.
        betas: group key `betas`.
    """

    store: Store = Full()
    betas: tuple[float | Hyper, float | Hyper] = (0.9, 0.99)

    absorbs_decay: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"betas": BETAS}

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        return {"exp_avg": average(self.store, True, "gradient", self.betas[1], group)}

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        return 2 + 2 * self.store.resolve(spec, True)[0].reads_anew

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        update = update.whole(ctx)
        statistic, (beta1, beta2) = state["exp_avg"], map(ctx.read, self.betas)
        direction = torch.lerp(statistic.read(), kernels.multiply_out(update), 1 - beta1).sign_()
        yield from statistic.ema(update, 1 - beta2)
        return Update(direction, finite=update.finite)


@dataclass(frozen=True)
class scale_by_rss(Transform):
    """Divide the update by the root of the sum of all its squares so far: `u / sqrt(sum(u**2) + eps)`.

    With `Full()` this is Adagrad's rule (Duchi et al. 2011); with `AxisMax()` SM3-II (Anil et al. 2019, arXiv
    1901.11150, algorithm 2), where the sum is only known from above: `nu = min over dimensions of the kept maxima +
    u**2` divides the update and gives the new maxima. The sum never decays, so steps only become smaller.

    Args:
        store: how the sum is kept, never negative.
        eps: added under the root; group key `eps`.
        slot: name of the slot.
    """

    store: Store
    eps: float | Hyper = 1e-30
    slot: str = "accumulator"

    absorbs_decay: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"eps": Rule("eps", low=1e-38)}

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        # A sum of t squares grows by a share of about 1 / t, which becomes arbitrarily small.
        return {self.slot: Slot(self.store, signed=False, smallest_weight=0.0, of="square_sum")}

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        store = self.store.resolve(spec, signed=False)[0]
        return 2 if isinstance(store, Factored) else 0 if store.exact_sums else 3

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        update = update.whole(ctx)
        yield from state[self.slot].add_square(update)
        inverse_root = state[self.slot].compact().add(ctx.read(self.eps)).rsqrt_()
        return update.times(inverse_root)
