"""The files of a DeepSpeed checkpoint: which there are, and the values in them. Imports no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files import torch_archive_reader
from optstate.checkpoint.files.file_kinds import FOLDER, identify, open_file, read_bytes
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.files.torch_types import type_name
from optstate.text import shown

__all__ = [
    "STATE",
    "UNIVERSAL",
    "DeepSpeedFiles",
    "Node",
    "find_files",
    "is_deepspeed",
    "read_values",
    "refusal_of_ranks",
]

UNIVERSAL = "zero"
"""The folder of a universal checkpoint that has a folder for each parameter."""

STATE = "optimizer_state.pt"
"""What that folder has for all parameters together."""

LATEST = ("latest", "latest_universal")

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})(?:_\d{1,6})?_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_0+_)?mp_rank_\d{1,6}(?:_\d{1,6})?_model_states\.pt")

T = TypeVar("T")


@dataclass(frozen=True)
class DeepSpeedFiles:
    """The files of one checkpoint. optimizer: None in the universal form. models: of the first data-parallel rank."""

    folder: Path
    optimizer: Path | None
    models: tuple[Path, ...]


@dataclass(frozen=True)
class Node:
    """A value in a file, and where it is in it, for messages."""

    path: Path
    value: Any
    place: str = "it"

    def wrong(self, what: str) -> CheckpointError:
        """Return the error for a value that is not as DeepSpeed writes it."""
        return CheckpointError(self.path, f"{shown(self.place)} {what}")

    def at(self, key: Any) -> Node:
        """Return the value under a key."""
        if not isinstance(self.value, dict) or key not in self.value:
            raise self.wrong(f"has no {key!r}, which DeepSpeed's ZeRO writes")
        return Node(self.path, self.value[key], str(key) if self.place == "it" else f"{self.place}.{key}")

    def optional(self, key: Any) -> Node | None:
        """Return the value under a key, if there is one."""
        return self.at(key) if isinstance(self.value, dict) and self.value.get(key) is not None else None

    def of(self, kind: type[T]) -> T:
        """Return the value itself, of this type."""
        if not isinstance(self.value, kind):
            raise self.wrong(f"is {type_name(self.value)}, not a {kind.__name__}")
        return self.value

    def tensor(self) -> Stored:
        """Return the value, which must be a tensor."""
        if not isinstance(self.value, Stored):
            raise self.wrong(f"is {type_name(self.value)}, not a tensor")
        return self.value

    def items(self) -> list[Node]:
        """Return the values in a list."""
        return [Node(self.path, value, f"{self.place}[{i}]") for i, value in enumerate(self.of(list))]


def is_deepspeed(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a checkpoint folder of DeepSpeed, one of its tags, or the file of an optimizer in one."""
    place = Path(path)
    if place.is_file():
        return _OPTIMIZER.fullmatch(place.name) is not None
    if not place.is_dir():
        return False
    try:
        folder = _tagged(place)
    except CheckpointError:
        return False
    return _is_universal(folder) or any(folder.glob("*_optim_states.pt")) or any(folder.glob("*_model_states.pt"))


def find_files(path: str | os.PathLike[str]) -> DeepSpeedFiles:
    """Return the files of a checkpoint without opening them.

    Raises:
        CheckpointError: if there is no ZeRO state, or it is that of several ranks.
    """
    place = Path(path)
    folder = _tagged(place) if identify(place) == FOLDER else place.parent
    models = tuple(sorted(file for file in folder.iterdir() if _MODEL.fullmatch(file.name)))
    if _is_universal(folder):
        return DeepSpeedFiles(folder, None, models)
    found = sorted(file for file in folder.iterdir() if _OPTIMIZER.fullmatch(file.name))
    if not found:
        hint = "without ZeRO it is in *_model_states.pt under 'optimizer': give that file"
        raise CheckpointError(path, "a DeepSpeed checkpoint without *_optim_states.pt of ZeRO", hint)
    if len(found) > 1:
        raise refusal_of_ranks(path, len(found))
    return DeepSpeedFiles(folder, found[0], models)


def refusal_of_ranks(path: str | os.PathLike[str], count: int) -> CheckpointError:
    """Why the state of many ranks is not read."""
    reason = f"state of {count} ranks: each has its part of every flat tensor"
    hint = (
        "put them together with `python -m deepspeed.checkpoint.ds_to_universal --input_folder TAG --output_folder "
        "NEW`, and give NEW"
    )
    return CheckpointError(path, reason, hint, refused=True)


def read_values(path: Path) -> Node:
    """Return the values in one file."""
    return Node(path, torch_archive_reader.read_torch_file(path))


def _is_universal(folder: Path) -> bool:
    return (folder / UNIVERSAL / STATE).is_file()


def _tagged(folder: Path) -> Path:
    """Return the folder of the tag that `latest` names, else the folder itself."""
    latest = next((folder / name for name in LATEST if (folder / name).is_file()), None)
    if latest is None:
        return folder
    with open_file(latest) as file:
        tag = read_bytes(latest, file, 4096).decode("utf-8", "replace").strip()
    if not tag or tag in (".", "..") or set(tag) & {"/", "\\", "\0"} or not os.path.isdir(folder / tag):
        raise CheckpointError(latest, f"names '{shown(tag)}', which is no folder beside it", "give the tag's folder")
    return folder / tag
