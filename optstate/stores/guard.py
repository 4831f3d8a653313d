"""Refusing a gradient that is not finite, without making the processor wait for an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor

from optstate.kernels import Scalar
from optstate.spec import accumulator_dtype, is_fake

__all__ = ["Guard", "NonFiniteGradientError"]


class NonFiniteGradientError(RuntimeError):
    """A gradient holds an infinite or NaN element. The parameter and its state were left as they were."""


class Guard:
    """Watches one parameter's gradient for one step.

    On a CPU the flag is at hand, and `check` raises before anything is written. On an accelerator reading it
    would stall the queue: the step then runs with every weight and scale set to zero where the flag is False,
    which leaves parameter and state as they were, and the optimizer reads the flag later.
    """

    __slots__ = ("checked", "deferred", "dtype", "finite", "name")

    def __init__(self, name: str, grad: Tensor, deferred: bool | None = None) -> None:
        self.name = name
        self.dtype = accumulator_dtype(grad.dtype)
        self.deferred = grad.device.type != "cpu" or is_fake(grad) if deferred is None else deferred
        self.checked = False
        self.finite: Tensor | None = None

    def check(self, finite: Tensor) -> None:
        """Note the 0-d bool `finite`; raise NonFiniteGradientError if it can be read now and is False."""
        self.checked = True
        if self.deferred:
            self.finite = finite
        elif not finite:
            raise NonFiniteGradientError(
                f"the gradient of {self.name!r} is not finite; its weight and state are unchanged. "
                "Skip the batch, lower the learning rate, or find the loss that overflows"
            )

    def masked(self, weight: Scalar) -> Scalar:
        """`weight`, or zero if the gradient is known on the device not to be finite."""
        if self.finite is None:
            return weight
        if isinstance(weight, Tensor):
            return torch.where(self.finite, weight, 0.0)
        return self.finite.to(self.dtype) * weight

    def choose(self, new: Tensor, old: Tensor) -> Tensor:
        """`new`, or `old` if the gradient is known on the device not to be finite."""
        return new if self.finite is None else torch.where(self.finite, new, old)
