"""Schedule-Free AdamW (Defazio et al. 2024, arXiv 2405.15682)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["ScheduleFreeAdamW"]


class ScheduleFreeAdamW(Optimizer):
    """AdamW whose weights are averaged instead of following a schedule; the official code's rule and defaults.

    The model holds the weights at which gradients are taken. Call `optimizer.eval()` before the model is evaluated or
    its weights are saved for use, which puts the averaged weights there, and `optimizer.train()` before training goes
    on, which puts back what was there, to the bit. Between the two the optimizer makes no step and saves no state, and
    keeps a copy of the weights.

    Args:
        params: as `optstate.Optimizer` takes them.
        lr: step size, constant but for the warm-up; somewhat larger than AdamW's.
        betas: weight of the average in the weights at which gradients are taken, and of the past in the second moment.
        eps: outside the root, after the bias correction.
        weight_decay: of the weights at which gradients are taken, multiplied by the learning rate.
        warmup_steps: steps over which the learning rate grows linearly.
        r, weight_lr_power: exponents of the step and of the largest learning rate so far in the average's weights.
        first, second: stores of the sequence `z`, which stands in a first moment's place, and of the second moment.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        first: Store = Full(),
        second: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        beta1, beta2 = (updates.hyper("betas", beta, index=i) for i, beta in enumerate(betas))
        recipe = updates.chain(
            updates.scale_by_second_moment(second, beta2, eps),
            updates.add_decayed_weights(weight_decay),
            updates.schedule_free(beta1, first, warmup_steps, r, weight_lr_power),
        )
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)
