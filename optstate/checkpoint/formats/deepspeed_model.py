"""What a DeepSpeed checkpoint says of the model: names, shapes and dtypes of parameters. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optstate.checkpoint.files import deepspeed_files
from optstate.checkpoint.files.deepspeed_files import Node
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.folder_weights import Weight

__all__ = ["Model", "Shape", "model_of"]

Shape = tuple[int, ...]


@dataclass
class Model:
    """What the files of the model's state say.

    groups: shapes by name, in the order of each flat tensor. weights: shapes and dtypes of all. files: those read.
    """

    groups: list[dict[str, Shape]] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def model_of(paths: Sequence[Path]) -> Model:
    """Names, shapes and dtypes; of several files each has those of its stage of a pipeline."""
    model = Model(files=list(paths))
    for path in paths:
        tree = deepspeed_files.read(path)
        for i, group in enumerate(tree.at("param_shapes").items()):
            shapes = {str(name): _shape_of(group, name) for name in group.of(dict)}
            model.groups += [{}] * (i + 1 - len(model.groups))
            model.groups[i] = {**shapes, **model.groups[i]}
        module, tied = tree.optional("module"), tree.optional("shared_params")
        pairs = tied.of(dict).items() if tied is not None else ()
        for name, shape in ((name, shape) for group in model.groups for name, shape in group.items()):
            weight = module.of(dict).get(name) if module is not None else None
            others = tuple(str(other) for other, first in pairs if first == name)
            if name not in model.weights or isinstance(weight, Stored):
                model.weights[name] = Weight(shape, weight.dtype if isinstance(weight, Stored) else "", tied=others)
    return model


def _shape_of(group: Node, name: Any) -> Shape:
    sizes = group.at(name)
    if not all(type(size) is int and size >= 0 for size in sizes.of(tuple)):
        raise sizes.wrong("is no shape")
    return sizes.of(tuple)
