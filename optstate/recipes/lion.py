"""Lion (Chen et al. 2023, arXiv 2302.06675)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate import updates
from optstate.optimizer.optimizer import Optimizer
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["Lion"]


class Lion(Optimizer):
    """Sign of a mix of momentum and gradient, decoupled weight decay; the reference code's defaults.

    Args:
        params: as `optstate.Optimizer` takes them.
        lr, betas, weight_decay: as in the paper's algorithm 2.
        store: of the momentum, fp32 by default whatever the parameter's dtype.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        store: Store = Full(),
        weights: Weights | str = "auto",
    ) -> None:
        recipe = updates.chain(updates.sign_momentum(store, betas=betas), updates.add_decayed_weights(weight_decay))
        super().__init__(params, recipe, lr=lr, weights=weights)
