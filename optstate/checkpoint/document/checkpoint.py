"""A checkpoint of any kind, opened: what it holds as one document, and where its numbers lie. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

from optstate.checkpoint.document.document import Document, Parameter, SlotRecord
from optstate.checkpoint.files.file_kinds import permissions_of
from optstate.checkpoint.files.tensor_place import Stored

__all__ = ["OPTSTATE", "Checkpoint"]

OPTSTATE = "optstate"
"""The kind of a file that `optstate.save` or `optstate convert` wrote."""


@dataclass(frozen=True)
class Checkpoint:
    """Optimizer state as one document, whoever wrote it; no statistic has been read.

    path: what was opened, a file or a folder. kind: the layout it is in. certainty: "declared" where the file itself
    says so, "layout" where the names and shapes of its parts do. tensors: every tensor that the document names, by
    its key there. files: all files it was read from. notes: what a person should know, such as what is not in it.
    """

    path: str
    kind: str
    certainty: str
    document: Document
    tensors: Mapping[str, Stored]
    files: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    def fields_of(self, slot: SlotRecord) -> dict[str, Stored]:
        """Return the tensors of one statistic, by field name."""
        return {name: self.tensors[key] for name, key in slot.fields.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.nbytes for stored in self.tensors.values())

    @property
    def permissions(self) -> int | None:
        """Who may do what with all of its files; None if there are none."""
        return reduce(int.__and__, map(permissions_of, self.files)) if self.files else None

    @property
    def named(self) -> bool:
        """Whether parameters have names rather than places."""
        return any(not param.name.startswith("#") for param in self.document.parameters)

    def with_parameters(self, parameters: tuple[Parameter, ...], tensors: Mapping[str, Stored]) -> Checkpoint:
        """Return the same with other parameters, in the same groups, and their tensors."""
        document = replace(self.document, parameters=parameters)
        groups = tuple(
            replace(group, parameters=tuple(param.name for param in held))
            for group, held in zip(document.groups, document.members, strict=True)
        )
        document = replace(document, groups=groups)
        return replace(self, document=document, tensors=tensors)
