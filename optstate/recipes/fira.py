"""Fira (Chen et al. 2024, arXiv 2410.01623)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.recipes.hidden_matrices import make_adam_decayed_after, refuse_bad_counts, route_hidden_matrices
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["Fira"]


class Fira(Optimizer):
    """GaLore, and besides what the projection leaves out, scaled row by row as Adam scales the projection.

    One step on an `[m, n]` matrix with gradient g, m >= n (else rows and columns change places)::

        P <- the first `rank` right singular vectors of g, at steps 1, 1 + update_proj_gap, ...
        u = Adam(g P^T);   s_i = (g - g P^T P)_i |u_i| / |(g P^T)_i|   of every row i
        s <- s, whose norm grows by 1 % per step at most
        p <- p - lr scale (u P + s);   p <- p (1 - lr weight_decay)

    This is the paper's algorithm 1. The official code subtracts only `scale` times the projection from the gradient,
    does not scale the added part, and bounds the part's growth before the bias correction.

    Hidden matrices are stepped so: matrices whose group declares no role, "matrix" or "query_key"
    (`optstate.declare_roles(model)`). Embeddings, heads, norms, biases and tensors of three or more dimensions get
    AdamW with the same numbers. State: that of `GaLore`, and one number per matrix.

    Args:
        params: as `optstate.Optimizer` takes them, best from `optstate.declare_roles`.
        lr: step size; the paper's runs use 1e-2.
        rank: number of vectors. A rank above the shorter side counts as that side.
        update_proj_gap: steps between two sets of vectors.
        scale: multiplies the update of hidden matrices (alpha).
        betas, eps, weight_decay: as in the official code: eps beside the root before the bias correction, weight decay
            after the step.
        projection: how vectors are made; see `updates.project`.
        first, second: stores of the two moments, in the projected space.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.
    """

    made_for_fused_backward: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        projection: Literal["svd", "randomized", "power"] = "svd",
        first: Store = Full(),
        second: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        refuse_bad_counts(rank=rank, update_proj_gap=update_proj_gap)
        adam, decay = make_adam_decayed_after(first, second, betas, eps, weight_decay)
        both = updates.scale_by_residual_norm(adam, rank=rank, gap=update_proj_gap, scale=scale, projection=projection)
        recipe = route_hidden_matrices(updates.chain(both, decay), updates.chain(adam, decay))
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)
