"""SUMO: orthogonalised momentum in a subspace (arXiv 2505.24749)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.recipes.hidden_matrices import is_hidden_matrix
from optstate.recipes.muon import own_learning_rate
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["SUMO"]


class SUMO(Optimizer):
    """A momentum of the projected gradient, orthogonalised exactly, and the rest of the gradient as it is.

    One step of an m x n matrix with m >= n; else the projection is from the right (algorithm 1)::

        every K steps  Q' <- leading `rank` left singular vectors of g;  M <- Q'^T Q M;  Q <- Q'
        M <- momentum M + Q^T g;   O <- U V^T of M's singular value decomposition
        p <- (1 - lr weight_decay) p - lr (Q O + g - Q Q^T g)

    State: `4 rank (m + n)` bytes per matrix. Other parameters get AdamW, embeddings and output heads among them where
    they are declared (`optstate.declare_roles(model)`).

    Args:
        params: as `optstate.Optimizer` takes them, best from `optstate.declare_roles`.
        lr: of hidden matrices.
        weight_decay: decoupled, on every parameter of its group.
        momentum: weight of the past in the decaying sum of projected gradients; the paper names none.
        rank: vectors of the projection.
        update_proj_gap: steps between two projections (K).
        projection: "randomized" as in the paper, from a random sketch and two power iterations; "svd" is exact, and
            gathers a parameter that is split.
        adam_lr: learning rate of AdamW; None for `lr`. A schedule of the group's learning rate moves both alike.
        betas, eps: of AdamW.
        first: store of the momentum.
        adam_first, adam_second: stores of AdamW's moments.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.

    Left out: the bound on the growth of `O`, whose norm is the root of the rank at every step but those where M has a
    lower one, and so hardly ever grows.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        rank: int = 128,
        update_proj_gap: int = 250,
        projection: Literal["randomized", "svd"] = "randomized",
        adam_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        first: Store = Full(),
        adam_first: Store = Full(),
        adam_second: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        inner = updates.chain(updates.momentum(first, momentum, heavy_ball=True), updates.orthogonalize_exactly())
        rest = updates.chain()
        sumo = updates.chain(
            updates.project_and_carry(inner, rank, update_proj_gap, 1.0, projection, residual=rest),
            updates.add_decayed_weights(weight_decay),
        )
        adamw = updates.chain(
            updates.scale_by_adam(adam_first, adam_second, betas=betas, eps=eps),
            updates.add_decayed_weights(weight_decay),
            *own_learning_rate("adam_lr", adam_lr, lr),
        )
        super().__init__(params, updates.route([(is_hidden_matrix, sumo)], default=adamw), lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)
