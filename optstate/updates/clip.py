"""Transforms that bound an update: by its RMS, its norm, or element by element."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from optstate import kernels
from optstate.spec import ParamSpec
from optstate.stores import Requests
from optstate.updates.base import Context, State, Transform, Update
from optstate.updates.hyper import Hyper, Rule

__all__ = ["clip_by_norm", "clip_by_rms", "clip_by_value"]


@dataclass(frozen=True)
class clip_by_rms(Transform):
    """Scale the update down to a root mean square of at most `threshold`: `u / max(1, RMS(u) / threshold)`.

    Source: Adafactor (arXiv 1804.04235), section 6; AdaLomo (arXiv 2310.10195), algorithm 1, line 11.

    Args:
        threshold: group key `clip_threshold`; None switches the clip off.
    """

    threshold: float | Hyper | None = 1.0

    elementwise: ClassVar[bool] = False
    absorbs_decay: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {
        "threshold": Rule("clip_threshold", low=1e-38, optional=True)
    }

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        threshold = ctx.read(self.threshold)
        if threshold is None:
            return update
        update = update.whole(ctx)
        mean_square = yield from ctx.mean_square(update)
        return update.rescaled((mean_square / (threshold * threshold)).clamp_(min=1.0).rsqrt_())


@dataclass(frozen=True)
class clip_by_norm(Transform):
    """Scale the update of each parameter down to an L2 norm of at most `max_norm`.

    The coefficient is `min(1, max_norm / (norm + 1e-6))`, as in `torch.nn.utils.clip_grad_norm_`, but per parameter.

    Args:
        max_norm: group key `clip_norm`; None switches the clip off.
    """

    max_norm: float | Hyper | None = 1.0

    elementwise: ClassVar[bool] = False
    absorbs_decay: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"max_norm": Rule("clip_norm", low=1e-38, optional=True)}

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        max_norm = ctx.read(self.max_norm)
        if max_norm is None:
            return update
        update = update.whole(ctx)
        mean_square = yield from ctx.mean_square(update)
        norm = (mean_square * ctx.spec.numel).sqrt_()
        return update.rescaled((max_norm / (norm + 1e-6)).clamp_(max=1.0))


@dataclass(frozen=True)
class clip_by_value(Transform):
    """Clamp every element of the update to `[-bound, bound]`.

    At the head of a chain the gradient itself is clamped, and the coefficient of a global norm clip multiplies
    afterwards: the order of the official LOMO code. There the clamp costs nothing; after other transforms the update
    is multiplied out, into one fp32 tensor of the parameter's (or slice's) size.

    Args:
        bound: group key `clip_grad_value`; None switches the clip off.
    """

    bound: float | Hyper | None = 1.0

    absorbs_decay: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {
        "bound": Rule("clip_grad_value", low=1e-38, optional=True)
    }

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        return 0 if head else 1

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        bound = ctx.read(self.bound)
        if bound is None:
            return update
        if not ctx.guard.checked:  # a clamp would turn an infinite gradient into a plausible one
            yield from ctx.check_finite(kernels.all_finite(ctx.grad))
        if update.is_gradient(ctx):
            return replace(update, bound=bound if update.bound is None else min(bound, update.bound))
        return Update(kernels.multiply_out(update.whole(ctx)).clamp_(-bound, bound), finite=update.finite)
