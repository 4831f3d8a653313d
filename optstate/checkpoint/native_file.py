"""A file or a set of files that optstate wrote, opened as a checkpoint. Imports no torch."""

from __future__ import annotations

import os

from optstate.checkpoint.checkpoint import OPTSTATE, Checkpoint
from optstate.checkpoint.container import Header, read_header, read_index
from optstate.checkpoint.document import KEY, Document, document_of
from optstate.checkpoint.errors import CheckpointError, shown
from optstate.checkpoint.kinds import FOLDER, JSON, identify
from optstate.checkpoint.sharded import find
from optstate.checkpoint.stored import Stored, stored_entry

__all__ = ["native_checkpoint"]


def native_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open what `optstate.save` or `optstate convert` wrote.

    path: a safetensors file; the index of a set, or the folder with it; or the name that a set was saved under. The
    checkpoint's own `path` is what that led to, the index of a set.

    Raises:
        CheckpointError: if something is unreadable or invalid, there is not exactly one optstate document, or a tensor
            is missing that it names.
    """
    found = find(path)
    if identify(found) in (FOLDER, JSON):
        index = read_index(found)
        found, headers = index.path, tuple(index.shards.values())
        places = {(shard, entry.name): entry for shard, header in index.shards.items() for entry in header.tensors}
        stored = {
            name: stored_entry(index.shards[shard].path, places[shard, name])
            for name, shard in index.weight_map.items()
        }
        files = (found, *(header.path for header in headers))
    else:
        headers = (read_header(found),)
        stored = {entry.name: stored_entry(found, entry) for entry in headers[0].tensors}
        files = (found,)
    document = _only_document(found, headers)
    tensors = _named(found, document, stored)
    return Checkpoint(found, OPTSTATE, "declared", document, tensors, files, _stray(stored, tensors))


def _only_document(path: str, headers: tuple[Header, ...]) -> Document:
    """The document of a file, or of the one file of a set that has it."""
    having = [header for header in headers if KEY in header.metadata]
    if len(headers) > 1 and len(having) != 1:
        names = ", ".join(shown(os.path.basename(header.path)) for header in having[:3])
        what = f"{len(having)} optstate documents, in {names}," if having else "no optstate document"
        hint = "the files of several sets were mixed" if having else "it was not written by optstate.save"
        raise CheckpointError(path, f"{what} in a set of {len(headers)} files: there must be one", hint)
    return document_of(having[0] if having else headers[0])


def _named(path: str, document: Document, stored: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors that the document names."""
    tensors = {}
    for param in document.parameters:
        for key in param.keys:
            if key not in stored:
                raise CheckpointError(
                    path, f"the tensor '{shown(key)}' is missing", "it was changed after it had been saved"
                )
            tensors[key] = stored[key]
    return tensors


def _stray(stored: dict[str, Stored], tensors: dict[str, Stored]) -> tuple[str, ...]:
    stray = sorted(stored.keys() - tensors.keys())
    if not stray:
        return ()
    if len(stray) == 1:
        return (f"the tensor '{shown(stray[0])}' belongs to no statistic in the document",)
    return (f"{len(stray)} tensors belong to no statistic in the document, such as '{shown(stray[0])}'",)
