"""Refuse gradients that are not finite, without making the host wait for an accelerator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optstate import kernels
from optstate.kernels import Scalar
from optstate.spec import accumulator_dtype, is_fake

__all__ = ["DeferredFlags", "Guard", "NonFiniteGradientError", "refusal_of"]


class NonFiniteGradientError(RuntimeError):
    """Raised for a gradient with an infinite or NaN element; the parameter and its state are left as they were."""


def refusal_of(name: str) -> NonFiniteGradientError:
    """Return what is raised for the gradient of a parameter of this name, before anything is written."""
    return NonFiniteGradientError(
        f"the gradient of {name!r} is not finite or its squares overflow; weight and state are unchanged. "
        "Skip the batch, lower the learning rate, or find the loss that overflows"
    )


class Guard:
    """The watch over one parameter's gradient during one step.

    On a CPU the flag is at hand, and `check` raises before anything is written. On an accelerator reading the flag
    would stall the queue: the step then runs with every weight and scale set to zero where the flag is False,
    which leaves parameter and state as they were, and the optimizer reads the flag later.

    before_write: called once, before the parameter or its state is written in this step.
    """

    __slots__ = ("_before_write", "checked", "deferred", "dtype", "finite", "name")

    def __init__(
        self,
        name: str,
        grad: Tensor,
        deferred: bool | None = None,
        before_write: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self._before_write = before_write
        self.dtype = accumulator_dtype(grad.dtype)
        elsewhere = kernels.device_type(grad.device) != "cpu" or (is_fake(grad) and not kernels.rehearsing())
        self.deferred = elsewhere if deferred is None else deferred
        self.checked = False
        self.finite: Tensor | None = None

    def check(self, finite: Tensor) -> None:
        """Note the 0-d bool `finite`; raise NonFiniteGradientError if it can be read now and is False."""
        self.checked = True
        if self.deferred:
            self.finite = finite
        elif not is_fake(finite) and not finite:
            raise refusal_of(self.name)

    def begin_writing(self) -> None:
        """Say that the parameter or its state is about to be written. Whatever writes calls this before it does."""
        if self._before_write is not None:
            self._before_write()
            self._before_write = None

    def masked(self, weight: Scalar) -> Scalar:
        """Return `weight`, or zero if the gradient is known on the device not to be finite."""
        if self.finite is None:
            return weight
        if isinstance(weight, Tensor):
            return torch.where(self.finite, weight, 0.0)
        return self.finite.to(self.dtype) * weight

    def choose(self, new: Tensor, old: Tensor) -> Tensor:
        """Return `new`, or `old` if the gradient is known on the device not to be finite."""
        if self.finite is None:
            return new
        if old.dtype.itemsize == 1 and old.is_floating_point():  # where() does not know 8-bit floats
            return torch.where(self.finite, new.view(torch.uint8), old.view(torch.uint8)).view(old.dtype)
        return torch.where(self.finite, new, old)


class DeferredFlags:
    """Flags of gradients on accelerators, brought to the host once a step without waiting for the device."""

    def __init__(self) -> None:
        self._open: list[tuple[Tensor, Tensor]] = []
        self._closed: list[tuple[list[Tensor], Tensor, torch.Event | None]] = []

    def add(self, param: Tensor, finite: Tensor) -> None:
        """Note the 0-d bool of one parameter in the step at hand."""
        if not is_fake(finite):
            self._open.append((param, finite))

    def close_step(self) -> None:
        """Start copying the flags of the step to the host."""
        if not self._open:
            return
        params, flags = [p for p, _ in self._open], [flag for _, flag in self._open]
        self._open = []
        device = flags[0].device
        stacked = torch.stack([flag.to(device, non_blocking=True) for flag in flags])
        if device.type == "cpu":
            self._closed.append((params, stacked, None))
            return
        host = torch.empty(stacked.shape, dtype=torch.bool, pin_memory=True).copy_(stacked, non_blocking=True)
        event = torch.Event(device)
        event.record()
        self._closed.append((params, host, event))

    def bad(self, wait: bool) -> list[Tensor]:
        """Parameters whose gradient was not finite, of the steps whose flags have arrived; of all steps with `wait`."""
        if wait:
            self.close_step()
        found: list[Tensor] = []
        while self._closed:
            params, host, event = self._closed[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    break
            found += [param for param, finite in zip(params, host.tolist(), strict=True) if not finite]
            del self._closed[0]
        return found
