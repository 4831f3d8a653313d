"""Folders of torch.distributed.checkpoint: what they hold, and where it lies. Imports no torch.

`.metadata` is a pickle of every value's key, shape and places; each place is a whole file of torch.save within a
.distcp file. A tensor that was sharded has one place for each part.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files import torch_archive_reader
from optstate.checkpoint.files.dtypes import MAX_COUNT, MOST_DIMENSIONS, SAFETENSORS_NAMES
from optstate.checkpoint.files.pickle_objects import Global, Object, called
from optstate.checkpoint.files.tensor_place import Pieces, Stored
from optstate.text import shown

__all__ = ["METADATA", "DcpFolder", "Shaped", "read_dcp_folder"]

METADATA = ".metadata"

LONGEST_KEY = 4096
"""Characters of a name: every end of it is looked at."""

Shape = tuple[int, ...]
Box = tuple[Shape, Shape]  # the index of its first element, and its sizes


@dataclass(frozen=True)
class Shaped:
    """A tensor in the folder by its shape and the boxes it was cut into; dtype in the safetensors format's words."""

    dtype: str
    shape: Shape
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class _Place:
    """Where one item lies. extensions: what its bytes went through."""

    file: str
    start: int
    length: int
    extensions: tuple[Any, ...]


@dataclass
class DcpFolder:
    """One folder of torch.distributed.checkpoint.

    keys: of everything, in order; tensors: those of tensors. nested: the path of a key before it was joined. files:
    those that were read.
    """

    path: Path
    keys: tuple[str, ...]
    tensors: dict[str, Shaped]
    nested: dict[str, tuple[Any, ...]]
    places: dict[tuple[str, Shape | None], _Place]
    files: set[str] = field(default_factory=set)

    @property
    def paths(self) -> list[Path]:
        """All files that were read."""
        return [self.path / name for name in (METADATA, *sorted(self.files))]

    def get(self, key: str) -> Any:
        """Return what is under a key: a tensor's place, `Pieces` if there are several, or the value itself."""
        return self._tensor(key, self.tensors[key]) if key in self.tensors else self._item(key, None)

    def _tensor(self, key: str, shaped: Shaped) -> Stored:
        parts = []
        for first, sizes in shaped.boxes:
            stored = self._item(key, first)
            if not isinstance(stored, Stored) or (stored.dtype, stored.shape) != (shaped.dtype, sizes):
                what = f"{stored.dtype} {list(stored.shape)}" if isinstance(stored, Stored) else called(stored)
                raise self.wrong(f"'{shown(key)}' is {what} in its file, {shaped.dtype} {list(sizes)} in {METADATA}")
            parts.append((first, stored))
        if len(parts) == 1 and parts[0][1].shape == shaped.shape:
            return parts[0][1]
        self._check_filled(key, shaped)
        return Pieces(str(self.path), 0, shaped.dtype, shaped.shape, whole=shaped.shape, parts=tuple(parts))

    def _item(self, key: str, first: Shape | None) -> Any:
        place = self.places.get((key, first))
        if place is None:
            where = "" if first is None else f" from {list(first)} on"
            raise self.wrong(f"{METADATA} does not say where '{shown(key)}'{where} is")
        if place.extensions:
            what = ", ".join(shown(str(name)) for name in place.extensions)
            hint = "save it again without extensions"
            raise CheckpointError(self.path, f"'{shown(key)}' was written with {what}", hint, refused=True)
        path = self.path / place.file
        if place.file not in self.files and not os.path.exists(path):
            count = sum(other.file == place.file for other in self.places.values())
            reason = f"'{shown(place.file)}' is missing: it has {count} of the {len(self.places)} items in {METADATA}"
            raise CheckpointError(self.path, reason, "copy the whole folder, the files of all ranks")
        self.files.add(place.file)
        return torch_archive_reader.read_torch_part(path, place.start, place.length)

    def _check_filled(self, key: str, shaped: Shaped) -> None:
        """Every element is in one box, and in one only."""
        boxes = [(first, sizes) for first, sizes in shaped.boxes if prod(sizes)]
        within = all(
            start + size <= whole
            for first, sizes in boxes
            for start, size, whole in zip(first, sizes, shaped.shape, strict=True)
        )
        count = sum(prod(sizes) for _, sizes in boxes)
        if not within or count != prod(shaped.shape) or _overlap(boxes):
            raise self.wrong(f"the {len(boxes)} parts of '{shown(key)}' do not fill its shape {list(shaped.shape)}")

    def wrong(self, reason: str) -> CheckpointError:
        """Return the error for a contradiction within the folder."""
        return CheckpointError(self.path, reason)


def _overlap(boxes: list[Box]) -> bool:
    """Whether any two boxes have an element in common; looked for among those that meet in the dimension cut most."""
    if len(boxes) < 2:
        return False
    dim = max(range(len(boxes[0][0])), key=lambda d: len({first[d] for first, _ in boxes}), default=0)
    open_boxes: list[Box] = []
    for first, sizes in sorted(boxes, key=lambda box: box[0][dim : dim + 1]):
        open_boxes = [box for box in open_boxes if box[0][dim] + box[1][dim] > first[dim]]
        for other, extent in open_boxes:
            ranges = zip(first, sizes, other, extent, strict=True)
            if all(start < their + reach and their < start + size for start, size, their, reach in ranges):
                return True
        open_boxes.append((first, sizes))
    return False


