"""What differs between two checkpoints: their statistics as numbers, and what is said of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optstate.checkpoint.document.canonical_names import with_canonical_names
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import refuse_contradictions
from optstate.checkpoint.document.document import SlotRecord
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.tensor_bytes import DTYPES, PIECE, as_bits, load_tensor
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.open_checkpoint import open_checkpoint, refuse_streams
from optstate.checkpoint.operations.compare_documents import Finding, Pair, find_disagreements, match_parameters
from optstate.checkpoint.operations.read_values import UnreadableStatisticError, Values

__all__ = [
    "CLOSE",
    "DIFFERENT",
    "EQUAL",
    "EQUAL_VALUES",
    "Deviation",
    "Difference",
    "SlotDifference",
    "StatisticDifference",
    "compare",
    "measure_deviation",
]

EQUAL, EQUAL_VALUES, CLOSE, DIFFERENT = VERDICTS = ("equal", "equal values", "close", "different")
"""The same bytes in the same store; the same numbers; numbers within the tolerance; anything else."""

ABSENT = "-"
"""The store of a statistic that one side does not have."""


@dataclass(frozen=True)
class Deviation:
    """Sums over two statistics, or parts of them, element by element: those of parts add up.

    lone: elements that are a number on one side only, or infinite or NaN in different ways; the others are summed.
    """

    largest: float = 0.0
    error: float = 0.0
    of_a: float = 0.0
    of_b: float = 0.0
    dot: float = 0.0
    lone: int = 0

    def __add__(self, other: Deviation) -> Deviation:
        return Deviation(
            max(self.largest, other.largest),
            self.error + other.error,
            self.of_a + other.of_a,
            self.of_b + other.of_b,
            self.dot + other.dot,
            self.lone + other.lone,
        )

    @property
    def max_abs(self) -> float | None:
        """The largest difference; None where there are lone elements."""
        return None if self.lone else self.largest

    @property
    def relative_l2(self) -> float | None:
        """Norm of the difference over that of the first side, infinite where that is zero; None for lone elements."""
        if self.lone:
            return None
        return 0.0 if not self.error else math.sqrt(self.error / self.of_a) if self.of_a else math.inf

    @property
    def cosine(self) -> float | None:
        """Cosine between the two: 1 if both are zero, 0 if one is; None where there are lone elements."""
        if self.lone:
            return None
        if not self.error:
            return 1.0
        whole = math.sqrt(self.of_a) * math.sqrt(self.of_b)
        return max(-1.0, min(1.0, self.dot / whole)) if whole else 0.0


def measure_deviation(a: Tensor, b: Tensor) -> Deviation:
    """Two tensors of one shape compared in fp64, piece by piece. NaN equals NaN, infinity equals infinity."""
    total = Deviation()
    for x, y in zip(torch.split(a.reshape(-1), PIECE), torch.split(b.reshape(-1), PIECE), strict=True):
        total += _of_piece(x.double(), y.double())
    return total


def _of_piece(x: Tensor, y: Tensor) -> Deviation:
    if not x.numel():
        return Deviation()
    finite = x.isfinite() & y.isfinite()
    same = (x == y) | (x.isnan() & y.isnan())
    lone = int((~finite & ~same).sum())
    x, y = x.where(finite, 0.0), y.where(finite, 0.0)
    error = x - y
    return Deviation(
        float(error.abs().max()),
        float(torch.dot(error, error)),
        float(torch.dot(x, x)),
        float(torch.dot(y, y)),
        float(torch.dot(x, y)),
        lone,
    )


@dataclass(frozen=True)
class StatisticDifference:
    """One statistic of one parameter.

    stores: on either side, "-" where it is absent. deviation: None where numbers cannot be compared, for the reason in
    `why`.
    """

    parameter: str
    slot: str
    stores: tuple[str, str]
    verdict: str
    deviation: Deviation | None
    why: str = ""

    @property
    def equal(self) -> bool:
        """Whether both sides have the same numbers."""
        return self.verdict in (EQUAL, EQUAL_VALUES)


@dataclass(frozen=True)
class SlotDifference:
    """One statistic of all parameters that keep it in the same store on one side, and the same on the other."""

    slot: str
    stores: tuple[str, str]
    statistics: tuple[StatisticDifference, ...]

    @property
    def verdict(self) -> str:
        """The worst of its parameters'."""
        return max((statistic.verdict for statistic in self.statistics), key=VERDICTS.index)

    @property
    def equal(self) -> bool:
        """Whether both sides have the same numbers."""
        return self.verdict in (EQUAL, EQUAL_VALUES)

    @property
    def differing(self) -> int:
        """For how many parameters it is different."""
        return sum(statistic.verdict == DIFFERENT for statistic in self.statistics)

    @property
    def deviation(self) -> Deviation | None:
        """Of all parameters together; None where one cannot be compared."""
        total = Deviation()
        for statistic in self.statistics:
            if statistic.deviation is None:
                return None
            total += statistic.deviation
        return total


