"""The numbers of a step, read from the param group once more in every step, as backends of tensors take them.

Where a device knows the learning rate or counts the steps, what follows is computed there, in fp64, and nobody waits.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from optstate.kernels.native import StepRule
from optstate.kernels.rules import ElementRule, MatrixRule, Number
from optstate.optimizer.whole_steps.elementwise import CompiledElementwise
from optstate.optimizer.whole_steps.factored import CompiledFactored
from optstate.optimizer.whole_steps.tail import Tail
from optstate.updates import Context, constant, momentum, power_decay, scale_by_adam, scale_by_rss, sign_momentum
from optstate.updates.schedules import Schedule

__all__ = ["count_of", "read_element_rule", "read_matrix_rule", "weight_of"]


def count_of(ctx: Context) -> Number:
    """Return the number of the step: a float, or 0-d fp64 where the device counts."""
    return float(ctx.step) if ctx.clock is None else ctx.clock.double()


def root_of(x: Number) -> Number:
    """Return the square root of a number."""
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def weight_of(schedule: Schedule, ctx: Context) -> Number | None:
    """Return the share of the new value in an average; None if only the device counts and the schedule is not known."""
    if ctx.clock is None or type(schedule) is constant:
        return schedule.weight(ctx.step, ctx.group)
    if type(schedule) is power_decay:
        found: Tensor = ctx.clock.double() ** ctx.read(schedule.exponent)
        return found
    return None


def read_element_rule(chain: CompiledElementwise, ctx: Context) -> ElementRule | None:
    """Return the numbers of a step in which every element goes its own way; None if one is known to a device only."""
    end, t = chain.tail.read(ctx, on_device=True), count_of(ctx)
    if end is None:
        return None
    rule = ElementRule(step=end.scale, keep=1.0 - end.decay)
    match chain.rule:
        case scale_by_adam() as adam:
            beta1, beta2 = map(ctx.read, adam.betas)
            return replace(
                rule,
                rule=StepRule.ADAM,
                first_weight=1 - beta1,
                second_weight=1 - beta2,
                eps=ctx.read(adam.eps),
                inverse_correction=1 / root_of(1 - beta2**t),
                step=end.scale / (1 - beta1**t),
            )
        case scale_by_rss() as rss:
            return replace(rule, rule=StepRule.ROOT_OF_SUM, eps=ctx.read(rss.eps))
        case sign_momentum() as lion:
            beta1, beta2 = map(ctx.read, lion.betas)
            return replace(rule, rule=StepRule.LION, first_weight=1 - beta2, mix=1 - beta1)
        case momentum(heavy_ball=True) as ball:
            beta, dampening = ctx.read(ball.beta), ctx.read(ball.dampening)
            share = 1 - dampening * (t != 1)
            return replace(rule, rule=StepRule.HEAVY_BALL, first_weight=share, mix=beta, nesterov=ball.nesterov)
        case momentum() as average:
            share = 1 - ctx.read(average.beta)
            return replace(rule, rule=StepRule.AVERAGE, first_weight=share, nesterov=average.nesterov)
    return rule


def read_matrix_rule(chain: CompiledFactored, ctx: Context) -> MatrixRule | None:
    """Return the numbers of a step that bounds and scales an update; None if one is known to a device only."""
    tail = chain.tail
    before = tail.read(ctx, ends_chain=chain.average is None, on_device=True)
    end = Tail(None, (), None, False).read(ctx, on_device=True)
    averaging = weight_of(chain.rms.decay, ctx)
    if before is None or end is None or averaging is None:
        return None
    after: Number
    share, after, decay = 0.0, 1.0, before.decay
    if chain.average is not None:
        share = 1 - ctx.read(chain.average.beta)
        after = 1.0 if tail.applies_lr else end.scale
        decay = decay * after
    return MatrixRule(
        averaging=averaging,
        eps=ctx.read(chain.rms.eps) or 0.0,
        threshold=None if tail.threshold is None else ctx.read(tail.threshold.threshold),
        least_rms=None if tail.least_rms is None else ctx.read(tail.least_rms.eps),
        step=before.scale,
        decay=decay,
        decay_is_scaled=tail.decay_is_scaled,
        first_weight=share,
        after=after,
    )
