"""Optimizer state of DeepSpeed's ZeRO: of one rank, and in the universal form. Imports no torch.

A rank keeps one flat tensor per statistic and group (in stage 3: sub-group), with its part of all parameters one after
the other; if there is one rank these parts are whole. Names and shapes are in the file of the model's state.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files import deepspeed_files
from optstate.checkpoint.files.deepspeed_files import STATE, UNIVERSAL, Node, find_files, is_deepspeed, refusal_of_ranks
from optstate.checkpoint.files.dtypes import BITS
from optstate.checkpoint.files.pickle_objects import Object
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.files.torch_types import type_name
from optstate.checkpoint.formats.registry import read_state_dict
from optstate.checkpoint.formats.shared.folder_weights import Weight, complete_checkpoint
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.state_dict import parse_state_dict
from optstate.checkpoint.formats.shared.statistics import FIRST, SECOND
from optstate.checkpoint.formats.shared.tables import Layout, read_table, whole
from optstate.other_libraries import libraries
from optstate.text import shown

__all__ = ["FORMAT", "is_deepspeed", "read_deepspeed"]

NAME = "deepspeed"

State = dict[str, dict[str, Any]]
Shape = tuple[int, ...]

OTHERS = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "ds_version")

FUSED_NOTE = "read as AdamW's: the file does not say whether weight decay is decoupled (adam_w_mode)"

UNORDERED = "parameters are in the order of the alphabet: *_model_states.pt, which has their own, is missing"


FUSED = Layout("FusedAdam", libraries.FUSED_ADAM, whole({"exp_avg": FIRST, "exp_avg_sq": SECOND}))


@dataclass
class _Found:
    """State by parameters' names. groups: hyper-parameters, with the names in `params`; masters: fp32 weights."""

    kind: str
    state: State
    groups: list[dict[str, Any]]
    masters: dict[str, Any]
    files: list[Path]
    about: Node