@dataclass(frozen=True)
class Difference:
    """Two checkpoints compared. findings: what differs besides statistics. notes: how they were compared."""

    a: Checkpoint
    b: Checkpoint
    slots: tuple[SlotDifference, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def statistics(self) -> list[StatisticDifference]:
        """Every statistic of every parameter, slot by slot."""
        return [one for slot in self.slots for one in slot.statistics]

    @property
    def equal(self) -> bool:
        """Whether all numbers are the same, and everything that is said."""
        return self.verdict in (EQUAL, EQUAL_VALUES)

    @property
    def close(self) -> bool:
        """Whether nothing is different, with the tolerance."""
        return self.verdict != DIFFERENT

    @property
    def verdict(self) -> str:
        """The worst of everything."""
        return DIFFERENT if self.findings else max((s.verdict for s in self.slots), key=VERDICTS.index, default=EQUAL)


Task = tuple[Pair, str]
Track = Callable[[Sequence[Task]], Iterable[Task]]


def compare(
    a: Checkpoint | str | os.PathLike[str],
    b: Checkpoint | str | os.PathLike[str],
    *,
    tolerance: float = 1e-6,
    key: str | None = None,
    names: str | None = None,
    optimizer: str | None = None,
    track: Track = iter,
) -> Difference:
    """Compare two checkpoints of any kinds, statistic by statistic, whatever they are stored in.

    Memory: one statistic of either side.

    Args:
        a: a file or folder, or what `open` made of it.
        b: the other one.
        tolerance: largest relative difference, in the L2 norm, of what is close.
        key: as for `open`, of one side or of both.
        names: names for numbered parameters, as for `open`, of both sides.
        optimizer: whose state it is, as for `open`, of both sides.
        track: what the statistics go through while they are compared, such as a progress bar.

    Raises:
        CheckpointError: if one cannot be opened, or contradicts itself.
    """
    a, b = (with_canonical_names(_opened(side, key, names, optimizer)) for side in (a, b))
    matches = match_parameters(a, b)
    findings, notes = find_disagreements(a, b, matches.pairs)
    tasks = [(pair, slot) for pair in matches.pairs for slot in dict.fromkeys((*pair[0].slots, *pair[1].slots))]
    comparison = _Comparison(Values(a), Values(b), tolerance)
    by_stores: dict[tuple[str, tuple[str, str]], list[tuple[Task, StatisticDifference]]] = {}
    for task in track(tasks):
        found = comparison.of(task)
        by_stores.setdefault((found.slot, found.stores), []).append((task, found))
    order = list(dict.fromkeys(slot for slot, _ in by_stores))
    slots = [
        SlotDifference(slot, stores, tuple(comparison.completed(found)))
        for (slot, stores), found in sorted(by_stores.items(), key=lambda item: order.index(item[0][0]))
    ]
    return Difference(a, b, tuple(slots), (*matches.findings, *findings), (*matches.notes, *notes))


def _opened(
    side: Checkpoint | str | os.PathLike[str], key: str | None, names: str | None, optimizer: str | None
) -> Checkpoint:
    """Open one side, whose tensors must be what it says of them."""
    if isinstance(side, Checkpoint):
        return side
    refuse_streams(side)
    try:
        checkpoint = open_checkpoint(side, key=key, names=names, optimizer=optimizer)
    except CheckpointError:
        found = None
        if key is not None:  # which may be of the other side alone
            with suppress(CheckpointError):
                found = open_checkpoint(side, names=names, optimizer=optimizer)
        if found is None:
            raise
        checkpoint = found
    refuse_contradictions(checkpoint)
    return checkpoint


class _Comparison:
    """Compares single statistics of two checkpoints."""

    def __init__(self, a: Values, b: Values, tolerance: float) -> None:
        self.a, self.b, self.tolerance = a, b, tolerance

    def of(self, task: Task) -> StatisticDifference:
        """One statistic. What is equal byte by byte is not decoded: its sums are left at zero."""
        (param, other), name = task
        left, right = param.slots.get(name), other.slots.get(name)
        stores = (left.store if left else ABSENT, right.store if right else ABSENT)
        result = StatisticDifference(param.name, name, stores, DIFFERENT, None, "on one side only")
        if left is None or right is None:
            return result
        if self._same_bytes(left, right):
            return replace(result, verdict=EQUAL, deviation=Deviation(), why="")
        try:
            found = self._deviation(task, left, right)
        except UnreadableStatisticError as error:
            return replace(result, why=str(error))
        return replace(result, verdict=self._verdict(found), deviation=found, why="")

    def completed(self, found: Sequence[tuple[Task, StatisticDifference]]) -> Iterable[StatisticDifference]:
        """Return the statistics of one slot, with the sums of equal ones, too, if there are others to add them to."""
        if all(result.verdict == EQUAL for _, result in found) or any(result.deviation is None for _, result in found):
            return [result for _, result in found]
        return [
            replace(result, deviation=self._of_itself(task)) if result.verdict == EQUAL else result
            for task, result in found
        ]

    def _verdict(self, found: Deviation) -> str:
        if found.lone:
            return DIFFERENT
        if not found.largest:
            return EQUAL_VALUES
        return CLOSE if found.relative_l2 is not None and found.relative_l2 <= self.tolerance else DIFFERENT

    def _same_bytes(self, left: SlotRecord, right: SlotRecord) -> bool:
        if not self._same_layout(left, right):
            return False
        mine, theirs = self.a.checkpoint.fields_of(left), self.b.checkpoint.fields_of(right)
        return all(
            torch.equal(load_tensor(as_bits(mine[field])), load_tensor(as_bits(theirs[field]))) for field in mine
        )

    def _same_layout(self, left: SlotRecord, right: SlotRecord) -> bool:
        """Whether equal bytes are equal numbers."""
        mine, theirs = self.a.checkpoint.fields_of(left), self.b.checkpoint.fields_of(right)
        forms = [{field: (stored.dtype, stored.shape) for field, stored in fields.items()} for fields in (mine, theirs)]
        said = [(slot.store, slot.codebook, slot.block, slot.signed) for slot in (left, right)]
        return forms[0] == forms[1] and said[0] == said[1]

    def _deviation(self, task: Task, left: SlotRecord, right: SlotRecord) -> Deviation:
        """Of the numbers, or of the stored tensors themselves where there is no way from them to numbers."""
        (param, other), name = task
        if param.shape is not None and other.shape is not None and param.shape != other.shape:
            raise UnreadableStatisticError(f"shape {list(param.shape)} on one side, {list(other.shape)} on the other")
        try:
            return measure_deviation(self.a.read(param, name), self.b.read(other, name))
        except UnreadableStatisticError:
            if not self._same_layout(left, right) or not _has_numbers(self.a.checkpoint.fields_of(left)):
                raise
        mine, theirs = self.a.fields(left), self.b.fields(right)
        return sum((measure_deviation(mine[field], theirs[field]) for field in mine), Deviation())

    def _of_itself(self, task: Task) -> Deviation | None:
        (param, _), name = task
        if not _has_numbers(self.a.checkpoint.fields_of(param.slots[name])):
            return None
        try:
            value = self.a.read(param, name)
            return measure_deviation(value, value)
        except UnreadableStatisticError:
            fields = self.a.fields(param.slots[name]).values()
            return sum((measure_deviation(tensor, tensor) for tensor in fields), Deviation())


def _has_numbers(fields: Mapping[str, Stored]) -> bool:
    """Whether torch has tensors of these, and not only their bytes can be compared."""
    return all(stored.dtype in DTYPES.values() for stored in fields.values())
