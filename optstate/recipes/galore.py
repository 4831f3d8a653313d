"""GaLore (Zhao et al. 2024, arXiv 2403.03507) and GaLore 2 (Su et al. 2025, arXiv 2504.20437)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.recipes.hidden_matrices import make_adam_decayed_after, refuse_bad_counts, route_hidden_matrices
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["GaLore", "GaLore2"]


class GaLore(Optimizer):
    """Adam on the gradient's projection on a few singular vectors, which are made anew every `update_proj_gap` steps.

    One step on an `[m, n]` matrix with gradient g, m >= n (else g is projected from the left)::

        P <- the first `rank` right singular vectors of g, at steps 1, 1 + update_proj_gap, ...
        u = Adam(g P^T) P;   p <- p - lr scale u;   p <- p (1 - lr weight_decay)

    Hidden matrices are projected: matrices whose group declares no role, "matrix" or "query_key"
    (`optstate.declare_roles(model)`). Embeddings, heads, norms, biases and tensors of three or more dimensions get
    AdamW with the same numbers. State of a projected matrix: `rank (2 max(m, n) + min(m, n))` elements instead of
    `2 m n`. As in the official code, moments stay as they are when the vectors change.

    Args:
        params: as `optstate.Optimizer` takes them, best from `optstate.declare_roles`.
        lr: step size; the paper's runs use 1e-2 where AdamW has 1e-3 to 5e-3.
        rank: number of vectors, 128 to 1024 in the paper. A rank above the shorter side counts as that side.
        update_proj_gap: steps between two sets of vectors.
        scale: multiplies the update of projected matrices (alpha).
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
        projection: Literal["svd", "randomized", "random", "power"] = "svd",
        first: Store = Full(),
        second: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        refuse_bad_counts(rank=rank, update_proj_gap=update_proj_gap)
        adam, decay = make_adam_decayed_after(first, second, betas, eps, weight_decay)
        projected = updates.project(adam, rank=rank, gap=update_proj_gap, scale=scale, projection=projection)
        recipe = route_hidden_matrices(updates.chain(projected, decay), updates.chain(adam, decay))
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)


class GaLore2(GaLore):
    """GaLore with randomized singular vectors, which are several times cheaper and gather no split parameter.

    The vectors come from a random sketch and two power iterations (Halko, Martinsson and Tropp 2011); the paper names
    a randomized decomposition, and not how many vectors and iterations. All else is GaLore.

    Args:
        params, lr, rank, update_proj_gap, scale, betas, eps, weight_decay: as in `GaLore`.
        first, second, weights, fused_backward: as in `GaLore`.
    """

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
        first: Store = Full(),
        second: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            rank,
            update_proj_gap,
            scale,
            betas,
            eps,
            weight_decay,
            projection="randomized",
            first=first,
            second=second,
            weights=weights,
            fused_backward=fused_backward,
        )
