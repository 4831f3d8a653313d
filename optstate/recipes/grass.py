"""GRASS (Muhamed et al. 2024, arXiv 2406.17660)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.recipes.hidden_matrices import refuse_bad_counts, route_hidden_matrices
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["Grass"]


class Grass(Optimizer):
    """Adam on some rows of each gradient, chosen anew every `update_proj_gap` steps; other rows wait.

    One step on an `[m, n]` matrix with gradient g::

        rows <- `rank` rows of g, at steps 1, 1 + update_proj_gap, ...; moments and their bias corrections begin anew
        p[rows] <- p[rows] - lr scale rho Adam(rho g[rows])
        p <- p (1 - lr weight_decay), before that

    There is no official code, and the paper leaves open what had to be decided here: rows of the weight are chosen,
    whatever side is longer; moments begin anew together with their bias corrections; weight decay is for all rows; the
    default is the deterministic choice of the largest rows. The gradient is formed whole: the saving of the paper in
    the backward pass itself is not made.

    Hidden matrices are stepped so: matrices whose group declares no role, "matrix" or "query_key"
    (`optstate.declare_roles(model)`). Embeddings, heads, norms, biases and tensors of three or more dimensions get
    AdamW with the same numbers. State of a hidden matrix: `2 rank n` elements and one or two numbers per chosen row.

    Args:
        params: as `optstate.Optimizer` takes them, best from `optstate.declare_roles`.
        lr: step size.
        rank: number of rows. More than a matrix has count as all.
        update_proj_gap: steps between two choices.
        scale: multiplies the update of hidden matrices (alpha).
        betas, eps, weight_decay: as in torch's AdamW.
        selection: "top", "norm" or "uniform"; see `updates.select_rows`.
        first, second: stores of the two moments of the chosen rows.
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
        scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        selection: Literal["top", "norm", "uniform"] = "top",
        first: Store = Full(),
        second: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        refuse_bad_counts(rank=rank, update_proj_gap=update_proj_gap)
        adam = updates.scale_by_adam(first, second, betas=betas, eps=eps)
        decay = updates.add_decayed_weights(weight_decay)
        some = updates.select_rows(adam, rows=rank, gap=update_proj_gap, scale=scale, selection=selection)
        recipe = route_hidden_matrices(updates.chain(some, decay), updates.chain(adam, decay))
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)
