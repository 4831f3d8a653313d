"""What recipes of hidden matrices share: which parameters these are, and the chain of all others."""

from __future__ import annotations

from optstate import updates
from optstate.spec import ParamSpec
from optstate.stores import Store

__all__ = ["is_hidden_matrix", "make_adam_decayed_after", "refuse_bad_counts", "route_hidden_matrices"]


def is_hidden_matrix(spec: ParamSpec) -> bool:
    """Select matrices whose group declares no role, or the role "matrix" or "query_key"."""
    return spec.ndim == 2 and spec.role in ("matrix", "query_key")


def route_hidden_matrices(matrices: updates.Transform, others: updates.Transform) -> updates.Route:
    """Return the route of a recipe that works on hidden matrices and gives every other parameter another chain."""
    return updates.route([(is_hidden_matrix, matrices)], default=others)


def make_adam_decayed_after(
    first: Store, second: Store, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[updates.Transform, updates.Transform]:
    """Return Adam and a weight decay as Hugging Face's AdamW has them, and after it GaLore, APOLLO and Fira."""
    adam = updates.scale_by_adam(first, second, betas=betas, eps=eps, eps_hat=True)
    return adam, updates.decay_weights_after(weight_decay)


def refuse_bad_counts(**counts: int) -> None:
    """Raise ValueError unless every number is a whole one of 1 at least, under the name that it has in a recipe."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: give a whole number, 1 at least")
