"""Write a safetensors file, or several with an index where one would be too large. Imports no torch.

The index is the one that Hugging Face's libraries write and read: `opt.safetensors.index.json` says which tensor lies
in which of `opt-00001-of-00003.safetensors` ... A set is never changed: a new one has files of its own, the index is
replaced at once, and only then the old files go.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.atomic_write import ending_in_order, replacing, reported, temporary_beside, write_all
from optstate.checkpoint.files.file_kinds import MAX_HEADER, read_whole
from optstate.checkpoint.files.safetensors_writer import (
    NewEntry,
    SafetensorsFile,
    create_safetensors,
    header_size,
    layout,
)
from optstate.checkpoint.files.strict_json import NotJSONError, parse_python_json
from optstate.text import shown

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["SafetensorsSet", "create_set", "find_file_or_index", "index_path"]

SUFFIX = ".safetensors"
INDEX = ".index.json"

Path = str | os.PathLike[str]


def index_path(path: Path) -> str:
    """Return the index of a set that is written as `path`."""
    return os.fspath(path) + INDEX


def find_file_or_index(path: Path) -> str:
    """Return where `path` was written: the file itself, or the index where there is no such file but a set."""
    index = index_path(path)
    return index if not os.path.exists(path) and os.path.exists(index) else os.fspath(path)


@contextmanager
def create_set(
    path: Path,
    entries: Iterable[NewEntry],
    *,
    room: int,
    limit: int | None,
    overwrite: bool = False,
    permissions: int | None = None,
) -> Iterator[SafetensorsFile | SafetensorsSet]:
    """Write tensors in any order as `writer.create` does, into several files where they have more than `limit` bytes.

    Up to the limit this is one file at `path`. Above it, it is a set: files with at most `limit` bytes of tensors each,
    and beside them an index at `path` + ".index.json", which is what is opened later. Tensors of one parameter
    (`<parameter>/...`) stay together where they fit, parameters in the order of `entries`; a tensor is never split, a
    larger one has a file of its own. The metadata are in the first file. Equal input gives equal bytes, and equal
    names in an equal folder.

    At every moment the index leads to the whole old set or to the whole new one: names that are taken are not used
    again, the next set is called `opt-2-00001-of-00003.safetensors` ... What is superseded (the index and its files, or
    the one file) is removed after the new one is complete. An exception leaves no trace, unless it is an interrupt at
    that moment. A killed process may leave temporary files, as with `writer.write`, or files that no index names: never
    read, safe to delete.

    Args:
        path: where, such as `opt.safetensors`.
        entries: the tensors.
        room: bytes kept for the header, as `writer.create` wants them for all tensors in one file.
        limit: most bytes of tensors in a file; None for one file of any size.
        overwrite: replace an existing file or set.
        permissions: of new files where none is replaced; those of the process if None.

    Raises:
        CheckpointError: a file or index is there (refused), the index to be replaced is not readable (refused), or
            something cannot be written.
        ValueError: as `writer.create` does; for a limit below one byte.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"at most {limit} bytes in a file: it must be 1 at least")
    ordered = list(entries)
    _check_targets(path, overwrite)
    existing = _permissions(path)
    permissions = permissions if existing is None else existing
    writing: AbstractContextManager[SafetensorsFile | SafetensorsSet]
    if limit is None or sum(entry.nbytes for entry in ordered) <= limit:
        writing = _one_file(path, ordered, room, overwrite, permissions)
    else:
        writing = _several(path, ordered, room, limit, overwrite, permissions)
    with ending_in_order(), writing as file:
        yield file


