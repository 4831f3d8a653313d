"""SMMF: square-matricised momentum factorisation (Park and Lee 2024, arXiv 2412.08894)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.stores import SignRank1, Store
from optstate.weights import Weights

__all__ = ["SMMF"]


class SMMF(Optimizer):
    """Adam whose moments are kept as rows and columns of a nearly square matrix, and signs: 0.13 bytes per element.

    One step (algorithm 1)::

        G <- g as the matrix whose sides differ least;   b1 <- beta growth_rate**(t - 1);   b2 <- 1 - t**decay_rate
        M <- b1 (sign r c) + (1 - b1) G;   V <- b2 (R C) + (1 - b2) G*G
        p <- (1 - lr weight_decay) p - lr M / (sqrt(V) + eps)
        sign, r, c <- M;   R, C <- V

    Args:
        params: as `optstate.Optimizer` takes them.
        lr: step size.
        beta: weight of the past in the first moment, at the first step.
        eps: outside the root.
        weight_decay: decoupled.
        decay_rate: exponent of the second moment's averaging weight, -0.5 for convolutional nets, -0.8 for
            transformers.
        growth_rate: factor on `beta` from step to step.
        first, second: stores of the two moments, both of the matrix.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        beta: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_rate: float = -0.5,
        growth_rate: float = 0.999,
        first: Store = SignRank1(),
        second: Store = SignRank1(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        adam = updates.scale_by_moving_adam(
            first, second, updates.fading_momentum(beta, growth_rate), updates.power_decay(-decay_rate), eps
        )
        recipe = updates.chain(updates.as_square(adam), updates.add_decayed_weights(weight_decay))
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)
