"""Write what a conversion gives into a file of optstate's own or of another library."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.atomic_write import ending_in_order, replacing, write_all
from optstate.checkpoint.files.safetensors_set import find
from optstate.checkpoint.files.safetensors_writer import NewEntry, create, header_size
from optstate.checkpoint.files.tensor_bytes import bytes_of
from optstate.checkpoint.files.torch_archive_writer import create_torch
from optstate.checkpoint.formats.registry import (
    LayoutError,
    NewState,
    choose_format,
    find_format,
    writable_formats,
    write_state,
)
from optstate.checkpoint.formats.shared.format import NewFolder
from optstate.checkpoint.operations.conversion_report import Report
from optstate.checkpoint.operations.plan_conversion import Conversion
from optstate.checkpoint.operations.read_values import UnreadableStatisticError
from optstate.checkpoint.operations.run_conversion import Track, carry_out, write_converted
from optstate.text import shown

__all__ = ["NATIVE", "check_target", "export", "layout_for", "layouts", "notes_of"]

NATIVE = "optstate"
LEROBOT_STATE, LEROBOT_GROUPS = "optimizer_state.safetensors", "optimizer_param_groups.json"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")


def layouts() -> tuple[str, ...]:
    """Return the names of all layouts that can be written."""
    return (NATIVE, *writable_formats())


def layout_for(conversion: Conversion, target: Path, asked: str | None) -> str:
    """Choose the layout to write: the one asked for, else by the target's suffix optstate's own or a torch file's.

    Raises:
        CheckpointError: if there is no such layout, or none that is obvious.
    """
    path = conversion.checkpoint.path
    if asked is None:
        if target.suffix not in TORCH_SUFFIXES:
            return NATIVE
        try:
            return choose_format(conversion.document)
        except LayoutError as error:
            raise CheckpointError(path, f"cannot be written as a torch file: {error}", refused=True) from None
    if asked not in layouts():
        raise CheckpointError(path, f"no layout is called {asked!r}", f"one of {', '.join(layouts())}", refused=True)
    return asked


def check_target(conversion: Conversion, target: Path, layout: str, *, overwrite: bool) -> None:
    """Refuse early what writing would refuse late: a target that exists, or is the source itself.

    Raises:
        CheckpointError: refused.
    """
    if _is_folder(layout) and os.path.lexists(target):
        reason = "exists already, and two files cannot be replaced at once"
        raise CheckpointError(target, reason, "give the name of a new folder", refused=True)
    there = find(target)
    for source in conversion.checkpoint.files:
        if _is_same(source, there):
            raise CheckpointError(target, "is the source itself", "choose another name", refused=True)
    if not overwrite and os.path.lexists(there):
        raise CheckpointError(target, "exists already", "choose another name, or --force", refused=True)
    if not os.path.isdir(target.parent):
        raise CheckpointError(target, "its folder does not exist", "make it first")


def _is_folder(layout: str) -> bool:
    """Whether a library's state is several files in a folder."""
    found = find_format(layout)
    return found is not None and found.pack is not None


def _is_same(source: str, target: str) -> bool:
    """Whether both lead to one file; a source that was removed since it was opened is none."""
    with suppress(OSError):
        return os.path.samefile(source, target)
    return False


def notes_of(conversion: Conversion, layout: str = NATIVE) -> tuple[str, ...]:
    """What a person should know of the source and of the new file: everything in the one that is not in the other.

    Raises:
        CheckpointError: (refused) if the layout cannot hold the state.
    """
    notes = [*conversion.checkpoint.notes, *conversion.notes]
    document, tensors = conversion.checkpoint.document, conversion.checkpoint.tensors
    stray = sorted(tensors.keys() - {key for param in document.parameters for key in param.keys})
    if stray:
        notes.append(f"left out, tensors of no statistic: {', '.join(map(shown, stray[:8]))}, {len(stray)} in all")
    if layout != NATIVE:
        with _refusing(conversion, layout):
            notes += _new_state(conversion, layout).notes
    return tuple(dict.fromkeys(notes))


@contextmanager
def _refusing(conversion: Conversion, layout: str) -> Iterator[None]:
    """Turn what a layout cannot hold, and numbers that cannot be converted, into a refusal."""
    try:
        yield
    except LayoutError as error:
        reason = f"cannot be written as {layout} state: {error}"
        raise CheckpointError(conversion.checkpoint.path, reason, refused=True) from None
    except UnreadableStatisticError as error:
        raise CheckpointError(conversion.checkpoint.path, f"cannot be converted: {error}", refused=True) from None


def export(
    conversion: Conversion,
    target: Path,
    layout: str = NATIVE,
    *,
    overwrite: bool = False,
    track: Track = iter,
    max_shard_size: int | None = None,
) -> Report:
    """Write a conversion, and report what was lost. The target is replaced at once or not at all.

    Raises:
        CheckpointError: if the target exists (refused unless `overwrite`), the layout cannot hold the state (refused),
            or something cannot be read or written.
    """
    check_target(conversion, target, layout, overwrite=overwrite)
    try:
        with _refusing(conversion, layout):
            if layout != NATIVE:
                return _write_layout(conversion, target, layout, overwrite, track)
            return write_converted(conversion, target, overwrite=overwrite, track=track, max_shard_size=max_shard_size)
    except (ValueError, ArithmeticError, OSError) as error:
        raise CheckpointError(conversion.checkpoint.path, str(error)) from error


def _write_layout(conversion: Conversion, target: Path, layout: str, overwrite: bool, track: Track) -> Report:
    new = _new_state(conversion, layout)
    if new.folder is not None:
        with ending_in_order():
            return _write_folder(conversion, target, new.folder, track)
    with create_torch(target, new.tree, overwrite=overwrite, permissions=conversion.checkpoint.permissions) as file:

        def put(key: str, tensor: Tensor) -> None:
            file.put(key, bytes_of(tensor))

        return carry_out(conversion, put, track)


def _new_state(conversion: Conversion, layout: str) -> NewState:
    """What the files of a library are to hold."""
    return write_state(layout, conversion.document, {entry.name: entry for entry in conversion.entries})


def _write_folder(conversion: Conversion, target: Path, made: NewFolder, track: Track) -> Report:
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
