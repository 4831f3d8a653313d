"""A transform around a chain that works on some rows of the gradient (GRASS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optstate import kernels
from optstate.kernels import Noise
from optstate.spec import ParamSpec
from optstate.stores import Full, Partial, Requests, Slot, Whole
from optstate.updates.around import Around
from optstate.updates.base import Context, State, Update
from optstate.updates.projected import require_counts

__all__ = ["select_rows"]

SELECTIONS = ("top", "norm", "uniform")


@dataclass(frozen=True)
class select_rows(Around):
    """Run a chain on some rows of the gradient, chosen anew every `gap` steps, and update these rows alone.

    `scale * rho * scatter(inner(rho * g[chosen]))`. At the steps that choose, statistics of the inner chain begin at
    zero again, and the inner chain counts its steps from 1, so that its bias corrections are right. A row that was
    drawn several times adds up. Source: GRASS (Muhamed et al. 2024, arXiv 2406.17660, section 3).

    Of a parameter that is split along rows, every device keeps the chosen rows; these are summed up at every step.

    Args:
        inner: the chain that sees the chosen rows.
        rows: how many rows are chosen. More than the matrix has count as all of its rows.
        gap: steps between two choices.
        scale: multiplies the update.
        selection: "top" for the rows of the largest norms, with rho = 1. "norm" draws rows with a chance proportional
            to their norm, "uniform" draws with the same chance for all, both with replacement and with
            `rho = 1 / sqrt(rows * chance)`, so that the projection is unbiased. Draws are a function of name and step.
    """

    rows: int = 128
    gap: int = 200
    scale: float = 1.0
    selection: Literal["top", "norm", "uniform"] = "top"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "rows", "gap")
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection={self.selection!r}: give one of {', '.join(SELECTIONS)}")

    @property
    def period(self) -> int:
        return math.lcm(self.gap, self.inner.period)

    def space(self, spec: ParamSpec) -> ParamSpec:
        if spec.ndim != 2:
            raise ValueError(
                f"select_rows chooses rows of matrices, and {spec.name!r} has {spec.ndim} dimensions: give it another "
                "chain, with optstate.route"
            )
        return spec.like((min(self.rows, spec.shape[0]), spec.shape[1]), (None, 1))

    def own_slots(self, spec: ParamSpec) -> dict[str, Slot]:
        per_row = Slot(Full(), signed=False, spec=spec.like(self.space(spec).shape[:1], (None,)))
        return {"chosen": per_row} if self.selection == "top" else {"chosen": per_row, "rho": per_row}

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        value = update.values(ctx)
        since = (ctx.step - 1) % self.gap
        if since == 0:
            yield from self._choose(value, state, ctx)
        place, is_here = self._places(state["chosen"].read().long(), ctx.spec, len(value))
        rho = state["rho"].read().unsqueeze(1) if "rho" in state else None
        some = value[place] if is_here is None else value[place] * is_here.unsqueeze(1)
        some = yield Partial(some if rho is None else some * rho, -2)
        step = kernels.multiply_out((yield from self.inside(some, state, ctx, since + 1)))
        step = step if rho is None else step * rho
        step = step if is_here is None else step * is_here.unsqueeze(1)
        whole = torch.zeros_like(value).index_add_(0, place, step)
        return Update(whole, scale=self.scale, finite=update.finite)

    def _choose(self, value: Tensor, state: State, ctx: Context) -> Requests[None]:
        """Choose the rows from now on, and let statistics of the inner chain begin anew."""
        count, total = self.space(ctx.spec).shape[0], ctx.spec.shape[0]
        if self.selection == "uniform":
            norms = value.new_ones(total)
        else:
            squares = yield Partial(value.square().sum(-1), -1)
            norms = (yield Whole(squares, ctx.spec.like((total,), (0,)))).sqrt()
        if self.selection == "top":
            order = norms.argsort(descending=True, stable=True)
            state["chosen"].hold(order[:count].sort().values.to(norms.dtype))
        else:
            chances = torch.where(norms.sum() > 0, norms, torch.ones_like(norms)).double()
            ends = chances.cumsum(0)
            chosen = torch.searchsorted(ends / ends[-1], draw_numbers(ctx, count), right=True).clamp_(max=total - 1)
            state["chosen"].hold(chosen.to(norms.dtype))
            state["rho"].hold((ends[-1] / (chances[chosen] * count)).sqrt().to(norms.dtype))
        space = self.space(ctx.spec)
        for name in self.inner.slots(space, ctx.group):
            yield from state[name].continue_from(value.new_zeros(state[name].shape))

    @staticmethod
    def _places(chosen: Tensor, spec: ParamSpec, here: int) -> tuple[Tensor, Tensor | None]:
        """Return where the chosen rows are in the part on this device, and whether they are there; None for yes."""
        if spec.region is None:
            return chosen, None
        local = chosen - spec.region.offset[0]
        is_here = (local >= 0) & (local < here)
        return local.clamp(0, max(here - 1, 0)), is_here


def draw_numbers(ctx: Context, count: int) -> Tensor:
    """Return numbers in [0, 1), fp64, which are a function of the parameter's name and of its step."""
    high, low = (
        Noise(f"{ctx.spec.name}/rows/{part}", ctx.step).bits16(count, ctx.param.device).double() + 32768.0
        for part in ("high", "low")
    )
    return (high * 65536.0 + low) / 2.0**32
