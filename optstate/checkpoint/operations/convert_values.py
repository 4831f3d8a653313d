"""Carry out transfers, one parameter at a time, and measure what each of them loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from optstate import kernels
from optstate.checkpoint.document.document import Parameter
from optstate.checkpoint.operations.conversion_report import Figures, find_divisor, make_update, measure_change
from optstate.checkpoint.operations.plan_conversion import Transfer
from optstate.checkpoint.operations.read_values import UnreadableStatisticError, Values
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
T = TypeVar("T")
R = TypeVar("R")


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
        """Return the source's numbers of a piece, flat."""
        return piece.of(self.value).reshape(-1)

    def new(self, piece: Piece) -> Tensor:
        """Return what the new tensors will be read as, without the factor of another correction: flat, the caller's."""
        if self.store.elementwise:
            parts = {name: piece.of_field(tensor, self.specs[name].per) for name, tensor in self.fields.items()}
            value = self.store.read(parts, (piece.stop - piece.start,))
        else:
            value = reduce(torch.mul, map(piece.of, self.factors)).expand(piece.of(self.value).shape).reshape(-1)
        return _unbiased(value, self.transfer.factor)

    @property
    def key(self) -> tuple[str, str, str]:
        """The slot, and its stores before and after."""
        assert self.transfer.was is not None
        return (self.transfer.name, self.transfer.was.store, self.transfer.record.store)


@dataclass(frozen=True)
class _Moment:
    """One of Adam's moments of the source: bias is what it is of the average proper; pair, what changes it."""

    value: Tensor
    bias: float
    pair: _Pair | None

    def value_of(self, piece: Piece) -> Tensor:
        """Return the value of a piece, flat."""
        return piece.of(self.value).reshape(-1)

    def new_value_of(self, piece: Piece) -> Tensor | None:
        """Return what the value of a piece becomes, flat; None if it is kept."""
        return None if self.pair is None else self.pair.new(piece)

    def old(self, piece: Piece) -> Tensor:
        """Return the average proper of a piece, flat; the value itself where nothing corrects it."""
        return _unbiased(self.value_of(piece), self.bias)


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

    def carry(self, transfers: Sequence[Transfer], eps: float, put: Put) -> None:
        """Make the tensors of one parameter, hand each to `put(key, tensor)`, and measure what is lost.

        Raises:
            UnreadableStatisticError: if a statistic's numbers are needed and cannot be had, or would have to be changed
                and are not finite.
            OSError: if the source cannot be read.
        """
        pairs = []
        for transfer in transfers:
            if transfer.store is not None and transfer.source is not None:
                pairs.append(self._encoded(transfer, transfer.source))
                fields = pairs[-1].fields
            else:
                fields = self.fields_of(transfer)
            for name, tensor in fields.items():
                put(transfer.record.fields[name], tensor)
        lossy = [pair for pair in pairs if not pair.transfer.exact and pair.value.numel()]
        if lossy:
            self._measure(lossy[0].transfer.parameter, lossy, eps)

    def fields_of(self, transfer: Transfer) -> dict[str, Tensor]:
        """Return the new tensors of one statistic by field, without measuring what is lost; raises as `carry`."""
        if transfer.store is None:
            assert transfer.was is not None
            return self.values.fields(transfer.was)
        if transfer.source is None:
            return _zeros(transfer.specs or {})
        return self._encoded(transfer, transfer.source).fields

    def _encoded(self, transfer: Transfer, source: str) -> _Pair:
        """Put one statistic into its new store."""
        param, store, specs = transfer.parameter, transfer.store, transfer.specs
        assert store is not None
        assert specs is not None
        value = self._read(param, source)
        if not value.numel():  # means of nothing would not be numbers
            return _Pair(transfer, store, specs, value, _zeros(specs))
        if not transfer.exact:
            _check_numbers(value, f"{source} of {param.name!r}", param.slots[source].signed)
        fields = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        if store.elementwise:

            def encode(piece: Piece) -> None:
                part = piece.of(value).reshape(-1)
                part = part * transfer.factor if transfer.factor != 1.0 else part.clone()
                for name, new in store.encode(part, NO_NOISE).items():
                    place = piece.of_field(fields[name], specs[name].per)
                    place.copy_(new.reshape(place.shape))

            _for_each(encode, _pieces(value, store.alignment))
            return _Pair(transfer, store, specs, value, fields)
        store.write(fields, value * transfer.factor if transfer.factor != 1.0 else value)
        return _Pair(transfer, store, specs, value, fields, store.factors(fields, value.shape))

    def _read(self, param: Parameter, slot: str) -> Tensor:
        """Read a statistic, of one dimension at least."""
        value = self.values.read(param, slot)
        return value if value.ndim else value.view(1)

    def _measure(self, param: Parameter, pairs: Sequence[_Pair], eps: float) -> None:
        """Compare statistics and updates before and after, piece by piece."""
        first, second = (self._moment(param, of, pairs) for of in ("gradient", "square"))
        comparison = _Comparison(pairs, first, second, eps)
        pieces = _pieces(pairs[0].value, math.lcm(*(pair.store.alignment for pair in pairs)))
        for of_pairs, of_update in _for_each(comparison.of, pieces):
            for pair, figures in zip(pairs, of_pairs, strict=True):
                self.figures.setdefault(pair.key, Figures()).add(figures)
            self.total.add(of_update)

    def _moment(self, param: Parameter, of: str, pairs: Sequence[_Pair]) -> _Moment | None:
        """Find the source's statistic of this meaning, if it has one, and the pair that changes it, if one does."""
        slot = next((name for name, record in param.slots.items() if record.of == of), None)
        if slot is None:
            return None
        pair = next((pair for pair in pairs if pair.transfer.source == slot), None)
        beta = param.slots[slot].beta
        bias = 1.0 if beta is None or not param.step else 1.0 - beta**param.step
        return _Moment(self._read(param, slot) if pair is None else pair.value, bias, pair)


