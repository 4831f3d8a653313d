"""Adam, Lion and SGD with their moments in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate import updates
from optstate.optimizer.optimizer import Optimizer
from optstate.recipes.adamw import AdamW
from optstate.recipes.lion import Lion
from optstate.recipes.sgd import SGD
from optstate.spec import ParamSpec
from optstate.stores import Block4, Block8
from optstate.weights import Weights

__all__ = ["AdamW4bit", "AdamW8bit", "Lion8bit", "SGDM8bit"]


class AdamW8bit(AdamW):
    """AdamW with both moments in 8-bit blocks (Dettmers et al. 2022, arXiv 2110.02861).

    State takes 2.03 bytes per element instead of 8. Parameters under 4096 elements keep fp32 moments. The update uses
    the moments before they are rounded. `stores.Block8` tells the format and its differences from bitsandbytes' CPU
    code.

    Args:
        params, lr, betas, eps, weight_decay, weights: as in `AdamW`.
        block: elements per scale, even.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        block: int = 256,
        weights: Weights | str = "auto",
    ) -> None:
        moments = Block8(block)
        super().__init__(params, lr, betas, eps, weight_decay, first=moments, second=moments, weights=weights)


class AdamW4bit(Optimizer):
    """AdamW with both moments in 4 bits (Li et al. 2023, arXiv 2309.01507).

    State takes 1.06 bytes per element instead of 8. Parameters under 4096 elements keep fp32 moments, and parameters
    whose group declares the role "embedding" or "head" keep 8 bits in both: 4 bits of the head's first moment are what
    makes long runs diverge (arXiv 2610.12444), and rows of rare tokens share blocks with those of frequent ones.
    `optstate.declare_roles(model)` declares the roles.

    Args:
        params, lr, betas, eps, weight_decay, weights: as in `AdamW`.
        block: elements per scale, even.
        rank1: scale second moments by row and column maxima instead of blocks, as in the paper; see `stores.Block4`.
            Not those of embeddings and heads.

    A file in which the second moments of embeddings and heads have 4 bits is refused by `optstate.load`, unless
    `allow_lossy=True` lets it convert them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        block: int = 128,
        rank1: bool = False,
        weights: Weights | str = "auto",
    ) -> None:
        def adamw(first: Block4 | Block8, second: Block4 | Block8) -> updates.Chain:
            return updates.chain(
                updates.scale_by_adam(first, second, betas=betas, eps=eps),
                updates.add_decayed_weights(weight_decay),
            )

        matrices = adamw(Block4(block), Block4(block, rank1=rank1))
        recipe = updates.route([(is_token_table, adamw(Block8(), Block8()))], default=matrices)
        super().__init__(params, recipe, lr=lr, weights=weights)


class Lion8bit(Lion):
    """Lion with its momentum in 8-bit blocks: 1.02 bytes of state per element.

    Args:
        params, lr, betas, weight_decay, weights: as in `Lion`.
        block: elements per scale, even. Parameters under 4096 elements keep an fp32 momentum.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        block: int = 256,
        weights: Weights | str = "auto",
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, store=Block8(block), weights=weights)


class SGDM8bit(SGD):
    """SGD with a momentum in 8-bit blocks: 1.02 bytes of state per element.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, weights: as in `SGD`; the momentum must not be 0.
        block: elements per scale, even. Parameters under 4096 elements keep an fp32 momentum.

    Raises:
        ValueError: if the momentum is 0, as there is then no state to compress.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        block: int = 256,
        weights: Weights | str = "auto",
    ) -> None:
        if not momentum:
            raise ValueError("momentum=0 keeps no state to compress: use optstate.recipes.SGD")
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, store=Block8(block), weights=weights)


def is_token_table(spec: ParamSpec) -> bool:
    """Select parameters declared to hold a row per token: embeddings and output heads."""
    return spec.role in ("embedding", "head")