# --- the pickle ---------------------------------------------------------------------------------------------------


def read_dcp_folder(path: str | os.PathLike[str]) -> DcpFolder:
    """Return what `.metadata` of a folder says; the other files are not opened.

    Raises:
        CheckpointError: if there is no `.metadata`, or it is not one.
    """
    folder = Path(path)
    source = folder / METADATA
    if not source.exists():
        hint = "it is written last: the save was cut short, or only a part of the folder was copied"
        raise CheckpointError(path, f"a folder of torch.distributed.checkpoint without {METADATA}", hint)
    parts = _Reading(source).attributes(torch_archive_reader.read_pickle(source), "Metadata")
    return _Reading(source).folder(folder, parts)


class _Reading:
    """Takes `.metadata` apart; whatever is not as torch writes it is an error that says what."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(self.source, f"not the metadata of torch.distributed.checkpoint: {what}")

    def attributes(self, value: Any, kind: str) -> dict[str, Any]:
        """Return the attributes of an instance of one of torch's classes."""
        if isinstance(value, Object) and value.name.endswith(f".{kind}") and isinstance(value.state, dict):
            return value.state
        raise self.wrong(f"{called(value)} instead of {kind}")

    def counts(self, value: Any, what: str) -> Shape:
        """Return a shape or an index that the metadata give."""
        if isinstance(value, tuple | list) and len(value) > MOST_DIMENSIONS:
            raise self.wrong(f"{what} has {len(value)} dimensions: at most {MOST_DIMENSIONS} are read")
        if isinstance(value, tuple | list) and all(type(n) is int and 0 <= n <= MAX_COUNT for n in value):
            return tuple(value)
        raise self.wrong(f"{what} is {called(value)}, no list of counts")

    def folder(self, path: Path, parts: dict[str, Any]) -> DcpFolder:
        described, placed = parts.get("state_dict_metadata"), parts.get("storage_data")
        if not isinstance(described, dict) or not isinstance(placed, dict):
            raise self.wrong("it does not say what there is, and where")
        if not all(isinstance(key, str) for key in described):
            raise self.wrong("a key that is no text")
        if (longest := max(map(len, described), default=0)) > LONGEST_KEY:
            raise self.wrong(f"a key of {longest} characters: at most {LONGEST_KEY} are read")
        nested = parts.get("planner_data")
        paths = nested if isinstance(nested, dict) else {}
        tensors = {
            key: self.tensor(key, self.attributes(value, "TensorStorageMetadata"))
            for key, value in described.items()
            if not isinstance(value, Object) or not value.name.endswith(".BytesStorageMetadata")
        }
        known = {key: paths[key] for key in described if isinstance(paths.get(key), tuple)}
        return DcpFolder(path, tuple(described), tensors, known, self.places(placed))

    def tensor(self, key: str, parts: dict[str, Any]) -> Shaped:
        properties, chunks = parts.get("properties"), parts.get("chunks")
        values = properties.state if isinstance(properties, Object) else None
        dtype = values[0] if isinstance(values, tuple) and values else None
        if not isinstance(dtype, Global) or not isinstance(chunks, list):
            raise self.wrong(f"'{shown(key)}' is a tensor of {called(dtype)}")
        shape = self.counts(parts.get("size"), f"the shape of '{shown(key)}'")
        boxes = []
        for chunk in chunks:
            box = self.attributes(chunk, "ChunkStorageMetadata")
            first, sizes = (self.counts(box.get(part), f"a part of '{shown(key)}'") for part in ("offsets", "sizes"))
            if not len(first) == len(sizes) == len(shape):
                raise self.wrong(f"a part of '{shown(key)}' has another number of dimensions")
            boxes.append((first, sizes))
        return Shaped(SAFETENSORS_NAMES.get(dtype.name, dtype.name), shape, tuple(boxes))

    def places(self, placed: dict[Any, Any]) -> dict[tuple[str, Shape | None], _Place]:
        found: dict[tuple[str, Shape | None], _Place] = {}
        for index, info in placed.items():
            at = self.attributes(index, "MetadataIndex")
            key, first = at.get("fqn"), at.get("offset")
            if not isinstance(key, str):
                raise self.wrong("a place of what has no key")
            ident = (key, None if first is None else self.counts(first, f"the place of '{shown(key)}'"))
            if ident in found:
                raise self.wrong(f"two places of '{shown(key)}'")
            found[ident] = self.place(key, self.attributes(info, "_StorageInfo"))
        return found

    def place(self, key: str, parts: dict[str, Any]) -> _Place:
        file, extensions = parts.get("relative_path"), parts.get("transform_descriptors") or ()
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & {"/", "\\", "\0"}:
            raise self.wrong(f"'{shown(key)}' is in '{shown(str(file))}', which is no file in this folder")
        start, length = self.counts((parts.get("offset"), parts.get("length")), f"the place of '{shown(key)}'")
        if not isinstance(extensions, tuple | list):
            raise self.wrong(f"the extensions of '{shown(key)}' are {called(extensions)}")
        return _Place(file, start, length, tuple(extensions))
