"""All formats: found by themselves, asked whose state it is, chosen to write in. Imports no torch.

The modules beside this one declare a `FORMAT` each; other packages do so by entry points of the group
`optstate.formats`. No format knows another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, TypeVar

from optstate.checkpoint import formats
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Document, Group
from optstate.checkpoint.document.rules import base_recipe, library_of
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files import torch_archive_reader
from optstate.checkpoint.files.pickle_objects import PickleError, check_tree
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.formats.shared.any_statistics import read_any
from optstate.checkpoint.formats.shared.embedded_state import choose_state, find_siblings
from optstate.checkpoint.formats.shared.format import Format, NewFolder
from optstate.checkpoint.formats.shared.hyper_parameters import check_numbers
from optstate.checkpoint.formats.shared.master_weights import describe_masters
from optstate.checkpoint.formats.shared.state_by_name import find_attributes
from optstate.checkpoint.formats.shared.state_dict import parse_state_dict
from optstate.checkpoint.formats.shared.statistics import RULES
from optstate.checkpoint.formats.shared.tree_writer import LayoutError, Tree, TreeWriter
from optstate.other_libraries import other_formats
from optstate.plugins import warn_in_a_line
from optstate.text import shown

__all__ = [
    "LayoutError",
    "NewState",
    "choose_format",
    "find_folder_format",
    "find_format",
    "find_formats",
    "read_folder",
    "read_state_dict",
    "read_torch_checkpoint",
    "translate_group",
    "writable_formats",
    "write_state",
]

T = TypeVar("T")

MOST_NAMES = 6
"""Names listed before a count."""


@cache
def _own_formats() -> tuple[Format, ...]:
    names = (module.name for module in iter_modules(formats.__path__) if not module.ispkg)
    modules = (
        import_module(f"{formats.__name__}.{name}") for name in names if f"{formats.__name__}.{name}" != __name__
    )
    return tuple(module.FORMAT for module in modules)


def find_formats() -> list[Format]:
    """All formats in the order in which they are asked whose a state_dict is.

    Those that a file names itself come first, then those that its keys tell; among these other packages' before ours,
    since theirs may be a variant of what is known here.
    """
    return sorted([*other_formats(), *_own_formats()], key=lambda found: not found.names_itself)


def find_format(name: str) -> Format | None:
    """Return the format of a library; None if there is none."""
    return next((found for found in find_formats() if found.name == name), None)


def find_folder_format(path: Path) -> Format | None:
    """Return the format whose library wrote a folder; None if none says that it did."""
    return next((found for found in find_formats() if found.is_at and _ask(found, found.is_at, path)), None)


def read_folder(found: Format, path: Path) -> Checkpoint:
    """Return the checkpoint in a folder of the format's library.

    Raises:
        CheckpointError: if it cannot be read.
    """
    assert found.read_at is not None
    try:
        return _call(found, found.read_at, path)
    except LayoutError as error:
        raise CheckpointError(path, str(error)) from None


def writable_formats() -> tuple[str, ...]:
    """Return the names of all libraries whose files can be written, sorted."""
    return tuple(sorted(found.name for found in find_formats() if found.write is not None))


def _call(found: Format, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of a format.

    Raises:
        LayoutError: of one line, for whatever else than the errors of checkpoints another package's function raises.
    """
    if any(found is own for own in _own_formats()):
        return function(*arguments)
    try:
        return function(*arguments)
    except (CheckpointError, LayoutError):
        raise
    except (Exception, SystemExit) as error:  # another package's mistake is no traceback of a command
        reason = " ".join(str(error).split())
        raise LayoutError(
            f"the format {found.name!r} of another package fails: {type(error).__name__}: {reason}"
        ) from error


def _ask(found: Format, function: Callable[..., T], *arguments: Any) -> T | None:
    """Ask a format whether state is its library's. One that fails is left out, with a warning: others may know it."""
    try:
        return _call(found, function, *arguments)
    except LayoutError as error:
        warn_in_a_line(f"{error}; it is left out")
        return None


# --- reading ------------------------------------------------------------------------------------------------------


def read_torch_checkpoint(
    path: str | os.PathLike[str], key: str | None = None, optimizer: str | None = None
) -> Checkpoint:
    """Return a checkpoint of what torch.save wrote.

    key: where in the file the optimizer's state is, as "optimizer" or "optimizer_states.0"; found if there is one only.
    optimizer: its name, where the file does not tell it.

    Raises:
        CheckpointError: if the file cannot be read, or holds no optimizer state or several.
    """
    text = os.fspath(path)
    strangers: dict[str, None] = {}
    notes: list[str] = []
    tree = torch_archive_reader.read_torch_file(path, strangers)
    state = choose_state(tree, text, key, notes)
    if strangers:  # it may have been in one of them, into which nobody has looked
        try:
            check_tree(state)
        except PickleError as error:
            raise CheckpointError(text, str(error)) from None
        notes.append(f"of Python objects in the file only the names are read: {_listed(strangers)}")
    if note := describe_masters(find_siblings(tree, state)):
        notes.append(note)
    checkpoint = read_state_dict(state, text, optimizer)
    return replace(checkpoint, notes=(*checkpoint.notes, *notes))


