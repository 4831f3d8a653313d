"""A transform around a chain whose moments follow the projection when its basis is made anew (SUMO)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from optstate.spec import ANY_MATRIX, ParamSpec
from optstate.stores import Partial, Requests, Slot, Whole
from optstate.updates.base import Context, State, Transform, Update
from optstate.updates.low_rank import project
from optstate.updates.orthogonal import refuse_vectors

__all__ = ["orthogonalize_exactly", "project_and_carry"]

LINEAR = ("gradient", "update", "update_sum")
"""Meanings of statistics that can be taken into another basis."""

LEAST = 1e-12
"""Squares of singular values below this share of the largest one count as zero: their vectors are arbitrary."""


@dataclass(frozen=True)
class project_and_carry(project):
    """Run a chain on the gradient's projection, and take its averages along into every new basis: `m <- Q'^T Q m`.

    The vectors are on the longer side of the matrix, unlike those of `project`: of an `[m, n]` matrix with m >= n they
    are `[m, rank]`. Source: SUMO (arXiv 2505.24749, algorithm 1).

    Args:
        inner: the chain that sees the projected gradient, without statistics of squares.
        rank, gap, scale, projection, store, residual: as for `project`.

    Raises:
        ValueError: if the inner chain keeps a statistic of squares, which no basis change takes along.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection == "random":
            raise ValueError("projection='random' keeps no vectors to carry averages along: give 'svd' or 'randomized'")
        for name, slot in self.inner.slots(ANY_MATRIX, {}).items():
            if slot.of not in LINEAR:
                raise ValueError(f"the statistic {name!r} cannot be carried into another basis: use project(...)")

    def is_right(self, spec: ParamSpec) -> bool:
        return spec.shape[0] < spec.shape[1]

    def basis(self, value: Tensor, state: State, ctx: Context) -> Requests[Tensor]:
        old = state["projector"].read().clone() if ctx.step > 1 and (ctx.step - 1) % self.gap == 0 else None
        new = yield from super().basis(value, state, ctx)
        if old is not None:
            yield from self._carry(old, new, state, ctx)
        return new

    def _carry(self, old: Tensor, new: Tensor, state: State, ctx: Context) -> Requests[None]:
        """Take the statistics of the inner chain from one basis into another."""
        right = self.is_right(ctx.spec)
        turn = yield (Partial(old @ new.T, -1) if right else Partial(new.T @ old, -2))
        for name, slot in self.inner.slots(self.space(ctx.spec), ctx.group).items():
            kept = state[name].read()
            state[name].hold(kept @ turn if right else turn @ kept, weight=slot.smallest_weight)


@dataclass(frozen=True)
class orthogonalize_exactly(Transform):
    """Replace the update by `U V^T` of its singular value decomposition, without vectors of the value zero.

    Computed from the Gram matrix of the shorter side, in fp64. Dimensions after the first are taken together. A
    parameter that is split is gathered. Source: SUMO (arXiv 2505.24749, algorithm 1, block 2).
    """

    elementwise: ClassVar[bool] = False
    absorbs_decay: ClassVar[bool] = True

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        return refuse_vectors(self, spec)

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        return 3

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        whole = cast(Tensor, (yield Whole(update.values(ctx), ctx.spec)))
        made = nearest_orthogonal(whole.flatten(1)).reshape(whole.shape)
        return Update(ctx.spec.part(made).contiguous(), finite=update.finite)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return `U V^T` of a matrix `U S V^T`, without the vectors whose singular value is next to nothing."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    rows = (matrix.T if is_tall else matrix).double()
    squares, vectors = torch.linalg.eigh(rows @ rows.T)
    is_lost = squares <= squares[-1:].clamp(min=1e-300) * LEAST
    inverse_roots = torch.where(is_lost, 0.0, squares.clamp(min=1e-300).rsqrt())
    made: Tensor = (vectors * inverse_roots @ (vectors.T @ rows)).to(matrix.dtype)
    return made.T if is_tall else made
