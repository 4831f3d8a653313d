"""Muon (Jordan et al. 2024), with AdamW for what is no hidden matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from optstate import updates
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.spec import ParamSpec
from optstate.stores import Block8, Full, Store
from optstate.weights import Weights

__all__ = ["Muon", "Muon8bit"]


class Muon(Optimizer):
    """Momentum whose singular values are brought near one: `torch.optim.Muon`'s rule and defaults for hidden matrices.

    All other parameters get AdamW: those with fewer than two dimensions, and those declared as "embedding", "head",
    "norm" or "bias" (`optstate.declare_roles(model)`). A matrix without a declared role counts as hidden. Of tensors
    with more dimensions, such as convolutions, all dimensions after the first are taken together.

    Args:
        params: as `optstate.Optimizer` takes them, best from `optstate.declare_roles`.
        lr: of hidden matrices.
        weight_decay: decoupled, on every parameter of its group.
        momentum: weight of the past in the running average of gradients.
        nesterov: mix the gradient into the average once more.
        ns_steps: Newton-Schulz iterations, in bf16.
        adjust_lr_fn: "original", the same as None, multiplies a step by `sqrt(max(1, rows / columns))`;
            "match_rms_adamw" by `0.2 sqrt(max(rows, columns))`, so that AdamW's learning rate serves both.
        adam_lr: learning rate of AdamW; None for `lr`. A schedule of the group's learning rate moves both alike.
        betas, eps: of AdamW.
        first: store of the momentum, fp32 by default whatever the parameter's dtype.
        adam_first, adam_second: stores of AdamW's moments.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.

    The defaults of `adam_lr`, `betas` and `eps` are those of the author's code, of `lr` and `weight_decay` torch's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
        adam_lr: float | None = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        first: Store = Full(),
        adam_first: Store = Full(),
        adam_second: Store = Full(),
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        muon = updates.chain(
            updates.momentum(first, momentum, nesterov=nesterov),
            updates.orthogonalize(ns_steps, adjust_lr_fn or "original"),
            updates.add_decayed_weights(weight_decay),
        )
        adamw = updates.chain(
            updates.scale_by_adam(adam_first, adam_second, betas=betas, eps=eps),
            updates.add_decayed_weights(weight_decay),
            *own_learning_rate("adam_lr", adam_lr, lr),
        )
        super().__init__(params, updates.route([(is_hidden, muon)], default=adamw), lr=lr, weights=weights)
        if fused_backward:
            fuse_backward(self)


class Muon8bit(Muon):
    """Muon with its momentum in 8-bit blocks: 1.02 bytes of state per element of a hidden matrix.

    Args:
        params, lr, weight_decay, momentum, nesterov, ns_steps, adjust_lr_fn: as in `Muon`.
        adam_lr, betas, eps, weights, fused_backward: as in `Muon`.
        block: elements per scale, even. Parameters under 4096 elements keep an fp32 momentum. AdamW's moments of all
            other parameters, embeddings and output heads among them, have 8 bits, too.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
        adam_lr: float | None = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        block: int = 256,
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        moments = Block8(block)
        rule = (lr, weight_decay, momentum, nesterov, ns_steps, adjust_lr_fn, adam_lr, betas, eps)
        super().__init__(params, *rule, moments, moments, moments, weights=weights, fused_backward=fused_backward)


def is_hidden(spec: ParamSpec) -> bool:
    """Select matrices, convolutions included, that are neither embeddings nor output heads, norms or biases."""
    return spec.ndim >= 2 and spec.role not in ("embedding", "head", "norm", "bias")


def own_learning_rate(name: str, own: float | None, lr: float) -> list[updates.Transform]:
    """Return what gives a chain a learning rate of its own at the end, as a share of the groups' `lr`; [] for None.

    Raises:
        ValueError: if there can be no such share.
    """
    if own is None:
        return []
    if not lr > 0:
        raise ValueError(f"{name}={own!r} is kept as a share of lr={lr!r}: give an lr above 0, or {name}=None for lr")
    return [updates.scale_by_factor(own / float(lr))]
