"""APOLLO and APOLLO-Mini (Zhu et al. 2024, arXiv 2412.05270)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.recipes.hidden_matrices import make_adam_decayed_after, refuse_bad_counts, route_hidden_matrices
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["Apollo", "ApolloMini"]


class Apollo(Optimizer):
    """The gradient itself, each row scaled as Adam scales that row of a random projection of the gradient.

    One step on an `[m, n]` matrix with gradient g, m >= n (else rows and columns change places)::

        P <- normal numbers over sqrt(rank), others every `update_proj_gap` steps
        s_i = |Adam(g P^T)_i| / |(g P^T)_i|      of every row i; with scale_type="tensor" of the whole matrix
        u = g s, whose norm grows by 1 % per step at most
        p <- p - lr sqrt(scale) u;   p <- p (1 - lr weight_decay)

    Hidden matrices are stepped so: matrices whose group declares no role, "matrix" or "query_key"
    (`optstate.declare_roles(model)`). Embeddings, heads, norms, biases and tensors of three or more dimensions get
    AdamW with the same numbers. State of a hidden matrix: `2 rank max(m, n)` elements and one number; random vectors
    are a function of name and step and kept nowhere, where the official code keeps them.

    Args:
        params: as `optstate.Optimizer` takes them, best from `optstate.declare_roles`.
        lr: step size; the paper's runs use 1e-2.
        rank: number of vectors; the paper uses a quarter of the shorter side.
        update_proj_gap: steps between two sets of vectors.
        scale: its root multiplies the update of hidden matrices, as in the official code.
        scale_type: "channel", a scale for every row (or column), or "tensor", one for the matrix.
        proj: "random", or "svd" for singular vectors of the gradient, which are kept.
        betas, eps, weight_decay: as in the official code: eps beside the root before the bias correction, weight decay
            after the step.
        first, second: stores of the two moments, in the projected space.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.

    Raises:
        ValueError: for numbers out of range, or another `scale_type` or `proj`.
    """

    made_for_fused_backward: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 256,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        scale_type: Literal["channel", "tensor"] = "channel",
        proj: Literal["random", "svd"] = "random",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        first: Store = Full(),
        second: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        refuse_bad_counts(rank=rank, update_proj_gap=update_proj_gap)
        if scale_type not in ("channel", "tensor"):
            raise ValueError(f"scale_type={scale_type!r}: give 'channel' or 'tensor'")
        if proj not in ("random", "svd"):
            raise ValueError(f"proj={proj!r}: give 'random' or 'svd'")
        adam, decay = make_adam_decayed_after(first, second, betas, eps, weight_decay)
        scaled = updates.scale_by_projected(
            adam,
            rank=rank,
            gap=update_proj_gap,
            scale=take_root("scale", scale),
            projection=proj,
            kind=scale_type,
        )
        recipe = route_hidden_matrices(updates.chain(scaled, decay), updates.chain(adam, decay))
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)


class ApolloMini(Apollo):
    """APOLLO with one random vector and one scale per matrix: `2 max(m, n) + 1` numbers of state.

    Args:
        params, lr, update_proj_gap, proj, betas, eps, weight_decay: as in `Apollo`.
        rank: number of vectors.
        scale: its root multiplies the update; 128 makes up for the small norm of a projection on one vector.
        first, second, weights, fused_backward: as in `Apollo`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int = 1,
        update_proj_gap: int = 200,
        scale: float = 128.0,
        proj: Literal["random", "svd"] = "random",
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
            "tensor",
            proj,
            betas,
            eps,
            weight_decay,
            first=first,
            second=second,
            weights=weights,
            fused_backward=fused_backward,
        )


def take_root(name: str, value: float) -> float:
    """Return the square root of a positive number.

    Raises:
        ValueError: if the number is not positive.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r}: give a positive number")
    return math.sqrt(value)
