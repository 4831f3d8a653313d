"""Optimizer state in folders of torch.distributed.checkpoint, by the names of parameters. Imports no torch.

`get_optimizer_state_dict` gives `state.<name>.<statistic>`, and the hyper-parameters as `param_groups.<number>.<key>`
or, flattened, as `param_groups.<name>.<key>` for each parameter. Names have dots; what comes before is anyone's choice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files import dcp_folder
from optstate.checkpoint.files.dcp_folder import METADATA, DcpFolder, Shaped
from optstate.checkpoint.files.tensor_place import Pieces, Stored
from optstate.checkpoint.formats.registry import read_state_dict
from optstate.checkpoint.formats.shared.folder_weights import Weight, complete_checkpoint
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.state_dict import NotPlainError, plain
from optstate.text import shown

__all__ = ["FORMAT", "is_dcp", "read_dcp"]

SLOTS = frozenset(
    ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum", "variance")
)
"""Statistics by which state is known without its hyper-parameters, and split from a name that is not known."""

REGROUPED = "its groups are not in the folder: neighbours with equal hyper-parameters were made one group"
UNGROUPED = "hyper-parameters are not in the folder: all parameters were made one group without any"

_PREFIX = re.compile(r"((?:[^.]+\.)*?)(state|param_groups)\.")
_NESTED = re.compile(r"(\d{1,6})\.(.+)")

RawGroup = dict[str, Any]


def is_dcp(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder of torch.distributed.checkpoint, or of Megatron-LM's optimizer, which is refused."""
    folder = Path(path)
    if not folder.is_dir():
        return False
    return (folder / METADATA).is_file() or any(folder.glob("*.distcp")) or _is_megatron(folder)


def read_dcp(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the optimizer's state in a folder. Tensors that were sharded are `Pieces`; no statistic is read.

    Weights in the folder are no state: they tell the shapes and dtypes of parameters.

    Raises:
        CheckpointError: if the folder is damaged, or holds the state of no optimizer, or of several.
    """
    if _is_megatron(path):
        raise _megatron_error(path)
    return _checkpoint(dcp_folder.read_dcp_folder(path))


def _checkpoint(source: DcpFolder) -> Checkpoint:
    prefix = _prefix_of(source)
    own = (f"{prefix}state.", f"{prefix}param_groups.")
    weights = _by_ends({key: tensor for key, tensor in source.tensors.items() if not key.startswith(own)})
    groups, form, notes = _groups_of(source, own[1])
    state = _state_of(source, own[0], {name for group in groups for name in group["params"]} | weights.keys())
    if not groups:
        groups, form, notes = [{"params": list(state)}], "tensors", [UNGROUPED]
    tree, path = {"state": state, "param_groups": groups}, os.fspath(source.path)
    known = {name: weights[name] for group in groups for name in group["params"] if name in weights}
    about = {"tool": "torch.distributed.checkpoint", "kind": "dcp", "form": form, "prefix": prefix}
    notes += _of_others(key for key in source.keys if key not in source.tensors and not key.startswith(own))
    notes += _of_pieces(state)
    return complete_checkpoint(read_state_dict(tree, path), known, about, source.paths, notes)


def _of_others(others: Iterable[str]) -> list[str]:
    keys = list(others)
    what = f"{len(keys)} other values in the folder, such as '{shown(keys[0])}'," if len(keys) > 1 else ""
    return [f"{what or shown(keys[0])} are no optimizer state and were left out"] if keys else []


def _of_pieces(state: Mapping[str, Mapping[str, Any]]) -> list[str]:
    tensors = [value for kept in state.values() for value in kept.values() if isinstance(value, Pieces)]
    most = max((len(tensor.parts) for tensor in tensors), default=0)
    return [f"{len(tensors)} tensors are in up to {most} parts, which reading puts together"] if tensors else []


# --- whose state it is --------------------------------------------------------------------------------------------


def _prefix_of(source: DcpFolder) -> str:
    """Return what stands before `state.` and `param_groups.`."""
    if _has_megatrons_keys(source.keys):
        raise _megatron_error(source.path)
    prefixes = _prefixes(source.keys)
    if len(prefixes) > 1:
        names = ", ".join(f"'{shown(prefix)}'" for prefix in prefixes)
        reason = f"the folder holds the state of {len(prefixes)} optimizers, under {names}"
        raise CheckpointError(source.path, reason, "save each of them in a folder of its own", refused=True)
    if not prefixes:
        such = f", such as '{shown(next(iter(source.keys)))}'" if source.keys else ""
        reason = f"no optimizer state: {len(source.keys)} keys{such}, none of 'state.<parameter>.<statistic>'"
        raise CheckpointError(source.path, reason, "give the folder that the optimizer was saved in")
    return prefixes[0]


def _prefixes(keys: Iterable[str]) -> list[str]:
    """All that stand before hyper-parameters; if there are none, before statistics of known names.

    Weights may have "state." in their names, too.
    """
    found: dict[str, set[str]] = {"state": set(), "param_groups": set()}
    for key in keys:
        match = _PREFIX.match(key)
        if match is not None and (match[2] == "param_groups" or not SLOTS.isdisjoint(key.rsplit(".", 2)[1:])):
            found[match[2]].add(match[1])
    return sorted(found["param_groups"] or found["state"])


# --- hyper-parameters ---------------------------------------------------------------------------------------------


def _groups_of(source: DcpFolder, prefix: str) -> tuple[list[RawGroup], str, list[str]]:
    """Return the groups with their parameters' names, the form they are in, and notes; none if there are no entries."""
    entries = {key.removeprefix(prefix): key for key in source.keys if key.startswith(prefix)}
    if not entries:
        return [], "", []
    if any(re.fullmatch(r"\d{1,6}\.params", entry) for entry in entries):
        return _numbered(source, entries), "nested", []
    return _regrouped(source, entries)


def _numbered(source: DcpFolder, entries: Mapping[str, str]) -> list[RawGroup]:
    """Return groups that are saved as such."""
    groups: dict[int, RawGroup] = {}
    for entry, key in entries.items():
        match = _NESTED.fullmatch(entry)
        if match is None:
            raise CheckpointError(source.path, f"'{shown(key)}' belongs to no group: the others have numbers")
        groups.setdefault(int(match[1]), {})[match[2]] = source.get(key)
    for number, group in groups.items():
        names = group.get("params")
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(source.path, f"param group {number} does not name its parameters")
        group.pop("param_names", None)  # the same names, or those of the model before it was wrapped
    return [groups[number] for number in sorted(groups)]


def _regrouped(source: DcpFolder, entries: Mapping[str, str]) -> tuple[list[RawGroup], str, list[str]]:
    """Return groups of the hyper-parameters that were saved for every parameter."""
    hypers: dict[str, RawGroup] = {}
    for entry, key in entries.items():
        name, _, number = entry.rpartition(".")
        hypers.setdefault(name, {})[number] = source.get(key)
    groups: list[RawGroup] = []
    last = None
    for name, hyper in hypers.items():
        comparable = _comparable(hyper)
        if comparable != last:
            groups.append({**hyper, "params": []})
            last = comparable
        groups[-1]["params"].append(name)
    told = all("param_names" in group for group in groups)  # which then made the groups differ
    for group in groups:
        group.pop("param_names", None)
    return groups, "flattened", [] if told else [REGROUPED]


def _comparable(hyper: RawGroup) -> RawGroup:
    """Hyper-parameters that are equal if their numbers are, not where they lie."""
    found = {}
    for key, value in hyper.items():
        try:
            found[key] = plain(value)
        except NotPlainError:
            found[key] = value
    return found


# --- statistics ---------------------------------------------------------------------------------------------------


def _state_of(source: DcpFolder, prefix: str, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return what is kept, by the parameter's name and the statistic's."""
    state: dict[str, dict[str, Any]] = {}
    for key in source.keys:
        if key.startswith(prefix):
            name, slot = _by_path(source.nested.get(key, ()), prefix) or _split(key.removeprefix(prefix), names)
            if not name:
                raise CheckpointError(source.path, f"'{shown(key)}' names no parameter with its statistic")
            state.setdefault(name, {})[slot] = source.get(key)
    return state


def _by_path(path: Sequence[Any], prefix: str) -> tuple[str, str] | None:
    """Return the names of the parameter and the statistic, of a path that has them as parts behind `prefix`."""
    parts = [str(part) for part in path]
    for count in range(1, len(parts) - 1):
        if ".".join(parts[:count]) + "." == prefix:
            return parts[count], ".".join(parts[count + 1 :])
    return None


def _split(rest: str, known: Collection[str]) -> tuple[str, str]:
    """Return the names of a parameter and a statistic, of both joined; the longest known name is the parameter's."""
    parts = rest.split(".")
    for count in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:count])
        if name in known:
            return name, ".".join(parts[count:])
    last = 2 if len(parts) > 2 and parts[-2] in SLOTS else 1
    return ".".join(parts[:-last]), ".".join(parts[-last:])


