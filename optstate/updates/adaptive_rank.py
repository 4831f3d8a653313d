"""A projection on as many vectors as the gradient needs at the time (AdaRankGrad)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optstate.spec import ParamSpec
from optstate.stores import Full, Partial, Requests, Slot, Whole
from optstate.updates.base import Context, State
from optstate.updates.low_rank import project
from optstate.updates.moving_projection import carry_moments
from optstate.updates.projected import require_counts

__all__ = ["project_by_need"]


@dataclass(frozen=True)
class project_by_need(project):
    """Project as `project` does, on the fewest singular vectors that leave out a share `error` of the gradient.

    The number of vectors is the least `r` with `|g - up(down(g))| <= error |g|`, between `least` and `rank`, each time
    the vectors are made anew; both moments of Adam are then carried into the new space. State has the size of `rank`
    vectors, those that are not in use are zero, and how many are in use is a number in slot `rank_in_use`. Source:
    AdaRankGrad (Refael et al. 2024, arXiv 2410.17881).

    A parameter that is split is gathered at the steps that make the vectors. These steps wait for an accelerator, and
    no others.

    Args:
        inner: the chain: one `scale_by_adam`, whose `betas` are those of the group.
        rank, gap, scale, store: as for `project`; rank is the largest number of vectors. The projection is "svd".
        error: norm of what may be left out, over that of the gradient.
        least: the least number of vectors.
    """

    error: float = 0.2
    least: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "least")
        if not 0 <= self.error < 1:
            raise ValueError(f"error={self.error!r}: give a share of the gradient, at least 0 and below 1")
        if self.least > self.rank:
            raise ValueError(f"least={self.least} vectors are more than rank={self.rank}")
        if self.projection != "svd":
            raise ValueError(f"projection={self.projection!r}: the number of vectors is found with 'svd' alone")

    def own_slots(self, spec: ParamSpec) -> dict[str, Slot]:
        number = Slot(Full(), signed=False, spec=spec.like((), ()))
        return {**super().own_slots(spec), "rank_in_use": number}

    def basis(self, value: Tensor, state: State, ctx: Context) -> Requests[Tensor]:
        kept, spec = state["projector"], ctx.spec
        if (ctx.step - 1) % self.gap:
            return kept.read()
        old, is_right = kept.read(), self.is_right(spec)
        u, sizes, vh = torch.linalg.svd((yield Whole(value, spec)), full_matrices=False)
        rank = min(self.basis_spec(spec).shape)
        in_use = self._count(sizes, rank)
        is_used = torch.arange(rank, device=sizes.device) < in_use
        whole = vh[:rank] * is_used.unsqueeze(1) if is_right else u[:, :rank] * is_used
        new = self.basis_spec(spec).part(whole).contiguous()
        if ctx.step > 1:
            turn = yield (Partial(old @ new.T, -1) if is_right else Partial(new.T @ old, -2))
            yield from carry_moments(state, turn, is_right, ctx)
        state["rank_in_use"].hold(in_use.to(sizes.dtype))
        kept.hold(new)
        return new

    def _count(self, sizes: Tensor, rank: int) -> Tensor:
        """Return how many vectors are needed with these singular values, 0-d, without telling the host."""
        squares = (sizes / sizes.amax().clamp(min=torch.finfo(sizes.dtype).tiny)).square()
        left_out = squares.sum() - squares.cumsum(0)  # with 1, 2, 3 ... vectors
        enough = left_out <= self.error**2 * squares.sum()
        return (len(sizes) - enough.sum() + 1).clamp(self.least, rank)
