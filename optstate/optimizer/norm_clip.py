"""Clipping by the norm of all gradients in a fused backward pass: it takes a pass of its own to measure the norm."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from optstate import kernels
from optstate.distributed.agreement import LostProcessError
from optstate.distributed.placement import is_distributed
from optstate.distributed.sums import Pending, add_up
from optstate.integrations import engines
from optstate.kernels import Product, Scalar
from optstate.optimizer.param_groups import checked_gradient
from optstate.optimizer.step_runner import StepRunner
from optstate.spec import is_fake
from optstate.stores import NonFiniteGradientError

__all__ = ["NormClip", "has_reentrant_checkpoint"]


class NormClip:
    """Measures the norm of the gradients of one step, and keeps what the next update multiplies them by.

    bound: `clip_grad_norm`, None where the norm is only measured. scale: the coefficient of this step, 1 where nothing
    is clipped. is_missing: whether gradients are to be clipped by a norm that was not measured yet.
    """

    def __init__(self, bound: float | None) -> None:
        self.bound = bound
        self.scale: Scalar = 1.0
        self.is_missing = bound is not None
        self._squares: dict[Tensor, Tensor] = {}
        self._others: weakref.WeakSet[Tensor] | None = None

    def reset(self) -> None:
        """Forget the norm of the step at hand."""
        self.scale, self.is_missing = 1.0, self.bound is not None
        self._squares.clear()

    def look_again(self) -> None:
        """Search for the tensors of engines once more at the next measurement."""
        self._others = None

    @torch.no_grad()
    def add(self, runner: StepRunner, param: Tensor) -> None:
        """Take the gradient of a parameter into the norm that is being measured.

        Raises:
            RuntimeError: if the gradient comes a second time.
        """
        if param in self._squares:
            raise RuntimeError(
                f"the gradient of {runner.name(param)!r} arrives in parts, so its norm cannot be measured: use "
                "checkpoint(..., use_reentrant=False)"
            )
        self._squares[param] = _square_here(runner, param)

    def finish(self, runner: StepRunner) -> Tensor:
        """Return the norm of all gradients that were taken in, over all devices; set the coefficient of this step.

        Raises:
            RuntimeError: if there were none.
            NonFiniteGradientError: on a CPU, if the norm is not finite and gradients are to be clipped by it.
        """
        squares = _over_devices(runner, self._squares)
        self._squares.clear()
        return self._norm(squares)

    @torch.no_grad()
    def measure(self, runner: StepRunner, params: Sequence[Tensor]) -> None:
        """Set the coefficient of this step from gradients that are all there, if one is needed and not known."""
        if not self.is_missing:
            return
        try:
            squares = _over_devices(runner, {param: _square_here(runner, param) for param in params})
        except LostProcessError as error:
            raise runner.lost(params, error) from error.__cause__
        self._norm(squares)

    def _norm(self, parts: list[Tensor]) -> Tensor:
        """Return the norm from sums of squares; set the coefficient of this step."""
        if not parts:
            raise RuntimeError("no gradient reached any parameter of the optimizer: does the loss depend on them?")
        norm = torch.stack([part.to(parts[0].device, torch.float32) for part in parts]).sum().sqrt()
        if self.bound is not None:
            if norm.device.type == "cpu" and not is_fake(norm) and not norm.isfinite():
                raise NonFiniteGradientError(f"the gradient norm is {norm}: nothing was changed; skip the batch")
            self.scale, self.is_missing = (self.bound / (norm + 1e-6)).clamp(max=1.0), False
        return norm

    def backward_through(self, loss: Tensor, params: Iterable[Tensor]) -> None:
        """Run a backward pass that keeps the graph and leaves the gradients of other parameters as they were."""
        inputs = [param for param in params if param.requires_grad]
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


def has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether the graph of `loss` hides a part behind a reentrant checkpoint, which autograd runs as one node."""
    return any("CheckpointFunctionBackward" in node.name() for node in _nodes_of(loss))


def _square_here(runner: StepRunner, param: Tensor) -> Tensor:
    """Return the sum of squares of a gradient, as far as it is on this device."""
    leaf = runner.leaf(param)
    return kernels.sum_of_squares(Product(checked_gradient(param, leaf.plan.spec, leaf.placement)))


def _over_devices(runner: StepRunner, squares: dict[Tensor, Tensor]) -> list[Tensor]:
    """Return each sum of squares over all devices that have a part of its parameter."""
    total, split = [], []
    for param, square in squares.items():
        leaf = runner.leaf(param)
        if leaf.is_split:
            split.append(Pending(leaf.on_devices, square))
        else:
            total.append(square)
    return total + add_up(split)


def _leaves_of(loss: Tensor) -> list[Tensor]:
    """Return the tensors in which a backward pass from `loss` accumulates gradients."""
    return [node.variable for node in _nodes_of(loss) if hasattr(node, "variable")]


def _nodes_of(loss: Tensor) -> Iterator[Any]:
    """Yield every node of the graph of `loss` once."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(before for before, _ in node.next_functions)
