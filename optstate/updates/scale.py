"""Transforms that multiply an update by one number, and weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar

from optstate.kernels import Scalar
from optstate.stores import Requests
from optstate.updates.base import Context, State, Transform, Update
from optstate.updates.hyper import Hyper, Rule

__all__ = [
    "add_decayed_weights",
    "decay_weights_after",
    "scale_by_factor",
    "scale_by_learning_rate",
    "scale_by_param_rms",
    "scale_by_schedule",
]


@dataclass(frozen=True)
class scale_by_param_rms(Transform):
    """Multiply the update, weight decay included, by the parameter's root mean square: `u * max(eps, RMS(p))`.

    The parameter counts as it is before this step. Source: Adafactor (arXiv 1804.04235), section 8; AdaLomo (arXiv
    2310.10195), algorithm 1, line 11.

    Args:
        eps: least root mean square; group key `param_rms_eps`.
    """

    eps: float | Hyper = 1e-3

    elementwise: ClassVar[bool] = False
    reads_param: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"eps": Rule("param_rms_eps")}

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        mean_square = yield from ctx.param_mean_square()
        return update.scaled(mean_square.sqrt().clamp_(min=ctx.read(self.eps)))


@dataclass(frozen=True)
class add_decayed_weights(Transform):
    """Add `rate * param` to the update: decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Later transforms scale the decay, too: placed before `scale_by_param_rms` the decay is multiplied by the parameter's
    RMS, as in AdaLomo; placed after, only by the learning rate, as in `torch.optim.Adafactor`. Placed before a moment
    the decay is an L2 penalty. When the step is written, the parameter is first multiplied by one minus the scaled
    decay, then the rest of the update is subtracted.

    Args:
        rate: group key `weight_decay`.
    """

    rate: float | Hyper = 0.0

    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"rate": Rule("weight_decay")}

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        rate = ctx.read(self.rate)
        return replace(update, decay=update.decay + rate) if rate else update


@dataclass(frozen=True)
class decay_weights_after(Transform):
    """Multiply the parameter by `1 - lr * rate` after the step, and not before it, as Hugging Face's AdamW does.

    `add_decayed_weights` decays the parameter before the step, as `torch.optim.AdamW` does; the two differ by the decay
    of the step itself. Only the learning rate scales the decay: put the transform at the end of a chain.

    Args:
        rate: group key `weight_decay`.
        begin: the first step that decays.
    """

    rate: float | Hyper = 0.0
    begin: int = 1

    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"rate": Rule("weight_decay")}

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        rate = ctx.read(self.rate)
        if not rate or ctx.step < self.begin:
            return update
        return replace(update.rescaled(1 - ctx.group["lr"] * rate), decay=update.decay + rate)


@dataclass(frozen=True)
class scale_by_factor(Transform):
    """Multiply the update, weight decay included, by a number: a learning rate of its own, as a share of the group's.

    Args:
        factor: the number. Unlike a hyper-parameter, the factor stays as it was when the chain was made.

    Raises:
        ValueError: unless the factor is a finite number of 0 at least.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.factor, bool) or not isinstance(self.factor, Real) or not 0 <= self.factor < math.inf:
            raise ValueError(f"scale_by_factor({self.factor!r}): give a finite number, 0 at least")
        object.__setattr__(self, "factor", float(self.factor))

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        return update.scaled(self.factor)


@dataclass(frozen=True)
class scale_by_schedule(Transform):
    """Multiply the update, weight decay included, by `schedule(step, lr)`.

    Args:
        schedule: a function of the parameter's step, 1 at the first, and the group's learning rate.
    """

    schedule: Callable[[int, Any], Scalar]

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        return update.scaled(self.schedule(ctx.step, ctx.group["lr"]))


@dataclass(frozen=True)
class scale_by_learning_rate(Transform):
    """Multiply the update, weight decay included, by the learning rate here instead of at the end of the chain.

    Only needed where the place matters: a later momentum then averages steps, not updates, so a change of the learning
    rate takes effect slowly.
    """

    applies_lr: ClassVar[bool] = True

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        return update.scaled(ctx.group["lr"])
