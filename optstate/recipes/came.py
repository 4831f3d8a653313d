"""CAME (Luo et al. 2023, arXiv 2307.02047)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate import updates
from optstate.optimizer.optimizer import Optimizer
from optstate.stores import Factored, Full, Store
from optstate.weights import Weights

__all__ = ["CAME"]


class CAME(Optimizer):
    """Adafactor's clipped update, averaged, and divided by how far updates stray from their average.

    The average is full, so a matrix keeps 4 bytes per element by default; both second moments are factored. No average
    is corrected for starting at zero: the first steps are about ten times as long as the learning rate says, so warm
    up the learning rate (algorithm 2 as the official code runs it). Parameters below two dimensions skip the last
    division.

    Args:
        params: as `optstate.Optimizer` takes them.
        lr: the authors use half to nine tenths of AdamW's.
        betas: three numbers: for the average of updates, of squared gradients, and of squared distances.
        eps: two numbers: added to squared gradients, and added to squared distances.
        clip_threshold: bound on the RMS of an update before it is averaged; None for none.
        weight_decay: decoupled, multiplied by the learning rate.
        first: store of the average. Any but `Full()` needs temporaries of the parameter's size, as the plan says.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.

    Raises:
        ValueError: if `betas` are not three numbers, `eps` not two, or a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float | None = 1.0,
        weight_decay: float = 0.0,
        first: Store = Full(),
        weights: Weights | str = "auto",
    ) -> None:
        if not isinstance(betas, tuple | list) or len(betas) != 3:
            raise ValueError(
                f"betas={betas!r} must be three numbers, such as (0.9, 0.999, 0.9999): for the averages of updates, of "
                "squared gradients, and of squared distances of updates from their average"
            )
        if not isinstance(eps, tuple | list) or len(eps) != 2:
            raise ValueError(f"eps={eps!r} must be two numbers: added to squared gradients, and to squared distances")
        beta1, beta2, beta3 = (updates.hyper("betas", beta, index=i) for i, beta in enumerate(betas))
        least_square, least_distance = (updates.hyper("eps", value, index=i) for i, value in enumerate(eps))
        recipe = updates.chain(
            updates.scale_by_rms(Factored(), decay=updates.constant(beta2), eps=least_square),
            updates.clip_by_rms(clip_threshold),
            updates.scale_by_confidence(first, Factored(), betas=(beta1, beta3), eps=least_distance),
            updates.add_decayed_weights(weight_decay),
        )
        super().__init__(params, recipe, lr=lr, weights=weights)
