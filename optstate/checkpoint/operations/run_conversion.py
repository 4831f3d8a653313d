"""Carry out a conversion: choose where its numbers go, and write them, one parameter at a time."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from optstate.checkpoint.document.document import KEY, Document, Parameter, find_version
from optstate.checkpoint.document.document_json import to_json
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.atomic_write import ending_in_order, replacing, write_all
from optstate.checkpoint.files.safetensors_set import create_set, find_file_or_index
from optstate.checkpoint.files.safetensors_writer import NewEntry, create, header_size
from optstate.checkpoint.files.tensor_bytes import bytes_of
from optstate.checkpoint.files.torch_archive_writer import create_torch
from optstate.checkpoint.operations.conversion_report import ConversionReport, make_report
from optstate.checkpoint.operations.convert_values import Recoder
from optstate.checkpoint.operations.plan_conversion import Conversion
from optstate.checkpoint.operations.read_values import UnreadableStatisticError, Values
from optstate.text import shown

if TYPE_CHECKING:
    from optstate.checkpoint.formats.registry import NewState
    from optstate.checkpoint.formats.shared.format import NewFolder
    from optstate.checkpoint.formats.shared.tree_writer import Tree

__all__ = [
    "NATIVE",
    "Track",
    "carry_out",
    "check_target",
    "choose_layout",
    "export",
    "find_eps",
    "list_layouts",
    "list_notes",
    "record_conversion",
    "write_native",
]

NATIVE = "optstate"
"""The layout of files of optstate's own."""

TORCH_SUFFIXES = (".pt", ".pth", ".bin")

Track = Callable[[Iterable[Parameter]], Iterable[Parameter]]
"""Passes the parameters on, and may show how far the work has come."""

USUAL_EPS = 1e-8

MOST_HISTORY, LEFT_OUT = 64, "left_out"
"""Conversions that a document tells of, and the key under which it says how many others there were."""


# --- the target ---------------------------------------------------------------------------------------------------


def list_layouts() -> tuple[str, ...]:
    """Return the names of all layouts that can be written."""
    return (NATIVE, *_libraries().writable_formats())


def choose_layout(conversion: Conversion, target: Path, asked: str | None) -> str:
    """Choose the layout to write: the one asked for, else by the target's suffix optstate's own or a torch file's.

    Raises:
        CheckpointError: if there is no such layout, or none that is obvious.
    """
    path = conversion.checkpoint.path
    if asked is None:
        if target.suffix not in TORCH_SUFFIXES:
            return NATIVE
        libraries = _libraries()
        try:
            return str(libraries.choose_format(conversion.document))
        except libraries.LayoutError as error:
            raise CheckpointError(path, f"cannot be written as a torch file: {error}", refused=True) from None
    if asked != NATIVE and asked not in list_layouts():
        raise CheckpointError(
            path, f"no layout is called {asked!r}", f"one of {', '.join(list_layouts())}", refused=True
        )
    return asked


def check_target(conversion: Conversion, target: Path, layout: str, *, overwrite: bool) -> None:
    """Refuse early what writing would refuse late: a target that exists, or is the source itself.

    Raises:
        CheckpointError: refused.
    """
    if _is_of_folders(layout) and os.path.lexists(target):
        reason = "exists already, and two files cannot be replaced at once"
        raise CheckpointError(target, reason, "give the name of a new folder", refused=True)
    there = find_file_or_index(target)
    for source in conversion.checkpoint.files:
        if _is_same(source, there):
            raise CheckpointError(target, "is the source itself", "choose another name", refused=True)
    if not overwrite and os.path.lexists(there):
        raise CheckpointError(target, "exists already", "choose another name, or --force", refused=True)
    if not os.path.isdir(target.parent):
        raise CheckpointError(target, "its folder does not exist", "make it first")


def _is_of_folders(layout: str) -> bool:
    """Whether a library's state is several files in a folder."""
    found = None if layout == NATIVE else _libraries().find_format(layout)
    return found is not None and found.pack is not None


