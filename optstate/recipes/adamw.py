"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate import updates
from optstate.optimizer.optimizer import Optimizer
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["AdamW"]


class AdamW(Optimizer):
    """Adam with decoupled weight decay: `torch.optim.AdamW`'s rule and defaults.

    Args:
        params: as `optstate.Optimizer` takes them.
        lr, betas, eps, weight_decay: as in torch.
        first, second: stores of the two moments, fp32 by default whatever the parameter's dtype (torch keeps them
            in the parameter's). `Full("bfloat16")` is rounded stochastically where steps would be lost.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        first: Store = Full(),
        second: Store = Full(),
        weights: Weights | str = "auto",
    ) -> None:
        recipe = updates.chain(
            updates.scale_by_adam(first, second, betas=betas, eps=eps), updates.add_decayed_weights(weight_decay)
        )
        super().__init__(params, recipe, lr=lr, weights=weights)
