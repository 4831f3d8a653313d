"""Adam-mini (Zhang et al. 2024, arXiv 2406.16793)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate import updates
from optstate.optimizer.optimizer import Optimizer
from optstate.spec import ParamSpec
from optstate.stores import Full, Grouped, Store
from optstate.weights import Weights

__all__ = ["AdamMini"]


class AdamMini(Optimizer):
    """AdamW with one second moment per block of a parameter: about half of AdamW's state.

    Blocks follow the declared roles (`optstate.declare_roles(model)`):

    * "query_key": one block per attention head, `head_size` rows;
    * "norm": one block, the whole tensor;
    * "bias", and every other parameter with fewer than two dimensions: one block per element, as in Adam;
    * all other parameters, embeddings and output heads included: one block per row, an output neuron or a token. A
      layer that stores `[inputs, outputs]`, such as GPT-2's `Conv1D`, gets one block per input.

    Without declared roles every matrix gets one block per row, which is finer.

    Args:
        params: as `optstate.Optimizer` takes them, best from `optstate.declare_roles`.
        lr, betas, eps, weight_decay: as in the official code, which advises AdamW's learning rate. A group's own
            `weight_decay` counts for that group.
        first: store of the first moment, fp32 by default whatever the parameter's dtype.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.

    Within a block the rule is that of the official code (Adam-mini 1.1.1), which differs in five points. The official
    code tells blocks by substrings of names; takes `dim * dim // n_heads` consecutive elements of a query or key for a
    head, whatever the true head size; keeps a matrix whose name it does not know in one block; keeps the first moment
    of queries and keys in the shape of their blocks, where this recipe keeps the parameter's; and never decays a
    parameter with "norm", "ln" or "bias" in its name, where this recipe decays every group that does not set
    `weight_decay` to 0.

    Raises:
        ValueError: for a "query_key" parameter without a head_size, or with a number of rows it does not divide.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        first: Store = Full(),
        weights: Weights | str = "auto",
    ) -> None:
        def blocks(second: Store) -> updates.Chain:
            adam = updates.scale_by_adam(first, second, betas=betas, eps=eps)
            return updates.chain(adam, updates.add_decayed_weights(weight_decay))

        recipe = updates.route(
            [
                (is_norm, blocks(Grouped("tensor"))),
                (is_elementwise, blocks(Full())),
                (is_query_key, blocks(Grouped("head"))),
            ],
            default=blocks(Grouped("row")),
        )
        super().__init__(params, recipe, lr=lr, weights=weights)


def is_norm(spec: ParamSpec) -> bool:
    """Select parameters declared as weights of a normalisation layer."""
    return spec.role == "norm"


def is_elementwise(spec: ParamSpec) -> bool:
    """Select declared biases and all other parameters with at most one dimension."""
    return spec.role == "bias" or spec.ndim <= 1


def is_query_key(spec: ParamSpec) -> bool:
    """Select parameters declared as projections to queries or keys."""
    return spec.role == "query_key"
