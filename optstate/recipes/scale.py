"""SCALE: column-normalised gradients with momentum in the last layer (Glentis et al. 2025, arXiv 2506.16659)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.recipes.muon import own_learning_rate
from optstate.spec import ParamSpec, is_vector
from optstate.stores import Full, Store
from optstate.weights import Weights

__all__ = ["Scale"]


class Scale(Optimizer):
    """Gradient descent with every output neuron's gradient divided by its root mean square, and little state.

    Only output heads keep a momentum. Embeddings are normalised per output, too: over all tokens. Vectors get AdamW.
    Embeddings and heads are those declared so (`optstate.declare_roles(model)`); a head that is tied to the embedding
    counts as the embedding. The official code names embeddings by their parameters' names.

    Args:
        params: as `optstate.Optimizer` takes them, best from `optstate.declare_roles`.
        lr: step size.
        weight_decay: decoupled.
        momentum: weight of the past in the running average of the heads' gradients.
        adam_lr: learning rate of AdamW; None for `lr`. A schedule of the group's learning rate moves both alike.
        betas, eps: of AdamW; eps stands beside the root of the second moment before its bias is corrected.
        first: store of the heads' momentum.
        adam_first, adam_second: stores of AdamW's moments.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.

    The rule and the defaults are those of the official code. The paper divides by norms instead of root mean squares.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        adam_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        first: Store = Full(),
        adam_first: Store = Full(),
        adam_second: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        decay = updates.add_decayed_weights(weight_decay)
        hidden = updates.normalize_rows(rms=True)
        adam = updates.scale_by_adam(adam_first, adam_second, betas=betas, eps=eps, eps_hat=True)
        recipe = updates.route(
            [
                (is_vector, updates.chain(adam, decay, *own_learning_rate("adam_lr", adam_lr, lr))),
                (is_embedding, updates.chain(updates.normalize_columns(rms=True), decay)),
                (is_head, updates.chain(updates.momentum(first, momentum), hidden, decay)),
            ],
            default=updates.chain(hidden, decay),
        )
        super().__init__(params, recipe, lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)


def is_embedding(spec: ParamSpec) -> bool:
    """Select parameters declared to hold a row per token at a model's input."""
    return spec.role == "embedding"


def is_head(spec: ParamSpec) -> bool:
    """Select parameters declared to be a model's last layer."""
    return spec.role == "head"
