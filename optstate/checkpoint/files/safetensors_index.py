"""The index of a sharded set: which tensor is in which file, and whether the files agree."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.file_kinds import (
    FOLDER,
    MAX_HEADER,
    cannot_open,
    open_file,
    read_bytes,
    source_of,
    special_kind,
)
from optstate.checkpoint.files.issues import Issue, IssueLog, raising
from optstate.checkpoint.files.safetensors_header import Header, log_header, tensor_place, value_text
from optstate.checkpoint.files.strict_json import NotJSONError, Pairs, members, plain
from optstate.text import shown

__all__ = ["SetIndex", "log_index", "read_index"]

KNOWN = "index"
"""Under which an opened file keeps its index, and the warnings of it, for whoever asks next."""


@dataclass(frozen=True, slots=True)
class SetIndex:
    """A sharded set: `shards` maps the file names of the index to their headers, `weight_map` a tensor to its shard."""

    path: str
    metadata: dict[str, Any]
    shards: dict[str, Header]
    weight_map: dict[str, str]


def read_index(path: str | os.PathLike[str]) -> SetIndex:
    """Return the index of a sharded set with the headers of its shards.

    Args:
        path: the *.index.json or the folder with it.

    Raises:
        CheckpointError: unless every shard is a valid file in the folder of the index, or below it, and holds the
            tensors that the index says it holds.
    """
    return log_index(path, raising(path))


def log_index(path: str | os.PathLike[str], log: IssueLog) -> SetIndex:
    """Return an index and the headers of its shards, and give all findings to `log`."""
    file = _index_file(Path(path))
    with open_file(file) as opened:
        source = source_of(opened)
        if KNOWN in source.known:
            known: tuple[SetIndex, list[Issue]] = source.known[KNOWN]
            log.repeat(known[1])
            return replace(known[0], path=str(file))
        if source.size > MAX_HEADER:
            raise CheckpointError(file, f"an index of {source.size} bytes, above the limit of {MAX_HEADER}")
        content = read_bytes(file, opened, source.size)
    found = list[Issue]()
    index = _parsed(file, content, log.noted(found))
    if not any(issue.severity == "error" for issue in found):
        source.known[KNOWN] = index, found
    return index


def _parsed(file: Path, content: bytes, log: IssueLog) -> SetIndex:
    metadata, weight_map = _members_of(file, content, log)
    shards = {}
    for name in sorted(set(weight_map.values())):
        header = _shard(file, name, log)
        if header is not None:
            shards[name] = header
    _check_shards(shards, metadata, weight_map, log)
    return SetIndex(str(file), metadata, shards, weight_map)


def _index_file(path: Path) -> Path:
    special = special_kind(path)
    if special is None:
        return path
    if special != FOLDER:
        raise CheckpointError(path, f"{special}, not a folder or an index", "copy it into a regular file first")
    try:
        found = sorted(name for name in os.listdir(path) if name.endswith(".safetensors.index.json"))
    except OSError as error:
        raise cannot_open(path, error) from error
    if len(found) != 1:
        names = ": " + ", ".join(shown(name) for name in found[:5]) if found else ""
        hint = "give one of them" if found else "give one of its files"
        raise CheckpointError(path, f"a folder with {len(found) or 'no'} *.safetensors.index.json{names}", hint)
    if special_kind(path / found[0]) is not None:
        raise CheckpointError(path / found[0], "not a regular file")
    return path / found[0]


def _members_of(file: Path, content: bytes, log: IssueLog) -> tuple[dict[str, Any], dict[str, str]]:
    """Return `metadata` and `weight_map` of an index; entries with an error are left out of the latter."""
    metadata: dict[str, Any] = {}
    weight_map: dict[str, str] | None = None
    seen: set[str] = set()
    try:
        for key, value in members(content.decode("utf-8"), ("weight_map",)):
            if key in seen:
                log.error("index", f"'{shown(key)}' occurs twice")
            seen.add(key)
            if key == "weight_map":
                if not isinstance(value, Pairs | Iterator):
                    raise CheckpointError(file, "weight_map is not an object")
                weight_map = _weight_map(value, log)
            elif key == "metadata" and isinstance(value, Pairs):
                metadata.update(plain(value))
            elif key == "metadata" and value is not None:
                log.error("index", "metadata is not an object")
    except UnicodeDecodeError as error:
        raise CheckpointError(file, f"the index is not UTF-8: {error.reason} at byte {error.start}") from None
    except NotJSONError as error:
        raise CheckpointError(file, f"the index is not valid JSON: {error}") from None
    if weight_map is None:
        raise CheckpointError(file, "not the index of a sharded set: it has no weight_map")
    return metadata, weight_map


def _weight_map(pairs: Iterable[tuple[str, Any]], log: IssueLog) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    problem_of = cache(_unsafe)  # few shards have many tensors
    for name, shard in pairs:
        if name in weight_map:
            log.error(tensor_place(name), "occurs twice in weight_map")
        if not isinstance(shard, str):
            log.error(tensor_place(name), "weight_map does not give a file name")
        elif problem := problem_of(shard):
            log.error(tensor_place(name), f"weight_map leads to '{shown(shard)}', {problem}")
        else:
            weight_map[name] = shard
    return weight_map


def _unsafe(shard: str) -> str:
    """Return what is wrong with a shard's name, or an empty string. The rules are those of huggingface_hub's loader."""
    windows, posix = PureWindowsPath(shard), PurePosixPath(shard)
    if not shard or "\0" in shard:
        return "which is no file name"
    if "://" in shard:
        return "a URL: shards lie in the folder of the index"
    if posix.is_absolute() or windows.is_absolute() or windows.drive or windows.root:
        return "an absolute path: shards lie in the folder of the index"
    if ".." in posix.parts or ".." in windows.parts:
        return "outside the folder of the index"
    return "which has a backslash" if "\\" in shard else ""


def _shard(file: Path, name: str, log: IssueLog) -> Header | None:
    """Return the header of one shard, or None after an error."""
    folder = file.parent
    path = folder / name
    where = f"shard '{shown(name)}'"
    try:
        target = Path(os.path.realpath(path))
        inside = Path(os.path.realpath(folder)) in target.parents or _in_hub_cache(folder, target)
        if target == Path(os.path.realpath(file)):
            log.error(where, "is the index itself")
            return None
        if not inside:
            log.error(where, f"a symbolic link out of the folder, to '{shown(str(target))}'")
            return None
        return log_header(path, log.within(where))
    except CheckpointError as error:
        if error.path != str(path):  # raised by the log
            raise
        log.error(where, f"{error.reason} ({error.hint})" if error.hint else error.reason)
        return None


def _in_hub_cache(folder: Path, target: Path) -> bool:
    """Return whether a shard is where Hugging Face's cache keeps it.

    There <repo>/snapshots/<revision>/<name> is a link to <repo>/blobs/<hash>.
    """
    folder = Path(os.path.abspath(folder))
    return folder.parent.name == "snapshots" and target.parent == Path(os.path.realpath(folder.parent.parent / "blobs"))


def _check_shards(
    shards: dict[str, Header], metadata: dict[str, Any], weight_map: dict[str, str], log: IssueLog
) -> None:
    names = {shard: {entry.name for entry in header.tensors} for shard, header in shards.items()}
    for tensor, shard in weight_map.items():
        if shard in names and tensor not in names[shard]:
            log.error(tensor_place(tensor), f"is not in '{shown(shard)}', where the index puts it")
    for shard, held in names.items():
        for tensor in sorted(name for name in held if weight_map.get(name) != shard):
            other = weight_map.get(tensor)
            what = f"which the index puts in '{shown(other)}'" if other else "which the index does not name"
            log.warning(f"shard '{shown(shard)}'", f"holds {tensor_place(tensor)}, {what}")
    total = metadata.get("total_size")
    if total is None:
        return
    # Some writers give a float; a tied tensor may be counted once or twice.
    if isinstance(total, bool) or not isinstance(total, int | float) or total != total or total < 0:
        log.error("index", f"metadata.total_size is {value_text(total)}, which is no number of bytes")
    elif total != (real := sum(entry.nbytes for header in shards.values() for entry in header.tensors)):
        log.warning("index", f"metadata.total_size is {total}, the shards hold {real} bytes")
