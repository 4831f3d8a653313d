"""A file or a set of files that optstate wrote, opened as a checkpoint. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import replace

from optstate.checkpoint.document.checkpoint import OPTSTATE, Checkpoint
from optstate.checkpoint.document.document import KEY, Document, DocumentError
from optstate.checkpoint.document.document_json import from_json
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.file_kinds import FOLDER, JSON, identify
from optstate.checkpoint.files.safetensors_header import Header, read_header
from optstate.checkpoint.files.safetensors_index import read_index
from optstate.checkpoint.files.safetensors_set import find_file_or_index
from optstate.checkpoint.files.tensor_place import locate_entry
from optstate.text import shown

__all__ = ["document_of", "native_checkpoint", "native_of"]


def native_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open what `optstate.save` or `optstate convert` wrote. Tensors that its document does not name are kept, too.

    path: a safetensors file; the index of a set, or the folder with it; or the name that a set was saved under. The
    checkpoint's own `path` is what that led to, the index of a set.

    Raises:
        CheckpointError: if something is unreadable or invalid, there is not exactly one optstate document, or a tensor
            is missing that it names.
    """
    found = find_file_or_index(path)
    if identify(found) in (FOLDER, JSON):
        index = read_index(found)
        checkpoint = native_of(index.path, tuple(index.shards.values()))
        listed = {key: stored for key, stored in checkpoint.tensors.items() if key in index.weight_map}
        checkpoint = replace(checkpoint, tensors=listed, files=(index.path, *checkpoint.files))
    else:
        checkpoint = native_of(found, (read_header(found),))
    for param in checkpoint.document.parameters:
        for key in param.keys:
            if key not in checkpoint.tensors:
                hint = "it was changed after it had been saved"
                raise CheckpointError(found, f"the tensor '{shown(key)}' is missing", hint)
    return checkpoint


def native_of(path: str, headers: tuple[Header, ...]) -> Checkpoint:
    """Return the checkpoint that files with these headers hold, whether or not it is complete.

    Tensors are in the document's order, then come those that it does not name.

    Raises:
        CheckpointError: if there is not exactly one optstate document, or it cannot be read.
    """
    stored = {entry.name: locate_entry(header, entry) for header in headers for entry in header.tensors}
    files = tuple(header.path for header in headers)
    document = _only_document(path, headers)
    named = {key: stored[key] for param in document.parameters for key in param.keys if key in stored}
    return Checkpoint(path, OPTSTATE, "declared", document, named | stored, files)


def _only_document(path: str, headers: tuple[Header, ...]) -> Document:
    """Return the document of a file, or of the one file of a set that has it."""
    having = [header for header in headers if KEY in header.metadata]
    if len(headers) > 1 and len(having) != 1:
        names = ", ".join(shown(os.path.basename(header.path)) for header in having[:3])
        what = f"{len(having)} optstate documents, in {names}," if having else "no optstate document"
        hint = "the files of several sets were mixed" if having else "it was not written by optstate.save"
        raise CheckpointError(path, f"{what} in a set of {len(headers)} files: there must be one", hint)
    return document_of(having[0] if having else headers[0])


def document_of(header: Header) -> Document:
    """Return the document of a file whose header has been read.

    Raises:
        CheckpointError: if it has none, or one that cannot be read.
    """
    text = header.metadata.get(KEY)
    if text is None:
        hint = "it was not written by optstate.save; `optstate inspect` shows what it holds"
        raise CheckpointError(header.path, f"the file has no metadata {KEY!r}", hint)
    try:
        return from_json(text)
    except DocumentError as error:
        raise CheckpointError(header.path, f"metadata {KEY!r}: {error}") from None