def _is_same(source: str, target: str) -> bool:
    """Whether both lead to one file; a source that was removed since it was opened is none."""
    with suppress(OSError):
        return os.path.samefile(source, target)
    return False


def list_notes(conversion: Conversion, layout: str = NATIVE) -> tuple[str, ...]:
    """List what a person should know of the source and of the new file: everything in one that is not in the other.

    Raises:
        CheckpointError: (refused) if the layout cannot hold the state.
    """
    notes = [*conversion.checkpoint.notes, *conversion.notes]
    document, tensors = conversion.checkpoint.document, conversion.checkpoint.tensors
    stray = sorted(tensors.keys() - {key for param in document.parameters for key in param.keys})
    if stray:
        notes.append(f"left out, tensors of no statistic: {', '.join(map(shown, stray[:8]))}, {len(stray)} in all")
    if layout != NATIVE:
        notes += _new_state(conversion, layout).notes
    return tuple(dict.fromkeys(notes))


def _libraries() -> ModuleType:
    """Import the formats of all libraries, of which a file of optstate's own needs none."""
    return import_module("optstate.checkpoint.formats.registry")


# --- writing ------------------------------------------------------------------------------------------------------


def export(
    conversion: Conversion,
    target: Path,
    layout: str = NATIVE,
    *,
    overwrite: bool = False,
    track: Track = iter,
    max_shard_size: int | None = None,
) -> ConversionReport:
    """Write a conversion, and report what was lost. The target is replaced at once or not at all.

    Raises:
        CheckpointError: if the target exists (refused unless `overwrite`), the layout cannot hold the state (refused),
            or something cannot be read or written.
    """
    check_target(conversion, target, layout, overwrite=overwrite)
    source = conversion.checkpoint.path
    try:
        if layout == NATIVE:
            return write_native(conversion, target, overwrite=overwrite, track=track, max_shard_size=max_shard_size)
        new = _new_state(conversion, layout)
        if new.folder is None:
            return _write_torch(conversion, target, new.tree, overwrite, track)
        with ending_in_order():
            return _write_folder(conversion, target, new.folder, track)
    except UnreadableStatisticError as error:
        raise CheckpointError(source, f"cannot be converted: {error}", refused=True) from None
    except (ValueError, ArithmeticError, OSError) as error:
        raise CheckpointError(source, str(error)) from error


def write_native(
    conversion: Conversion,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    track: Track = iter,
    max_shard_size: int | None = None,
) -> ConversionReport:
    """Write what a checkpoint becomes as one safetensors file, and report what was lost.

    Memory: the statistics of one parameter in fp32, and their new tensors. The file is replaced at once or not at all.
    More than `max_shard_size` bytes become several files with an index. A new file has the permissions of the source.

    Raises:
        CheckpointError: if the target exists (refused unless `overwrite`) or cannot be written.
        OSError, UnreadableStatisticError: if the source cannot be read.
    """
    entries = conversion.entries
    widest = record_conversion(conversion, _widest(make_report(conversion)))
    room = header_size({KEY: to_json(widest)}, entries)
    kept, limit = conversion.checkpoint.permissions, max_shard_size
    with create_set(path, entries, room=room, limit=limit, overwrite=overwrite, permissions=kept) as file:
        report = carry_out(conversion, lambda key, tensor: file.put(key, bytes_of(tensor)), track)
        file.finish({KEY: to_json(record_conversion(conversion, report))})
    return report


def _new_state(conversion: Conversion, layout: str) -> NewState:
    """Make what the files of a library are to hold.

    Raises:
        CheckpointError: (refused) for what it has no place for.
    """
    libraries, entries = _libraries(), {entry.name: entry for entry in conversion.entries}
    try:
        made: NewState = libraries.write_state(layout, conversion.document, entries)
    except libraries.LayoutError as error:
        reason = f"cannot be written as {layout} state: {error}"
        raise CheckpointError(conversion.checkpoint.path, reason, refused=True) from None
    return made


