"""How a library declares its optimizer state: one `Format`, found by itself. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Document
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.files.torch_pickle_writer import Constant
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.checkpoint.formats.shared.tree_writer import Tree, TreeWriter
from optstate.other_libraries import OtherRule

__all__ = ["Format", "NewFolder"]


@dataclass(frozen=True)
class NewFolder:
    """What a library's folder holds: one safetensors file, and text beside it.

    file: the name of the safetensors file. tensors: name, dtype and shape in that file, by key of the document.
    constants: tensors whose bytes are known, by their names in the file. texts: the other files' content by name.
    """

    file: str
    tensors: dict[str, NewEntry]
    constants: dict[str, Constant]
    texts: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One library's optimizer state. A module of `formats`, or an entry point of `optstate.formats`, declares one.

    name: of the library, as `convert --format` and `Document.source["kind"]` have the name.
    read: takes a state_dict, and the optimizer's name if a person gave one; returns None for another library's.
    names_itself: whether the file itself tells whose it is, by a header or by names of classes. Such formats are asked
    before those that are told by the keys of their groups alone.
    write: makes the library's state_dict of a document; None where its files cannot be written.
    stores: for each rule ("adam", "lion" ...) that the library is the choice for when nobody says which, the stores
    that its files have for that rule; under "" those of files that come from the library itself.
    rules: what the groups of the library's classes hold, and what in them changes the rule.
    our_words: turns a group's hyper-parameters into the keys and values of our recipes; given the hyper-parameters and
    the rule. None where they are the same.
    is_at, read_at: for libraries that write folders: whether a path is one, and the checkpoint there.
    prepare, pack: for libraries whose files torch.save does not write: the document as it can be written, and the
    folder that a state_dict becomes.
    """

    name: str
    read: Callable[[StateDict, str | None], Checkpoint | None] | None = None
    names_itself: bool = False
    write: Callable[[TreeWriter], Tree] | None = None
    stores: Mapping[str, frozenset[str]] = field(default_factory=dict)
    rules: tuple[OtherRule, ...] = ()
    our_words: Callable[[dict[str, Any], str], dict[str, Any]] | None = None
    is_at: Callable[[Path], bool] | None = None
    read_at: Callable[[str | os.PathLike[str]], Checkpoint] | None = None
    prepare: Callable[[Document], Document] | None = None
    pack: Callable[[Tree], NewFolder] | None = None

    def holds(self, rule: str, stores: set[str], own: bool = False) -> bool:
        """Whether the library's files have all of some stores for a rule. own: the state came from one of its files."""
        held = self.stores.get(rule, frozenset[str]())
        return stores <= (held | self.stores.get("", frozenset[str]()) if own else held)