def _by_ends(weights: Mapping[str, Shaped | Stored]) -> dict[str, Weight]:
    """Weights by every end of their keys: a parameter `fc.weight` may be saved as `model.fc.weight`.

    Ends that stand for tensors of several shapes or dtypes tell nothing.
    """
    found: dict[str, set[Weight]] = {}
    for key, tensor in weights.items():
        parts = key.split(".")
        for first in range(len(parts)):
            found.setdefault(".".join(parts[first:]), set()).add(Weight(tensor.shape, tensor.dtype))
    return {end: alike.pop() for end, alike in found.items() if len(alike) == 1}


# --- Megatron-LM's distributed optimizer --------------------------------------------------------------------------

# Flat buffers by data-parallel group, or a tensor per statistic that has all layers of the model in it.
_MEGATRON_KEY = re.compile(
    r"distributed\.dp_group_idx_\d|(^|\.)optimizer\.state\.(exp_avg|exp_avg_sq|fp32_param|param)\."
)


def _is_megatron(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has a distrib_optim.pt, or a folder mp_rank_* in it does."""
    folder = Path(path)
    places = [folder, *folder.glob("mp_rank_*")] if folder.is_dir() else []
    return any((place / "distrib_optim.pt").is_file() for place in places)


def _has_megatrons_keys(keys: Iterable[str]) -> bool:
    """Whether tensors of torch.distributed.checkpoint are named as Megatron names its own."""
    return any(_MEGATRON_KEY.search(key) for key in keys)


def _megatron_error(path: str | os.PathLike[str]) -> CheckpointError:
    """Why such a folder is not read."""
    reason = "state of Megatron-LM's distributed optimizer: which parameter has which part of it, only Megatron knows"
    hint = "load it with Megatron-LM, and save each parameter's state by its name"
    return CheckpointError(path, reason, hint, refused=True)


FORMAT = Format(name="torch.distributed.checkpoint", is_at=is_dcp, read_at=read_dcp)
