"""A projection whose vectors are made anew more seldom where they hardly turn (Q-GaLore)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optstate.spec import ParamSpec, is_fake
from optstate.stores import Full, Partial, Requests, Slot
from optstate.updates.base import Context, State
from optstate.updates.low_rank import project
from optstate.updates.projected import require_counts

__all__ = ["project_lazily"]


@dataclass(frozen=True)
class project_lazily(project):
    """Project as `project` does, and multiply a matrix's gap by `growth` where its vectors hardly turn any more.

    Every time the vectors are made anew, the absolute cosine of the angle between the first vector and the first one
    before is noted. Where the last `queue` cosines have a mean of `similarity` at least, the gap grows. Vectors are
    made anew at the steps `1 + k gap` of the gap at hand. Source: Q-GaLore (Zhang et al. 2024, arXiv 2407.08296,
    section 3.2), whose official code takes the cosine with the sign that the decomposition happens to give.

    Whether it is time is a number in the state. A host reads this number, and waits for an accelerator, at the steps
    `1 + k gap` of the first gap, and at no other step.

    Args:
        inner: the chain that sees the projected gradient.
        rank, gap, scale, projection, store, residual: as for `project`; gap is the first one. The projection cannot be
            "random", as such vectors turn every time.
        similarity: least mean of the cosines, above 0.
        queue: number of cosines that are looked at.
        growth: what the gap is multiplied by.
    """

    similarity: float = 0.4
    queue: int = 5
    growth: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "queue", "growth")
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity={self.similarity!r}: give a cosine above 0, 1 at most")
        if self.projection == "random":
            raise ValueError("projection='random' makes vectors that are never alike: use project()")

    def own_slots(self, spec: ParamSpec) -> dict[str, Slot]:
        return {
            **super().own_slots(spec),
            "gap": Slot(Full(), signed=False, spec=spec.like((), ())),
            "cosines": Slot(Full(), signed=False, spec=spec.like((self.queue,), (None,))),
        }

    def basis(self, value: Tensor, state: State, ctx: Context) -> Requests[Tensor]:
        kept, gap, cosines = (state[name] for name in ("projector", "gap", "cosines"))
        if not self._is_time(gap.read(), ctx):
            return kept.read()
        old = kept.read()
        new = yield from self.make_anew(value, state, ctx)
        if ctx.step == 1:
            gap.hold(torch.full_like(gap.read(), float(self.gap)))
        else:
            cosine = yield from self._cosine(old, new, ctx.spec)
            last = torch.cat([cosines.read()[1:], cosine.view(1)])
            is_alike = (last > 0).all() & (last.mean() >= self.similarity)  # 0 stands for none yet
            cosines.hold(last)
            gap.hold(torch.where(is_alike, gap.read() * self.growth, gap.read()))
        kept.hold(new)
        return kept.read()

    def _is_time(self, gap: Tensor, ctx: Context) -> bool:
        """Return whether vectors are made anew at this step, which only a step of the first gap can be."""
        since = ctx.step - 1
        if since % self.gap:
            return False
        return since == 0 or is_fake(gap) or since % int(gap) == 0

    def _cosine(self, old: Tensor, new: Tensor, spec: ParamSpec) -> Requests[Tensor]:
        """Return the absolute cosine of the angle between the first vectors of two bases, 0 for a zero vector."""
        is_right = self.is_right(spec)
        a, b = (basis[0] if is_right else basis[:, 0] for basis in (old, new))
        products = torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
        both, of_old, of_new = yield Partial(products, -1 if is_right else -2)
        tiny = torch.finfo(products.dtype).tiny
        cosine: Tensor = both.abs() / (of_old.sqrt() * of_new.sqrt()).clamp(min=tiny)
        return cosine
