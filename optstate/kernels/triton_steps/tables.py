"""Tables of tensors on a device, by which one launch steps many parameters: addresses, sizes, keys, chunks.

A table is made on the host and copied to the device without waiting. While no tensor moves it is kept; where gradients
lie elsewhere than in the step before, as after `zero_grad()`, only their addresses are put in and the rows copied anew.
Nothing here imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from optstate.kernels.triton_steps.operands import MomentTensor, WeightTensor, signed_key

__all__ = ["ALIGNMENT", "Column", "RowOfTable", "Table"]

ALIGNMENT = 16
"""Bytes at multiples of which tensors begin, and elements of which a count must be a multiple: reads of 16 bytes."""


class Column(IntEnum):
    """What a row says of a parameter, each an int64 number; addresses are 0 where there is no such tensor."""

    PARAM = 0
    EXTRA = 1
    GRAD = 2
    FIRST = 3
    FIRST_SCALE = 4
    SECOND = 5
    SECOND_SCALE = 6
    COUNT = 7
    START = 8
    WEIGHT_KEY = 9
    FIRST_KEY = 10
    SECOND_KEY = 11
    FIRST_CHUNK = 12
    WIDTH = 16


@dataclass(frozen=True)
class RowOfTable:
    """One parameter of a table.

    Attributes:
        weight, first, second: the operands; their keys are those of names, which a kernel joins with the step.
        grad: the gradient.
    """

    weight: WeightTensor
    grad: Tensor
    first: MomentTensor
    second: MomentTensor

    @property
    def addresses(self) -> list[int]:
        """The addresses of the tensors, in the order of the columns."""
        first, second = self.first, self.second
        tensors = (self.weight.param, self.weight.extra, self.grad, first.data, first.scale, second.data, second.scale)
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

    @property
    def is_aligned(self) -> bool:
        """Whether every tensor begins where kernels may read 16 bytes at once."""
        return not any(address % ALIGNMENT for address in self.addresses)


@dataclass
class Table:
    """Rows and chunks on a device.

    Attributes:
        rows: int64 `[parameters, Column.WIDTH]`.
        chunks: int32 `[chunks, 2]`: the row of a parameter, and the number of a chunk in it.
        chunk: elements of a chunk.
        slots: places for one number per chunk; those of a parameter begin at a multiple of 16.
        counts: elements of the parameters.
    """

    rows: Tensor
    chunks: Tensor
    chunk: int
    slots: int
    counts: tuple[int, ...]
    _host: Tensor = field(repr=False)
    _sources: list[Tensor] = field(default_factory=list, repr=False)

    @staticmethod
    def of(rows: Sequence[RowOfTable], chunk: int) -> Table:
        """Return the table of parameters, all on one device, in chunks of this many elements.

        A chunk is a multiple of the kernels' tiles, so that blocks of codes lie within one.
        """
        device, slots = rows[0].grad.device, 0
        numbers, places = [], []
        for place, row in enumerate(rows):
            weight, count = row.weight, row.weight.param.numel()
            keys = [signed_key(key) for key in (weight.key, row.first.key, row.second.key)]
            chunks = -(-count // chunk)
            filled = [*row.addresses, count, weight.start, *keys, slots]
            numbers.append(filled + [0] * (Column.WIDTH - len(filled)))
            places.append(
                torch.stack([torch.full((chunks,), place, device="cpu"), torch.arange(chunks, device="cpu")], 1)
            )
            slots += -(-chunks // ALIGNMENT) * ALIGNMENT
        host = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        counts = tuple(row.weight.param.numel() for row in rows)
        empty = torch.empty(0, device=device)
        table = Table(empty, empty, chunk, slots, counts, host)
        table.chunks = table._copied(torch.cat(places).to(torch.int32))
        table.rows = table._copied(host)
        return table

    def replace_gradients(self, addresses: Sequence[int]) -> None:
        """Put in where the gradients are now, and copy the rows to the device once more."""
        self._host[:, Column.GRAD] = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        self.rows = self._copied(self._host)

    def _copied(self, host: Tensor) -> Tensor:
        """Copy numbers to the device without waiting.

        The source is memory of its own, so that the host may change its numbers while the copy runs. A CUDA graph
        copies from the source once more at every replay: what was copied while one was recorded is kept.
        """
        device = self.chunks.device
        if device.type == "cpu":
            return host.clone()
        source = host.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            self._sources.append(source)
        return source.to(device, non_blocking=True)
