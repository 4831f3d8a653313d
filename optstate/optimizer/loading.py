"""Loading state into an optimizer: checked as a whole first, then filled in, on all processes or on none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from optstate.distributed.agreement import DisagreementError, fail_together, reason_of
from optstate.distributed.placement import here
from optstate.optimizer import alike
from optstate.optimizer import state_dict as resume
from optstate.optimizer.broken_step import InconsistentStateError
from optstate.optimizer.missing_state import Gap, warn_of
from optstate.optimizer.moved_state import MovedStateError, Watch
from optstate.optimizer.step_runner import StepRunner

__all__ = ["Copy", "load_prepared", "watch_state"]

Copy = Callable[[Tensor, Tensor], Any]
"""Brings the values of the second tensor into the first."""


def load_prepared(
    runner: StepRunner,
    prepare: Callable[[], tuple[Mapping[str, Any], Copy]],
    content: Callable[[], Mapping[str, str]] = dict,
) -> None:
    """Fill the state of a runner's optimizer; see `Optimizer.load_prepared`."""
    runner.follow()
    optimizer, parameters, consistency = runner.optimizer, runner.parameters, runner.consistency
    shared = alike.processes(parameters.leaves.values())
    with fail_together("load", shared) as views:
        consistency.require_trained_weights("load")
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "loading inside a backward pass is refused: gradients of the old state would meet the new one; "
                "load before the forward pass, or after step()"
            )
        saved, copy = prepare()
        plan = parameters.plan(optimizer.param_groups)
        gaps = resume.check_state_dict(optimizer, plan, saved)
        taken_over = resume.names_to_take_over(optimizer, plan, saved)
        if shared:
            _note_what_is_loaded(runner, views, saved, content())
    broken = bool(consistency.broken)
    # A load is written ahead: whatever ends it before its end, no step and no save follow.
    consistency.reason = "loading has not come to its end"
    try:
        with fail_together("load, after reading", shared):
            _fill(runner, saved, gaps, copy)
    except DisagreementError as error:
        consistency.reason = f"loading failed elsewhere: {error}"
        raise InconsistentStateError(f"loading ended: {error}. Load again on all ranks before the next step") from None
    optimizer.param_groups = resume.loaded_groups(optimizer.param_groups, saved["param_groups"])
    runner.forget_flags()
    runner.ask_again()
    runner.drop_gradients(broken)
    consistency.forget()
    if runner.hooks is not None:
        runner.hooks.look_again()  # trainers load when they take an optimizer over
    resume.warn_if_rounded_otherwise(saved, optimizer.param_groups, parameters.plan(optimizer.param_groups), taken_over)
    if taken_over:
        parameters.take_names(taken_over, optimizer.param_groups)
    plan = parameters.plan(optimizer.param_groups)
    of = {gap: [param.spec.name for param, each in zip(plan, gaps, strict=True) if each is gap] for gap in Gap}
    kept = {param.spec.name for param in plan if param.fields}  # where nothing is kept nothing is missing
    warn_of([name for name in of[Gap.ANEW] if name in kept], of[Gap.DROP])
    resume.warn_if_written_otherwise(saved, plan)
    resume.warn_if_unclipped(saved, runner.clip_grad_norm)


def watch_state(runner: StepRunner, action: str) -> Callable[[], None]:
    """Return what to call when the state has been read for `action`; see `Optimizer.watch`."""
    runner.follow()
    state = runner.optimizer.state
    for param in runner.parameters.leaves:
        if param.requires_grad and param not in state:  # it was unfrozen: what trains has state
            runner.parameters.allocate(param, state)
    watch = Watch(state)

    def unmoved() -> None:
        param = watch.moved()
        if param is not None:
            raise MovedStateError(
                f"{action}() refused: {runner.name(param)!r} was updated while it was read, so that its numbers are "
                "of two steps: let no other thread step meanwhile"
            )
        runner.consistency.require_whole(action)

    return unmoved


def _note_what_is_loaded(
    runner: StepRunner, views: dict[Any, dict[str, str]], saved: Mapping[str, Any], content: Mapping[str, str]
) -> None:
    """Note what processes that share parameters must load alike."""
    entries = list(resume.entries(runner.optimizer, saved))
    steps = {param: state["step"] for param, state in entries if state}
    for those, view in runner.views(saved["param_groups"], steps).items():
        views[those] |= {**view, **content}
        for param, state in entries:
            leaf = runner.leaf(param)
            if leaf.placement is not None and leaf.placement.everyone == those:
                tensors = {f"{leaf.name}/{key}": v for key, v in state.items() if isinstance(v, Tensor) and v.ndim}
                views[those] |= alike.content(tensors)


def _fill(runner: StepRunner, saved: Mapping[str, Any], gaps: Sequence[Gap], copy: Copy) -> None:
    """Bring what was saved into the optimizer's state."""
    optimizer, consistency = runner.optimizer, runner.consistency
    watch = Watch(optimizer.state)
    for (param, state), gap in zip(resume.entries(optimizer, saved), gaps, strict=True):
        try:
            _fill_one(runner, param, state, gap, copy)
        except BaseException as error:
            consistency.reason = f"loading ended at {runner.name(param)!r}: {reason_of(error)}"
            raise
        watch.renew(param)
    moved = watch.moved()
    if moved is not None:
        consistency.reason = f"{runner.name(moved)!r} was updated while it was loaded"
        raise MovedStateError(f"{consistency.reason}: let no other thread step meanwhile, and load again")


def _fill_one(runner: StepRunner, param: Tensor, state: Mapping[str, Any], gap: Gap, copy: Copy) -> None:
    """Bring the saved state of one parameter into the optimizer's, or begin anew where none was saved."""
    if gap is Gap.NONE:
        return
    if gap is Gap.DROP:
        runner.parameters.drop(param, runner.optimizer.state)
        return
    own = runner.state_of(param)
    for key, value in own.items():
        if gap is Gap.ANEW:
            own[key] = value.zero_() if isinstance(value, Tensor) else 0
        elif isinstance(value, Tensor):
            increment_version([value, here(value)])  # a file may be read into its memory
            copy(value, state[key])
        else:
            own[key] = int(state[key])
