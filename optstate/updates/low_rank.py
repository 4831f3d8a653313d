"""Transforms around a chain that works on a projection of the gradient: GaLore, APOLLO and Fira."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from optstate import kernels
from optstate.kernels import Scalar
from optstate.spec import ParamSpec
from optstate.stores import Full, Partial, Requests, Slot, Store
from optstate.updates.around import run_inside
from optstate.updates.base import Context, State, Transform, Update
from optstate.updates.chain import as_chain
from optstate.updates.projected import (
    Projected,
    iterate_basis,
    make_random_vectors,
    require_counts,
    take_singular_vectors,
)

__all__ = ["project", "scale_by_projected", "scale_by_residual_norm"]

ProjectionKind = Literal["svd", "randomized", "random", "power"]
PROJECTIONS = ("svd", "randomized", "random", "power")

OVERSAMPLED = 4
"""Vectors more than the rank that a random sketch takes (Halko, Martinsson and Tropp 2011, section 4.2)."""

RESIDUAL = "residual_"

ROUNDING = 1e-6
"""What a projection leaves out counts as rounding up to this share of the gradient's norm."""

SMALL_NORM = 1e-8
"""Added to norms that are divided by, as the official codes do."""


@dataclass(frozen=True)
class project(Projected):
    """Run a chain on the gradient's projection, and project its update back: `scale * up(inner(down(g)))`.

    The vectors are made anew from the gradient at steps 1, 1 + gap, 1 + 2 gap ...; statistics of the inner chain stay
    as they are then, in the new basis. Source: GaLore (Zhao et al. 2024, arXiv 2403.03507, algorithm 2).

    Args:
        inner: the chain that sees the projected gradient.
        rank: number of vectors.
        gap: steps between two bases.
        scale: multiplies the update (alpha).
        projection: "svd": the leading singular vectors; gathers a parameter that is split. "randomized": the same from
            a random sketch and two power iterations, with sums only (GaLore 2, arXiv 2504.20437). "power": one power
            iteration from the last basis. "random": normal numbers over sqrt(rank), which nobody has to keep. The
            first three wait for an accelerator at the steps that make a basis, and at no other.
        store: of the vectors, slot `projector`.
        residual: a chain for what the projection leaves out, whose update is added; None to drop it. Its slots are
            called `residual_<slot>`, and there are none where `rank` vectors are all.
    """

    gap: int = 200
    scale: float = 0.25
    projection: ProjectionKind = "svd"
    store: Store = Full()
    residual: Transform | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual is not None:
            object.__setattr__(self, "residual", as_chain(self.residual))
        require_counts(self, "gap")
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not 0 < self.scale < math.inf:
            raise ValueError(f"scale={self.scale!r}: give a positive number")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"projection={self.projection!r}: give one of {', '.join(PROJECTIONS)}")

    @property
    def period(self) -> int:
        return math.lcm(self.gap, self.inner.period)

    def own_slots(self, spec: ParamSpec) -> dict[str, Slot]:
        return {} if self.projection == "random" else {"projector": Slot(self.store, spec=self.basis_spec(spec))}

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        slots = super().slots(spec, group)
        if self.residual is not None and self._leaves_rest(spec):
            rest = spec.like(spec.shape, range(spec.ndim))
            slots |= {RESIDUAL + name: slot.turned(rest) for name, slot in self.residual.slots(rest, group).items()}
        return slots

    def _leaves_rest(self, spec: ParamSpec) -> bool:
        """Return whether something of the gradient is left for the other chain."""
        side = spec.shape[1 if self.is_right(spec) else 0]  # the side that the vectors run along
        return self.residual is not None and min(self.basis_spec(spec).shape) < side

    def _rest(self, value: Tensor, low: Tensor, basis: Tensor, spec: ParamSpec) -> Requests[Tensor]:
        """Return what the projection leaves out, and zero where that is nothing but rounding."""
        rest = value - self.up(low, basis, spec)
        of_rest, of_all = yield torch.stack([rest.square().sum(), value.square().sum()])
        return rest.mul_(of_rest > ROUNDING**2 * of_all)

    def basis(self, value: Tensor, state: State, ctx: Context) -> Requests[Tensor]:
        """Return this device's part of the vectors of the step, made anew where it is time."""
        since = (ctx.step - 1) % self.gap
        if self.projection == "random":
            return make_random_vectors(self, ctx, min(self.space(ctx.spec).shape), ctx.step - since)
        kept = state["projector"]
        if since == 0:
            kept.hold((yield from self.make_anew(value, state, ctx)))
        return kept.read()

    def make_anew(self, value: Tensor, state: State, ctx: Context) -> Requests[Tensor]:
        """Return this device's part of vectors that are made from a value, in a way that keeps them in the state."""
        if self.projection == "svd":
            return (yield from take_singular_vectors(self, value, ctx.spec))
        if self.projection == "power" and ctx.step > 1:
            return (yield from iterate_basis(self, value, state["projector"].read(), ctx.spec, 1))
        rank = min(self.space(ctx.spec).shape)
        count = min(rank + OVERSAMPLED, *ctx.spec.shape)
        start = make_random_vectors(self, ctx, count, ctx.step)
        return (yield from iterate_basis(self, value, start, ctx.spec, 3, rank))

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        value = update.values(ctx)
        basis = yield from self.basis(value, state, ctx)
        low = yield from self.down(value, basis, ctx.spec)
        step = yield from self.inside(low, state, ctx)
        whole = self.up(kernels.multiply_out(step), basis, ctx.spec)
        if self._leaves_rest(ctx.spec):
            rest = yield from self._rest(value, low, basis, ctx.spec)
            own = {name.removeprefix(RESIDUAL): s for name, s in state.items() if name.startswith(RESIDUAL)}
            chain = cast(Transform, self.residual)
            added = yield from run_inside(chain, rest, ctx.spec.like(ctx.spec.shape, range(2)), own, ctx)
            whole = whole.add_(kernels.multiply_out(added))
        return Update(whole, scale=self.scale, finite=update.finite)


