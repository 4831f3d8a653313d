"""LeRobot's layout: tensors `state/<id>/<slot>` in a safetensors file, groups in a JSON file beside it. No torch."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Document
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.file_kinds import read_whole
from optstate.checkpoint.files.safetensors_header import Header, read_header
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.files.strict_json import NotJSONError, parse_python_json
from optstate.checkpoint.files.tensor_place import locate_entry
from optstate.checkpoint.files.torch_pickle_writer import Constant, NewTensor
from optstate.checkpoint.formats.registry import find_format, read_state_dict
from optstate.checkpoint.formats.shared.format import Format, NewFolder
from optstate.checkpoint.formats.shared.tree_writer import LayoutError, Tree, TreeWriter, numbers
from optstate.text import shown

__all__ = ["FORMAT", "GROUPS", "STATE", "is_lerobot", "read_lerobot"]

NAME = "lerobot"

STATE = "optimizer_state.safetensors"
GROUPS = "optimizer_param_groups.json"
SEPARATOR = "/"

LARGEST_SIDE_FILE = 16 << 20
MOST_PARTS = 8
NO_GROUPS = f"no {GROUPS} beside it: groups and hyper-parameters are unknown"


def is_lerobot(header: Header) -> bool:
    """Whether the tensors of a safetensors file are called `state/<id>/<slot>`."""
    return bool(header.tensors) and all(_parts(entry.name) is not None for entry in header.tensors)


def _parts(name: str) -> list[str] | None:
    parts = name.split(SEPARATOR)
    fits = 3 <= len(parts) <= MOST_PARTS and parts[0] == "state" and parts[1].isascii() and parts[1].isdigit()
    return parts if fits and len(parts[1]) < 10 else None


def read_lerobot(path: str | os.PathLike[str], optimizer: str | None = None) -> Checkpoint:
    """Return a checkpoint of LeRobot's, from its folder `training_state` or the safetensors file in it.

    Raises:
        CheckpointError: if a file is missing or damaged, or the groups are not those of the tensors.
    """
    file = Path(path) / STATE if os.path.isdir(path) else Path(path)
    header = read_header(file)
    if header.tensors and not is_lerobot(header):
        raise CheckpointError(file, "not LeRobot's layout: its tensors are not called state/<id>/<slot>")
    beside = file.parent / GROUPS
    if not header.tensors and not beside.is_file():
        raise CheckpointError(file, f"it holds no tensors, and no {GROUPS} is beside it")
    state = _tensors_by_id(header)
    groups = _groups(beside) if beside.is_file() else [{"params": sorted(state)}]
    checkpoint = read_state_dict({"state": state, "param_groups": groups}, str(file), optimizer)
    source = {**checkpoint.document.source, "tool": NAME, "kind": NAME, "layout": checkpoint.kind}
    return replace(
        checkpoint,
        path=os.fspath(path),
        kind=NAME,
        document=replace(checkpoint.document, source=source),
        files=(str(file), str(beside)) if beside.is_file() else (str(file),),
        notes=checkpoint.notes if beside.is_file() else (NO_GROUPS, *checkpoint.notes),
    )


def _tensors_by_id(header: Header) -> dict[int, dict[str, Any]]:
    """Return the state by id; names with more parts are dicts within."""
    state: dict[int, dict[str, Any]] = {}
    for entry in header.tensors:
        parts = _parts(entry.name)
        assert parts is not None  # `is_lerobot` asked
        into = state.setdefault(int(parts[1]), {})
        for part in parts[2:-1]:
            into = into.setdefault(part, {})
            if not isinstance(into, dict):
                raise CheckpointError(header.path, f"'{shown(entry.name)}' lies within another tensor")
        if parts[-1] in into:
            raise CheckpointError(header.path, f"'{shown(entry.name)}' is there twice")
        into[parts[-1]] = locate_entry(header, entry)
    return dict(sorted(state.items()))


def _groups(path: Path) -> list[Any]:
    try:
        groups = parse_python_json(read_whole(path, LARGEST_SIDE_FILE).decode())
        if not isinstance(groups, list):
            raise TypeError("it is no list")
    except (UnicodeDecodeError, NotJSONError, TypeError) as error:
        raise CheckpointError(path, f"the param groups beside the file cannot be read: {error}") from None
    return groups


# --- writing ------------------------------------------------------------------------------------------------------


def prepare_for_json(document: Document) -> Document:
    """Return the document with plain numbers in its groups, and without names.

    LeRobot compares the groups of a file with those of an optimizer without names.
    """
    groups = tuple(replace(g, hyper={key: numbers(value) for key, value in g.hyper.items()}) for g in document.groups)
    document = replace(document, groups=groups)
    if document.source.get("kind") == NAME:
        return document
    return replace(document, source={**document.source, "named": False})


def write_lerobot(writer: TreeWriter) -> Tree:
    """Return the state_dict of the library whose optimizer it is; of torch's, if it was not LeRobot's file."""
    library = find_format(writer.tool) if writer.same else None
    if library is None or library.write is None:
        library = find_format("torch")
    assert library is not None
    assert library.write is not None
    return library.write(writer)


def pack_folder(tree: Tree) -> NewFolder:
    """Every value a tensor `state/<place>/<key>`, steps too; the groups as JSON.

    Raises:
        LayoutError: for a value that is no tensor.
    """
    tensors: dict[str, NewEntry] = {}
    constants: dict[str, Constant] = {}
    for place, state in tree["state"].items():
        for key, value in state.items():
            name = f"state/{place}/{key}"
            if isinstance(value, Constant):
                constants[name] = value
            elif isinstance(value, NewTensor):
                tensors[value.key] = NewEntry(name, value.dtype, value.shape)
            else:
                raise LayoutError(f"{key}={value!r} is no tensor, and LeRobot keeps nothing else per parameter")
    text = json.dumps(tree["param_groups"], indent=4, ensure_ascii=False)
    return NewFolder(STATE, tensors, constants, {GROUPS: text})


FORMAT = Format(name=NAME, write=write_lerobot, prepare=prepare_for_json, pack=pack_folder)
