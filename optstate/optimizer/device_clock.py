"""The count of steps on a device, which goes on when a CUDA graph replays a step that the host does not see."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DeviceClock"]


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
        """Return, as the device counts it, the number of an update that is the `step`-th one as the host counts."""
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
        self._flags = []

    def read(self) -> tuple[int, int]:
        """Wait for the device; return how many steps it made that the host did not, and how many updates it refused."""
        ticks, refused = torch.stack([self.ticks, self._refused]).tolist()
        self._refused.zero_()
        unseen, self.count = ticks - self.count, ticks
        return unseen, refused
