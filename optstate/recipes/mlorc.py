"""MLorc: moments as products of thin matrices (arXiv 2506.01897)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.stores import LowRank, Store
from optstate.weights import Weights

__all__ = ["MLorc", "MLorcLion"]


class MLorc(Optimizer):
    """AdamW whose two moments are kept as products of thin matrices: `8 rank (m + n)` bytes per m x n matrix.

    One step (algorithm 1, as the official code runs it)::

        m <- betas[0] uM vM + (1 - betas[0]) g
        v <- betas[1] repaired(uV vV) + (1 - betas[1]) g*g
        p <- p - lr sqrt(1 - betas[1]**t) / (1 - betas[0]**t) * m / (sqrt(v) + eps);   p <- (1 - lr weight_decay) p
        uM, vM <- m and uV, vV <- v, by a random sketch of `rank` columns

    The step uses both moments before they are compressed. Negative elements of `uV vV` are repaired to the mean
    magnitude of all of them. Parameters that are no matrices keep their moments in full, where the official code does
    not train them.

    Args:
        params: as `optstate.Optimizer` takes them.
        lr, betas, eps, weight_decay: as in the official code: eps stands beside the root of the second moment before
            its bias is corrected, and the decay follows the step.
        rank: columns of the thin matrices.
        first, second: stores of the two moments; None for `LowRank(rank)`.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        rank: int = 4,
        first: Store | None = None,
        second: Store | None = None,
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        thin = LowRank(rank)
        recipe = updates.chain(
            updates.scale_by_adam(first or thin, second or thin, betas=betas, eps=eps, eps_hat=True),
            updates.decay_weights_after(weight_decay),
        )
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)


class MLorcLion(Optimizer):
    """Lion whose momentum is kept as the product of thin matrices: `4 rank (m + n)` bytes per m x n matrix.

    The sign is that of the mix with the momentum as it was kept; the new momentum is compressed after the step
    (arXiv 2506.01897, algorithm 2, as the official code runs it).

    Args:
        params: as `optstate.Optimizer` takes them.
        lr, betas, weight_decay: as in the official code; the decay follows the step.
        rank: columns of the thin matrices.
        first: store of the momentum; None for `LowRank(rank)`.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.95, 0.98),
        weight_decay: float = 0.05,
        rank: int = 4,
        first: Store | None = None,
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        recipe = updates.chain(
            updates.sign_momentum(first or LowRank(rank), betas=betas), updates.decay_weights_after(weight_decay)
        )
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)
