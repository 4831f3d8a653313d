"""A conversion on paper: the new document, and how each of its statistics comes about. Nothing has been read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import refuse_contradictions
from optstate.checkpoint.document.document import WEIGHT, Document, Parameter
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.formats.shared.statistics import RULES
from optstate.checkpoint.operations.read_values import UnreadableStatisticError, Values
from optstate.checkpoint.operations.transfers import Transfer, copied, recoded, spec_of
from optstate.stores import Store
from optstate.stores.registry import from_words

__all__ = ["Conversion", "in_stores", "store_of", "unchanged"]

DROP = "drop"
NOT_STATISTICS = (WEIGHT, "master")
"""What is kept for weights: a default store is not meant for it."""


@dataclass(frozen=True)
class Conversion:
    """What a checkpoint becomes.

    document: the new one, as if it had always been so; this conversion is not in its history yet.
    transfers: by name of the source's parameter, in the new document's order.
    dropped: parameters and slots of statistics that the new file will not have. changes: what a step will do otherwise
    than it did, whatever becomes of the numbers.
    """

    checkpoint: Checkpoint
    document: Document
    transfers: Mapping[str, tuple[Transfer, ...]]
    dropped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @property
    def lossless(self) -> bool:
        """Whether the run goes on as it was: the same numbers under the same rule."""
        return not self.changes and self.keeps_numbers

    @property
    def keeps_numbers(self) -> bool:
        """Whether everything read from the new file will be what was read from the old one."""
        return not self.dropped and all(transfer.exact for transfer in self.all_transfers)

    @property
    def changes_nothing(self) -> bool:
        """Whether all tensors are copied and none is left out."""
        return not self.dropped and all(transfer.store is None for transfer in self.all_transfers)

    @property
    def all_transfers(self) -> list[Transfer]:
        """Every statistic of the new file."""
        return [transfer for transfers in self.transfers.values() for transfer in transfers]

    @property
    def entries(self) -> list[NewEntry]:
        """Every tensor of the new file."""
        return [entry for transfer in self.all_transfers for entry in transfer.entries.values()]

    @property
    def bytes_before(self) -> int:
        """Of the old file's tensors."""
        return self.checkpoint.nbytes

    @property
    def bytes_after(self) -> int:
        """Of the new file's tensors."""
        return sum(entry.nbytes for entry in self.entries)

    def check(self) -> None:
        """Raise if a statistic cannot be what is said of it, must be read and cannot be, or none is there at all.

        Raises:
            CheckpointError: for a file that contradicts itself.
            UnreadableStatisticError: for numbers that cannot be had.
        """
        refuse_contradictions(self.checkpoint)
        document, said = self.checkpoint.document, self.checkpoint.notes
        keeps_none = RULES.get(document.recipe, "") in ("", "sgd")
        if document.parameters and not keeps_none and not any(param.has_state for param in document.parameters):
            raise UnreadableStatisticError(said[0] if said else "no statistics are in the file: no step was made")
        values = Values(self.checkpoint)
        for transfer in self.all_transfers:
            if transfer.store is not None and transfer.source is not None:
                values.check(transfer.parameter, transfer.source)


def unchanged(checkpoint: Checkpoint) -> Conversion:
    """Every statistic as it is: for another container."""
    transfers = {param.name: _copies(checkpoint, param) for param in checkpoint.document.parameters}
    return Conversion(checkpoint, checkpoint.document, transfers)


def in_stores(checkpoint: Checkpoint, default: str | None, by_slot: Mapping[str, str]) -> Conversion:
    """The same recipe with statistics in other stores.

    Args:
        checkpoint: the source.
        default: words of a store (`optstate.stores.registry`) for all statistics; None leaves them as they are.
        by_slot: words by slot, before the default; "drop" leaves the statistic out.

    Raises:
        ValueError: for words that name no store, a slot that the file does not have, or a store that cannot hold a
            statistic.
    """
    present = dict.fromkeys(slot for param in checkpoint.document.parameters for slot in param.slots)
    for slot in by_slot:
        if slot not in present:
            raise ValueError(f"the file keeps no {slot!r}: it has {', '.join(present) or 'no statistics'}")
    stores: dict[str, Store | None] = {}
    if default is not None:
        everywhere = from_words(default)  # dropping everything is no conversion
        stores = {slot: everywhere for slot in present if slot not in NOT_STATISTICS}
    stores |= {slot: store_of(words) for slot, words in by_slot.items()}
    parameters, transfers, dropped = [], {}, []
    for param in checkpoint.document.parameters:
        made = []
        for slot in param.slots:
            if slot in stores and stores[slot] is None:
                dropped.append((param.name, slot))
            else:
                made.append(_in_store(checkpoint, param, slot, stores.get(slot)))
        parameters.append(replace(param, slots={transfer.name: transfer.record for transfer in made}))
        transfers[param.name] = tuple(made)
    document = replace(checkpoint.document, parameters=tuple(parameters), codebooks=_books(checkpoint, transfers))
    return Conversion(checkpoint, document, transfers, tuple(dropped))


def store_of(words: str) -> Store | None:
    """The store that words name, None for "drop".

    Raises:
        ValueError: if they name none.
    """
    return None if words == DROP else from_words(words)


def _in_store(checkpoint: Checkpoint, param: Parameter, slot: str, store: Store | None) -> Transfer:
    stored = checkpoint.fields_of(param.slots[slot])
    if store is None:
        return copied(param, slot, stored)
    group = checkpoint.document.groups[param.group]
    try:
        return recoded(param, slot, stored, store, spec_of(param, group.role, group.head_size))
    except ValueError as error:
        raise ValueError(f"{slot} of {param.name!r} cannot go into {store}: {error}") from None


def _copies(checkpoint: Checkpoint, param: Parameter) -> tuple[Transfer, ...]:
    return tuple(copied(param, slot, checkpoint.fields_of(record)) for slot, record in param.slots.items())


def _books(checkpoint: Checkpoint, transfers: Mapping[str, tuple[Transfer, ...]]) -> dict[str, tuple[float, ...]]:
    """The values of all codes in the new file."""
    books, theirs = {}, checkpoint.document.codebooks
    for made in transfers.values():
        for transfer in made:
            book = transfer.store.codebook if transfer.store is not None else None
            if book is not None:
                books[book.id] = tuple(book.values.tolist())
            elif transfer.record.codebook in theirs:
                books[transfer.record.codebook] = theirs[transfer.record.codebook]
    return dict(sorted(books.items()))