class SafetensorsSet:
    """The files of a set, written as if they were one."""

    def __init__(self, files: Sequence[SafetensorsFile], groups: Sequence[Sequence[NewEntry]]) -> None:
        self._files = files
        self._of = {entry.name: file for file, group in zip(files, groups, strict=True) for entry in group}

    def put(self, name: str, buffer: Buffer, offset: int = 0) -> None:
        """Write bytes of a tensor, as `SafetensorsFile.put` does."""
        if name not in self._of:
            raise ValueError(f"tensor '{shown(name)}' is none of the {len(self._of)} of the set")
        self._of[name].put(name, buffer, offset)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the headers, after the last tensor, as `SafetensorsFile.finish` does."""
        first, *others = self._files
        first.finish(metadata)
        for file in others:
            file.finish({})


# --- one file or several ------------------------------------------------------------------------------------------


@contextmanager
def _one_file(
    path: Path, entries: Sequence[NewEntry], room: int, overwrite: bool, permissions: int | None
) -> Iterator[SafetensorsFile]:
    with create_safetensors(path, entries, room=room, overwrite=overwrite, permissions=permissions) as file:
        _set_permissions(path, file.descriptor, permissions)
        yield file
    index = index_path(path)
    if overwrite and os.path.lexists(index):
        old = _named_by(index) or set()
        _remove(index)  # first: it must not name files that are not there
        _remove_shards(path, old)


@contextmanager
def _several(
    path: Path, entries: Sequence[NewEntry], room: int, limit: int, overwrite: bool, permissions: int | None
) -> Iterator[SafetensorsSet]:
    layout(entries)  # raises for entries that cannot be
    groups = _groups(entries, limit)
    shards = _free_names(path, len(groups))
    spare = room - header_size({}, entries) + 8  # for the metadata: in the first file only
    rooms = [header_size({}, group) + (spare if i == 0 else 0) for i, group in enumerate(groups)]
    targets = [_beside(path, shard) for shard in shards]
    temporaries = [temporary_beside(target) for target in targets]
    old, made = set[str](), dict[str, os.stat_result]()
    try:
        with ExitStack() as stack:
            files = []
            for shard, target, temporary, group, size in zip(shards, targets, temporaries, groups, rooms, strict=True):
                writing = create_safetensors(target, group, room=size, permissions=permissions, temporary=temporary)
                with _advised(len(groups)):
                    files.append(stack.enter_context(writing))
                made[shard] = os.fstat(files[-1].descriptor)
            yield SafetensorsSet(files, groups)
        old = _named_by(index_path(path)) or set()
        _write_index(path, dict(zip(shards, groups, strict=True)), permissions, overwrite)
        if overwrite:
            _remove(os.fspath(path))
    finally:
        # Whether the new index is in place or not, even after an interrupt: what no index names now is not needed.
        for temporary in temporaries:  # of a file whose writer the interrupt kept from ending
            with suppress(OSError):
                os.unlink(temporary)
        _remove_shards(path, old | {shard for shard, own in made.items() if _is(_beside(path, shard), own)})


def _groups(entries: Sequence[NewEntry], limit: int) -> list[list[NewEntry]]:
    """Return the entries of each file."""
    groups: list[list[NewEntry]] = [[]]
    size = 0
    for together in _together(entries, limit):
        nbytes = sum(entry.nbytes for entry in together)
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1] += together
        size += nbytes
    return groups


def _together(entries: Sequence[NewEntry], limit: int) -> Iterator[list[NewEntry]]:
    """Return the tensors of one parameter after the other, one by one where they do not fit into a file."""
    by_parameter: dict[str, list[NewEntry]] = {}
    for entry in entries:
        by_parameter.setdefault(entry.name.rpartition("/")[0], []).append(entry)
    for members in by_parameter.values():
        if sum(entry.nbytes for entry in members) <= limit:
            yield members
        else:
            yield from ([entry] for entry in members)


def _write_index(
    path: Path, shards: Mapping[str, Sequence[NewEntry]], permissions: int | None, overwrite: bool
) -> None:
    tree = {
        "metadata": {"total_size": sum(entry.nbytes for group in shards.values() for entry in group)},
        "weight_map": {entry.name: shard for shard, group in shards.items() for entry in group},
    }
    text = json.dumps(tree, indent=2, sort_keys=True) + "\n"
    with replacing(index_path(path), overwrite) as descriptor:
        _set_permissions(path, descriptor, permissions)
        with reported(index_path(path)):
            write_all(descriptor, memoryview(text.encode()))


@contextmanager
def _advised(files: int) -> Iterator[None]:
    """All files of a set are open at once, and the system has a limit for that."""
    try:
        yield
    except CheckpointError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        hint = "allow more bytes in each"
        raise CheckpointError(error.path, f"{files} files are too many: {error.__cause__.strerror}", hint) from error


# --- what is there already ----------------------------------------------------------------------------------------


def _check_targets(path: Path, overwrite: bool) -> None:
    """Refuse what may not be replaced: a file or a set, whichever of the two will be written."""
    index = index_path(path)
    if os.fspath(path).endswith(INDEX):
        hint = f"give the name without {INDEX}"
        raise CheckpointError(path, "the name of an index, which is written where one is needed", hint, refused=True)
    for target in os.fspath(path), index:
        if not os.path.exists(target):
            continue
        if not os.path.isfile(target):
            kind = "a folder" if os.path.isdir(target) else "not a regular file"
            raise CheckpointError(target, f"is {kind} and cannot be replaced", refused=True)
        if not overwrite:
            raise CheckpointError(target, "exists already", "choose another name or allow overwriting", refused=True)
    if os.path.exists(index) and _named_by(index) is None:
        hint = "which files it names cannot be told: remove it first"
        raise CheckpointError(index, "not the index of a sharded set", hint, refused=True)


def _named_by(index: str) -> set[str] | None:
    """Return the files that an index names; None if it cannot be read, or there is none."""
    if not os.path.isfile(index):
        return None
    try:
        names = parse_python_json(read_whole(index, MAX_HEADER).decode())["weight_map"].values()
    except (CheckpointError, UnicodeDecodeError, NotJSONError, TypeError, KeyError, AttributeError):
        return None
    return {name for name in names if isinstance(name, str)}


def _named_in(folder: str) -> set[str]:
    """Return the files that any index in a folder names."""
    with reported(folder):
        indices = [name for name in os.listdir(folder) if name.endswith(INDEX)]
    return set[str]().union(*(_named_by(os.path.join(folder, name)) or () for name in indices))


def _free_names(path: Path, files: int) -> list[str]:
    """Names for the files of a set: nothing of this name is there, and no index speaks of it."""
    named = _named_in(_folder(path))
    stems = (_stem(path) + (f"-{number}" if number > 1 else "") for number in count(1))
    candidates = ([f"{stem}-{i:05d}-of-{files:05d}{SUFFIX}" for i in range(1, files + 1)] for stem in stems)

    def taken(name: str) -> bool:
        return name in named or os.path.lexists(_beside(path, name))

    return next(names for names in candidates if not any(map(taken, names)))


def _remove_shards(path: Path, shards: Iterable[str]) -> None:
    """Remove those of a set's files that no index names now; what is not called like one of its files is kept."""
    own = re.compile(rf"{re.escape(_stem(path))}(-[0-9]+)?-[0-9]+-of-[0-9]+{re.escape(SUFFIX)}")
    named = _named_in(_folder(path))
    for shard in sorted(shards):
        if shard not in named and own.fullmatch(shard):
            _remove(_beside(path, shard))


def _remove(path: str) -> None:
    try:
        with suppress(FileNotFoundError):
            os.unlink(path)
    except OSError as error:
        reason = f"superseded, and cannot be removed: {error.strerror or error}"
        raise CheckpointError(path, reason, "remove it: the new one is complete") from error


def _is(path: str, file: os.stat_result) -> bool:
    """Whether a path leads to this file."""
    try:
        return os.path.samestat(os.lstat(path), file)
    except OSError:
        return False


def _folder(path: Path) -> str:
    return os.path.dirname(path) or os.curdir


def _stem(path: Path) -> str:
    return os.path.basename(path).removesuffix(SUFFIX)


def _beside(path: Path, name: str) -> str:
    return os.path.join(os.path.dirname(path), name)


def _permissions(path: Path) -> int | None:
    """Those of what is superseded: a set is as private as the file was, and the other way round."""
    for target in os.fspath(path), index_path(path):
        with suppress(OSError):
            return stat.S_IMODE(os.stat(target).st_mode) & 0o777
    return None


def _set_permissions(path: Path, descriptor: int, permissions: int | None) -> None:
    if permissions is not None and hasattr(os, "fchmod"):
        with reported(path):
            os.fchmod(descriptor, permissions)
