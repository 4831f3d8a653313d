"""AdaLomo (Lv et al., arXiv 2310.10195)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import optstate
from optstate import stores, updates
from optstate.weights import Weights

__all__ = ["AdaLomo"]


class AdaLomo(optstate.Optimizer):
    """Factored second moment, update clipped by its RMS and scaled by the parameter's RMS; made for fused backward.

    One step, with g the gradient, t the parameter's step count and a = lr * max(eps[1], RMS(p)) (algorithm 1, as
    the official code runs it)::

        row, col <- row and column means of g*g + eps[0], averaged with weight t ** decay_rate
        u = g / sqrt(row col / mean(row));   u <- u / max(1, RMS(u) / clip_threshold)
        p <- p (1 - a weight_decay) - a u

    Parameters below two dimensions keep their second moment in full; for more than two, the last two are factored
    and the others batched. State: `4 (m + n)` bytes per m x n matrix.

    Args:
        params: as `optstate.Optimizer` takes them; names are recommended.
        lr: relative step size; the paper's runs use 5e-4 to 1e-3.
        weight_decay: decoupled, multiplied by `a`, on every parameter of its group.
        clip_threshold: bound on the RMS of an update; None for none.
        decay_rate: exponent of the averaging weight, -0.8 as in Adafactor.
        eps: two numbers: added to squared gradients, and the least parameter RMS.
        clip_grad_value: clamp gradient elements to this magnitude first; None for no clamp.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.

    Raises:
        TypeError: if `decay_rate` is no number.
        ValueError: for numbers out of range.
    """

    made_for_fused_backward: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        clip_threshold: float | None = 1.0,
        decay_rate: float = -0.8,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_grad_value: float | None = None,
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        if not isinstance(eps, tuple | list) or len(eps) != 2:
            raise ValueError(f"eps={eps!r} must be two numbers: added to squared gradients, and least parameter RMS")
        if isinstance(decay_rate, bool) or not isinstance(decay_rate, int | float):
            raise TypeError(f"decay_rate={decay_rate!r} must be a number, such as -0.8")
        least_square, least_rms = (updates.hyper("eps", value, index=i) for i, value in enumerate(eps))
        recipe = optstate.chain(
            updates.clip_by_value(clip_grad_value),
            updates.scale_by_rms(stores.Factored(), decay=updates.power_decay(-decay_rate), eps=least_square),
            updates.clip_by_rms(clip_threshold),
            updates.add_decayed_weights(weight_decay),
            updates.scale_by_param_rms(least_rms),
        )
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            optstate.fuse_backward(self)
