"""Gradients of an FSDP2 group, which arrive one by one and can only be used together."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from optstate.distributed.placement import here
from optstate.optimizer.parameters import Leaf

__all__ = ["GradientGroup"]


class GradientGroup:
    """Collects split parameters until the gradients of all in their group are there.

    FSDP2 scatters the gradients of a group into one buffer and then calls the hooks of its parameters in order, so none
    of them could be freed before the last, and sums over devices need only be taken once for all of them.

    params: parameters whose gradients wait.
    """

    def __init__(self) -> None:
        self.params: list[Tensor] = []
        self._buffer = 0

    def add(self, leaf: Leaf, param: Tensor) -> Iterator[list[Tensor]]:
        """Take in a parameter whose gradient has arrived; yield the parameters of each group that is complete now."""
        grad = here(param.grad) if param.grad is not None else param
        storage = grad.untyped_storage()
        if self.params and storage._cdata != self._buffer:
            yield self.take()  # parameters behind them in their group had no gradient
        self._buffer = storage._cdata
        self.params.append(param)
        end = grad.storage_offset() + leaf.on_devices.slots_in_buffer
        if end * grad.element_size() >= storage.nbytes():
            yield self.take()

    def take(self) -> list[Tensor]:
        """Return the parameters that wait, and wait for none of them any more."""
        params, self.params = self.params, []
        return params
