"""The end of a chain: transforms that multiply the update by a number or add a decay, read as two coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from optstate.kernels.rules import Number
from optstate.optimizer.whole_steps.operands import as_number
from optstate.updates import (
    Context,
    Transform,
    add_decayed_weights,
    clip_by_rms,
    scale_by_learning_rate,
    scale_by_param_rms,
    scale_by_schedule,
)

__all__ = ["Coefficients", "Tail"]


class Coefficients(NamedTuple):
    """What multiplies the update, and what share of the weight is taken away, before the weight's RMS multiplies."""

    scale: Number
    decay: Number


@dataclass(frozen=True)
class Tail:
    """Transforms that leave the update on paper.

    Attributes:
        threshold: the clip of the update's root mean square, or None.
        factors: decays and numbers, in the order of the chain.
        least_rms: the transform that scales by the weight's root mean square, or None.
        decay_is_scaled: whether that transform comes after the decay.
        applies_lr: whether a transform multiplies by the learning rate.
    """

    threshold: clip_by_rms | None
    factors: tuple[Transform, ...]
    least_rms: scale_by_param_rms | None
    decay_is_scaled: bool

    @staticmethod
    def of(transforms: Sequence[Transform]) -> Tail | None:
        """Return the end of a chain; None if it holds another transform, or the order makes more of it."""
        rest = list(transforms)
        threshold = rest.pop(0) if rest and isinstance(rest[0], clip_by_rms) else None
        scales = [i for i, t in enumerate(rest) if isinstance(t, scale_by_param_rms)]
        if len(scales) > 1:
            return None
        place = scales[0] if scales else len(rest)
        least_rms = rest.pop(place) if scales else None
        decays = [i < place for i, t in enumerate(rest) if isinstance(t, add_decayed_weights)]
        known = (add_decayed_weights, scale_by_schedule, scale_by_learning_rate)
        if not all(isinstance(t, known) for t in rest) or len(set(decays)) > 1:
            return None
        return Tail(threshold, tuple(rest), least_rms, bool(decays and decays[0]))  # type: ignore[arg-type]

    @cached_property
    def applies_lr(self) -> bool:
        """Whether a transform multiplies by the learning rate, so that the end of the chain does not."""
        return any(t.applies_lr for t in self.factors)

    def read(self, ctx: Context, ends_chain: bool = True, on_device: bool = False) -> Coefficients | None:
        """Return the coefficients of this step; None if a number is known to a device only.

        ends_chain: whether the learning rate multiplies at the end, unless a transform has done so. on_device: take a
        learning rate that only a device knows for a 0-d fp64 tensor, without waiting for the device.
        """
        lr = ctx.group["lr"]
        if on_device and isinstance(lr, Tensor) and _is_kept_there(lr, ctx):
            lr = lr.detach().to(torch.float64).reshape(())
        elif type(lr) is not float:
            lr = as_number(lr)
        if lr is None:
            return None
        scale: Number
        decay: Number
        scale, decay = 1.0, 0.0
        for transform in self.factors:
            if isinstance(transform, add_decayed_weights):
                decay += ctx.read(transform.rate)
                continue
            factor: Number | None = lr
            if isinstance(transform, scale_by_schedule):
                known = ctx.clock is None
                factor = as_number(transform.schedule(ctx.step, ctx.group["lr"])) if known else None
            if factor is None:
                return None
            scale, decay = scale * factor, decay * factor
        if ends_chain and not self.applies_lr:
            scale, decay = scale * lr, decay * lr
        return Coefficients(scale, decay)


def _is_kept_there(lr: Tensor, ctx: Context) -> bool:
    """Whether a learning rate is on the parameter's device, and the host must not read it."""
    return lr.device == ctx.param.device and (ctx.clock is not None or lr.device.type != "cpu")