def _listed(names: Iterable[str]) -> str:
    first, *others = (shown(name) for name in names)
    listed = ", ".join([first, *others[: MOST_NAMES - 1]])
    return f"{listed} and {len(others) - MOST_NAMES + 1} more" if len(others) >= MOST_NAMES else listed


def read_state_dict(tree: Any, path: str, optimizer: str | None = None) -> Checkpoint:
    """Return a checkpoint of plain data with `Stored` tensors, as the first format reads it that knows the state.

    Raises:
        CheckpointError: naming the first parameter whose state is not what its library writes.
    """
    found = parse_state_dict(tree, path) or find_attributes(tree, path)
    if found is None:
        raise CheckpointError(path, "not optimizer state: it lacks 'state' and 'param_groups'")
    checkpoints = (_ask(each, each.read, found, optimizer) for each in find_formats() if each.read is not None)
    return next((made for made in checkpoints if made is not None), None) or read_any(found, optimizer)


def translate_group(document: Document, group: Group) -> dict[str, Any]:
    """Return a group's hyper-parameters under the keys and with the values that groups of the document's recipe have.

    What our recipe does not have stays as it is.
    """
    source = find_format(library_of(document))
    hyper = dict(group.hyper)
    return hyper if source is None else _our_words(source, RULES.get(document.recipe, ""), hyper)


def _our_words(source: Format, rule: str, hyper: dict[str, Any]) -> dict[str, Any]:
    """Return hyper-parameters of a library in the words of our recipes."""
    return hyper if source.our_words is None else _call(source, source.our_words, hyper, rule)


# --- writing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NewState:
    """What a library's files are to hold.

    tree: what `create_torch` writes. folder: the same for a library that has a folder instead, else None. notes: what a
    person should know about the new file: what was assumed, what is not in it.
    """

    tree: Tree
    folder: NewFolder | None
    notes: tuple[str, ...]


def write_state(name: str, document: Document, entries: Mapping[str, NewEntry]) -> NewState:
    """Return the content of a library's file: `state`, `param_groups`, and what else it has at the top.

    Statistics are NewTensors under the document's keys, in the shapes that the library has. A document that came from
    this library gives the file it came from.

    Args:
        name: one of `writable_formats`.
        document: what to write.
        entries: dtype and shape of every tensor the document names, by key.

    Raises:
        LayoutError: for a library that is none of them, or for the first thing that it has no place for.
    """
    target = find_format(name)
    if target is None or target.write is None:
        raise LayoutError(
            f"no library whose files can be written is called {name!r}: one of {', '.join(writable_formats())}"
        )
    if target.prepare is not None:
        document = _call(target, target.prepare, document)
    source, rule = find_format(library_of(document)), RULES.get(document.recipe, "")
    writer = TreeWriter(name, document, entries, dict if source is None else partial(_our_words, source, rule))
    if not writer.same:
        check_numbers(writer)
    tree = _call(target, target.write, writer)
    writer.warn_of_rest(tree)
    return NewState(tree, None if target.pack is None else _call(target, target.pack, tree), tuple(writer.notes))


def choose_format(document: Document) -> str:
    """Return the library to write when nobody says which.

    That is the one a document came from if the library still has all its stores, else the library with the fewest
    stores that has its rule and its stores.

    Raises:
        LayoutError: if there is none, or several.
    """
    stores = {record.store.partition("(")[0] for param in document.parameters for record in param.slots.values()}
    rule = RULES.get(base_recipe(document), "")
    own = find_format(str(document.source.get("kind", "")))
    if own is not None and own.stores and own.holds(rule, stores, own=True):
        return own.name
    rule = RULES.get(document.recipe, "")
    fitting = [found for found in find_formats() if rule in found.stores and rule and found.holds(rule, stores)]
    fewest = min((len(found.stores[rule]) for found in fitting), default=0)
    names = sorted((found.name for found in fitting if len(found.stores[rule]) == fewest), reverse=True)
    if len(names) == 1:
        return names[0]
    if names:
        raise LayoutError(
            f"the state of {document.recipe} fits several libraries: give --format {' or --format '.join(names)}"
        )
    what = document.recipe or str(document.source.get("optimizer") or "a chain without a name")
    kept = f" in {', '.join(sorted(stores))}" if stores else ""
    raise LayoutError(
        f"no library's file holds {what}{kept}: write a file of optstate's own, or convert with --recipe or --to"
    )
