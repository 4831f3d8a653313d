"""SOAP (Vyas et al. 2024, arXiv 2409.11321)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["SOAP"]


class SOAP(Optimizer):
    """Adam in the eigenbasis of running averages of `g g^T` and `g^T g`; the official code's rule and defaults.

    One step of an m x n matrix, with t the count of its updates (algorithm 3, as the official code runs it)::

        t = 1:  L <- (1 - b) g g^T;  R <- (1 - b) g^T g;  qL, qR <- their eigenvectors; the weight stays
        t > 1:  u <- Adam's update of qL^T g qR, with step t - 1
                p <- p - lr qL u qR^T;  p <- (1 - lr weight_decay) p
                L <- b L + (1 - b) g g^T;  R <- b R + (1 - b) g^T g
                every `precondition_frequency` steps  qL, qR <- one power iteration; moments follow

    State is no smaller than Adam's: `4 (2 m n + 2 m^2 + 2 n^2)` bytes with the defaults; compressed moments cut the
    first part. Tensors with more dimensions have a basis for each; vectors get Adam.

    Args:
        params: as `optstate.Optimizer` takes them.
        lr: step size.
        betas: of Adam's moments.
        shampoo_beta: weight of the past in `L` and `R` (b above); None for `betas[1]`.
        eps: beside the root of the second moment before its bias is corrected.
        weight_decay: decoupled, after the step.
        precondition_frequency: steps between two bases.
        max_precond_dim: a dimension of more elements is not turned.
        first, second: stores of the two moments, both of the turned gradient. `second=Factored()` is the paper's
            factorised variant.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        first: Store = Full(),
        second: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        adam = updates.scale_by_adam(first, second, betas=betas, eps=eps, eps_hat=True)
        beta = betas[1] if shampoo_beta is None else shampoo_beta
        recipe = updates.chain(
            updates.eigenbasis(adam, beta=beta, every=precondition_frequency, largest=max_precond_dim),
            updates.decay_weights_after(weight_decay, begin=2),
        )
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)
