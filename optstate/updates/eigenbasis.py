"""A transform around a chain that works on the gradient in the eigenbasis of its Gram matrices (SOAP)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optstate import kernels
from optstate.spec import ParamSpec
from optstate.stores import Full, Requests, Slot, Store, Whole
from optstate.updates.around import Around
from optstate.updates.base import Context, State, Update
from optstate.updates.hyper import Hyper, Rule
from optstate.updates.projected import require_counts

__all__ = ["eigenbasis"]

LINEAR = ("gradient", "update", "update_sum")
"""Meanings of statistics that turn with the basis; squares are only put into its order."""

SMALL = 1e-30
"""Added to the diagonal before the first eigenvectors are taken, as the official code does."""


@dataclass(frozen=True)
class eigenbasis(Around):
    """Run a chain on the gradient in the eigenbasis of running averages of `g g^T` and `g^T g`, and turn back.

    A tensor of more dimensions has such an average, of its products over all other dimensions, for each of them. One of
    fewer than two is not turned, and skips its first step like all others.

    The averages move after the update, so that no gradient enters its own basis, and the first step makes only the
    basis: its update is zero, and the inner chain counts its steps from the second on. Every `every` steps the basis
    becomes one power iteration of the averages (QR), in the order of their diagonal; first moments turn with the
    basis, second moments are put into its order. Source: SOAP (Vyas et al. 2024, arXiv 2409.11321, algorithm 3).

    A parameter that is split is gathered at every step; every device keeps all of both averages. The steps that make
    a basis wait for an accelerator.

    Args:
        inner: the chain that sees the turned gradient.
        beta: weight of the past in the averages; group key `shampoo_beta`.
        every: steps between two bases.
        largest: a side longer than this many is not turned.
        store: of averages and bases: slots `gram0` and `basis0` of the first dimension, `gram1` and `basis1` of the
            second, and so on.
    """

    beta: float | Hyper = 0.95
    every: int = 10
    largest: int = 10000
    store: Store = Full()

    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"beta": Rule("shampoo_beta", below=1.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "every", "largest")

    @property
    def period(self) -> int:
        return math.lcm(self.every, self.inner.period)

    def space(self, spec: ParamSpec) -> ParamSpec:
        return spec.like(spec.shape, range(spec.ndim))

    def own_slots(self, spec: ParamSpec) -> dict[str, Slot]:
        slots: dict[str, Slot] = {}
        for side, size in enumerate(spec.shape):
            if spec.ndim >= 2 and size <= self.largest:
                square = spec.like((size, size), (None, None))
                slots |= {f"{what}{side}": Slot(self.store, spec=square) for what in ("gram", "basis")}
        return slots

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        part = ctx.spec.part
        whole = yield Whole(update.values(ctx).contiguous(), ctx.spec)  # the same bits for any order in memory
        old = {side: state[f"basis{side}"].read() for side in range(whole.ndim) if f"basis{side}" in state}
        result = Update(torch.zeros_like(part(whole)), finite=update.finite)
        if ctx.step > 1:
            step = yield from self.inside(part(turned(whole, old)), state, ctx, ctx.step - 1)
            step = yield Whole(kernels.multiply_out(step), ctx.spec)
            back = {side: basis.T for side, basis in old.items()}
            result = Update(part(turned(step, back)).contiguous(), finite=update.finite)
        for side in old:
            rows = whole.movedim(side, 0).flatten(1)
            gram = Update(rows @ rows.T, finite=update.finite)
            yield from state[f"gram{side}"].ema(gram, 1 - ctx.read(self.beta))
        if ctx.step == 1:
            for side in old:
                state[f"basis{side}"].hold(first_basis(state[f"gram{side}"].read()))
        elif (ctx.step - 1) % self.every == 0:
            yield from self._turn(old, state, ctx)
        return result

    def _turn(self, old: Mapping[int, Tensor], state: State, ctx: Context) -> Requests[None]:
        """Make the bases anew, and take the statistics of the inner chain into them."""
        orders, turns = {}, {}
        for side, basis in old.items():
            gram = state[f"gram{side}"].read()
            orders[side] = (basis.T @ gram @ basis).diagonal().argsort(descending=True, stable=True)
            new = torch.linalg.qr(gram @ basis[:, orders[side]])[0]
            turns[side] = basis.T @ new
            state[f"basis{side}"].hold(new)
        for name, slot in self.inner.slots(self.space(ctx.spec), ctx.group).items():
            if slot.of not in LINEAR and not slot.of_squares:
                continue
            whole = yield Whole(state[name].read(), ctx.spec)
            if slot.of_squares:
                for side, order in orders.items():
                    whole = whole.index_select(side, order)
            else:
                whole = turned(whole, turns)
            state[name].hold(ctx.spec.part(whole).contiguous(), weight=slot.smallest_weight)


def turned(value: Tensor, bases: Mapping[int, Tensor]) -> Tensor:
    """Return a tensor in the bases of its dimensions, where there are such; of a matrix `q0^T value q1`."""
    for side, basis in bases.items():
        value = (value.movedim(side, -1) @ basis).movedim(-1, side)
    return value


def first_basis(gram: Tensor) -> Tensor:
    """Return the eigenvectors of a Gram matrix, those of large values first."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    vectors: Tensor = torch.linalg.eigh(gram + SMALL * eye)[1]
    return vectors.flip(1)
