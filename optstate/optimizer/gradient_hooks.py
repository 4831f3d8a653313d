"""The hooks of a fused optimizer: what happens when a gradient arrives, and at the ends of passes and steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optstate.integrations import engines, trainers
from optstate.optimizer import stale_weights
from optstate.optimizer.broken_step import STEP
from optstate.optimizer.gradient_group import GradientGroup
from optstate.optimizer.norm_clip import NormClip, has_reentrant_checkpoint
from optstate.optimizer.parameter_hooks import ParameterHooks
from optstate.optimizer.parameters import HELD_ELEMENTS, Leaf, batches
from optstate.optimizer.pass_ends import watch_pass_around, weakly
from optstate.optimizer.small_steps import Member
from optstate.optimizer.step_runner import StepRunner
from optstate.optimizer.waiting_gradients import WaitingGradients, drop

__all__ = ["GradientHooks"]


class _Mode(Enum):
    UPDATE = "update"
    MEASURE = "measure"
    ACCUMULATE = "accumulate"


class GradientHooks:
    """The hooks that update parameters inside the backward pass.

    The runner of the optimizer's steps holds the hooks, which hold the runner weakly: an optimizer that is deleted is
    gone at once, and its hooks with it.
    """

    def __init__(
        self, runner: StepRunner, clip_grad_norm: float | None, make_handle: Callable[[Any, GradientHooks], Any]
    ) -> None:
        self.reference = weakref.ref(runner)
        """To the runner of the optimizer whose parameters are hooked."""
        self._make_handle = make_handle
        self._handle: weakref.ref[Any] | None = None
        self._clip = NormClip(clip_grad_norm)
        self._hooks = ParameterHooks(self)
        self._mode = _Mode.UPDATE
        self._updated: list[Tensor] = []
        self._hidden: list[Tensor] = []  # those whose new values the pass at hand must not see
        self._engine_checked = False
        self._group = GradientGroup()
        self._waiting = WaitingGradients()

    @property
    def runner(self) -> StepRunner:
        """What makes the steps of the optimizer whose parameters are hooked."""
        runner = self.reference()
        if runner is None:
            raise ReferenceError("the optimizer of these hooks was deleted")
        return runner

    @property
    def optimizer(self) -> Any:
        """The optimizer whose parameters are hooked."""
        return self.runner.optimizer

    @property
    def clip_grad_norm(self) -> float | None:
        """The bound on the norm of all gradients, None for none."""
        return self._clip.bound

    @property
    def handle(self) -> Any:
        """What users hold of these hooks and their optimizer: the same object as long as somebody holds it."""
        handle = self._handle() if self._handle is not None else None
        if handle is None:
            handle = self._make_handle(self.optimizer, self)
            self._handle = weakref.ref(handle)
        return handle

    @property
    def active(self) -> bool:
        """Whether backward passes update parameters."""
        runner = self.reference()
        return runner is not None and runner.hooks is self

    # --- hooks ------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Attach hooks to every parameter that trains and has none of this optimizer, as after unfreezing."""
        self._require_active("attach")
        self.runner.follow()
        self._hooks.attach(self.runner)

    def follow(self, replaced: Mapping[Tensor, Tensor], gone: Iterable[Tensor]) -> None:
        """Move hooks to parameters that were put in the place of others, which may be whole where these are sharded.

        Parameters that are in no group any more are let go.
        """
        self._hooks.release((*replaced, *gone))
        self._hooks.add(self.runner, [param for param in replaced.values() if param.requires_grad])
        if replaced:
            self.look_again()

    def remove(self) -> None:
        """Detach: backward passes leave gradients again and `step()` updates. State stays."""
        if self._waiting.members:  # those of a pass that goes on
            self._update_waiting()
        self._hooks.release(list(self._hooks.hooked))
        if self.active:
            self.runner.hooks = None
        self._reset()

    def _reset(self) -> None:
        """Forget the step in progress: what was updated and measured since the last `step()`."""
        self._show_weights()
        self._updated.clear()
        self._hooks.kept.clear()
        self._group.params.clear()
        self._waiting.clear()
        self._clip.reset()
        self._mode = _Mode.UPDATE

    def look_again(self) -> None:
        """Look for engines and trainers once more at the next update: one may have taken over meanwhile."""
        self._engine_checked = False
        self._clip.look_again()

    @property
    def _has_begun(self) -> bool:
        """Whether a backward pass has used gradients since the last `step()`."""
        return bool(self._updated or self._waiting.members)

    def _require_active(self, action: str) -> None:
        if not self.active:
            raise RuntimeError(f"{action}() needs an active fused backward: this one was removed, fuse again")

    # --- what a gradient triggers -----------------------------------------------------------------------------------

    def on_gradient(self, runner: StepRunner, param: Tensor) -> None:
        """Take the gradient of a parameter, which is complete: update with it, measure it, or keep it."""
        if param.grad is None:
            return
        if self._mode is _Mode.ACCUMULATE:
            self._hooks.kept.add(param)
            return
        try:
            if self._mode is _Mode.MEASURE:
                self._clip.add(runner, param)
                param.grad = None
                return
            leaf = self._admit(runner, param)
            if leaf is None:
                return
            if leaf.is_split:
                for complete in self._group.add(leaf, param):
                    self._update_group(complete)
                return
            small = leaf.small  # asked here first, as every call counts in a small step
            if small[1] if small is not None and small[0] is leaf.plan else leaf.is_small(param):
                self._wait(leaf, param)
                return
            try:
                runner.update(leaf, param, self._clip.scale)
            finally:
                param.grad = None
            self._note_updated(leaf, param)
        except BaseException:
            self.abandon()
            raise

    def _admit(self, runner: StepRunner, param: Tensor) -> Leaf | None:
        """Return what is known of a parameter whose gradient may be used now; None if it is not this optimizer's now.

        Raises:
            RuntimeError: if the norm to clip by is not known, or if the parameter was updated in this step already.
        """
        consistency = runner.consistency
        consistency.require_going_on("backward")
        number = torch._C._current_graph_task_id()
        if number not in consistency.running:
            self.begin_pass(runner, number)
        if self._clip.is_missing:
            raise RuntimeError(
                f"clip_grad_norm={self.clip_grad_norm} needs the norm before the update: call fused.grad_norm(loss) "
                "before loss.backward(), or run every micro-batch under fused.accumulate()"
            )
        leaf = runner.parameters.leaves.get(param)
        if leaf is None or runner.hooks is not self:
            return None
        name, waiting = leaf.plan.spec.name, self._group.params
        if (
            name in consistency.updated
            or name in self._waiting.names
            or (waiting and any(param is other for other in waiting))
        ):
            consistency.broke_off(name, "its gradient arrived twice in one step")
            raise RuntimeError(
                f"the gradient of {name!r} arrived a second time before step(): call optimizer.step() "
                "after each backward(), run all but the last micro-batch under fused.accumulate(), freeze parameters "
                "that a loss is not meant to train, and use checkpoint(..., use_reentrant=False) where checkpointed "
                "parts share a layer"
            )
        return leaf

    def _note_updated(self, leaf: Leaf, param: Tensor) -> None:
        """Remember that a parameter was updated, and hide its new values from the rest of the pass."""
        self._updated.append(param)
        if torch._C._current_graph_task_id() >= 0:
            stale_weights.hide_weight(param, leaf.plan.spec.name)
            self._hidden.append(param)

    def _wait(self, leaf: Leaf, param: Tensor) -> None:
        """Keep the gradient of a small parameter until it is used together with others.

        The parameter is hidden from now on, as if it were updated: when that happens depends on the others.
        """
        assert param.grad is not None
        member = Member(leaf, param, param.grad)
        param.grad = None
        if self._waiting.elements + leaf.plan.spec.numel > HELD_ELEMENTS:
            self._update_waiting(goes_on=True)
        self._waiting.add(member, torch._C._current_graph_task_id())
        stale_weights.hide_weight(param, leaf.plan.spec.name)
        self._hidden.append(param)

    def _update_waiting(self, goes_on: bool = False) -> None:
        """Update the parameters whose gradients wait. goes_on: whether the pass goes on, which must not see them."""
        members = self._waiting.take()
        for member in members:
            stale_weights.show_weight(member.param)
        self.runner.update_small(members, self._clip.scale)
        for leaf, param, _ in members:
            self._updated.append(param)
            if goes_on:
                stale_weights.hide_weight(param, leaf.plan.spec.name)

    def _update_group(self, params: list[Tensor]) -> None:
        self.runner.require_agreement(params)
        self._update(params)

    def _update(self, params: list[Tensor]) -> None:
        runner = self.runner
        try:
            runner.update_all(params, self._clip.scale)
        finally:
            for param in params:
                param.grad = None
        for param in params:
            self._note_updated(runner.leaf(param), param)

    # --- the beginning and the end of a pass ------------------------------------------------------------------------

    def begin_pass(self, runner: StepRunner, number: int) -> None:
        """Before the first update of a pass: leave a mark that only the end of this backward pass takes away.

        Gradients that wait are those of a pass around this one, as reentrant checkpoints make them: they are used now.
        Those of a pass that fails are dropped when autograd lets go of what it was to call at the end.
        """
        if self._waiting.members:
            self._update_waiting(goes_on=True)
        if not self._engine_checked:
            engines.refuse_live_objects(self._hooks.hooked)
            trainers.refuse_settings(self.optimizer, self.clip_grad_norm)
            self._engine_checked = True
        runner.require_ready()
        self._hooks.attach_unfrozen(runner)
        runner.consistency.begin(number)
        at_end = weakly(GradientHooks._end_pass, self, number)
        self._waiting.watched[number] = weakref.ref(at_end, partial(drop, weakref.ref(self._waiting), number))
        torch.autograd.Variable._execution_engine.queue_callback(at_end)

    def _end_pass(self, number: int) -> None:
        """Note that a backward pass ended well; called by autograd."""
        self._waiting.watched.pop(number, None)
        around = torch._C._current_autograd_node()
        try:
            if self._waiting.members:
                self._update_waiting(goes_on=around is not None)
            if self._group.params:
                self._update_group(self._group.take())
        except BaseException:
            self.abandon()
            raise
        if around is not None:
            watch_pass_around(self, around)
        else:
            self._show_weights()
        self.runner.consistency.end(number)

    def abandon(self) -> None:
        """Drop the gradients that were being collected: they must not reach the next step."""
        for param in self.runner.params():
            param.grad = None
        self._reset()

    def _show_weights(self) -> None:
        for param in self._hidden:
            stale_weights.show_weight(param)
        self._hidden.clear()

    # --- clipping and accumulation ----------------------------------------------------------------------------------

    def grad_norm(self, loss: Tensor) -> Tensor:
        """Measure the norm of all gradients of `loss`; see `FusedBackward.grad_norm`."""
        self._require_active("grad_norm")
        runner = self.runner
        if self._mode is _Mode.ACCUMULATE or self._has_begun or any(p.grad is not None for p in runner.params()):
            raise RuntimeError(
                "grad_norm() comes first in a step, but gradients were already used or are being accumulated: call "
                "step() before it; under accumulate() run every micro-batch, step() then clips their sum"
            )
        if has_reentrant_checkpoint(loss):
            raise RuntimeError(
                "grad_norm() cannot see gradients behind checkpoint(..., use_reentrant=True): use use_reentrant=False"
            )
        runner.follow()
        self._hooks.attach_unfrozen(runner)
        self._reset()
        self._mode = _Mode.MEASURE
        try:
            self._clip.backward_through(loss, runner.params())
        finally:
            self._mode = _Mode.UPDATE
        return self._clip.finish(runner)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Keep gradients and add them up instead of updating; see `FusedBackward.accumulate`."""
        self._require_active("accumulate")
        if self._has_begun:
            raise RuntimeError("accumulate() after a backward that updated: accumulate first, update last")
        runner = self.runner
        runner.follow()
        self._hooks.attach_unfrozen(runner)
        outer, self._mode = self._mode, _Mode.ACCUMULATE
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        finally:
            self._mode = outer

    # --- closing a step ---------------------------------------------------------------------------------------------

    def close_step(self) -> None:
        """Do what `optimizer.step()` does when fused: update what still holds a gradient, check, begin anew.

        Raises:
            RuntimeError: if hooks were lost, or no gradient arrived since the last step.
        """
        runner = self.runner
        if self._waiting.members:
            self._update_waiting()
        held = [param for param in runner.params() if param.grad is not None]
        lost = self._hooks.lost(held)
        if lost:
            raise RuntimeError(
                f"{runner.name(lost[0])!r} and {len(lost) - 1} more lost their backward hooks, so nothing updates "
                "them: they were converted or replaced after fuse_backward; call fused.remove() and fuse_backward() "
                "again"
            )
        if not held and not self._updated:
            raise RuntimeError(
                "step() without a gradient: no backward() ran to its end since the last step, or the model's "
                "parameters were replaced (load_state_dict(assign=True), deepcopy, fully_shard) and the optimizer has "
                "the old ones; build the optimizer and fuse after such changes"
            )
        if held:
            self._step_held(runner, held)
        self._reset()
        self._hooks.attach_unfrozen(runner)

    def _step_held(self, runner: StepRunner, held: list[Tensor]) -> None:
        """Update accumulated gradients, and those of parameters that were unfrozen after fusing."""
        try:
            runner.require_agreement(held)
            runner.consistency.begin(STEP)
            self._clip.measure(runner, held)
            for batch in batches((runner.leaf(param), param) for param in held):
                self._update([param for _, param in batch])
        except BaseException:
            self.abandon()
            raise
