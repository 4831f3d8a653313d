"""Updating each parameter inside the backward pass, the moment its gradient is complete: what users hold of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from optstate.optimizer import param_groups
from optstate.optimizer.gradient_hooks import GradientHooks
from optstate.optimizer.optimizer import Optimizer

__all__ = ["FusedBackward", "fuse_backward"]


def fuse_backward(optimizer: Optimizer, clip_grad_norm: float | None = None) -> FusedBackward:
    """From now on `loss.backward()` updates the parameters; `optimizer.step()` closes the step.

    Each parameter is updated by the same one-parameter step that `step()` uses, as soon as its gradient is
    complete, and the gradient is freed at once: about one gradient is alive at a time instead of all of them. On a CPU
    small parameters, of at most 65,536 elements, wait for one another: their gradients, 524,288 elements at most, are
    used and freed together, at the latest at the end of the backward pass. `plan()` says how many parameters wait.

    The loop stays what it was: backward, `optimizer.step()`, scheduler. The hyper-parameters used are those in
    `param_groups` while backward runs. `zero_grad()` is harmless.

    Args:
        optimizer: an `optstate.Optimizer` over the final parameters: shard, cast and wrap the model first.
            Once neither the optimizer nor what is returned here is referred to, backward passes leave gradients again.
        clip_grad_norm: clip by the global norm of all gradients. It is only known after a whole backward, so each
            step then needs two: `fused.grad_norm(loss)` measures, the next backward is scaled.

    An older optimizer of this library that is fused over some of the parameters loses its hooks to this one, with a
    warning, and is refused from then on.

    Raises:
        RuntimeError: under DistributedDataParallel, FSDP1, DeepSpeed, a GradScaler or `torch.inference_mode()`, or if
            a parameter has somebody else's hook already.
        ValueError: if the optimizer is fused already with another `clip_grad_norm`.
    """
    param_groups.refuse_inference_mode("fusing an optimizer")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"fuse_backward got a {type(optimizer).__name__}: it fuses optstate optimizers")
    if clip_grad_norm is not None:
        if isinstance(clip_grad_norm, bool) or not isinstance(clip_grad_norm, int | float):
            raise TypeError(f"clip_grad_norm={clip_grad_norm!r} is a {type(clip_grad_norm).__name__}: give a number")
        if not 0 < clip_grad_norm < float("inf"):
            raise ValueError(f"clip_grad_norm={clip_grad_norm!r} must be positive and finite, or None for no clipping")
    runner = optimizer.runner
    hooks = runner.hooks
    if isinstance(hooks, GradientHooks):
        if hooks.clip_grad_norm != clip_grad_norm:
            raise ValueError("the optimizer is fused already with another clip_grad_norm: call fused.remove() first")
        hooks.attach()
    else:
        runner.hooks = hooks = GradientHooks(runner, clip_grad_norm, FusedBackward)
        try:
            hooks.attach()
        except BaseException:
            hooks.remove()
            raise
    runner.clip_of_original = None
    handle: FusedBackward = hooks.handle
    return handle


class FusedBackward:
    """A fused optimizer's handle; made by `fuse_backward`, and found at `optimizer.fused`.

    optimizer: the optimizer that is fused; kept alive by this object. clip_grad_norm: the bound that was given.
    """

    def __init__(self, optimizer: Optimizer, hooks: GradientHooks) -> None:
        self.optimizer = optimizer
        self.clip_grad_norm = hooks.clip_grad_norm
        self._hooks = hooks

    @property
    def active(self) -> bool:
        """Whether backward passes update parameters."""
        return self._hooks.active

    def attach(self) -> None:
        """Attach hooks to every parameter that trains and has none of this optimizer, as after unfreezing."""
        self._hooks.attach()

    def remove(self) -> None:
        """Detach: backward passes leave gradients again and `step()` updates. State stays."""
        self._hooks.remove()

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
        return self._hooks.grad_norm(loss)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """`with fused.accumulate(): loss.backward()` adds gradients up instead of updating.

        Exact gradient accumulation: the next backward outside adds its own and updates from the sum; without one,
        `step()` does. Divide the losses yourself. While it lasts every gradient is kept, so memory is that of
        ordinary training. An exception inside drops the whole sum: part of a micro-batch may be in it.
        """
        with self._hooks.accumulate():
            yield
