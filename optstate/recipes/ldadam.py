"""LDAdam (Robert et al. 2024, arXiv 2410.16103)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.recipes.hidden_matrices import refuse_bad_counts, route_hidden_matrices
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["LDAdam"]


class LDAdam(Optimizer):
    """Adam in a space of `rank` vectors that turns a little at every step; what the space leaves out comes back later.

    One step on an `[m, n]` matrix with gradient g, m > n (else from the left)::

        g <- g + e
        P <- one power iteration, from the last P, of rho times the first moment and 1 - rho times g
        both moments of Adam are carried from the last space into that of P
        e <- what P leaves out of g, and of the first moment
        p <- p (1 - lr weight_decay);   p <- p - lr Adam(g P^T) P

    Hidden matrices are stepped so: matrices whose group declares no role, "matrix" or "query_key"
    (`optstate.declare_roles(model)`). Embeddings, heads, norms, biases and tensors of three or more dimensions get
    AdamW with the same numbers. State of a hidden matrix: `rank (2 max(m, n) + min(m, n))` elements, and one number
    per element for e, which the official code hides in `.grad`. A file holds e, so that a run resumes exactly.

    Args:
        params: as `optstate.Optimizer` takes them, best from `optstate.declare_roles`.
        lr: step size.
        rank: number of vectors. A rank above the shorter side counts as that side.
        rho: weight of the first moment in the next vectors.
        betas, eps, weight_decay: as in torch's AdamW.
        first, second: stores of the two moments.
        error: store of e.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.
    """

    made_for_fused_backward: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 16,
        rho: float = 0.908,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        first: Store = Full(),
        second: Store = Full(),
        error: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        refuse_bad_counts(rank=rank)
        adam = updates.scale_by_adam(first, second, betas=betas, eps=eps)
        decay = updates.add_decayed_weights(weight_decay)
        projected = updates.project_anew(adam, rank=rank, rho=rho, error=error)
        recipe = route_hidden_matrices(updates.chain(projected, decay), updates.chain(adam, decay))
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)
