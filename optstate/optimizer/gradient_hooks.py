"""The hooks of a fused optimizer: what happens when a gradient arrives, and at the ends of passes and steps."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from optstate import kernels
from optstate.distributed.agreement import LostProcessError
from optstate.distributed.placement import here, is_distributed
from optstate.distributed.sums import Pending, add_up
from optstate.integrations import engines, trainers
from optstate.kernels import Product, Scalar
from optstate.optimizer import param_groups, stale_weights
from optstate.optimizer.broken_step import STEP
from optstate.optimizer.optimizer import Optimizer
from optstate.spec import is_fake
from optstate.stores import NonFiniteGradientError

__all__ = ["GradientHooks"]


class _Mode(Enum):
    UPDATE = "update"
    MEASURE = "measure"
    ACCUMULATE = "accumulate"


class GradientHooks:
    """Updates parameters inside the backward pass. Held by the optimizer, and holds it weakly: one that is deleted is
    gone at once, and its hooks with it."""

    def __init__(
        self,
        optimizer: Optimizer,
        clip_grad_norm: float | None,
        make_handle: Callable[[Optimizer, GradientHooks], Any],
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._make_handle = make_handle
        self._handle: weakref.ref[Any] | None = None
        self.clip_grad_norm = clip_grad_norm
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._mode = _Mode.UPDATE
        self._updated: set[Tensor] = set()
        self._kept: set[Tensor] = set()
        self._squares: dict[Tensor, Tensor] = {}
        self._coefficient: Scalar | None = None
        self._engine_checked = False
        self._others: weakref.WeakSet[Tensor] | None = None
        self._waiting: list[Tensor] = []
        self._buffer = 0

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose parameters are hooked."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the optimizer of these hooks was deleted")
        return optimizer

    @property
    def handle(self) -> Any:
        """What users hold of these hooks and their optimizer: the same object as long as somebody holds it."""
        handle = self._handle() if self._handle is not None else None
        if handle is None:
            handle = self._make_handle(self.optimizer, self)
            self._handle = weakref.ref(handle)
        return handle

    # --- hooks ------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether backward passes update parameters."""
        optimizer = self._optimizer()
        return optimizer is not None and optimizer._fused is self

    def attach(self) -> None:
        """Hook every parameter that trains and has no hook of this optimizer: after unfreezing, for example."""
        self._require_active("attach")
        self.optimizer._follow_replaced()
        self._hook([p for p in self._params() if p.requires_grad and not self._is_hooked(p)])

    def _attach_new(self) -> None:
        """Hook parameters that began to train after fusing. Lost hooks are not healed: `close_step` reports them."""
        self.optimizer._follow_replaced()
        self._hook([p for p in self._params() if p.requires_grad and p not in self._handles])

    def take_over(self, replaced: Mapping[Tensor, Tensor]) -> None:
        """Hook parameters that were put in the place of others, and let those go: they may be whole where these are
        sharded."""
        self.let_go(replaced)
        self._hook([p for p in replaced.values() if p.requires_grad])
        self.look_again()

    def let_go(self, params: Iterable[Tensor]) -> None:
        """Leave the gradients of these parameters alone from now on."""
        for param in params:
            handle = self._handles.pop(param, None)
            if handle is not None:
                handle.remove()
            self._kept.discard(param)

    def _hook(self, missing: list[Tensor]) -> None:
        if missing:
            engines.refuse_live_objects(missing)
            self._replace_older(missing)
            engines.refuse_parameters((self._name(p), p) for p in missing)
        for param in missing:
            handle = param.register_post_accumulate_grad_hook(_Hook(self))  # type: ignore[no-untyped-call]
            weakref.finalize(self, handle.remove).atexit = False  # an optimizer that is gone leaves nothing behind
            self._handles[param] = handle
            if param.grad is not None:
                self._kept.add(param)

    def _replace_older(self, params: list[Tensor]) -> None:
        """Take the hooks over from optimizers that were fused earlier: a second fit, or a notebook cell run again."""
        hooks = (hook for p in params for hook in (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values())
        found = {hook.hooks(): None for hook in hooks if isinstance(hook, _Hook)}
        for older in found:
            if older is None or older is self or older._optimizer() is None:
                continue
            which = f"{type(older.optimizer).__name__} over {sum(1 for _ in older._params())} parameters"
            older.optimizer._replaced_by = weakref.ref(self)
            older.remove()
            warnings.warn(
                f"an older {which} was fused over parameters of this {type(self.optimizer).__name__}: only this one "
                "updates from now on. Call fused.remove() on the older one, or delete it, before you fuse a new one",
                stacklevel=5,
            )

    def remove(self) -> None:
        """Detach: backward passes leave gradients again and `step()` updates. State stays."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        if self.active:
            self.optimizer._fused = None
        self._reset()

    def _reset(self) -> None:
        """Forget the step in progress: what was updated and measured since the last `step()`."""
        self._show_weights()
        self._updated.clear()
        self._kept.clear()
        self._squares.clear()
        self._waiting.clear()
        self._coefficient = None
        self._mode = _Mode.UPDATE

    def look_again(self) -> None:
        """Look for engines and trainers once more at the next update: one may have taken over meanwhile."""
        self._engine_checked, self._others = False, None

    def _require_active(self, action: str) -> None:
        if not self.active:
            raise RuntimeError(f"{action}() needs an active fused backward: this one was removed, fuse again")

    def _is_hooked(self, param: Tensor) -> bool:
        handle = self._handles.get(param)
        hooks = getattr(param, "_post_accumulate_grad_hooks", None)
        return handle is not None and hooks is not None and handle.id in hooks

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _name(self, param: Tensor) -> str:
        return self.optimizer._name(param)

    # --- what a gradient triggers -----------------------------------------------------------------------------

    def _on_gradient(self, param: Tensor) -> None:
        """Called by autograd when `param.grad` is complete."""
        if param.grad is None:
            return
        if self._mode is _Mode.ACCUMULATE:
            self._kept.add(param)
            return
        try:
            if self._mode is _Mode.MEASURE:
                self._measure(param)
                param.grad = None
                return
            self._check_update(param)
            if param not in self._handles:
                return  # it was taken out of the param groups
            if self.optimizer._leaf(param).is_split:
                self._wait_for_group(param)
            else:
                self._update([param])
        except BaseException:
            self.abandon()
            raise

    def _wait_for_group(self, param: Tensor) -> None:
        """Update split parameters together once the gradients of all in their group are there.

        FSDP2 scatters the gradients of a group into one buffer and then calls the hooks of its parameters in order, so
        none of them could be freed before the last, and sums over devices need only be taken once for all of them.
        """
        grad = here(param.grad) if param.grad is not None else param
        storage = grad.untyped_storage()
        if self._waiting and storage._cdata != self._buffer:
            self._update_waiting()  # parameters behind them in their group had no gradient
        self._buffer = storage._cdata
        self._waiting.append(param)
        end = grad.storage_offset() + self.optimizer._placed(param).slots_in_buffer
        if end * grad.element_size() >= storage.nbytes():
            self._update_waiting()

    def _update_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        self.optimizer._require_agreement(waiting)
        self._update(waiting)

    def _update(self, params: list[Tensor]) -> None:
        try:
            self.optimizer._step_all(params, self._scale())
        finally:
            for param in params:
                param.grad = None
        self._updated.update(params)
        if torch._C._current_graph_task_id() >= 0:
            for param in params:
                stale_weights.hide(param, self._name(param))

    def _check_update(self, param: Tensor) -> None:
        """Raise unless this gradient may be used now."""
        optimizer = self.optimizer
        optimizer._consistency.require_going_on("backward")
        self._begin_pass()
        if self.clip_grad_norm is not None and self._coefficient is None:
            raise RuntimeError(
                f"clip_grad_norm={self.clip_grad_norm} needs the norm before the update: call fused.grad_norm(loss) "
                "before loss.backward(), or run every micro-batch under fused.accumulate()"
            )
        updated = param in self._updated or self._name(param) in optimizer._consistency.updated
        if updated or any(param is other for other in self._waiting):
            optimizer._consistency.broke_off(self._name(param), "its gradient arrived twice in one step")
            raise RuntimeError(
                f"the gradient of {self._name(param)!r} arrived a second time before step(): call optimizer.step() "
                "after each backward(), run all but the last micro-batch under fused.accumulate(), freeze parameters "
                "that a loss is not meant to train, and use checkpoint(..., use_reentrant=False) where checkpointed "
                "parts share a layer"
            )

    def _begin_pass(self) -> None:
        """Before an update: leave a mark that only the end of this backward pass takes away."""
        consistency, number = self.optimizer._consistency, torch._C._current_graph_task_id()
        if number in consistency.running:
            return
        if not self._engine_checked:
            engines.refuse_live_objects(self._handles)
            trainers.refuse_settings(self.optimizer, self.clip_grad_norm)
            self._engine_checked = True
        self._attach_new()
        self.optimizer._require_usable_values()
        self.optimizer.require_alike()
        consistency.begin(number)
        torch.autograd.Variable._execution_engine.queue_callback(_weakly(GradientHooks._end_pass, self, number))

    def _end_pass(self, number: int) -> None:
        """Called by autograd at the end of a backward pass that ended well."""
        if self._waiting:
            try:
                self._update_waiting()
            except BaseException:
                self.abandon()
                raise
        around = torch._C._current_autograd_node()
        if around is not None:
            self._watch_pass_around(around)
        else:
            self._show_weights()
        self.optimizer._consistency.end(number)

    def _watch_pass_around(self, node: Any) -> None:
        """This pass ran inside another, as those of reentrant checkpoints do, which can still fail: mark that one.

        node: what the other pass is computing, whose inputs it visits next.
        """
        following = [before for before, _ in node.next_functions if before is not None]
        mark = object()
        handles: list[RemovableHandle] = []

        def on_visit(hooks: GradientHooks, _: Any) -> None:
            for handle in handles:
                handle.remove()
            if mark in hooks.optimizer._consistency.running:
                hooks._begin_pass()
                hooks.optimizer._consistency.end(mark)

        if following:
            self.optimizer._consistency.running.add(mark)
            handles += [before.register_prehook(_weakly(on_visit, self)) for before in following]

    def abandon(self) -> None:
        """Drop the gradients that were being collected: they must not reach the next step."""
        self._show_weights()
        for param in self._params():
            param.grad = None
        self._reset()

    def _show_weights(self) -> None:
        for param in self._updated:
            stale_weights.show(param)

    def _scale(self) -> Scalar:
        return 1.0 if self._coefficient is None else self._coefficient

    @torch.no_grad()
    def _measure(self, param: Tensor) -> None:
        if param in self._squares:
            raise RuntimeError(
                f"the gradient of {self._name(param)!r} arrives in parts, so its norm cannot be measured: use "
                "checkpoint(..., use_reentrant=False)"
            )
        self._squares[param] = self._square_here(param)

    # --- clipping and accumulation ----------------------------------------------------------------------------

    def grad_norm(self, loss: Tensor) -> Tensor:
        """Measure the norm of all gradients of `loss`; see `FusedBackward.grad_norm`."""
        self._require_active("grad_norm")
        if self._mode is _Mode.ACCUMULATE or self._updated or any(p.grad is not None for p in self._params()):
            raise RuntimeError(
                "grad_norm() comes first in a step, but gradients were already used or are being accumulated: call "
                "step() before it; under accumulate() run every micro-batch, step() then clips their sum"
            )
        if _has_reentrant_checkpoint(loss):
            raise RuntimeError(
                "grad_norm() cannot see gradients behind checkpoint(..., use_reentrant=True): use use_reentrant=False"
            )
        self._attach_new()
        self._reset()
        self._mode = _Mode.MEASURE
        try:
            self._backward_through(loss)
        finally:
            self._mode = _Mode.UPDATE
        squares = self._over_devices(self._squares)
        self._squares.clear()
        return self._norm(squares)

    def _backward_through(self, loss: Tensor) -> None:
        """A backward pass that keeps the graph and leaves the gradients of other parameters as they were."""
        inputs = [p for p in self._params() if p.requires_grad]
        if not any(map(is_distributed, inputs)):
            torch.autograd.backward(loss, retain_graph=True, inputs=inputs)
            return
        # FSDP2 computes with whole parameters in the place of ours: gradients of all leaves must be computed.
        ours = set(inputs)
        if self._others is None:
            self._others = weakref.WeakSet(leaf for leaf in engines.distributed_leaves() if leaf not in ours)
        others = {leaf: leaf.grad for leaf in (*self._others, *_leaves_of(loss)) if leaf not in ours}
        for leaf in others:
            leaf.grad = None
        try:
            torch.autograd.backward(loss, retain_graph=True)
        finally:
            for leaf, grad in others.items():
                leaf.grad = grad

    def _norm(self, squares: Iterable[Tensor]) -> Tensor:
        """The norm from sums of squares; sets the coefficient of this step."""
        parts = list(squares)
        if not parts:
            raise RuntimeError("no gradient reached any parameter of the optimizer: does the loss depend on them?")
        norm = torch.stack([part.to(parts[0].device, torch.float32) for part in parts]).sum().sqrt()
        if self.clip_grad_norm is not None:
            if norm.device.type == "cpu" and not is_fake(norm) and not norm.isfinite():
                raise NonFiniteGradientError(f"the gradient norm is {norm}: nothing was changed; skip the batch")
            self._coefficient = (self.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Keep gradients and add them up instead of updating; see `FusedBackward.accumulate`."""
        self._require_active("accumulate")
        if self._updated:
            raise RuntimeError("accumulate() after a backward that updated: accumulate first, update last")
        self._attach_new()
        outer, self._mode = self._mode, _Mode.ACCUMULATE
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        finally:
            self._mode = outer

    # --- closing a step ---------------------------------------------------------------------------------------

    def close_step(self) -> None:
        """What `optimizer.step()` does when fused: update what still holds a gradient, check, begin anew.

        Raises:
            RuntimeError: if hooks were lost, or no gradient arrived since the last step.
        """
        held = [p for p in self._params() if p.grad is not None]
        lost = [p for p in self._handles if p.requires_grad and not self._is_hooked(p)]
        lost += [p for p in held if self._is_hooked(p) and p not in self._kept]  # a swapped tensor keeps a dead hook
        if lost:
            raise RuntimeError(
                f"{self._name(lost[0])!r} and {len(lost) - 1} more lost their backward hooks, so nothing updates them: "
                "they were converted or replaced after fuse_backward; call fused.remove() and fuse_backward() again"
            )
        if not held and not self._updated:
            raise RuntimeError(
                "step() without a gradient: no backward() ran since the last step, or the model's parameters were "
                "replaced (load_state_dict(assign=True), deepcopy, fully_shard) and the optimizer has the old ones; "
                "build the optimizer and fuse after such changes"
            )
        try:
            if held:
                self._step_held(held)
        except BaseException:
            self.abandon()
            raise
        self._reset()
        self._attach_new()

    def _step_held(self, held: list[Tensor]) -> None:
        """Update accumulated gradients, and those of parameters that were unfrozen after fusing."""
        self.optimizer._require_agreement(held)
        self.optimizer._consistency.begin(STEP)
        if self.clip_grad_norm is not None and self._coefficient is None:
            try:
                squares = self._over_devices({param: self._square_here(param) for param in held})
            except LostProcessError as error:
                raise self.optimizer._lost(held, error) from error.__cause__
            self._norm(squares)
        for batch in self.optimizer._batches(held):
            self._update(batch)

    @torch.no_grad()
    def _square_here(self, param: Tensor) -> Tensor:
        """The sum of squares of a gradient, as far as it is on this device."""
        leaf = self.optimizer._leaf(param)
        return kernels.sum_of_squares(Product(param_groups.checked_gradient(param, leaf.plan.spec, leaf.placement)))

    def _over_devices(self, squares: dict[Tensor, Tensor]) -> list[Tensor]:
        """Each sum of squares over all devices that have a part of its parameter."""
        total, split = [], []
        for param, square in squares.items():
            leaf = self.optimizer._leaf(param)
            if leaf.is_split and leaf.placement is not None:
                split.append(Pending(leaf.placement, square))
            else:
                total.append(square)
        return total + add_up(split)


class _Hook:
    """A gradient hook that does not keep the optimizer alive."""

    def __init__(self, hooks: GradientHooks) -> None:
        self.hooks = weakref.ref(hooks)

    def __call__(self, param: Tensor) -> None:
        hooks = self.hooks()
        if hooks is not None and hooks._optimizer() is not None:
            hooks._on_gradient(param)


def _weakly(function: Callable[..., None], hooks: GradientHooks, *args: Any) -> Callable[..., None]:
    """`function(hooks, *args, ...)` as long as these are alive. Returns None, as autograd demands."""
    reference = weakref.ref(hooks)

    def call(*more: Any) -> None:
        alive = reference()
        if alive is not None and alive._optimizer() is not None:
            function(alive, *args, *more)

    return call


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether the graph of `loss` hides a part behind a reentrant checkpoint, which autograd runs as one node."""
    return any("CheckpointFunctionBackward" in node.name() for node in _nodes_of(loss))


def _leaves_of(loss: Tensor) -> list[Tensor]:
    """The tensors in which a backward pass from `loss` accumulates gradients."""
    return [node.variable for node in _nodes_of(loss) if hasattr(node, "variable")]


def _nodes_of(loss: Tensor) -> Iterator[Any]:
    """Every node of the graph of `loss` once."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(before for before, _ in node.next_functions)
