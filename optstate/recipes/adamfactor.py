"""Adam with a compressed first moment and a factored second one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate.recipes.adamw import AdamW
from optstate.stores import Block8, Factored, Store
from optstate.weights import Weights

__all__ = ["AdamFactor"]


class AdamFactor(AdamW):
    """AdamW with its first moment in 8-bit blocks and its second as row and column means.

    State takes 1.02 bytes per element instead of 8, and no second moment is quantised: the "Factor" variant of arXiv
    2309.01507 (section 4.3) with an 8-bit instead of a 4-bit first moment. The rule stays Adam's, with bias correction
    and eps outside the root; unlike in Adafactor, nothing is clipped, nothing is scaled by the parameter, and the
    averages decay at the constant rates `betas`.

    Args:
        params, lr, betas, eps, weight_decay, weights: as in `AdamW`.
        first: store of the first moment; `Block4()` for 0.53 bytes, `Full()` for 4.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        first: Store = Block8(),
        weights: Weights | str = "auto",
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, first=first, second=Factored(), weights=weights)
