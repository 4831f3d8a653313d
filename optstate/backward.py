"""Updating each parameter inside the backward pass, the moment its gradient is complete."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from optstate import engines, groups, kernels, trainers
from optstate.collectives import LostProcessError
from optstate.kernels import Product, Scalar
from optstate.optimizer import Optimizer
from optstate.placement import here, is_distributed
from optstate.sharding import Pending, add_up
from optstate.spec import is_fake
from optstate.stores import NonFiniteGradientError

__all__ = ["FusedBackward", "fuse_backward"]


def fuse_backward(optimizer: Optimizer, clip_grad_norm: float | None = None) -> FusedBackward:
    """From now on `loss.backward()` updates the parameters; `optimizer.step()` closes the step.

    Each parameter is updated by the same one-parameter step that `step()` uses, as soon as its gradient is
    complete, and the gradient is freed at once: about one gradient is alive at a time instead of all of them.

    The loop stays what it was: backward, `optimizer.step()`, scheduler. The hyper-parameters used are those in
    `param_groups` while backward runs. `zero_grad()` is harmless.

    Args:
        optimizer: an `optstate.Optimizer` over the final parameters: shard, cast and wrap the model first.
        clip_grad_norm: clip by the global norm of all gradients. It is only known after a whole backward, so each
            step then needs two: `fused.grad_norm(loss)` measures, the next backward is scaled.

    Raises:
        RuntimeError: under DistributedDataParallel, FSDP1, DeepSpeed or a GradScaler, or if a parameter has a
            foreign fused hook already.
        ValueError: if the optimizer is fused already with another `clip_grad_norm`.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"fuse_backward got a {type(optimizer).__name__}: it fuses optstate optimizers")
    if clip_grad_norm is not None:
        if isinstance(clip_grad_norm, bool) or not isinstance(clip_grad_norm, int | float):
            raise TypeError(f"clip_grad_norm={clip_grad_norm!r} is a {type(clip_grad_norm).__name__}: give a number")
        if not 0 < clip_grad_norm < float("inf"):
            raise ValueError(f"clip_grad_norm={clip_grad_norm!r} must be positive and finite, or None for no clipping")
    current = optimizer._fused
    if isinstance(current, FusedBackward):
        if current.clip_grad_norm != clip_grad_norm:
            raise ValueError("the optimizer is fused already with another clip_grad_norm: call fused.remove() first")
        current.attach()
        return current
    fused = FusedBackward(optimizer, clip_grad_norm)
    optimizer._fused = fused
    try:
        fused.attach()
    except BaseException:
        fused.remove()
        raise
    optimizer._clip_of_original = None
    return fused


class _Mode(Enum):
    UPDATE = "update"
    MEASURE = "measure"
    ACCUMULATE = "accumulate"