@dataclass(frozen=True)
class scale_by_projected(project):
    """Multiply the gradient by how a chain scales its projection: `g * |inner(down(g))| / |down(g)|`.

    The norms are those of every row (column, where columns are the longer side), or of the whole matrix. The result
    grows from step to step by at most the factor `growth`. Source: APOLLO and APOLLO-Mini (Zhu et al. 2024, arXiv
    2412.05270, algorithm 1); the bias correction multiplies the bounded result, as in the official code.

    Args:
        inner: the chain that sees the projected gradient.
        rank: number of vectors.
        gap: steps between two bases.
        scale: multiplies the update; the official code multiplies by the root of its `scale`.
        projection: as for `project`; random by default.
        store: of the vectors, where any are kept.
        kind: "channel" for rows or columns, "tensor" for the whole matrix.
        growth: the bound of the growth of the update's norm, which is kept in slot `norm`; 0 for no bound.
    """

    scale: float = 1.0
    projection: ProjectionKind = "random"
    kind: Literal["channel", "tensor"] = "channel"
    growth: float = 1.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("channel", "tensor"):
            raise ValueError(f"kind={self.kind!r}: give 'channel' or 'tensor'")

    def own_slots(self, spec: ParamSpec) -> dict[str, Slot]:
        return {**super().own_slots(spec), **norm_slot(spec, self.growth)}

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        value = update.values(ctx)
        basis = yield from self.basis(value, state, ctx)
        low = yield from self.down(value, basis, ctx.spec)
        step = yield from self.inside(low, state, ctx)
        scaled = kernels.multiply_out(replace(step, scale=1.0))
        ratio = yield from self._ratio(scaled, low, ctx)
        result = Update(value, (ratio,), finite=update.finite)
        limit = yield from growth_limit(result, state, ctx, self.growth)
        return result.rescaled(limit).rescaled(step.scale).rescaled(self.scale)

    def _ratio(self, scaled: Tensor, low: Tensor, ctx: Context) -> Requests[Tensor]:
        """Return how much longer the inner chain made every row or column, or the whole matrix."""
        along = -1 if self.is_right(ctx.spec) else -2
        squares = [value.square().sum(along, keepdim=True) for value in (scaled, low)]
        if self.kind == "tensor":
            other = -2 if self.is_right(ctx.spec) else -1
            partial = tuple(Partial(square.sum(other, keepdim=True), other) for square in squares)
            squares = list((yield partial))
        now, before = (square.sqrt() for square in squares)
        return now / (before + SMALL_NORM)


@dataclass(frozen=True)
class scale_by_residual_norm(project):
    """Add to a projected update what the projection leaves out, scaled row by row as the chain scales the projection.

    `scale * (up(u) + limit * k * (g - up(down(g))))` with `u = inner(down(g))` and `k = |u| / |down(g)|` for every row
    (column, where columns are the longer side); the added part grows by at most the factor `growth` per step. Source:
    Fira (Chen et al. 2024, arXiv 2410.01623, algorithm 1). The official code differs from the paper: it subtracts only
    `scale` times the projection, and does not scale the added part.

    Args:
        inner: the chain that sees the projected gradient.
        rank: number of vectors.
        gap: steps between two bases.
        scale: multiplies the update (alpha).
        projection: as for `project`.
        store: of the vectors.
        growth: the bound of the growth of the added part's norm, kept in slot `norm`; 0 for no bound.
    """

    growth: float = 1.01

    def own_slots(self, spec: ParamSpec) -> dict[str, Slot]:
        return {**super().own_slots(spec), **norm_slot(spec, self.growth)}

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        value = update.values(ctx)
        basis = yield from self.basis(value, state, ctx)
        low = yield from self.down(value, basis, ctx.spec)
        step = kernels.multiply_out((yield from self.inside(low, state, ctx)))
        along = -1 if self.is_right(ctx.spec) else -2
        ratio = step.norm(dim=along, keepdim=True) / (low.norm(dim=along, keepdim=True) + SMALL_NORM)
        left_out = yield from self._rest(value, low, basis, ctx.spec)
        rest = Update(left_out, (ratio,), finite=update.finite)
        limit = yield from growth_limit(rest, state, ctx, self.growth)
        whole = kernels.multiply_out(rest.rescaled(limit)).add_(self.up(step, basis, ctx.spec))
        return Update(whole, scale=self.scale, finite=update.finite)


# --- bounds on growth ---------------------------------------------------------------------------------------------


def norm_slot(spec: ParamSpec, growth: float) -> dict[str, Slot]:
    """Return the slot of the norm of the last update; none where its growth is not bounded."""
    return {"norm": Slot(Full(), signed=False, spec=spec.like((), ()))} if growth else {}


def growth_limit(update: Update, state: State, ctx: Context, growth: float) -> Requests[Scalar]:
    """Return the factor by which an update grows by at most `growth` over the last; keep the norm that results.

    Source: Fira (arXiv 2410.01623), section 4.3, in the form of the official APOLLO code.
    """
    if not growth:
        return 1.0
    total = yield kernels.sum_of_squares(update)
    now, last = total.sqrt(), state["norm"].read()
    limit = torch.ones_like(now) if ctx.step == 1 else (now / (last + SMALL_NORM)).clamp_(min=growth).div_(growth)
    state["norm"].hold(now / limit)
    return limit.reciprocal_()
