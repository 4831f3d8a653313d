"""Gradients of small parameters in a fused backward pass, which wait for one another to be used in one call."""

from __future__ import annotations

import weakref
from typing import Any

from optstate.optimizer.small_steps import Member

__all__ = ["WaitingGradients", "drop"]


class WaitingGradients:
    """Collects gradients until as many elements are there as may be held, or the backward pass ends.

    The parameters hold them no more: what a later pass computes is not added to those of a pass that failed.

    members: what waits, in order. passes: the backward pass of each, as autograd counts. names: of the parameters.
    elements: how many these are together.
    """

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.names: set[str] = set()
        self.elements = 0
        self.passes: list[int] = []
        self.watched: dict[int, weakref.ref[Any]] = {}
        """For each backward pass a reference to what autograd calls at its end: it notices when that is let go of."""

    def add(self, member: Member, number: int) -> None:
        """Take in a gradient. number: of the backward pass, as autograd counts."""
        self.members.append(member)
        self.passes.append(number)
        self.names.add(member.leaf.plan.spec.name)
        self.elements += member.leaf.plan.spec.numel

    def take(self) -> list[Member]:
        """Return what waits, and wait for nothing any more."""
        members = self.members
        self.clear()
        return members

    def clear(self) -> None:
        """Drop what waits."""
        self.members, self.passes = [], []
        self.names, self.elements = set(), 0


def drop(reference: weakref.ref[WaitingGradients], number: int, _: Any) -> None:
    """Drop the gradients of one backward pass, which failed: autograd let go of what it was to call at the end."""
    waiting = reference()
    if waiting is None:
        return
    waiting.watched.pop(number, None)
    kept = [member for member, other in zip(waiting.members, waiting.passes, strict=True) if other != number]
    passes = [other for other in waiting.passes if other != number]
    waiting.clear()
    for member, other in zip(kept, passes, strict=True):
        waiting.add(member, other)
