"""AdamS (arXiv 2505.16363) and AdEMAMix (arXiv 2409.03137)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["AdEMAMix", "AdamSMN"]


class AdamSMN(Optimizer):
    """AdamS: AdamW with the momentum's own square for a second moment, so that the momentum is all the state.

    One step: `m <- b1 m + (1 - b1) g` and `p <- (1 - lr weight_decay) p - lr m / (sqrt(b2 m_old**2 + (1 - b2) g**2) +
    eps)`. Nothing is corrected for starting at zero: the first steps are at most `(1 - b1) / sqrt(1 - b2)` of the
    learning rate, 0.45 of it with the defaults and 3.2 of it with betas of (0.9, 0.999), which need a warm-up. Not to
    be confused with other methods called AdamS, such as Adam with stable weight decay.

    Args:
        params: as `optstate.Optimizer` takes them.
        lr, betas, eps, weight_decay: as in AdamW.
        first: store of the momentum, fp32 by default whatever the parameter's dtype.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        first: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        recipe = updates.chain(
            updates.scale_by_momentum_square(first, betas=betas, eps=eps), updates.add_decayed_weights(weight_decay)
        )
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)


class AdEMAMix(Optimizer):
    """AdamW with a second, slow average of gradients beside the first, which weighs old ones (algorithm 1).

    One step: `p <- (1 - lr weight_decay) p - lr (m1 / c1 + alpha m2) / (sqrt(v / c2) + eps)`, where m1, v and m2 are
    averages with the three betas, and c1 and c2 correct m1 and v for starting at zero.

    Args:
        params: as `optstate.Optimizer` takes them.
        lr, eps, weight_decay: as in AdamW.
        betas: three numbers: of the fast average, of squares, and of the slow average.
        alpha: weight of the slow average.
        t_alpha_beta3: steps until alpha and the third beta have grown to their values; None for none.
        first, slow, second: stores of the fast average, the slow average and the average of squares.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        alpha: float = 5.0,
        t_alpha_beta3: int | None = None,
        first: Store = Full(),
        slow: Store = Full(),
        second: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        warmup = 0 if t_alpha_beta3 is None else t_alpha_beta3
        recipe = updates.chain(
            updates.scale_by_ademamix(first, slow, second, betas=betas, alpha=alpha, eps=eps, warmup=warmup),
            updates.add_decayed_weights(weight_decay),
        )
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)
