"""Updating parameters on accelerators together, in launches that they share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from optstate import kernels
from optstate.kernels import Scalar
from optstate.kernels.backend import choose_backend
from optstate.optimizer.parameters import Leaf
from optstate.optimizer.whole_steps.triton_tables import Job, TritonTables
from optstate.stores import Requests
from optstate.updates import Context

__all__ = ["update_joined"]


class SingleUpdates(Protocol):
    """What is needed of the runner of an optimizer's steps."""

    def leaf(self, param: Tensor) -> Leaf: ...

    def begin_step(
        self, leaf: Leaf, param: Tensor, grad_scale: Scalar
    ) -> tuple[Requests[None], dict[str, Any], Context]: ...

    def finish_step(self, param: Tensor, state: dict[str, Any], ctx: Context) -> None: ...

    def remember(self, params: list[Tensor], error: BaseException) -> None: ...


def update_joined(
    tables: TritonTables, runner: SingleUpdates, params: Iterable[Tensor], grad_scale: Scalar
) -> list[Tensor]:
    """Update parameters that share launches; return those that are to be updated otherwise. Call under no_grad."""
    listed = list(params)
    if not listed or kernels.rehearsing():
        return listed
    if choose_backend(runner.leaf(listed[0]).backend, listed[0].device)[0] != "triton":
        return listed
    joined = [(param, leaf.joined_step(param.device)) for param, leaf in ((p, runner.leaf(p)) for p in listed)]
    chosen = [(param, step) for param, step in joined if step is not None]
    if len(chosen) < 2:
        return listed
    try:
        begun = [(param, step, *runner.begin_step(runner.leaf(param), param, grad_scale)[1:]) for param, step in chosen]
        left = tables.step_many([Job(step, state, ctx) for _, step, state, ctx in begun])
        remaining = {id(job.ctx) for job in left}
        done = {param for param, _, _, ctx in begun if id(ctx) not in remaining}
        for param, _, state, ctx in begun:
            if param in done:
                runner.finish_step(param, state, ctx)
    except BaseException as error:
        runner.remember([param for param, _ in chosen], error)
        raise
    return [param for param in listed if param not in done]