def read_deepspeed(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the optimizer's state in a checkpoint folder, in the folder of a tag, or beside a file *_optim_states.pt.

    The fp32 copies of weights are read as a slot of their own.

    Raises:
        CheckpointError: if it is damaged, of several ranks, or lacks the file with the shapes of parameters.
    """
    files = find_files(path)
    model = read_model(files.models)
    found = _universal(files.folder, model) if files.optimizer is None else _zero(files.optimizer, model)
    others = {key: _unwrapped(found.about.value[key]) for key in OTHERS if key in found.about.value}
    tree, text = {"state": found.state, "param_groups": found.groups, **others}, os.fspath(path)
    members = parse_state_dict(tree, text)
    if members is not None and FUSED.fits(members):
        checkpoint = read_table(members, FUSED, NAME, [FUSED_NOTE])
    else:
        checkpoint = read_state_dict(tree, text)
    _check_masters(text, found.masters)
    names = [param.name for param in checkpoint.document.parameters]
    known = [name for name in names if name in model.weights]
    weights = {name: replace(model.weights[name], master=found.masters.get(name)) for name in known}
    about = {"tool": NAME, "kind": found.kind}
    return complete_checkpoint(
        checkpoint, weights, about, [*found.files, *model.files], [] if model.files else [UNORDERED]
    )


def _check_masters(path: str, masters: Mapping[str, Any]) -> None:
    odd = next((name for name, value in masters.items() if not isinstance(value, Stored)), None)
    if odd is not None:
        raise CheckpointError(path, f"the fp32 weight of '{shown(odd)}' is {type_name(masters[odd])}, not a tensor")


def _unwrapped(value: Any) -> Any:
    """Return the attributes of an object, such as the loss scaler."""
    return value.state if isinstance(value, Object) else value


# --- the files of one rank ----------------------------------------------------------------------------------------


def _zero(path: Path, model: ModelFiles) -> _Found:
    own = deepspeed_files.read_values(path).at("optimizer_state_dict")
    _check_one_part(own)
    stage = _stage_of(own)
    base = own.at("optimizer_state_dict" if stage == 3 else "base_optimizer_state")
    if isinstance(base.value, list):
        hint = "convert the checkpoint with deepspeed.checkpoint.ds_to_universal"
        raise CheckpointError(path, "written with elastic_checkpoint, which leaves hyper-parameters out", hint)
    flat_masters = _tensors(own.at("fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"))
    if not model.files:
        reason = "there is no *_model_states.pt beside it, which has the shapes of parameters"
        raise CheckpointError(path, reason, "copy the whole folder of the tag")
    state: State = {}
    masters: dict[str, Any] = {}
    for i, shapes in enumerate(model.groups):
        starts = _starts(shapes) if stage == 3 else _mapped_starts(own.at("param_slice_mappings"), i, shapes)
        flat = base.at("state").optional(i)
        for key, value in _members(flat).items():
            for name, part in _cut(value, shapes, starts, whole=stage == 3).items():
                state.setdefault(name, {})[key] = part
        if i < len(flat_masters):
            masters |= _cut(flat_masters[i], shapes, starts, whole=stage == 3)
    groups = _groups_of(base.at("param_groups"), model)
    return _Found(f"deepspeed-zero{stage}", state, groups, masters, [path], own)


def _tensors(nodes: Node) -> list[Node]:
    for node in nodes.items():
        node.tensor()
    return nodes.items()


def _members(node: Node | None) -> dict[str, Node]:
    """Return what is under the keys of a dict; nothing if there is none, as for parameters that were never updated."""
    return {key: node.at(key) for key in node.of(dict)} if node is not None else {}


def _stage_of(own: Node) -> int:
    """1, 2 or 3; DeepSpeed's optimizer for bfloat16 is of stage 1 and does not say so."""
    found = own.optional("zero_stage")
    value = found.value if found is not None else 1
    value = value.args[0] if isinstance(value, Object) and value.args else value
    if value not in (1, 2, 3):
        raise own.wrong(f"has zero_stage {shown(str(value))}: it must be 1, 2 or 3")
    return int(value)


def _check_one_part(own: Node) -> None:
    found = own.optional("partition_count")
    if found is None:
        return
    counts = found.value if isinstance(found.value, list) else [found.value]
    if not all(type(count) is int for count in counts):
        raise found.wrong("is no number of ranks")
    if max(counts, default=1) > 1:
        raise refusal_of_ranks(own.path, max(counts))


def _groups_of(groups: Node, model: ModelFiles) -> list[dict[str, Any]]:
    """Return the groups with names for their flat tensors, each of which is a parameter to the optimizer."""
    found, seen = [], []
    for group in groups.items():
        flats = group.at("params").of(list)
        if not all(type(flat) is int and 0 <= flat < len(model.groups) for flat in flats):
            raise group.wrong(f"has flat tensors {flats}: *_model_states.pt knows of {len(model.groups)}")
        seen += flats
        found.append({**group.of(dict), "params": [name for flat in flats for name in model.groups[flat]]})
    if sorted(seen) != list(range(len(model.groups))):
        raise groups.wrong(f"have the flat tensors {seen}, *_model_states.pt describes {len(model.groups)}")
    return found


def _starts(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """One after the other."""
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name] = end
        end += prod(shape)
    return starts


def _mapped_starts(mappings: Node, i: int, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """As the file says, with gaps where parameters are aligned."""
    if i >= len(mappings.items()):
        raise mappings.wrong(f"has {len(mappings.items())} groups, *_model_states.pt has more")
    mapping = mappings.items()[i]
    if list(mapping.of(dict)) != list(shapes):
        raise mapping.wrong("names other parameters than param_shapes of *_model_states.pt, or in another order")
    starts, end = {}, 0
    for name, shape in shapes.items():
        address = mapping.at(name).of(Object).state
        start, count = (address.get("start"), address.get("numel")) if isinstance(address, dict) else (None, None)
        if type(start) is not int or count != prod(shape) or start < end:
            at = f"{shown(str(count))} elements from {shown(str(start))} on"
            raise mapping.wrong(f"gives '{shown(name)}' {at}: it has {prod(shape)}, and what is before ends at {end}")
        starts[name], end = start, start + prod(shape)
    return starts


def _cut(flat: Node, shapes: Mapping[str, Shape], starts: Mapping[str, int], whole: bool) -> dict[str, Any]:
    """Return the parts of a flat tensor by the names of parameters; a number, such as a step, goes to every parameter.

    whole: whether it ends with the last parameter.
    """
    tensor = flat.value
    if not isinstance(tensor, Stored) or not tensor.shape:
        return dict.fromkeys(shapes, tensor)
    end = max((start + prod(shapes[name]) for name, start in starts.items()), default=0)
    if (
        len(tensor.shape) != 1
        or tensor.stride is not None
        or tensor.elements < end
        or (whole and tensor.elements > end)
    ):
        what = f"a number for each of the {end} elements of its parameters"
        raise flat.wrong(f"has shape {list(tensor.shape)}, not {what}: it cannot be cut")
    size = BITS[tensor.dtype] // 8
    return {
        name: replace(tensor, start=tensor.start + starts[name] * size, shape=shape) for name, shape in shapes.items()
    }


# --- the universal form -------------------------------------------------------------------------------------------


def _universal(folder: Path, model: ModelFiles) -> _Found:
    """Return a folder for each parameter, a file for each of its statistics."""
    own = deepspeed_files.read_values(folder / UNIVERSAL / STATE)
    names = sorted(entry.name for entry in (folder / UNIVERSAL).iterdir() if entry.is_dir())
    groups = own.at("param_groups")
    if not model.files:
        _assume_one_group(groups, names, model)
    _check_names(own.path, names, model)
    state: State = {}
    masters: dict[str, Any] = {}
    files = [own.path]
    for name in names:
        for path in sorted((folder / UNIVERSAL / name).glob("*.pt")):
            value = _of_parameter(path, name, model)
            files.append(path)
            if path.stem == "fp32":
                masters[name] = Node(path, value).tensor()
            else:
                state.setdefault(name, {})[path.stem] = value
    for name, step in _steps(own, model).items():
        if name in state:
            state[name].setdefault("step", step)
    return _Found("deepspeed-universal", state, _groups_of(groups, model), masters, files, own)


def _assume_one_group(groups: Node, names: Iterable[str], model: ModelFiles) -> None:
    """Without the model's state a single group is that of all parameters."""
    if len(groups.items()) > 1:
        reason = "there is no *_model_states.pt, which says the groups of parameters"
        raise CheckpointError(groups.path.parent.parent, reason, "copy it from the checkpoint that was converted")
    flats = groups.items()[0].at("params").of(list) if groups.items() else []
    model.groups = [dict.fromkeys(names, ()), *({} for _ in flats[1:])]


def _check_names(path: Path, names: Iterable[str], model: ModelFiles) -> None:
    known = {name for group in model.groups for name in group}
    odd = next((name for name in names if name not in known), None)
    if odd is not None:
        raise CheckpointError(path.parent, f"has the parameter '{shown(odd)}', which *_model_states.pt does not have")


def _of_parameter(path: Path, name: str, model: ModelFiles) -> Any:
    """Return what one file has for a parameter, in its shape: stage 3 writes flat tensors."""
    tree = deepspeed_files.read_values(path)
    value = tree.value["param"] if isinstance(tree.value, dict) and "param" in tree.value else tree.value
    if not isinstance(value, Stored) or path.stem == "step":
        return value
    weight = model.weights.get(name)
    if weight is not None and len(value.shape) == 1 and value.elements == prod(weight.shape) and value.stride is None:
        return replace(value, shape=weight.shape)
    if weight is None or (value.shape != weight.shape and tree.value is not value):
        # The model's shapes are those of a tensor-parallel rank, these of all together; or there are none.
        model.weights[name] = Weight(value.shape, weight.dtype if weight is not None else "")
    elif value.shape != weight.shape:
        raise tree.wrong(f"has shape {list(value.shape)}, the model {list(weight.shape)}")
    return value


def _steps(own: Node, model: ModelFiles) -> dict[str, Any]:
    """Stage 3 has the steps only with the flat tensors of the first rank."""
    base = own.optional("optimizer_state_dict")
    found: dict[str, Any] = {}
    for i, shapes in enumerate(model.groups if base is not None else ()):
        flat = _members(base.at("state").optional(i) if base is not None else None)
        if "step" in flat:
            found |= dict.fromkeys(shapes, flat["step"].value)
    return found


# --- the model ----------------------------------------------------------------------------------------------------


@dataclass
class ModelFiles:
    """What the files of the model's state say.

    groups: shapes by name, in the order of each flat tensor. weights: shapes and dtypes of all. files: those read.
    """

    groups: list[dict[str, Shape]] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def read_model(paths: Sequence[Path]) -> ModelFiles:
    """Names, shapes and dtypes; of several files each has those of its stage of a pipeline."""
    model = ModelFiles(files=list(paths))
    for path in paths:
        tree = deepspeed_files.read_values(path)
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


FORMAT = Format(name=NAME, is_at=is_deepspeed, read_at=read_deepspeed, rules=(libraries.FUSED_ADAM,))