@dataclass(frozen=True)
class _Comparison:
    """One parameter before and after: the pairs that change, and the moments that make its update."""

    pairs: Sequence[_Pair]
    first: _Moment | None
    second: _Moment | None
    eps: float

    def of(self, piece: Piece) -> tuple[list[Figures], Figures]:
        """Figures of every pair, and of the update with all changes at once."""
        return self._at_once(piece) or self._one_by_one(piece)

    def _at_once(self, piece: Piece) -> tuple[list[Figures], Figures] | None:
        """Measure Adam's moments in one pass; None where another statistic changes, too, or C code cannot."""
        first, second = self.first, self.second
        if first is None or second is None or any(pair not in (first.pair, second.pair) for pair in self.pairs):
            return None
        old = first.value_of(piece), second.value_of(piece)
        new = first.new_value_of(piece), second.new_value_of(piece)
        measured = kernels.measure_adam(old, new, (first.bias, second.bias), self.eps)
        if measured is None:
            return None
        of_first, of_second, of_both = (Figures.of(piece.stop - piece.start, numbers) for numbers in measured)
        return [of_first if pair is first.pair else of_second for pair in self.pairs], of_both

    def _one_by_one(self, piece: Piece) -> tuple[list[Figures], Figures]:
        """Measure any statistics, operation by operation."""
        v = self.second.old(piece) if self.second else None
        m = self.first.old(piece) if self.first else None if v is None else v.sqrt()  # a gradient as large as v says
        root = find_divisor(v, self.eps)
        before = None if m is None else make_update(m, root)
        new_m, new_root, found = m, root, []
        for pair in self.pairs:
            x, y = pair.old(piece), pair.new(piece)
            if self.first and pair is self.first.pair:
                new_m = _unbiased(y, self.first.bias)
                one = make_update(new_m, root)
            elif self.second and pair is self.second.pair:
                new_root = find_divisor(_unbiased(y, self.second.bias), self.eps)
                one = make_update(m, new_root) if m is not None else y
            else:
                found.append(measure_change(x, y, *_steps(x, y, pair.transfer.record.of, self.eps), squares=False))
                continue
            assert before is not None
            found.append(measure_change(x, y, before, one, squares=pair is (self.second and self.second.pair)))
        if before is None or new_m is None or (new_m is m and new_root is root):
            return found, Figures()
        after = make_update(new_m, new_root)
        return found, measure_change(before, after, before, after, squares=False)


def _zeros(specs: Mapping[str, FieldSpec]) -> dict[str, Tensor]:
    return {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}


def _check_numbers(value: Tensor, what: str, signed: bool) -> None:
    """Refuse numbers that would spoil their neighbours in a shared scale or mean, and whose loss has no measure."""
    low, high = (float(bound) for bound in torch.aminmax(value))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UnreadableStatisticError(f"{what} holds numbers that are not finite; `optstate check` tells how many")
    if low < 0 and not signed:
        raise UnreadableStatisticError(f"{what} holds {low:.3g}, and is never negative; `optstate check` tells more")


def _pieces(value: Tensor, alignment: int) -> Iterator[Piece]:
    """Pieces of a statistic that begin where blocks do."""
    if value.numel():
        yield from kernels.cut_into_pieces(value.shape, max(PIECE // alignment, 1) * alignment, align=alignment)


def _unbiased(value: Tensor, bias: float) -> Tensor:
    return value if bias == 1.0 else value / bias


def _steps(x: Tensor, y: Tensor, of: str, eps: float) -> tuple[Tensor, Tensor]:
    """Return the steps that a statistic other than Adam's moments makes: itself, or a number divided by its root."""
    if of not in DIVIDES:
        return x, y
    root = x.sqrt()
    return make_update(root, find_divisor(x, eps)), make_update(root, find_divisor(y, eps))


def _for_each(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return the results of `work` on every item, in order, made by as many threads as torch has.

    A piece that fits a core's cache is too small to be shared by cores: torch's own threads wait for each other at
    every operation. Here each piece is one thread's from its beginning to its end.
    """
    items, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(items) < 2 * threads:
        return [work(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)
