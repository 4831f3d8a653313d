"""Transforms that scale an update by one number, and weight decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from optstate.kernels import Scalar
from optstate.stores import Requests
from optstate.updates.base import Context, State, Transform, Update
from optstate.updates.hyper import Hyper, Rule

__all__ = ["add_decayed_weights", "scale_by_learning_rate", "scale_by_param_rms", "scale_by_schedule"]


@dataclass(frozen=True)
class scale_by_param_rms(Transform):
    """Multiply by the parameter's root mean square, at least `eps` (Adafactor, section 8; AdaLomo, line 11).

    The parameter is read as it is before this step, weight decay included.

    eps: group key `param_rms_eps`.
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
    """Add `rate * param` to the update: decoupled weight decay (Loshchilov and Hutter 2019).

    What follows in the chain scales the decay too: before `scale_by_param_rms` it is multiplied by the parameter's
    RMS, as in AdaLomo; after it only by the learning rate, as in `torch.optim.Adafactor`. Before a moment it is
    an L2 penalty. Applied as `param * (1 - lr * rate)`, then the step.

    rate: group key `weight_decay`.
    """

    rate: float | Hyper = 0.0

    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"rate": Rule("weight_decay")}

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        rate = ctx.read(self.rate)
        return replace(update, decay=update.decay + rate) if rate else update


@dataclass(frozen=True)
class scale_by_schedule(Transform):
    """Multiply by `schedule(step, lr)`, where step counts from 1 and lr is the group's, before it is applied."""

    schedule: Callable[[int, Any], Scalar]

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        return update.scaled(self.schedule(ctx.step, ctx.group["lr"]))


@dataclass(frozen=True)
class scale_by_learning_rate(Transform):
    """Multiply by the learning rate here instead of at the end of the chain.

    Only needed where its place matters: a momentum after it averages steps, not updates, so a change of the
    learning rate takes effect slowly.
    """

    applies_lr: ClassVar[bool] = True

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        return update.scaled(ctx.group["lr"])
