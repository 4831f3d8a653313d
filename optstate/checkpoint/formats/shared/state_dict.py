"""What optimizer state of all libraries has in common: groups, ids, names, steps, plain values. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optstate.checkpoint.document.document import DEEPEST, MOST_VALUES, TensorValue
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.dtypes import TORCH_NAMES
from optstate.checkpoint.files.opened_file import FileChangedError
from optstate.checkpoint.files.pickle_machine import Global, Object, Stranger, Unread
from optstate.checkpoint.files.tensor_place import Stored, read_numbers
from optstate.checkpoint.files.torch_tensors import only_element
from optstate.checkpoint.files.torch_types import type_name
from optstate.other_libraries import stem_of
from optstate.text import shown

__all__ = [
    "Id",
    "NotPlainError",
    "StateDict",
    "is_state_dict",
    "number_of",
    "parse_state_dict",
    "plain",
    "plain_members",
    "small_numbers",
    "stem_of",
    "step_of",
    "tell_adam_from_adamw",
]

MOST_STEPS = 1 << 63

HYPERS = frozenset(
    (
        *("lr", "betas", "beta1", "beta2", "beta3", "eps", "eps1", "eps2", "weight_decay", "momentum", "dampening"),
        *("nesterov", "amsgrad", "maximize", "alpha", "rho", "decay_rate", "clip_threshold", "step", "rank"),
    )
)
"""Hyper-parameters that are numbers, or pairs of numbers, in every library."""

Id = int | str


class NotPlainError(ValueError):
    """A value that a document has no form for; the message says which."""


@dataclass(frozen=True)
class StateDict:
    """What an optimizer's `state_dict()` gave, taken apart.

    groups: the hyper-parameters of each, with `params` and `param_names`. ids: what each group calls its parameters.
    names: id -> name, `#<place>` for one without, in the order of the groups. state: id -> what is kept. rest: other
    values beside the two.
    """

    path: str
    groups: tuple[dict[str, Any], ...]
    ids: tuple[tuple[Id, ...], ...]
    names: dict[Id, str]
    state: dict[Id, dict[str, Any]]
    rest: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """The hyper-parameters that every group has."""
        return set.intersection(*map(set, self.groups)) if self.groups else set()

    @property
    def kept(self) -> set[str]:
        """The keys of everything that is kept for any parameter."""
        return {key for state in self.state.values() for key in state}


def is_state_dict(tree: Any) -> bool:
    """Whether a value has the two parts that every `torch.optim.Optimizer.state_dict()` has."""
    return isinstance(tree, dict) and isinstance(tree.get("state"), dict) and isinstance(tree.get("param_groups"), list)


def parse_state_dict(tree: Any, path: str) -> StateDict | None:
    """Return the parts of `{'state': {...}, 'param_groups': [...]}`, checked; None for anything else.

    Raises:
        CheckpointError: if groups have no list of parameters, an id comes twice, or state belongs to no group's.
    """
    if not is_state_dict(tree):
        return None
    tree = _numbered(tree)
    ids = tuple(_ids_of(group, i, path) for i, group in enumerate(tree["param_groups"]))
    for i, group in enumerate(tree["param_groups"]):
        _check_hypers(group, i, path)
    order = [ident for group in ids for ident in group]
    if len(set(order)) < len(order):
        twice = Counter(order).most_common(1)[0][0]
        raise CheckpointError(path, f"the param groups have the parameter {_id_text(twice)} twice")
    names = _names_of(tree["param_groups"], ids, path)
    state = {ident: _state_of(ident, kept, names, path) for ident, kept in tree["state"].items()}
    rest = {key: value for key, value in tree.items() if key not in ("state", "param_groups")}
    return StateDict(path, tuple(tree["param_groups"]), ids, names, state, rest)


def _numbered(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a tree with places for ids where ids are the parameters themselves, as in a pickled optimizer."""
    places: dict[Stored, int] = {}
    groups = []
    for group in tree["param_groups"]:
        ids = group.get("params") if isinstance(group, dict) else None
        if isinstance(ids, list) and ids and all(isinstance(ident, Stored) for ident in ids):
            group = {**group, "params": [places.setdefault(ident, len(places)) for ident in ids]}
        groups.append(group)
    if not places:
        return tree
    state = {places.get(key, key) if isinstance(key, Stored) else key: kept for key, kept in tree["state"].items()}
    return {**tree, "state": state, "param_groups": groups}


def _ids_of(group: Any, place: int, path: str) -> tuple[Id, ...]:
    ids = group.get("params") if isinstance(group, dict) else None
    if not isinstance(ids, list | tuple) or not all(isinstance(key, str) for key in group):
        raise CheckpointError(path, f"param_groups[{place}] is not a param group: it has no list 'params'")
    for ident in ids:
        if isinstance(ident, bool) or not isinstance(ident, int | str):
            raise CheckpointError(path, f"param_groups[{place}] has {type_name(ident)} among the ids in 'params'")
    return tuple(ids)


def _check_hypers(group: Mapping[str, Any], place: int, path: str) -> None:
    """Refuse a hyper-parameter that is an object where every optimizer has numbers: without it the rule is another."""
    for key in HYPERS & group.keys():
        for value in group[key] if isinstance(group[key], list | tuple) else (group[key],):
            if isinstance(value, Stranger | Unread | Global):
                reason = f"param_groups[{place}] has {type_name(value)} as '{key}', not a number"
                raise CheckpointError(
                    path, reason, "put plain numbers into the optimizer's param_groups and save again"
                )


