"""A division by one running mean square per row or column: the half of a factored second moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from optstate.spec import ParamSpec
from optstate.stores import Full, Partial, Requests, Slot, Store
from optstate.updates.base import Context, State, Transform, Update
from optstate.updates.hyper import Hyper, Rule

__all__ = ["scale_by_line_rms"]


@dataclass(frozen=True)
class scale_by_line_rms(Transform):
    """Divide every row of a matrix (column, where columns are the longer side) by the root of its running mean square.

    `u_i / (sqrt(c_i) + eps)` with `c_i <- beta c_i + (1 - beta) mean(u_i**2)`. Multiplied from that side only, an
    update stays in the space that it is in. Source: AdaMeM (Vyas et al. 2024), the one-sided Adafactor.

    Args:
        store: of the mean squares, slot `line_mean_sq`, one number per row or column.
        beta: weight of the past; group key `line_beta`.
        eps: outside of the root; group key `line_eps`.
    """

    store: Store = Full()
    beta: float | Hyper = 0.95
    eps: float | Hyper = 1e-8

    elementwise: ClassVar[bool] = False
    absorbs_decay: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {
        "beta": Rule("line_beta", below=1.0),
        "eps": Rule("line_eps", low=1e-38),
    }

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        if spec.ndim != 2:
            raise ValueError(f"scale_by_line_rms() needs a matrix, and {spec.name!r} has {spec.ndim} dimensions")
        long = 0 if spec.shape[0] >= spec.shape[1] else 1
        value = float(self.beta.get(group) if isinstance(self.beta, Hyper) else self.beta)
        lines = spec.like((spec.shape[long],), (long,))
        return {"line_mean_sq": Slot(self.store, signed=False, smallest_weight=1.0 - value, of="square", spec=lines)}

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        return 2

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        value = update.values(ctx)
        short = -1 if ctx.spec.shape[0] >= ctx.spec.shape[1] else -2
        squares = yield Partial(value.square().sum(short), short)
        mean = Update(squares.div_(ctx.spec.shape[short]), finite=update.finite)
        yield from state["line_mean_sq"].ema(mean, 1 - ctx.read(self.beta))
        scale = (state["line_mean_sq"].read().sqrt() + ctx.read(self.eps)).reciprocal_()
        return Update(value, (scale.unsqueeze(short),), finite=update.finite)
