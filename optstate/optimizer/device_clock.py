"""The count of steps on a device, which goes on when a CUDA graph replays a step that the host does not see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optstate.stores import NonFiniteGradientError

__all__ = ["DeviceClock", "read_clock", "start_clock"]


class DeviceClock:
    """Counts the steps of an optimizer twice: here, and on a device.

    A step that is recorded for a CUDA graph counts here when it is recorded, and there whenever it is replayed. What
    follows from the number of a step is computed there, from `ticks`.

    Args:
        count: steps that were made already.
        device: of the parameters.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.count = count
        self.ticks = torch.full((), count, dtype=torch.int64, device=device)
        """The device's count, int64, 0-d."""
        self._refused = torch.zeros((), dtype=torch.int64, device=device)
        self._flags: list[Tensor] = []
        self._known: dict[int, Tensor] = {}
        self.stepped: list[Tensor] = []
        """The parameters that the last step updated."""

    def begin_step(self) -> None:
        """Count one step more."""
        self.count += 1
        self.ticks += 1
        self._known = {self.count: self.ticks}
        self._flags, self.stepped = [], []

    def number(self, step: int) -> Tensor:
        """Return, as the device counts it, the number of an update that is the `step`-th one as the host counts.

        Raises:
            RuntimeError: outside of `step()`, as in a fused backward pass.
        """
        if not self._known:
            raise RuntimeError("a device counts the steps of this optimizer, which step() alone can make")
        if step not in self._known:
            self._known[step] = self.ticks + (step - self.count)
        return self._known[step]

    def note(self, param: Tensor, finite: Tensor | None) -> None:
        """Note that a parameter is stepped, and the flag of its gradient."""
        self.stepped.append(param)
        if finite is not None:
            self._flags.append(finite)

    def close_step(self) -> None:
        """Count, on the device, the gradients of this step that were not finite."""
        if self._flags:
            self._refused += torch.stack(self._flags).logical_not().sum()
        self._flags, self._known = [], {}

    def read(self) -> tuple[int, int]:
        """Wait for the device; return how many steps it made that the host did not, and how many updates it refused."""
        ticks, refused = torch.stack([self.ticks, self._refused]).tolist()
        self._refused.zero_()
        unseen, self.count = ticks - self.count, ticks
        return unseen, refused


def start_clock(runner: Any) -> None:
    """Have a device count the steps of a `StepRunner` from now on; see `Optimizer.count_on_device`."""
    params, leaves = runner.params(), runner.parameters.leaves.values()
    devices = {param.device for param in params}
    if runner.hooks is not None or len(devices) != 1 or any(leaf.is_split for leaf in leaves):
        raise RuntimeError(
            "a device can count the steps of an optimizer whose step() updates whole parameters on one device: neither "
            "a fused backward pass nor parameters that are split among devices"
        )
    if runner.clock is None:
        steps = [runner.state_of(param)["step"] for param in params if param.requires_grad]
        runner.clock = DeviceClock(max(steps, default=0), devices.pop())


def read_clock(runner: Any) -> None:
    """Take over the steps that a device made unseen; waits for the device.

    Raises:
        NonFiniteGradientError: if gradients were not finite; what belongs to them was not updated.
    """
    if runner.clock is None:
        return
    unseen, refused = runner.clock.read()
    for param in runner.clock.stepped:
        runner.optimizer.state[param]["step"] += unseen
    if refused:
        raise NonFiniteGradientError(
            f"{refused} gradients were not finite since the device's count was read; what they belong to was not "
            "updated then. Lower the learning rate, or find the loss that overflows"
        )
