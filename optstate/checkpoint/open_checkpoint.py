"""Open a checkpoint of any kind by its content. Imports no torch, unless names come from a model.

Readers are imported when one is needed: a file of optstate's own does not wait for those of twenty other tools.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from time import sleep

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import KEY
from optstate.checkpoint.document.native_file import native_checkpoint
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.file_kinds import (
    FOLDER,
    HINTS,
    PICKLE,
    SAFETENSORS,
    TORCH_OLD,
    TORCH_ZIP,
    UNKNOWN,
    ZIP,
    cannot_open,
    identify_file,
    read_whole,
)
from optstate.checkpoint.files.opened_file import FileChangedError, OpenFiles, reading
from optstate.checkpoint.files.safetensors_header import read_header
from optstate.checkpoint.files.safetensors_index import read_index
from optstate.checkpoint.files.safetensors_set import find_file_or_index
from optstate.checkpoint.files.strict_json import NotJSONError, parse_python_json
from optstate.text import shown

__all__ = ["STREAM", "open_checkpoint", "refuse_streams"]

STREAM = "-"
"""The path of what comes through a pipe."""

INDEX = ".safetensors.index.json"
LEROBOT_FOLDER = "training_state"
TRAINER_STATE = "trainer_state.json"
LARGEST_SIDE_FILE = 64 << 20
ATTEMPTS = 10
"""To open all files of a set before one of them is replaced; one and a half seconds."""

# optimizer.pt of transformers' Trainer, optimizer.bin and optimizer_1.bin of accelerate, and what people call theirs.
OPTIMIZER_FILE = re.compile(r"(optimizer|optim|opt)([_-]\d{1,6})?\.(pt|pth|bin|safetensors)")
XLA_FILE = re.compile(r"rank\d+-of-\d+-optimizer\.pt")
FSDP_FOLDER = re.compile(r"optimizer(_\d+)?")


def open_checkpoint(
    path: str | os.PathLike[str], *, key: str | None = None, names: str | None = None, optimizer: str | None = None
) -> Checkpoint:
    """Open what a file or folder holds of an optimizer's state, whoever wrote it; no statistic is read.

    Args:
        path: a file, the index or folder of a sharded set, or a folder that holds one checkpoint.
        key: where in a file of torch.save the state is, as "optimizer"; needed if it holds several.
        names: what gives names to parameters that have none, see `read_names`.
        optimizer: its name, where the file does not tell it.

    Raises:
        CheckpointError: if it cannot be read, naming what it is; if it holds no optimizer state, or several.
    """
    with reading() as files:
        checkpoint = _of_one_version(path, key, optimizer, files)
    if optimizer is not None:
        _agrees(checkpoint, optimizer)
    if names is None:
        return checkpoint
    from optstate.checkpoint.parameter_names import give_names, read_names

    return give_names(checkpoint, read_names(names))


def refuse_streams(*paths: str | os.PathLike[str]) -> None:
    """Refuse `-`, which stands for a pipe elsewhere: tensors are read where they lie, and written in any order."""
    if any(os.fspath(path) == STREAM for path in paths):
        reason = "a checkpoint is read from a file and written into a file, not through a pipe"
        hint = "give the name of a file; `optstate inspect -` shows the header of what comes through a pipe"
        raise CheckpointError(STREAM, reason, hint, refused=True)


def _of_one_version(
    path: str | os.PathLike[str], key: str | None, optimizer: str | None, files: OpenFiles
) -> Checkpoint:
    """Open a checkpoint, and anew while a run replaces the files of a set between the first and the last of them."""
    problem = CheckpointError(path, "cannot be opened")
    for attempt in range(ATTEMPTS):
        if attempt:
            files.forget()
            sleep(min(0.005 * 2**attempt, 0.2))
        try:
            checkpoint = _opened(path, key, optimizer)
        except FileChangedError as error:
            problem = CheckpointError(path, str(error))
        except CheckpointError as error:
            if files.replaced() is None:
                raise
            problem = error
        else:
            # One file is one version; the files of a set must all be there still when the last of them was opened.
            changed = files.replaced(checkpoint.files) if len(checkpoint.files) > 1 else None
            if changed is None:
                return checkpoint
            reason = f"a set of files that are replaced again and again, such as '{shown(os.path.basename(changed))}'"
            problem = CheckpointError(path, reason, "read it when what writes it has ended, or from a copy")
    raise problem


def _opened(path: str | os.PathLike[str], key: str | None, optimizer: str | None) -> Checkpoint:
    text = find_file_or_index(path)
    kind = identify_file(text)
    if kind == FOLDER:
        return _of_folder(Path(text), key, optimizer)
    if kind in (TORCH_ZIP, TORCH_OLD, PICKLE, ZIP):
        from optstate.checkpoint.formats.registry import read_torch_checkpoint

        return read_torch_checkpoint(text, key, optimizer)
    _no_key(text, kind, key)
    if text.endswith(INDEX):
        return _of_index(text)
    if kind == SAFETENSORS or (kind == UNKNOWN and text.endswith(".safetensors")):  # whose reader says what is wrong
        return _of_safetensors(text, optimizer)
    raise CheckpointError(text, f"{kind}, not a checkpoint", HINTS.get(kind, ""))


def _no_key(path: str | os.PathLike[str], kind: str, key: str | None) -> None:
    if key is not None:
        raise CheckpointError(
            path, f"{kind}: a key is for files of torch.save that hold more than one optimizer's state"
        )


def _agrees(checkpoint: Checkpoint, optimizer: str) -> None:
    """Refuse a name that is not the checkpoint's own."""
    from optstate.checkpoint.formats.shared.state_dict import stem_of

    own = str(checkpoint.document.source.get("optimizer") or checkpoint.document.recipe)
    if own and stem_of(optimizer) != stem_of(own):
        reason = f"it is the state of {shown(own)} ({checkpoint.kind}), not of {shown(optimizer)}"
        raise CheckpointError(checkpoint.path, reason, "leave --optimizer out: the file tells it", refused=True)


