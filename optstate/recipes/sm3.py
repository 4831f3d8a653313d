"""SM3 (Anil et al. 2019, arXiv 1901.11150)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate import updates
from optstate.optimizer.optimizer import Optimizer
from optstate.stores import AxisMax, Full, Store
from optstate.weights import Weights

__all__ = ["SM3"]


class SM3(Optimizer):
    """Adagrad with its sums of squares bounded by one number per row and column (SM3-II, the paper's algorithm 2).

    Steps only become smaller, so the learning rate is warmed up and then kept, at a higher rate than Adam's. State of
    an m x n matrix: `4 (m + n)` bytes, and the momentum if there is one. The step divides by the exact new bound.

    Args:
        params: as `optstate.Optimizer` takes them.
        lr: step size.
        momentum: of the finished updates, `m <- momentum m + (1 - momentum) u`; 0 keeps no average of them.
        eps: added under the root.
        store: of the momentum.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.0,
        eps: float = 1e-30,
        store: Store = Full(),
        weights: Weights | str = "auto",
    ) -> None:
        steps: list[updates.Transform] = [updates.scale_by_rss(AxisMax(), eps=eps)]
        if momentum:
            steps.append(updates.momentum(store, momentum))
        super().__init__(params, updates.chain(*steps), lr=lr, weights=weights)
