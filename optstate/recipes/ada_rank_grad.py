"""AdaRankGrad (Refael et al. 2024, arXiv 2410.17881)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.recipes.hidden_matrices import refuse_bad_counts, route_hidden_matrices
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["AdaRankGrad"]


class AdaRankGrad(Optimizer):
    """GaLore on as few singular vectors as hold all but a share `xi` of the gradient, with moments that are carried on.

    One step on an `[m, n]` matrix with gradient g, m >= n (else from the left), at steps 1, 1 + update_proj_gap, ...::

        r <- the least number of singular vectors P with |g - g P^T P| <= xi |g|, from `min_rank` to `rank`
        both moments of Adam are carried from the last space into that of P

    and at every step `p <- p (1 - lr weight_decay);  p <- p - lr scale Adam(g P^T) P`.

    There is no official code. Decided here: vectors are made anew at fixed steps, and not besides where the projected
    gradient has become small; the second moment is carried as in LDAdam, which keeps it positive, as the plain product
    of the paper's form does not; state has the size of `rank` vectors all the time, and those that are not in use are
    zero, so that files and devices know the sizes. Slot `rank_in_use` says how many are in use.

    Hidden matrices are stepped so: matrices whose group declares no role, "matrix" or "query_key"
    (`optstate.declare_roles(model)`). Embeddings, heads, norms, biases and tensors of three or more dimensions get
    AdamW with the same numbers. State of a hidden matrix: `rank (2 max(m, n) + min(m, n))` elements and one number.

    Args:
        params: as `optstate.Optimizer` takes them, best from `optstate.declare_roles`.
        lr: step size.
        rank: largest number of vectors. A rank above the shorter side counts as that side.
        min_rank: least number of vectors.
        xi: norm of what may be left out of a gradient, over the gradient's.
        update_proj_gap: steps between two sets of vectors.
        scale: multiplies the update of hidden matrices.
        betas, eps, weight_decay: as in torch's AdamW.
        first, second: stores of the two moments.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.
    """

    made_for_fused_backward: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 128,
        min_rank: int = 1,
        xi: float = 0.2,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        first: Store = Full(),
        second: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        refuse_bad_counts(rank=rank, min_rank=min_rank, update_proj_gap=update_proj_gap)
        if min_rank > rank:
            raise ValueError(f"min_rank={min_rank} is more than rank={rank}: rank is the largest number of vectors")
        if not 0 <= xi < 1:
            raise ValueError(f"xi={xi!r}: give a share of the gradient's norm, at least 0 and below 1")
        adam = updates.scale_by_adam(first, second, betas=betas, eps=eps)
        decay = updates.add_decayed_weights(weight_decay)
        projected = updates.project_by_need(adam, rank=rank, gap=update_proj_gap, scale=scale, error=xi, least=min_rank)
        recipe = route_hidden_matrices(updates.chain(projected, decay), updates.chain(adam, decay))
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)
