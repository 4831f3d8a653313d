"""LOMO (Lv et al., arXiv 2306.09782)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import optstate
from optstate import updates
from optstate.weights import Weights

__all__ = ["Lomo"]


class Lomo(optstate.Optimizer):
    """Gradient descent without state, `p <- p (1 - lr weight_decay) - lr g`; made for fused backward.

    To clip by the global norm, as the paper recommends, call `fuse_backward(opt, clip_grad_norm=1.0)`.

    Args:
        params: as `optstate.Optimizer` takes them; names are recommended.
        lr: step size; the paper's runs use 3e-2 to 5e-2 with norm clipping.
        weight_decay: decoupled, on every parameter of its group.
        clip_grad_value: clamp gradient elements to this magnitude first; None for no clamp.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.
    """

    made_for_fused_backward: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        clip_grad_value: float | None = None,
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        recipe = optstate.chain(updates.clip_by_value(clip_grad_value), updates.add_decayed_weights(weight_decay))
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            optstate.fuse_backward(self)
