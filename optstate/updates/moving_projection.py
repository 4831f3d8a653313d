"""A projection whose vectors move at every step, and how moments follow them (LDAdam)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optstate import kernels
from optstate.spec import ParamSpec
from optstate.stores import Full, Partial, Requests, Slot, Store
from optstate.updates.base import Context, State, Update
from optstate.updates.hyper import Hyper, Rule
from optstate.updates.projected import Projected, iterate_basis, take_singular_vectors

__all__ = ["carry_moments", "project_anew"]


@dataclass(frozen=True)
class project_anew(Projected):
    """Run a chain with two moments on a projection whose basis moves at every step, and feed back what it drops.

    The basis is one power iteration of `rho` times the first moment plus `1 - rho` times the gradient; both moments are
    carried into the new basis, and what the projection of gradient and moment dropped is added to the next gradient.
    Source: LDAdam (Robert et al. 2024, arXiv 2410.16103, algorithm 1), whose official code takes the side of a square
    matrix from the left.

    Args:
        inner: the chain: one `scale_by_adam`, whose `betas` are those of the group.
        rank: number of vectors.
        rho: weight of the first moment in the basis; group key `rho`.
        store: of the vectors, slot `projector`.
        error: of what was dropped, slot `error`: one number per element of the parameter.
    """

    rho: float | Hyper = 0.908
    store: Store = Full()
    error: Store = Full()

    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"rho": Rule("rho", high=1.0)}

    def is_right(self, spec: ParamSpec) -> bool:
        return spec.shape[0] > spec.shape[1]

    def own_slots(self, spec: ParamSpec) -> dict[str, Slot]:
        return {"projector": Slot(self.store, spec=self.basis_spec(spec)), "error": Slot(self.error)}

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        value = update.values(ctx) + state["error"].read()
        done, spec = ctx.step - 1, ctx.spec
        beta1, old = ctx.group["betas"][0], state["projector"].read()
        moment = state["exp_avg"].read().clone()
        if done:
            rho = ctx.read(self.rho)
            mixed = (self.up(moment, old, spec) * (rho / (1 - beta1**done))).add_(value, alpha=1 - rho)
            basis = yield from iterate_basis(self, mixed, old, spec, 1)
        else:
            basis = yield from take_singular_vectors(self, value, spec)
        low = yield from self.down(value, basis, spec)
        right = self.is_right(spec)
        turn = yield (Partial(old @ basis.T, -1) if right else Partial(basis.T @ old, -2))
        moved = moment @ turn if right else turn @ moment
        dropped = self.up(moment, old, spec).sub_(self.up(moved, basis, spec)).mul_(beta1 / (1 - beta1))
        state["error"].hold(dropped.add_(value).sub_(self.up(low, basis, spec)))
        if done:
            yield from carry_moments(state, turn, right, ctx)
        state["projector"].hold(basis)
        step = yield from self.inside(low, state, ctx)
        return Update(self.up(kernels.multiply_out(step), basis, spec), finite=update.finite)


def carry_moments(state: State, turn: Tensor, right: bool, ctx: Context) -> Requests[None]:
    """Carry Adam's two moments into another basis of their space, before they move; drive with `yield from`.

    The second moment is that of numbers which keep their variance (LDAdam, arXiv 2410.16103, section 3.2); what would
    become negative counts with its magnitude.

    Args:
        state: with slots `exp_avg` and `exp_avg_sq` of a chain on a projection.
        turn: products of the old vectors with the new ones; multiplies moments of the old basis.
        right: whether it multiplies from the right.
        ctx: of the parameter.
    """
    (beta1, beta2), done = ctx.group["betas"], ctx.step - 1
    k1, k2 = 1 - beta1**done, 1 - beta2**done
    first, second, square = state["exp_avg"], state["exp_avg_sq"], turn.square()
    moment = first.read()
    moved = moment @ turn if right else turn @ moment
    spread = second.read() / k2 - (moment / k1).square()
    spread = spread @ square if right else square @ spread
    yield from second.continue_from((spread + (moved / k1).square()).mul_(k2).abs_(), weight=1 - beta2)
    yield from first.continue_from(moved, weight=1 - beta1)
