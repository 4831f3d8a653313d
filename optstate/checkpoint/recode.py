"""Carry out transfers, one parameter at a time, and measure what each of them loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from optstate import kernels
from optstate.checkpoint.document import Parameter
from optstate.checkpoint.figures import Figures, compared, update
from optstate.checkpoint.transfer import Transfer
from optstate.checkpoint.values import Values
from optstate.kernels import Noise, Piece
from optstate.spec import FieldSpec
from optstate.stores import Store

__all__ = ["Recoder"]

NO_NOISE = Noise("", 0)
PIECE = 1 << 18
"""Elements at a time: a dozen fp32 buffers of 1 MiB stay in a core's cache."""

DIVIDES = ("square_sum", "square_max", "distance")
"""Meanings of statistics that steps are divided by the root of, besides the second moment."""

Put = Callable[[str, Tensor], Any]


@dataclass
class _Pair:
    """One statistic before and after: the source's numbers, the new tensors, and how to read both piece by piece."""

    transfer: Transfer
    store: Store
    specs: Mapping[str, FieldSpec]
    value: Tensor
    fields: dict[str, Tensor]
    factors: tuple[Tensor, ...] = field(default=())

    def old(self, piece: Piece) -> Tensor:
        """The source's numbers of a piece, flat."""
        return piece.of(self.value).reshape(-1)

    def new(self, piece: Piece) -> Tensor:
        """What the new tensors will be read as, without the factor that other corrections need: a flat new tensor."""
        if self.store.elementwise:
            parts = {name: piece.of_field(tensor, self.specs[name].per) for name, tensor in self.fields.items()}
            value = self.store.read(parts, (piece.stop - piece.start,))
        else:
            value = reduce(torch.mul, map(piece.of, self.factors)).expand(piece.of(self.value).shape).reshape(-1)
        return value / self.transfer.factor


@dataclass(frozen=True)
class _Moment:
    """One of Adam's moments of the source: bias is what it is of the average proper; pair, what changes it."""

    value: Tensor
    bias: float
    pair: _Pair | None

    def old(self, piece: Piece) -> Tensor:
        """The average proper of a piece, flat."""
        return piece.of(self.value).reshape(-1) / self.bias


class Recoder:
    """Makes the tensors of a new file from a checkpoint.

    Memory: the source's statistics of one parameter in fp32, and the new ones.

    Attributes:
        figures: by slot and by the stores before and after, what was lost in all parameters so far.
        total: of the updates, with every lossy change at once.
    """

    def __init__(self, values: Values) -> None:
        self.values = values
        self.figures: dict[tuple[str, str, str], Figures] = {}
        self.total = Figures()

    def carry(self, param: Parameter, transfers: Sequence[Transfer], eps: float, put: Put) -> None:
        """Make the tensors of one parameter and hand each to `put(key, tensor)`.

        Raises:
            UnreadableStatisticError: if a statistic's numbers are needed and cannot be had.
            OSError: if the source cannot be read.
        """
        pairs = []
        for transfer in transfers:
            if transfer.store is None:
                assert transfer.was is not None
                fields = self.values.fields(transfer.was)
            elif transfer.source is None:
                specs = transfer.specs or {}
                fields = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
            else:
                pairs.append(self._encoded(param, transfer))
                fields = pairs[-1].fields
            for name, tensor in fields.items():
                put(transfer.record.fields[name], tensor)
        lossy = [pair for pair in pairs if not pair.transfer.exact and pair.value.numel()]
        if lossy:
            self._measure(param, lossy, eps)

    def _encoded(self, param: Parameter, transfer: Transfer) -> _Pair:
        """One statistic in its new store."""
        store, specs, source = transfer.store, transfer.specs, transfer.source
        assert store is not None
        assert specs is not None
        assert source is not None
        value = self.values.read(param, source)
        fields = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        if store.elementwise:
            for piece in _pieces(value, store.alignment):
                part = piece.of(value).reshape(-1)
                part = part * transfer.factor if transfer.factor != 1.0 else part.clone()
                for name, new in store.encode(part, NO_NOISE).items():
                    place = piece.of_field(fields[name], specs[name].per)
                    place.copy_(new.reshape(place.shape))
            return _Pair(transfer, store, specs, value, fields)
        store.write(fields, value * transfer.factor if transfer.factor != 1.0 else value)
        return _Pair(transfer, store, specs, value, fields, store.factors(fields, value.shape))

    def _measure(self, param: Parameter, pairs: Sequence[_Pair], eps: float) -> None:
        """Compare statistics and updates before and after, piece by piece."""
        first, second = (self._moment(param, of, pairs) for of in ("gradient", "square"))
        for piece in _pieces(pairs[0].value, math.lcm(*(pair.store.alignment for pair in pairs))):
            v = second.old(piece) if second else None
            m = first.old(piece) if first else None if v is None else v.sqrt()  # a gradient as large as v says
            before = None if m is None else update(m, v, eps)
            new_m, new_v = m, v
            for pair in pairs:
                x, y = pair.old(piece), pair.new(piece)
                if first and pair is first.pair:
                    new_m = y / first.bias
                    one = update(new_m, v, eps)
                elif second and pair is second.pair:
                    assert m is not None
                    new_v = y / second.bias
                    one = update(m, new_v, eps)
                else:
                    self._add(pair, compared(x, y, *_steps(x, y, pair.transfer.record.of, eps), squares=False))
                    continue
                assert before is not None
                self._add(pair, compared(x, y, before, one, squares=pair is (second and second.pair)))
            if before is not None and (new_m is not m or new_v is not v):
                assert new_m is not None
                after = update(new_m, new_v, eps)
                self.total.add(compared(before, after, before, after, squares=False))

    def _moment(self, param: Parameter, of: str, pairs: Sequence[_Pair]) -> _Moment | None:
        """The source's statistic of this meaning, if it has one, and the pair that changes it, if one does."""
        slot = next((name for name, record in param.slots.items() if record.of == of), None)
        if slot is None:
            return None
        pair = next((pair for pair in pairs if pair.transfer.source == slot), None)
        beta = param.slots[slot].beta
        bias = 1.0 if beta is None or not param.step else 1.0 - beta**param.step
        return _Moment(self.values.read(param, slot) if pair is None else pair.value, bias, pair)

    def _add(self, pair: _Pair, figures: Figures) -> None:
        was = pair.transfer.was
        assert was is not None
        key = (pair.transfer.name, was.store, pair.transfer.record.store)
        self.figures.setdefault(key, Figures()).add(figures)


def _pieces(value: Tensor, alignment: int) -> Iterator[Piece]:
    """Pieces of a statistic that begin where blocks do; a 0-d one is one piece."""
    if value.numel():
        yield from kernels.pieces(value.shape or (1,), max(PIECE // alignment, 1) * alignment, align=alignment)


def _steps(x: Tensor, y: Tensor, of: str, eps: float) -> tuple[Tensor, Tensor]:
    """What a statistic that is not one of Adam's moments makes of a step: it is one, or divides one by its root."""
    if of not in DIVIDES:
        return x, y
    root = x.sqrt()
    return update(root, x, eps), update(root, y, eps)
