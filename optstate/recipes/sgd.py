"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate import updates
from optstate.optimizer.optimizer import Optimizer
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["SGD"]


class SGD(Optimizer):
    """`torch.optim.SGD`'s rule and defaults: weight decay is an L2 penalty, momentum the heavy ball.

    Args:
        params: as `optstate.Optimizer` takes them.
        lr, momentum, dampening, weight_decay, nesterov: as in torch. Without momentum there is no state.
        store: of the momentum, fp32 by default whatever the parameter's dtype.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        store: Store = Full(),
        weights: Weights | str = "auto",
    ) -> None:
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(f"nesterov=True needs a momentum and no dampening, got {momentum=} and {dampening=}")
        steps: list[updates.Transform] = [updates.add_decayed_weights(weight_decay)]
        if momentum:
            steps.append(updates.momentum(store, momentum, nesterov=nesterov, heavy_ball=True, dampening=dampening))
        super().__init__(params, updates.chain(*steps), lr=lr, weights=weights)
