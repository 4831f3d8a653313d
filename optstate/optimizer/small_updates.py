"""Updating small parameters together: marked before they are written, and refused as each alone would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.autograd.graph import increment_version

from optstate.kernels import Scalar
from optstate.optimizer.broken_step import Consistency
from optstate.optimizer.parameters import Leaf
from optstate.optimizer.small_steps import Member, Round, SmallSteps, rounds
from optstate.stores import refusal_of

__all__ = ["update_alone", "update_together"]


class Runner(Protocol):
    """What is needed of the runner of an optimizer's steps."""

    @property
    def consistency(self) -> Consistency: ...

    def update(self, leaf: Leaf, param: Tensor, grad_scale: Scalar) -> None: ...

    def remember(self, params: list[Tensor], error: BaseException) -> None: ...


def update_together(
    small: SmallSteps, runner: Runner, members: Sequence[Member], grad_scale: Scalar, numbers: dict[Any, Any]
) -> None:
    """Update small parameters in as few calls as they fit into. Call under no_grad.

    They are updated in order. If a gradient is refused, those before it are updated and no other one, as if each were
    updated alone. What compiled code cannot step as it is now is updated alone in its place.

    numbers: what was made of the groups in this step already; more joins it.
    """
    for each in rounds(members):
        found = small.look(each)
        if found is not None:
            _update_round(small, runner, found, each, grad_scale, numbers)
            continue
        fitting: list[Member] = []
        for member in each:
            if small.fits(member, grad_scale):
                fitting.append(member)
                continue
            _update_fitting(small, runner, fitting, grad_scale, numbers)
            fitting = []
            update_alone(runner, member, grad_scale)
        _update_fitting(small, runner, fitting, grad_scale, numbers)


def update_alone(runner: Runner, member: Member, grad_scale: Scalar) -> None:
    """Update one small parameter as a large one is updated, from a gradient that it may not hold any more."""
    leaf, param, grad = member
    if param.grad is grad:
        runner.update(leaf, param, grad_scale)
        return
    param.grad = grad
    try:
        runner.update(leaf, param, grad_scale)
    finally:
        param.grad = None


def _update_fitting(
    small: SmallSteps, runner: Runner, members: list[Member], grad_scale: Scalar, numbers: dict[Any, Any]
) -> None:
    """Update parameters each of which compiled code can step."""
    found = small.look(members) if members else None
    if found is not None:
        _update_round(small, runner, found, members, grad_scale, numbers)
        return
    for member in members:
        update_alone(runner, member, grad_scale)


def _update_round(
    small: SmallSteps,
    runner: Runner,
    found: Round,
    members: Sequence[Member],
    grad_scale: Scalar,
    known: dict[Any, Any],
) -> None:
    """Update the parameters of a round in one call."""
    numbers = small.numbers(found, grad_scale, known)
    if numbers is None:
        for member in members:
            update_alone(runner, member, grad_scale)
        return
    consistency = runner.consistency
    try:
        table, count = small.begin(found, numbers)
        names = found.columns.names[:count]
        if count:
            consistency.begin_writing_all(names)
            increment_version(found.written(count))
            small.finish(found, numbers, table, count)
            for state, step in zip(found.states[:count], found.steps, strict=False):
                state["step"] = step
            consistency.finish_all(names)
        if count < len(found.params):
            raise refusal_of(found.columns.names[count])
    except BaseException as error:
        runner.remember(list(found.params), error)
        raise