# --- safetensors --------------------------------------------------------------------------------------------------


def _of_safetensors(path: str, optimizer: str | None) -> Checkpoint:
    header = read_header(path)
    if KEY in header.metadata:
        return native_checkpoint(path)
    from optstate.checkpoint.formats import lerobot

    if lerobot.is_lerobot(header) or (not header.tensors and os.path.basename(path) == lerobot.STATE):
        return lerobot.read_lerobot(path, optimizer)
    reason = f"a safetensors file of {len(header.tensors)} tensors has no metadata '{KEY}'"
    raise CheckpointError(path, f"{reason}: looks like model weights, not optimizer state")


def _of_index(path: str) -> Checkpoint:
    """Open a sharded set, whose document is in one of its shards."""
    headers = read_index(path).shards.values()
    if not any(KEY in header.metadata for header in headers):
        reason = f"{len(headers)} shards without an optstate document: looks like model weights, not optimizer state"
        raise CheckpointError(path, reason)
    return native_checkpoint(path)


# --- folders ------------------------------------------------------------------------------------------------------


def _of_folder(path: Path, key: str | None, optimizer: str | None) -> Checkpoint:
    """Open a folder as training stacks write it, or any folder with one file of optimizer state."""
    from optstate.checkpoint.formats import lerobot
    from optstate.checkpoint.formats.registry import find_folder_format, read_folder

    written_by = find_folder_format(path)
    if written_by is not None and written_by.read_at is not None:
        _no_key(path, f"a checkpoint of {written_by.name}", key)
        return read_folder(written_by, path)
    found = _parts(path)
    if len(found) > 1:
        files = ", ".join(f"'{shown(part.name)}'" for part in found[:8])
        raise CheckpointError(path, f"it holds {len(found)} checkpoints: {files}", "give one of them")
    if not found:
        raise CheckpointError(path, "a folder without optimizer state that is known here", "give the optimizer's file")
    part = found[0]
    if part.name == LEROBOT_FOLDER or part == path:
        _no_key(path, "a checkpoint of LeRobot", key)
        return replace(lerobot.read_lerobot(part, optimizer), path=str(path))
    checkpoint = replace(_opened(part, key, optimizer), path=str(path))
    note = _trainer_note(path, checkpoint)
    return replace(checkpoint, notes=(*checkpoint.notes, note)) if note else checkpoint


def _parts(path: Path) -> list[Path]:
    """List what holds optimizer state in a folder, by name: files, folders, or the folder itself."""
    from optstate.checkpoint.formats import dcp, lerobot

    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise cannot_open(path, error) from error
    if lerobot.STATE in names:
        return [path]
    if any(XLA_FILE.fullmatch(name) for name in names):
        reason = "each of its rank*-of-*-optimizer.pt files holds the state of one rank, which are not put together"
        raise CheckpointError(path, reason, "save the full state on one rank")
    files = [path / name for name in names if OPTIMIZER_FILE.fullmatch(name) and not (path / name).is_dir()]
    folders = [path / name for name in names if FSDP_FOLDER.fullmatch(name) and dcp.is_dcp(path / name)]
    if (path / LEROBOT_FOLDER / lerobot.STATE).is_file():
        folders.append(path / LEROBOT_FOLDER)
    found = files + folders + [path / name for name in names if name.endswith(INDEX) and _has_document(path / name)]
    return found or [path / name for name in names if name.endswith(".safetensors") and _has_document(path / name)]


def _has_document(path: Path) -> bool:
    """Whether a safetensors file or sharded set is optstate's own; False for what is damaged."""
    try:
        headers = read_index(path).shards.values() if path.name.endswith(INDEX) else [read_header(path)]
    except CheckpointError:
        return False
    return any(KEY in header.metadata for header in headers)


def _trainer_note(path: Path, checkpoint: Checkpoint) -> str:
    """Whether transformers' Trainer counted as many steps as the optimizer; "" if it did or says nothing."""
    file = path / TRAINER_STATE
    try:
        if not file.is_file() or file.stat().st_size > LARGEST_SIDE_FILE:
            return ""
        step = parse_python_json(read_whole(file, LARGEST_SIDE_FILE).decode()).get("global_step")
    except (CheckpointError, OSError, UnicodeDecodeError, NotJSONError, AttributeError):
        return f"{TRAINER_STATE} beside it cannot be read"
    steps = checkpoint.document.steps
    if type(step) is not int or not steps or step == steps[-1]:
        return ""
    return f"{TRAINER_STATE} says step {step}, the optimizer counted {steps[-1]}"
