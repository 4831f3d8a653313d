"""What the tensors of an optstate file are: the document under the metadata key `optstate`. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from optstate.checkpoint.document.chain_words import ChainWords, parse_chain

__all__ = [
    "FORMAT_VERSION",
    "KEY",
    "WEIGHT",
    "Document",
    "DocumentError",
    "Group",
    "Parameter",
    "SlotRecord",
    "TensorValue",
    "find_version",
    "tensor_key",
]

KEY = "optstate"
FORMAT_VERSION = 1

WEIGHT = "weight"
"""The slot of what is kept for writing the weight itself."""

MOST_VALUES = 1024
"""Elements of a tensor among hyper-parameters; larger ones are no hyper-parameters."""

DEEPEST = 32
"""Containers within containers; Python itself fails at a few hundred."""


class DocumentError(ValueError):
    """The document cannot be written or read; the message names the place in it."""


@dataclass(frozen=True)
class TensorValue:
    """A small tensor among hyper-parameters, such as a learning rate. dtype: torch's name; values: flat, in order."""

    dtype: str
    shape: tuple[int, ...]
    values: tuple[float | int, ...]


@dataclass(frozen=True, kw_only=True)
class SlotRecord:
    """One statistic of one parameter.

    store: the store in words, as `str(store)`.
    signed: whether the statistic can be negative.
    fields: field name -> tensor in the file; a store with one field names it "".
    codebook: id of the values that codes stand for, a key of the document's `codebooks`; "" where codes are numbers
    themselves.
    block: consecutive elements per scale, 0 where there are no blocks.
    of: what is averaged or summed (`optstate.stores.MEANINGS`), "" where that is unknown.
    beta: where it is `1 - beta**step` times an average, since that began at zero; else None.
    shape: of the tensor that it is a statistic of, where that is another one than the parameter; else None.
    within: the words of the transform around a chain that keeps it, such as "project(rank=4, ...)", which decides what
    the numbers are of; "" elsewhere.
    """

    store: str
    signed: bool
    fields: dict[str, str]
    codebook: str = ""
    block: int = 0
    of: str = ""
    beta: float | None = None
    shape: tuple[int, ...] | None = None
    within: str = ""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter and what is kept for it.

    name: `#<place>` for one without. shape: global, None where it is unknown. dtype: torch's name, "bfloat16". group:
    index of its group. step: its own count of updates, None where it has no state (frozen) or nobody counted. chain:
    its transforms in words. weights: how it is written, in words. tied: other names of the same parameter, as far as
    the writer knew them. extra: what else was kept for it that is no statistic.

    Files of other tools do not say dtype, chain and weights: these are "" then.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str
    group: int
    step: int | None
    chain: str
    weights: str
    slots: dict[str, SlotRecord] = field(default_factory=dict)
    tied: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Number of elements; 0 where the shape is unknown."""
        return math.prod(self.shape) if self.shape is not None else 0

    @property
    def transforms(self) -> ChainWords:
        """Its chain taken apart; no transforms where the file does not tell them."""
        return parse_chain(self.chain)

    @property
    def has_state(self) -> bool:
        """Whether anything is kept for it."""
        return self.step is not None or bool(self.slots)

    def measured_by(self, slot: SlotRecord) -> Parameter:
        """Return the tensor that a statistic is of, as if it were the parameter; the parameter itself in most cases."""
        return self if slot.shape is None else replace(self, shape=slot.shape)

    @property
    def keys(self) -> list[str]:
        """The names of its tensors in the file."""
        return [key for slot in self.slots.values() for key in slot.fields.values()]


@dataclass(frozen=True, kw_only=True)
class Group:
    """A param group: hyper-parameters as they were given, and the names of its parameters in order."""

    hyper: dict[str, Any]
    parameters: tuple[str, ...]
    role: str = ""
    head_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Document:
    """Everything about an optimizer that is not a tensor.

    recipe: name of the recipe as `optstate recipes` lists it, "" for a chain without one.
    parameters: in the optimizer's order, group by group.
    clip_grad_norm: the norm clip of a fused backward pass, None for none.
    source: the tool that wrote the file. history: what converted it since, oldest first.
    codebooks: the values that codes stand for, by id, each once. extra: what else the source kept for all.
    """

    recipe: str
    groups: tuple[Group, ...]
    parameters: tuple[Parameter, ...]
    clip_grad_norm: float | None = None
    source: dict[str, Any] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    codebooks: dict[str, tuple[float, ...]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def steps(self) -> tuple[int, ...]:
        """The different update counts of its parameters, ascending."""
        return tuple(sorted({param.step for param in self.parameters if param.step is not None}))

    @property
    def members(self) -> list[list[Parameter]]:
        """The parameters of every group."""
        found: list[list[Parameter]] = [[] for _ in self.groups]
        for param in self.parameters:
            found[param.group].append(param)
        return found


def tensor_key(parameter: str, slot: str, name: str = "") -> str:
    """Return the name of a tensor in the file: `<parameter>/<slot>` or `<parameter>/<slot>.<field>`.

    A slot has no "/", so the last one ends the parameter's name.
    """
    return f"{parameter}/{slot}.{name}" if name else f"{parameter}/{slot}"


def find_version() -> str:
    """Return the installed version, "unknown" where the package is run from a folder."""
    from importlib.metadata import PackageNotFoundError, version  # 20 ms that a look into a file does not need

    try:
        return version("optstate")
    except PackageNotFoundError:  # run from a source folder
        return "unknown"