class FusedBackward:
    """The link between an optimizer and the backward pass; made by `fuse_backward`."""

    def __init__(self, optimizer: Optimizer, clip_grad_norm: float | None) -> None:
        self.optimizer = optimizer
        self.clip_grad_norm = clip_grad_norm
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._mode = _Mode.UPDATE
        self._updated: set[Tensor] = set()
        self._kept: set[Tensor] = set()
        self._squares: dict[Tensor, Tensor] = {}
        self._coefficient: Scalar | None = None
        self._engine_checked = False
        self._others: weakref.WeakSet[Tensor] | None = None
        self._in_backward = False
        self._waiting: list[Tensor] = []
        self._buffer = 0

    # --- hooks ------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether backward passes update parameters."""
        return self.optimizer._fused is self

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
        for old in replaced:
            handle = self._handles.pop(old, None)
            if handle is not None:
                handle.remove()
            self._kept.discard(old)
        self._hook([p for p in replaced.values() if p.requires_grad])
        self.look_again()

    def _hook(self, missing: list[Tensor]) -> None:
        if missing:
            engines.refuse_parameters((self._name(p), p) for p in missing)
            engines.refuse_live_objects(missing)
        for param in missing:
            hook = _weak_hook(weakref.ref(self))
            handle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            weakref.finalize(self, handle.remove).atexit = False  # an optimizer that is gone leaves nothing behind
            self._handles[param] = handle
            if param.grad is not None:
                self._kept.add(param)

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
        self._updated.clear()
        self._kept.clear()
        self._squares.clear()
        self._waiting.clear()
        self._coefficient = None
        self._in_backward = False
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
            if self.optimizer._leaf(param).is_split:
                self._wait_for_group(param)
            else:
                self._update([param])
        except BaseException:
            self._abandon()
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
        self.optimizer._require_agreement(waiting, done=len(self._updated))
        self._update(waiting)

    def _update(self, params: list[Tensor]) -> None:
        try:
            self.optimizer._step_all(params, self._scale(), done=len(self._updated))
        finally:
            for param in params:
                param.grad = None
        self._updated.update(params)

    def _check_update(self, param: Tensor) -> None:
        """Raise unless this gradient may be used now."""
        optimizer = self.optimizer
        optimizer._require_consistent("backward")
        if not self._in_backward:
            self._begin_backward()
        if self.clip_grad_norm is not None and self._coefficient is None:
            raise RuntimeError(
                f"clip_grad_norm={self.clip_grad_norm} needs the norm before the update: call fused.grad_norm(loss) "
                "before loss.backward(), or run every micro-batch under fused.accumulate()"
            )
        if param in self._updated or any(param is other for other in self._waiting):
            optimizer._break_off(len(self._updated), param, "its gradient arrived twice in one step")
            raise RuntimeError(
                f"the gradient of {self._name(param)!r} arrived a second time before step(): call optimizer.step() "
                "after each backward(), run all but the last micro-batch under fused.accumulate(), freeze parameters "
                "that a loss is not meant to train, and use checkpoint(..., use_reentrant=False) where checkpointed "
                "parts share a layer"
            )

    def _begin_backward(self) -> None:
        """First update of a backward pass: look around, and leave a mark that only a completed pass removes."""
        if not self._engine_checked:
            engines.refuse_live_objects(self._handles)
            trainers.refuse_settings(self.optimizer, self.clip_grad_norm)
            self._engine_checked = True
        self._attach_new()
        self.optimizer.require_alike()
        self._in_backward = True
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        if self._waiting:
            try:
                self._update_waiting()
            except BaseException:
                self._abandon()
                raise
        self._in_backward = False

    def check_backward_completed(self) -> None:
        """Remember it if the last backward pass updated parameters and then failed outside any hook."""
        if self._in_backward:
            self._in_backward = False
            if self._updated and not self.optimizer._consistency.reason:
                self.optimizer._consistency.broke_off(len(self._updated), "the backward pass failed")
                self._abandon()

    def _abandon(self) -> None:
        """A step failed: gradients it was collecting must not leak into the next one."""
        for param in self._params():
            param.grad = None
        self._reset()

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
        """Measure the global L2 norm of all gradients of `loss` and change nothing.

        Runs one backward pass that keeps the graph, so `loss.backward()` can follow, and that computes gradients of
        this optimizer's parameters only; they are freed as they come. Where they are distributed the norm is that over
        all devices, each of which must call this.

        With `clip_grad_norm` set, the next backward is scaled, once, by `min(1, clip_grad_norm / (norm + 1e-6))`
        (LOMO, arXiv 2306.09782, section 3.3.1). Costs about one backward.

        A compiled model must allow a second backward: `torch._functorch.config.donated_buffer = False`.

        Returns:
            The norm before clipping, 0-d fp32.

        Raises:
            NonFiniteGradientError: on a CPU, if the norm is not finite; nothing was changed.
            RuntimeError: while gradients are accumulated (`step()` clips those by itself), or after a backward.
        """
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
        """`with fused.accumulate(): loss.backward()` adds gradients up instead of updating.

        Exact gradient accumulation: the next backward outside adds its own and updates from the sum; without one,
        `step()` does. Divide the losses yourself. While it lasts every gradient is kept, so memory is that of
        ordinary training. An exception inside drops the whole sum: part of a micro-batch may be in it.
        """
        self._require_active("accumulate")
        if self._updated:
            raise RuntimeError("accumulate() after a backward that updated: accumulate first, update last")
        self._attach_new()
        outer, self._mode = self._mode, _Mode.ACCUMULATE
        try:
            yield
        except BaseException:
            self._abandon()
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
            self._abandon()
            raise
        self._reset()
        self._attach_new()

    def _step_held(self, held: list[Tensor]) -> None:
        """Update accumulated gradients, and those of parameters that were unfrozen after fusing."""
        self.optimizer._require_agreement(held, done=len(self._updated))
        if self.clip_grad_norm is not None and self._coefficient is None:
            try:
                squares = self._over_devices({param: self._square_here(param) for param in held})
            except LostProcessError as error:
                raise self.optimizer._lost(held, len(self._updated), error) from error.__cause__
            self._norm(squares)
        for batch in self.optimizer._batches(held):
            self._update(batch)

    @torch.no_grad()
    def _square_here(self, param: Tensor) -> Tensor:
        """The sum of squares of a gradient, as far as it is on this device."""
        leaf = self.optimizer._leaf(param)
        return kernels.sum_of_squares(Product(groups.checked_gradient(param, leaf.plan.spec, leaf.placement)))

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


def _weak_hook(reference: weakref.ref[FusedBackward]) -> Callable[[Tensor], None]:
    """A hook that does not keep the optimizer alive. Returns None, as autograd demands."""

    def on_gradient(param: Tensor) -> None:
        fused = reference()
        if fused is not None:
            fused._on_gradient(param)

    return on_gradient


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