def _write_torch(conversion: Conversion, target: Path, tree: Tree, overwrite: bool, track: Track) -> ConversionReport:
    """Write a file as torch.save does."""
    with create_torch(target, tree, overwrite=overwrite, permissions=conversion.checkpoint.permissions) as file:
        return carry_out(conversion, lambda key, tensor: file.put(key, bytes_of(tensor)), track)


def _write_folder(conversion: Conversion, target: Path, made: NewFolder, track: Track) -> ConversionReport:
    """Write a new folder, which gets its name when all of its files are complete."""
    constants = [NewEntry(name, constant.dtype, constant.shape) for name, constant in made.constants.items()]
    all_entries = [*made.tensors.values(), *constants]
    folder, kept = target.with_name(f".optstate-{os.urandom(8).hex()}.tmp"), conversion.checkpoint.permissions
    folder.mkdir()
    try:
        room = header_size({}, all_entries)
        with create(folder / made.file, all_entries, room=room, permissions=kept) as file:
            for name, constant in made.constants.items():
                file.put(name, constant.data)

            def put(key: str, tensor: Tensor) -> None:
                file.put(made.tensors[key].name, bytes_of(tensor))

            report = carry_out(conversion, put, track)
            file.finish({})
        for name, text in made.texts.items():
            with replacing(folder / name, False, kept) as descriptor:
                write_all(descriptor, memoryview(text.encode()))
        os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return report


def carry_out(conversion: Conversion, put: Callable[[str, Tensor], Any], track: Track = iter) -> ConversionReport:
    """Make every new tensor and hand it to `put(key, tensor)`, parameter by parameter."""
    recoder = Recoder(Values(conversion.checkpoint))
    document = conversion.checkpoint.document
    by_name = {param.name: param for param in document.parameters}
    params = [by_name[name] for name in conversion.transfers]
    followers = [*params[1:], None][: len(params)]  # a file may hold no parameters at all
    for param, following in zip(track(params), followers, strict=True):
        if following is not None:
            recoder.values.announce(following)
        recoder.carry(conversion.transfers[param.name], find_eps(document.groups[param.group].hyper), put)
    return make_report(conversion, recoder.figures, recoder.total)


# --- what the file says of it -------------------------------------------------------------------------------------


def record_conversion(conversion: Conversion, report: ConversionReport) -> Document:
    """Return the new document with this conversion in its history, unless nothing but the container changes."""
    source = conversion.checkpoint
    document, was = conversion.document, source.document
    if conversion.changes_nothing and (document.recipe, document.source) == (was.recipe, was.source):
        return document
    entry = {
        "tool": "optstate",
        "version": find_version(),
        "from": {"kind": source.kind, "recipe": was.recipe, "source": was.source},
        **report.to_history(),
    }
    return replace(document, history=_bounded((*document.history, entry)))


def _bounded(history: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Return the first and the last entries of a long history, and how many there were between them."""
    if len(history) <= MOST_HISTORY:
        return history
    first, *others = history
    left_out = 0
    if others[0].keys() == {LEFT_OUT} and isinstance(others[0][LEFT_OUT], int):
        left_out = others.pop(0)[LEFT_OUT]
    last = others[len(others) - (MOST_HISTORY - 2) :]
    return (first, {LEFT_OUT: left_out + len(others) - len(last)}, *last)


def _widest(report: ConversionReport) -> ConversionReport:
    """Return the report with the figures that take most room in JSON."""
    most: dict[str, Any] = dict.fromkeys(
        ("relative_error", "update_relative_error", "update_cosine", "inflation"), -math.inf
    )
    rows = tuple(replace(row, **most, zeros=2**63) for row in report.rows)
    return replace(report, rows=rows, update_relative_error=-math.inf, update_cosine=-math.inf)


def find_eps(hyper: dict[str, Any]) -> float:
    """Find what the recipe adds to the root of the second moment; what Adam adds where it does no such thing."""
    eps = hyper.get("eps")
    try:
        return float(eps) if isinstance(eps, float | int) and not isinstance(eps, bool) else USUAL_EPS
    except OverflowError:  # an integer that is no eps of anything
        return USUAL_EPS
