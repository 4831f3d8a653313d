"""AdaMeM (Vyas, Morwani and Kakade 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.recipes.hidden_matrices import refuse_bad_counts, route_hidden_matrices
from optstate.stores import Factored, Full, Store
from optstate.weights import Weights

__all__ = ["AdaMeM"]


class AdaMeM(Optimizer):
    """Momentum of the gradient's projection, and the rest of the gradient without momentum, both as Adafactor scales.

    One step on an `[m, n]` matrix with gradient g, m >= n (else rows and columns change places)::

        P <- the first `rank` right singular vectors of g, at steps 1, 1 + update_proj_gap, ...
        M <- beta1 M + (1 - beta1) g P^T;   a = M / sqrt(running mean of M**2, factored into rows and columns)
        S = g - g P^T P;   b_i = S_i / (sqrt(running mean of S_i**2) + eps)      of every row i
        p <- p (1 - lr weight_decay);   p <- p - lr (a P + b)

    The rest is divided by one number per row only, so that it stays outside of the space of P. Source: "AdaMeM: Memory
    efficient momentum for Adafactor" (WANT workshop, ICML 2024). There is no official code. Decided here: the second
    moment of the first part is that of M; neither part corrects for averages that begin at zero, so that first steps
    are some four times as long as later ones, and need a warmup; M stays as it is when P changes; nothing is clipped;
    where `rank` vectors hold the whole gradient, what is left is rounding and is dropped.

    Hidden matrices are stepped so: matrices whose group declares no role, "matrix" or "query_key"
    (`optstate.declare_roles(model)`). Embeddings, heads, norms, biases and tensors of three or more dimensions get
    AdamW with the same betas and eps. State: `rank (m + n) + rank + 2 max(m, n)` elements.

    Args:
        params: as `optstate.Optimizer` takes them, best from `optstate.declare_roles`.
        lr: step size.
        rank: number of vectors. A rank above the shorter side counts as that side.
        update_proj_gap: steps between two sets of vectors.
        betas: weights of the past in the momentum and in both mean squares.
        eps: outside the root of the second part, and of AdamW.
        weight_decay: decoupled, by the learning rate alone.
        first: store of the momentum.
        second: store of the mean square of the first part; of AdamW's second moment, too, if it is not `Factored()`.
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
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        first: Store = Full(),
        second: Store = Factored(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        refuse_bad_counts(rank=rank, update_proj_gap=update_proj_gap)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas={betas!r} must be 2 numbers")
        beta1, beta2 = (updates.hyper("betas", beta, index=i) for i, beta in enumerate(betas))
        inner = updates.chain(
            updates.momentum(first, beta=beta1),
            updates.scale_by_rms(second, decay=updates.constant(beta2), eps=updates.hyper("least_square", 1e-30)),
        )
        rest = updates.scale_by_line_rms(beta=beta2, eps=updates.hyper("eps", eps))
        both = updates.project(inner, rank=rank, gap=update_proj_gap, scale=1.0, residual=rest)
        of_others = Full() if isinstance(second, Factored) else second
        adam = updates.scale_by_adam(first, of_others, betas=(beta1, beta2), eps=updates.hyper("eps", eps))
        decay = updates.add_decayed_weights(weight_decay)
        recipe = route_hidden_matrices(updates.chain(both, decay), updates.chain(adam, decay))
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)
