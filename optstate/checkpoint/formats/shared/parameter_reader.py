"""A Checkpoint in the making: what is known of every parameter, put together statistic by statistic. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Document, Group, Parameter, SlotRecord, tensor_key
from optstate.checkpoint.document.rules import follows_recipe, rule_notes
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.pickle_objects import Unread
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.files.torch_types import type_name
from optstate.checkpoint.formats.shared.codebooks import Codebooks
from optstate.checkpoint.formats.shared.state_dict import (
    Id,
    NotPlainError,
    StateDict,
    plain,
    plain_members,
    step_of,
)
from optstate.checkpoint.formats.shared.statistics import UNKNOWN, Meaning
from optstate.text import shown

__all__ = ["BLOCKS", "FULL", "Draft", "Source", "build_checkpoint", "without"]

FULL = {"F32": "Full()", "F64": "Full()", "BF16": "Full(dtype='bfloat16')", "F16": "Full(dtype='float16')"}
BLOCKS = {"Block8": 256, "Block4": 128, "Float8": 256}
"""The block of each store if its words name none."""


@dataclass(frozen=True)
class Source:
    """Whose file it is, for `Document.source`; `more` is what writing the same layout again needs.

    recipe: which of ours follows the same rule, unless a switch in the groups makes it another one.
    """

    kind: str
    tool: str
    optimizer: str
    recipe: str = ""
    more: Mapping[str, Any] | None = None


def without(stored: Stored, dim: int) -> Stored:
    """Return the same numbers in a shape that lacks a dimension of size 1."""

    def others(values: tuple[int, ...]) -> tuple[int, ...]:
        return values[:dim] + values[dim + 1 :]

    stride = None if stored.stride is None else others(stored.stride)
    return replace(stored, shape=others(stored.shape), stride=stride)


class Draft:
    """One parameter: readers take values out of `left` and say what they are.

    left: what has not been said of what the file keeps for it.
    """

    def __init__(self, found: StateDict, books: Codebooks, ident: Id, group: int) -> None:
        self.path, self.name, self.group = found.path, found.names[ident], group
        self.hyper = found.groups[group]
        self.left: dict[str, Any] = dict(found.state.get(ident, {}))
        self.books = books
        self.slots: dict[str, SlotRecord] = {}
        self.tensors: dict[str, Stored] = {}
        self.extra: dict[str, Any] = {}
        self.shape: tuple[int, ...] | None = None
        self.dtype = ""
        self.step: int | None = None
        self._shape_of = ""

    def error(self, reason: str, hint: str = "") -> CheckpointError:
        """Return what is wrong with this parameter."""
        return CheckpointError(self.path, f"parameter '{shown(self.name)}': {reason}", hint)

    def tensor(self, key: str) -> Stored:
        """Return a tensor out of `left`; an error if it is none."""
        value = self.left.pop(key, None)
        if not isinstance(value, Stored):
            what = "missing" if value is None else type_name(value)
            what += "" if value is None or isinstance(value, Unread) else ", not a tensor"
            raise self.error(f"{shown(key)} is {what}")
        return value

    def has_shape(self, shape: tuple[int, ...], of: str) -> None:
        """All statistics of a parameter agree on its shape."""
        if self.shape is None:
            self.shape, self._shape_of = shape, of
        elif shape != self.shape:
            theirs = f"{shown(self._shape_of)} that of a parameter of shape {list(self.shape)}"
            raise self.error(f"{shown(of)} has shape {list(shape)}, {theirs}")

    def put(self, slot: str, store: str, meaning: Meaning, fields: Mapping[str, Stored], **more: Any) -> None:
        """Return a statistic with its tensors by field."""
        beta = meaning.beta_in(self.hyper)
        keys = {field: tensor_key(self.name, slot, field) for field in fields}
        record = SlotRecord(store=store, signed=meaning.signed, fields=keys, of=meaning.of, beta=beta, **more)
        self.slots[slot] = record
        self.tensors |= {keys[field]: stored for field, stored in fields.items()}

    def whole(self, slot: str, stored: Stored, meaning: Meaning, key: str = "") -> None:
        """Return a statistic of the parameter's own shape. key: what the file calls it, for messages."""
        self.has_shape(stored.shape, key or slot)
        self.put(slot, FULL.get(stored.dtype, "Unknown()"), meaning, {"": stored})

    def unknown(self, slot: str, stored: Stored) -> None:
        """Return a tensor that nobody can say more about."""
        self.put(slot, "Unknown()", UNKNOWN, {"": stored})

    def factors(self, slot: str, row: Stored, col: Stored, meaning: Meaning) -> None:
        """Means over the last and over the last but one dimension."""
        if not row.shape or not col.shape or row.shape[:-1] != col.shape[:-1]:
            raise self.error(f"{slot} has rows {list(row.shape)} and columns {list(col.shape)}: they fit no matrix")
        self.has_shape((*row.shape, col.shape[-1]), slot)
        self.put(slot, "Factored()", meaning, {"row": row, "col": col})

    def codes(
        self,
        slot: str,
        store: str,
        fields: dict[str, Stored],
        meaning: Meaning,
        shape: tuple[int, ...],
        block: int,
        codebook: tuple[Stored, int] | None = None,
    ) -> None:
        """Codes with a scale per block. codebook: the map and how many codes there are."""
        self.has_shape(shape, slot)
        odd = next((stored for stored in fields.values() if stored.stride is not None), None)
        if odd is not None:
            raise self.error(
                f"codes or scales of {slot} are not contiguous, their strides are {list(odd.stride or ())}"
            )
        ident = ""
        if codebook is not None:
            try:
                ident = self.books.add(*codebook)
            except NotPlainError as error:
                raise self.error(f"the map of {slot} {error}") from None
        words = f"{store}()" if block == BLOCKS[store] else f"{store}(block={block})"
        self.put(slot, words, meaning, fields, codebook=ident, block=block)

    def block_of(self, slot: str, count: int, scales: int) -> int:
        """Return the block, a power of two, for which `count` codes have this number of scales."""
        for block in (256, *(1 << i for i in range(1, 17))):
            if -(-count // block) == scales:
                return block
        expected = f"blocks of 256 have {-(-count // 256)}"
        raise self.error(f"{slot} has {scales} scales for {count} codes: {expected}, and no other power of two fits")

    def take_step(self, key: str = "step") -> None:
        """Return the parameter's own count of updates, if the file has one."""
        if key in self.left:
            try:
                self.step = step_of(self.left.pop(key))
            except NotPlainError as error:
                raise self.error(str(error)) from None

    def take_group_step(self, key: str) -> None:
        """Return the group's count, for a parameter that was updated."""
        if key not in self.hyper:
            raise self.error(f"it has state, but its group does not count steps as '{key}'")
        try:
            self.step = step_of(self.hyper[key])
        except NotPlainError as error:
            raise self.error(f"'{key}' of its group: {error}") from None

    def finish(self) -> Parameter:
        """Return the parameter; what is left of its state must be plain values."""
        for key, value in self.left.items():
            try:
                self.extra[key] = plain(value)
            except NotPlainError as error:
                raise self.error(f"'{shown(key)}' cannot be read: {error}") from None
            if key.startswith("$"):
                raise self.error(f"'{shown(key)}' cannot be kept: a name must not begin with '$'")
        return Parameter(
            name=self.name,
            shape=self.shape,
            dtype=self.dtype,
            group=self.group,
            step=self.step,
            chain="",
            weights="",
            slots=self.slots,
            extra=self.extra,
        )


def build_checkpoint(
    found: StateDict, source: Source, say: Callable[[Draft], None], notes: Iterable[str] = ()
) -> Checkpoint:
    """Return a checkpoint of what `say` makes of every parameter, in the order of the groups."""
    books, said = Codebooks(), list(notes)
    parameters: list[Parameter] = []
    groups: list[Group] = []
    tensors: dict[str, Stored] = {}
    for g, ids in enumerate(found.ids):
        drafts = [Draft(found, books, ident, g) for ident in ids]
        for draft in drafts:
            say(draft)
            parameters.append(draft.finish())
            tensors |= draft.tensors
        values = {key: value for key, value in found.groups[g].items() if key not in ("params", "param_names")}
        hypers = plain_members(values, f"the hyper-parameter of group {g}", said)
        groups.append(Group(hyper=hypers, parameters=tuple(draft.name for draft in drafts)))
    document = Document(
        recipe=source.recipe,
        groups=tuple(groups),
        parameters=tuple(parameters),
        source=_source_of(found, source),
        codebooks=books.values,
        extra=plain_members(found.rest, "the value", said),
    )
    if not follows_recipe(document):
        document = replace(document, recipe="")
    said += rule_notes(document)
    return Checkpoint(found.path, source.kind, "layout", document, tensors, (found.path,), tuple(said))


def _source_of(found: StateDict, source: Source) -> dict[str, Any]:
    about: dict[str, Any] = {"tool": source.tool, "kind": source.kind, "optimizer": source.optimizer}
    about["named"] = any("param_names" in group for group in found.groups)
    if any(isinstance(ident, str) for ident in found.names):
        about["keys"] = "names"
    step = next((state["step"] for state in found.state.values() if "step" in state), None)
    if step is not None:
        about["step"] = step.dtype if isinstance(step, Stored) else type(step).__name__
    return about | dict(source.more or {})
