"""The numbers of a step, read from the param group once more in every step, as backends of tensors take them."""

from __future__ import annotations

import math
from dataclasses import replace

from optstate.kernels.native import StepRule
from optstate.kernels.rules import ElementRule, MatrixRule
from optstate.optimizer.whole_steps.elementwise import CompiledElementwise
from optstate.optimizer.whole_steps.factored import CompiledFactored
from optstate.optimizer.whole_steps.tail import Tail
from optstate.updates import Context, momentum, scale_by_adam, scale_by_rss, sign_momentum

__all__ = ["read_element_rule", "read_matrix_rule"]


def read_element_rule(chain: CompiledElementwise, ctx: Context) -> ElementRule | None:
    """Return the numbers of a step in which every element goes its own way; None if one is known to a device only."""
    end = chain.tail.read(ctx)
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
                inverse_correction=1 / math.sqrt(1 - beta2**ctx.step),
                step=end.scale / (1 - beta1**ctx.step),
            )
        case scale_by_rss() as rss:
            return replace(rule, rule=StepRule.ROOT_OF_SUM, eps=ctx.read(rss.eps))
        case sign_momentum() as lion:
            beta1, beta2 = map(ctx.read, lion.betas)
            return replace(rule, rule=StepRule.LION, first_weight=1 - beta2, mix=1 - beta1)
        case momentum(heavy_ball=True) as ball:
            share = 1.0 if ctx.step == 1 else 1 - ctx.read(ball.dampening)
            beta = ctx.read(ball.beta)
            return replace(rule, rule=StepRule.HEAVY_BALL, first_weight=share, mix=beta, nesterov=ball.nesterov)
        case momentum() as average:
            share = 1 - ctx.read(average.beta)
            return replace(rule, rule=StepRule.AVERAGE, first_weight=share, nesterov=average.nesterov)
    return rule


def read_matrix_rule(chain: CompiledFactored, ctx: Context) -> MatrixRule | None:
    """Return the numbers of a step that bounds and scales an update; None if one is known to a device only."""
    tail = chain.tail
    before = tail.read(ctx, ends_chain=chain.average is None)
    end = Tail(None, (), None, False).read(ctx)
    if before is None or end is None:
        return None
    share, after, decay = 0.0, 1.0, before.decay
    if chain.average is not None:
        share = 1 - ctx.read(chain.average.beta)
        after = 1.0 if tail.applies_lr else end.scale
        decay *= after
    return MatrixRule(
        averaging=chain.rms.decay.weight(ctx.step, ctx.group),
        eps=ctx.read(chain.rms.eps) or 0.0,
        threshold=None if tail.threshold is None else ctx.read(tail.threshold.threshold),
        least_rms=None if tail.least_rms is None else ctx.read(tail.least_rms.eps),
        step=before.scale,
        decay=decay,
        decay_is_scaled=tail.decay_is_scaled,
        first_weight=share,
        after=after,
    )