def _names_of(groups: list[dict[str, Any]], ids: tuple[tuple[Id, ...], ...], path: str) -> dict[Id, str]:
    """Names that the groups give, else places; an id that is itself text is a name."""
    order = [ident for group in ids for ident in group]
    names = {ident: ident if isinstance(ident, str) else f"#{i}" for i, ident in enumerate(order)}
    for g, (group, members) in enumerate(zip(groups, ids, strict=True)):
        given = group.get("param_names")
        if given is None:
            continue
        if not isinstance(given, list | tuple) or len(given) != len(members):
            count = len(given) if isinstance(given, list | tuple) else "no list of"
            raise CheckpointError(path, f"param_groups[{g}] has {count} param_names for {len(members)} params")
        if not all(isinstance(name, str) for name in given):
            raise CheckpointError(path, f"param_groups[{g}] has param_names that are no text")
        names |= dict(zip(members, given, strict=True))
    seen: set[str] = set()
    for name in names.values():
        if name in seen:
            raise CheckpointError(path, f"two parameters are named '{shown(name)}'")
        seen.add(name)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(path, f"the parameter's name '{shown(name)}' is not valid text") from None
    return names


def _state_of(ident: Any, kept: Any, known: Mapping[Id, str], path: str) -> dict[str, Any]:
    if ident not in known:
        raise CheckpointError(
            path,
            f"state has the parameter {_id_text(ident)}, which is in no param group: they have {len(known)} parameters",
            "the file was put together from two optimizers, or changed by hand",
        )
    if not isinstance(kept, dict):
        raise CheckpointError(path, f"the state of parameter {_id_text(ident)} is {type_name(kept)}, not a dict")
    for odd in (key for key in kept if not isinstance(key, str)):
        reason = f"the state of parameter {_id_text(ident)} has the key {shown(repr(odd))}, {type_name(kept[odd])}"
        raise CheckpointError(path, f"{reason}: nested state as heavyball writes it cannot be read")
    return kept


def _id_text(ident: Any) -> str:
    return shown(repr(ident))


# --- values -------------------------------------------------------------------------------------------------------


def small_numbers(stored: Stored) -> tuple[float | int, ...]:
    """All numbers of a small tensor.

    Raises:
        NotPlainError: for a large one, one that is not contiguous, of another dtype, or not all in the file.
    """
    try:
        return read_numbers(stored)
    except FileChangedError:
        raise
    except (ValueError, OSError) as error:
        raise NotPlainError(str(error)) from None


def plain(value: Any, depth: int = 0) -> Any:
    """Return a value as a document holds it: numbers, text, lists, tuples, dicts; small tensors with their numbers.

    Raises:
        NotPlainError: for anything else.
    """
    if depth > DEEPEST - 2:
        raise NotPlainError("it is nested too deeply")
    if isinstance(value, Stored):
        if value.dtype not in TORCH_NAMES or value.elements > MOST_VALUES:
            raise NotPlainError(f"it is a {value.dtype} tensor of shape {list(value.shape)}")
        return TensorValue(TORCH_NAMES[value.dtype], value.shape, small_numbers(value))
    if isinstance(value, list | tuple):
        return type(value)(plain(item, depth + 1) for item in value)
    if isinstance(value, dict):
        if any(not isinstance(key, str) or key.startswith("$") for key in value):
            raise NotPlainError("it is a dict with keys that are no plain text")
        return {key: plain(item, depth + 1) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if (number := only_element(value)) is not None:
        return number
    raise NotPlainError(f"it is {type_name(value)}")


def plain_members(values: Mapping[Any, Any], where: str, notes: list[str]) -> dict[str, Any]:
    """Those of some values that a document can hold; a note about each of the others."""
    found = {}
    for key, value in values.items():
        try:
            if not isinstance(key, str) or key.startswith("$"):
                raise NotPlainError("its name is no text that does not begin with '$'")
            found[key] = plain(value)
        except NotPlainError as error:
            notes.append(f"{where} '{shown(str(key))}' is left out: {error}")
    return found


def number_of(value: Any) -> float | None:
    """Return a number, also one kept as a tensor of one element; None for anything else."""
    if isinstance(value, Stored) and value.elements == 1:
        try:
            (value,) = small_numbers(value)
        except NotPlainError:
            return None
    if isinstance(value, TensorValue) and len(value.values) == 1:
        (value,) = value.values
    if isinstance(value, Object):
        value = only_element(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def step_of(value: Any) -> int:
    """Return a count of updates that is a number or a tensor of one.

    Raises:
        NotPlainError: if it is none.
    """
    number = number_of(value)
    if number is None:
        raise NotPlainError(f"step is {type_name(value)}: it must be one number")
    if not 0 <= number < MOST_STEPS or number != int(number):  # NaN is in no range
        raise NotPlainError(f"step is {shown(str(number))}: it must be a whole number from 0 on")
    return int(number)


# --- one name for two rules ---------------------------------------------------------------------------------------


def tell_adam_from_adamw(found: StateDict, optimizer: str | None, name: str) -> tuple[str, list[str]]:
    """Return the name of an optimizer that is `name` or the same with "Adam" for "AdamW", and a note if it was assumed.

    optimizer: the name that a person gave.
    """
    other = name.replace("AdamW", "Adam")
    if optimizer is not None and stem_of(optimizer) in ("adam", "adamw"):
        return name if stem_of(optimizer) == "adamw" else other, []
    if all(number_of(group.get("weight_decay")) == 0 for group in found.groups):
        return name, []
    return name, [
        f"read as {name}'s: the file does not say whether weight decay is decoupled; if not, give --optimizer {other}"
    ]
