"""Updating each parameter inside the backward pass, the moment its gradient is complete."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from optstate import engines, kernels
from optstate.kernels import Product, Scalar
from optstate.optimizer import Optimizer
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
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ValueError(f"clip_grad_norm={clip_grad_norm!r} must be positive, or None for no clipping")
    current = optimizer._fused
    if isinstance(current, FusedBackward):
        if current.clip_grad_norm != clip_grad_norm:
            raise ValueError("the optimizer is fused already with another clip_grad_norm: call fused.remove() first")
        current.attach()
        return current
    fused = FusedBackward(optimizer, clip_grad_norm)
    fused.attach()
    optimizer._fused = fused
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

    # --- hooks ------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether backward passes update parameters."""
        return self.optimizer._fused is self

    def attach(self) -> None:
        """Hook every parameter that trains and has no hook of this optimizer: after unfreezing, for example."""
        missing = [p for p in self._params() if p.requires_grad and not self._is_hooked(p)]
        if missing:
            engines.refuse_parameters((self._name(p), p) for p in missing)
            engines.refuse_live_objects(missing)
        for param in missing:
            hook = _hook(weakref.ref(self))
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
        self.reset()

    def reset(self) -> None:
        """Forget the step in progress: what was updated and measured since the last `step()`."""
        self._updated.clear()
        self._kept.clear()
        self._squares.clear()
        self._coefficient = None
        self._mode = _Mode.UPDATE

    def _is_hooked(self, param: Tensor) -> bool:
        handle = self._handles.get(param)
        hooks = getattr(param, "_post_accumulate_grad_hooks", None)
        return handle is not None and hooks is not None and handle.id in hooks

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _name(self, param: Tensor) -> str:
        return self.optimizer._name(param)

    # --- what a gradient triggers -----------------------------------------------------------------------------

    def on_gradient(self, param: Tensor) -> None:
        """Called by autograd when `param.grad` is complete."""
        if param.grad is None:
            return
        if self._mode is _Mode.ACCUMULATE:
            self._kept.add(param)
            return
        try:
            if self._mode is _Mode.MEASURE:
                self._measure(param)
            else:
                self._update(param)
        finally:
            param.grad = None

    def _update(self, param: Tensor) -> None:
        optimizer = self.optimizer
        optimizer._require_consistent("backward")
        if not self._engine_checked:
            engines.refuse_live_objects(self._handles)
            self._engine_checked = True
        if self.clip_grad_norm is not None and self._coefficient is None:
            raise RuntimeError(
                f"clip_grad_norm={self.clip_grad_norm} needs the norm before the update: call fused.grad_norm(loss) "
                "before loss.backward(), or run every micro-batch under fused.accumulate()"
            )
        if param in self._updated:
            self.optimizer.break_off(len(self._updated), param, "its gradient arrived twice in one step")
            raise RuntimeError(
                f"the gradient of {self._name(param)!r} arrived a second time before step(): call optimizer.step() "
                "after each backward(), run all but the last micro-batch under fused.accumulate(), and use "
                "checkpoint(..., use_reentrant=False) where checkpointed parts share a layer"
            )
        try:
            optimizer.step_parameter(param, 1.0 if self._coefficient is None else self._coefficient)
        except BaseException as error:
            if self._updated:
                self.optimizer.break_off(len(self._updated), param, str(error))
            raise
        self._updated.add(param)

    @torch.no_grad()
    def _measure(self, param: Tensor) -> None:
        if param in self._squares:
            raise RuntimeError(
                f"the gradient of {self._name(param)!r} arrives in parts, so its norm cannot be measured: use "
                "checkpoint(..., use_reentrant=False)"
            )
        assert param.grad is not None
        self._squares[param] = kernels.sum_of_squares(Product(param.grad))

    # --- clipping and accumulation ----------------------------------------------------------------------------

    def grad_norm(self, loss: Tensor) -> Tensor:
        """Measure the global L2 norm of all gradients of `loss` and change nothing.

        Runs one backward pass that keeps the graph, so `loss.backward()` can follow; gradients are freed as they
        come. With `clip_grad_norm` set, the next backward is scaled, once, by
        `min(1, clip_grad_norm / (norm + 1e-6))` (LOMO, arXiv 2306.09782, section 3.3.1). Costs about one backward.

        Returns:
            The norm before clipping, 0-d fp32.

        Raises:
            NonFiniteGradientError: on a CPU, if the norm is not finite; nothing was changed.
            RuntimeError: while gradients are accumulated (`step()` clips those by itself), or after a backward.
        """
        if not self.active:
            raise RuntimeError("grad_norm() needs an active fused backward: this one was removed")
        if self._updated or any(p.grad is not None for p in self._params()):
            raise RuntimeError(
                "grad_norm() comes first in a step, but gradients were already used or are being accumulated: call "
                "step() before it; under accumulate() run every micro-batch, step() then clips their sum"
            )
        self.attach()
        self._squares.clear()
        self._mode = _Mode.MEASURE
        try:
            loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        finally:
            self._mode = _Mode.UPDATE
        norm = self._norm(self._squares.values())
        self._squares.clear()
        return norm

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
        ordinary training.
        """
        if self._updated:
            raise RuntimeError("accumulate() after a backward that updated: accumulate first, update last")
        self.attach()
        self._mode = _Mode.ACCUMULATE
        try:
            yield
        finally:
            self._mode = _Mode.UPDATE

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
        if held:
            self._step_held(held)
        self.reset()
        self.attach()

    def _step_held(self, held: list[Tensor]) -> None:
        """Update accumulated gradients, and those of parameters that were unfrozen after fusing."""
        if self.clip_grad_norm is not None and self._coefficient is None:
            self._norm([kernels.sum_of_squares(Product(p.grad)) for p in held if p.grad is not None])
        try:
            self.optimizer.step_parameters(held, 1.0 if self._coefficient is None else self._coefficient)
        except BaseException as error:
            if self._updated and not self.optimizer._inconsistent:
                self.optimizer.break_off(len(self._updated), held[0], str(error))
            raise
        finally:
            for param in held:
                param.grad = None


def _hook(reference: weakref.ref[FusedBackward]) -> Callable[[Tensor], None]:
    """A hook that does not keep the optimizer alive. Returns None, as autograd demands."""

    def on_gradient(param: Tensor) -> None:
        fused = reference()
        if fused is not None:
            fused.on_gradient(param)

    return on_gradient
