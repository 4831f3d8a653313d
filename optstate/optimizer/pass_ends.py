"""What hooks have autograd call later: at the end of a backward pass, or when the pass around it goes on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from optstate.optimizer.step_runner import StepRunner

__all__ = ["watch_pass_around", "weakly"]


class Hooks(Protocol):
    """What is needed of the hooks of a fused optimizer."""

    @property
    def runner(self) -> StepRunner: ...

    reference: weakref.ref[StepRunner]

    def begin_pass(self, runner: StepRunner, number: int) -> None: ...


def watch_pass_around(hooks: Hooks, node: Any) -> None:
    """Mark the pass inside which this one ran, as those of reentrant checkpoints do: that one can still fail.

    node: what the other pass is computing, whose inputs it visits next.
    """
    following = [before for before, _ in node.next_functions if before is not None]
    mark = object()
    handles: list[RemovableHandle] = []

    def on_visit(alive: Hooks, _: Any) -> None:
        for handle in handles:
            handle.remove()
        runner = alive.runner
        if mark in runner.consistency.running:
            number = torch._C._current_graph_task_id()
            if number not in runner.consistency.running:
                alive.begin_pass(runner, number)
            runner.consistency.end(mark)

    if following:
        hooks.runner.consistency.running.add(mark)
        handles += [before.register_prehook(weakly(on_visit, hooks)) for before in following]


def weakly(function: Callable[..., None], hooks: Hooks, *args: Any) -> Callable[..., None]:
    """Return `function(hooks, *args, ...)` as long as these are alive. The call returns None, as autograd demands."""
    reference = weakref.ref(hooks)

    def call(*more: Any) -> None:
        alive = reference()
        if alive is not None and alive.reference() is not None:
            function(alive, *args, *more)

    return call
