"""CAME's confidence: divide an average of updates by how far updates stray from the average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from optstate.spec import ParamSpec
from optstate.stores import Factored, Full, Requests, Slot, Store
from optstate.updates.base import Context, State, Transform, Update
from optstate.updates.hyper import Hyper, Rule
from optstate.updates.moments import BETAS, average

__all__ = ["scale_by_confidence"]


@dataclass(frozen=True)
class scale_by_confidence(Transform):
    """Replace the update by its running average, divided by how far updates stray from the average.

    `m <- beta1 m + (1 - beta1) u`; `s <- beta3 s + (1 - beta3) ((u - m)**2 + eps)`; the new update is `m / sqrt(s)`, or
    `m` for parameters below two dimensions, which keep no `s`. Neither average is corrected for starting at zero.

    Source: CAME (Luo et al. 2023, arXiv 2307.02047), the second half of algorithm 2.

    Args:
        first: store of `m`, slot `exp_avg`.
        residual: store of `s`, slot `exp_avg_res`, never negative.
        betas: beta1 and beta3; group key `betas`, a pair unless given with `updates.hyper`.
        eps: added to squared residuals; group key `eps`.
    """

    first: Store = Full()
    residual: Store = Factored()
    betas: tuple[float | Hyper, float | Hyper] = (0.9, 0.9999)
    eps: float | Hyper = 1e-16

    absorbs_decay: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"betas": BETAS, "eps": Rule("eps", low=1e-38)}

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        slots = {"exp_avg": average(self.first, True, "update", self.betas[0], group)}
        if spec.ndim >= 2:
            slots["exp_avg_res"] = average(self.residual, False, "distance", self.betas[1], group)
        return slots

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        average, residual = self.first.resolve(spec, True)[0], self.residual.resolve(spec, signed=False)[0]
        of_residual = 0 if spec.ndim < 2 or isinstance(residual, Factored) else 1 if residual.exact_sums else 4
        return 3 * average.reads_anew + of_residual

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        update = update.whole(ctx)
        yield from state["exp_avg"].ema(update, 1 - ctx.read(self.betas[0]))
        average = state["exp_avg"].read()
        if "exp_avg_res" not in state:
            return Update(average, finite=update.finite)
        weight, eps = 1 - ctx.read(self.betas[1]), ctx.read(self.eps)
        yield from state["exp_avg_res"].ema_of_square(update, weight, eps, minus=average)
        return Update(average, state["exp_avg_res"].inverse_root(), finite=update.finite)
