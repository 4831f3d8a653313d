"""Names for the parameters of files that only number them: from a list, or from the model itself.

torch is imported only to build a model.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

from optstate.checkpoint.document.canonical_names import rename_parameter
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import contradictions
from optstate.checkpoint.document.document import Parameter
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.file_kinds import (
    JSON,
    SAFETENSORS,
    UNKNOWN,
    identify_file,
    open_file,
    read_bytes,
    size_of,
)
from optstate.checkpoint.files.strict_json import NotJSONError, Pairs, parse_python_json
from optstate.naming import canonical_names
from optstate.text import shown

__all__ = ["NamedParameter", "ParameterNames", "give_names", "read_names"]

LARGEST_FILE = 16 << 20


class NamedParameter(NamedTuple):
    """A parameter's name, and its shape and dtype (torch's name of it) where they are known, else None and ""."""

    name: str
    shape: tuple[int, ...] | None = None
    dtype: str = ""


@dataclass(frozen=True)
class ParameterNames:
    """Names of all parameters in order.

    source: where they are from. groups: how many each param group has, () where that is not said. of_module: whether
    they are in the order of a module, which is that of an optimizer only if it has one group. paragraphs: how many
    lines stand between the empty lines of a text, which are the groups of an optimizer that has several.
    """

    source: str
    named: tuple[NamedParameter, ...]
    groups: tuple[int, ...] = ()
    of_module: bool = False
    paragraphs: tuple[int, ...] = ()


def read_names(source: str | os.PathLike[str]) -> ParameterNames:
    """Read the names that a file lists or a factory's model has.

    source: a text file, one name a line, in the order of the optimizer's parameters, with an empty line between its
        param groups; a JSON file with a list of names, a list of lists (one per param group) or an object of names and
        shapes; or `package.module:factory`, which is
        called on the meta device and returns a module, named parameters, or param groups of named parameters.

    Raises:
        CheckpointError: if it is none of these, or the factory fails.
    """
    text = os.fspath(source)
    if not os.path.exists(text) and ":" in text:
        return _checked(_of_factory(text))
    kind = identify_file(text)
    if kind == SAFETENSORS:
        reason = "the tensors of a model file are sorted by name, which is not the order of the model's parameters"
        hint = "give a text file with one name a line in the optimizer's order, or package.module:factory"
        raise CheckpointError(text, f"it cannot say which parameter is which: {reason}", hint)
    if kind not in (JSON, UNKNOWN):
        raise CheckpointError(text, f"{kind}, not a list of names")
    with open_file(text) as file:
        if size_of(file) > LARGEST_FILE:
            raise CheckpointError(text, f"{size_of(file)} bytes are no list of names: at most {LARGEST_FILE} are read")
        content = read_bytes(text, file, LARGEST_FILE)
    try:
        lines = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(text, f"not a list of names: no UTF-8 at byte {error.start}") from None
    if kind == JSON:
        return _checked(_of_json(text, lines))
    return _checked(_of_text(text, lines))


def _checked(names: ParameterNames) -> ParameterNames:
    """Return the names, if every one is there once."""
    seen: set[str] = set()
    for named in names.named:
        if named.name in seen:
            raise CheckpointError(names.source, f"the name '{shown(named.name)}' comes twice")
        seen.add(named.name)
    if not seen:
        raise CheckpointError(names.source, "it names no parameters")
    return names


def _of_text(path: str, text: str) -> ParameterNames:
    """Read a name a line, and what stands between empty lines."""
    lines = [line.strip() for line in text.splitlines()]
    paragraphs = tuple(len(list(some)) for filled, some in groupby(lines, bool) if filled)
    return ParameterNames(path, tuple(NamedParameter(line) for line in lines if line), paragraphs=paragraphs)


# --- JSON ---------------------------------------------------------------------------------------------------------


def _of_json(path: str, text: str) -> ParameterNames:
    """Read a list of names, a list of lists of names, or an object with a shape or null for each name."""
    try:
        tree = parse_python_json(text, Pairs)
    except NotJSONError as error:
        raise CheckpointError(path, f"not valid JSON: {error}") from None
    if isinstance(tree, Pairs):
        return ParameterNames(path, tuple(NamedParameter(name, _shape_of(path, name, shape)) for name, shape in tree))
    if isinstance(tree, list) and all(isinstance(item, str) for item in tree):
        return ParameterNames(path, tuple(map(NamedParameter, tree)))
    if isinstance(tree, list) and all(isinstance(group, list) for group in tree):
        flat = [name for group in tree for name in group]
        if all(isinstance(name, str) for name in flat):
            return ParameterNames(path, tuple(map(NamedParameter, flat)), tuple(map(len, tree)))
    reason = "not names: a list of them, a list of lists (one per param group), or an object of names and shapes"
    raise CheckpointError(path, reason)


def _shape_of(path: str, name: str, shape: Any) -> tuple[int, ...] | None:
    if shape is None:
        return None
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise CheckpointError(path, f"the shape of '{shown(name)}' is {shown(str(shape))}: it must be a list of sizes")
    return tuple(shape)


# --- a factory ----------------------------------------------------------------------------------------------------


def _of_factory(source: str) -> ParameterNames:
    """Call `package.module:factory` on the meta device, where parameters have no memory, and name what it returns."""
    import torch

    try:
        with torch.device("meta"):
            made = _factory(source)()
            if isinstance(made, torch.nn.Module):
                return ParameterNames(source, tuple(_members(source, made.named_parameters())), of_module=True)
            return _of_iterable(source, made)
    except CheckpointError:
        raise
    except (Exception, SystemExit) as error:  # a script without a guard ends with its own exit code
        first = shown(next(iter(str(error).splitlines()), ""))
        raise CheckpointError(source, f"the factory fails: {type(error).__name__}: {first}") from None


def _factory(source: str) -> Any:
    """Find the object that a name leads to; modules in the working directory are found as `python -m` finds them."""
    module, _, attributes = source.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    finally:
        sys.path.remove(os.getcwd())
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    if not callable(found):
        raise CheckpointError(source, f"it is of type {type(found).__name__}, no function")
    return found


def _of_iterable(source: str, made: Any) -> ParameterNames:
    """Named parameters, or param groups of them."""
    if not isinstance(made, Iterable):
        hint = "return a module, pairs of name and parameter, or param groups of such pairs"
        raise CheckpointError(source, f"the factory returns a value of type {type(made).__name__}", hint)
    items = list(made)
    if not any(isinstance(item, dict) for item in items):
        return ParameterNames(source, tuple(_members(source, items)))
    groups = [tuple(_members(source, _pairs(source, item))) for item in items]
    return ParameterNames(source, tuple(named for group in groups for named in group), tuple(map(len, groups)))


def _pairs(source: str, group: Any) -> list[Any]:
    if not isinstance(group, dict) or "params" not in group:
        raise CheckpointError(source, "the factory returns a param group without 'params'")
    params = list(group["params"])
    names = group.get("param_names")
    return params if names is None else list(zip(names, params, strict=True))


def _members(source: str, pairs: Iterable[Any]) -> Iterator[NamedParameter]:
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            hint = "give names with them, as model.named_parameters() does"
            raise CheckpointError(
                source, f"the factory gives a {type(pair).__name__} where a name and a parameter are needed", hint
            )
        name, param = pair
        yield NamedParameter(name, tuple(param.shape), str(param.dtype).removeprefix("torch."))


# --- names for a checkpoint ---------------------------------------------------------------------------------------


def give_names(checkpoint: Checkpoint, names: ParameterNames) -> Checkpoint:
    """Return the checkpoint with names for its numbered parameters, and with shapes and dtypes that it lacked.

    Parameters that have names keep them; the given ones must be the same.

    Raises:
        CheckpointError: (refused) if counts, groups, shapes or names that are known differ; if a shape is not that of a
            parameter's statistics; or if names would have to be shared out among several groups by their order alone,
            which may be that of the model.
    """
    parameters = checkpoint.document.parameters
    _same_counts(checkpoint, names)
    if checkpoint.named:
        given = _by_own_name(checkpoint, names)
    else:
        _refuse_order_of_module(checkpoint, names)
        given = dict(zip((param.name for param in parameters), names.named, strict=True))
    if checkpoint.named and checkpoint.document.source.get("ordered") is False:
        places = {named.name: i for i, named in enumerate(names.named)}
        parameters = tuple(sorted(parameters, key=lambda param: places[given[param.name].name]))
    renamed = tuple(_renamed(names, param, given[param.name]) for param in parameters)
    if not checkpoint.named:
        _refuse_order_alone(checkpoint, names)
    tensors = {
        new: checkpoint.tensors[old]
        for before, after in zip(parameters, renamed, strict=True)
        for old, new in zip(before.keys, after.keys, strict=True)
    }
    made = checkpoint.with_parameters(renamed, tensors)
    _same_sizes(names, made)
    return made


def _refused(names: ParameterNames, reason: str, hint: str = "") -> CheckpointError:
    return CheckpointError(names.source, reason, hint, refused=True)


def _same_counts(checkpoint: Checkpoint, names: ParameterNames) -> None:
    lengths = tuple(len(group.parameters) for group in checkpoint.document.groups)
    if len(names.named) != sum(lengths):
        theirs = f"{sum(lengths)} parameters" + (f" ({_sum(lengths)} in its groups)" if len(lengths) > 1 else "")
        hint = "frozen parameters may or may not be among the optimizer's, tied ones are there once"
        raise _refused(names, f"it gives {len(names.named)} names, the checkpoint has {theirs}", hint)
    if names.groups and [n for n in names.groups if n] != [n for n in lengths if n]:  # empty groups have no names
        reason = f"it gives groups of {_sum(names.groups)} names, the checkpoint's have {_sum(lengths)} parameters"
        raise _refused(names, reason)


def _sum(lengths: Iterable[int]) -> str:
    return " + ".join(map(str, lengths))


def _refuse_order_of_module(checkpoint: Checkpoint, names: ParameterNames) -> None:
    """Refuse the order of a module where it says nothing about that of several groups."""
    groups = [group for group in checkpoint.document.groups if group.parameters]
    if names.of_module and len(groups) > 1:
        lengths = _sum(len(group.parameters) for group in groups)
        reason = (
            f"a module's order is not that of the optimizer's {len(groups)} groups, which have {lengths} parameters"
        )
        hint = "let the factory return the param groups, or give a JSON list with a list of names for each group"
        raise _refused(names, reason, hint)


def _refuse_order_alone(checkpoint: Checkpoint, names: ParameterNames) -> None:
    """Refuse names without groups where nothing tells whether they are in the order of several groups.

    A list is easily made in the model's order, and most trainers sort parameters into groups. Shapes tell, if no two
    groups have a parameter of the same shape.
    """
    lengths = tuple(len(group.parameters) for group in checkpoint.document.groups if group.parameters)
    if names.groups or len(lengths) < 2 or names.paragraphs == lengths:
        return
    given = [named.shape for named in names.named]
    of_groups: list[set[Any]] = []
    for count in lengths:
        of_groups.append(set(given[:count]))
        given = given[count:]
    if None not in set().union(*of_groups) and sum(map(len, of_groups)) == len(set().union(*of_groups)):
        return
    first = shown(names.named[lengths[0]].name)
    reason = (
        f"it does not say which names are of which of the checkpoint's {len(lengths)} param groups, which have "
        f"{_sum(lengths)} parameters: in this order the second group would begin with '{first}'"
    )
    hint = "put an empty line between groups, or give a JSON list with a list of names for each group"
    raise _refused(names, reason, hint)


def _same_sizes(names: ParameterNames, checkpoint: Checkpoint) -> None:
    """Refuse shapes that are given for parameters whose statistics have other numbers of elements."""
    for issue in contradictions(checkpoint):
        raise _refused(names, f"the shapes that it gives are not those of the checkpoint: {issue.where}: {issue.what}")


def _by_own_name(checkpoint: Checkpoint, names: ParameterNames) -> dict[str, NamedParameter]:
    """Find what is given for each of the checkpoint's own names, which must be the same."""
    lower = bool(checkpoint.document.source.get("lower_case"))
    own = [param.name for param in checkpoint.document.parameters]
    known = dict(zip(canonical_names(own), own, strict=True))
    given: dict[str, NamedParameter] = {}
    for named, short in zip(names.named, canonical_names([named.name for named in names.named]), strict=True):
        key, short = (named.name.lower(), short.lower()) if lower else (named.name, short)
        given[key if key in own else known.get(short, key)] = named
    missing = next((name for name in own if name not in given), None)
    if missing is not None or len(given) < len(own):
        other = next((named.name for key, named in given.items() if key not in own), "")
        reason = f"it does not have '{shown(missing or '')}', a parameter's name in the checkpoint"
        raise _refused(names, reason + (f", but '{shown(other)}'" if other else ""))
    ordered = checkpoint.document.source.get("ordered") is not False and not names.of_module
    if ordered and [given[name].name for name in own] != [named.name for named in names.named]:
        place = next(i for i, (a, b) in enumerate(zip(own, names.named, strict=True)) if given[a] is not b)
        first, second = shown(own[place]), shown(names.named[place].name)
        raise _refused(names, f"parameter {place} is '{first}' in the checkpoint and '{second}' there")
    return given


def _renamed(names: ParameterNames, param: Parameter, named: NamedParameter) -> Parameter:
    if None not in (param.shape, named.shape) and param.shape != named.shape:
        reason = f"it gives '{shown(named.name)}' of shape {_list(named.shape)} for parameter '{shown(param.name)}'"
        hint = "the order is that of the optimizer's groups, one after the other"
        raise _refused(names, f"{reason}, which has {_list(param.shape)} in the checkpoint", hint)
    shape = named.shape if param.shape is None else param.shape
    return replace(rename_parameter(param, named.name), shape=shape, dtype=param.dtype or named.dtype)


def _list(shape: tuple[int, ...] | None) -> str:
    return str(list(shape or ()))
