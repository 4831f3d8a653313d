"""A document as JSON: written in one form, and read back with every part checked. Imports no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, cast

from optstate.checkpoint.document.document import (
    DEEPEST,
    FORMAT_VERSION,
    MOST_VALUES,
    Document,
    DocumentError,
    Group,
    Parameter,
    SlotRecord,
    TensorValue,
    tensor_key,
)
from optstate.checkpoint.files.dtypes import MAX_COUNT, MOST_DIMENSIONS
from optstate.checkpoint.files.strict_json import NotJSONError, parse_python_json

__all__ = ["from_json", "to_json"]


# --- writing ------------------------------------------------------------------------------------------------------


def to_json(document: Document) -> str:
    """Return canonical JSON: equal documents give equal text.

    Raises:
        DocumentError: for a hyper-parameter that has no exact form in it.
    """
    tree = {
        "format_version": document.format_version,
        "recipe": document.recipe,
        "groups": [_group_tree(group, f"groups[{i}]") for i, group in enumerate(document.groups)],
        "parameters": [_parameter_tree(param) for param in document.parameters],
        "clip_grad_norm": _encoded(document.clip_grad_norm, "clip_grad_norm"),
        "source": _encoded(document.source, "source"),
        "history": [_encoded(entry, f"history[{i}]") for i, entry in enumerate(document.history)],
    }
    optional = {
        "codebooks": {key: list(values) for key, values in document.codebooks.items()},
        "extra": _encoded(document.extra, "extra"),
    }
    tree |= {key: value for key, value in optional.items() if value}
    return json.dumps(tree, sort_keys=True, allow_nan=False, separators=(",", ":"))


def _group_tree(group: Group, place: str) -> dict[str, Any]:
    tree = {"hyper": _encoded(group.hyper, f"{place}.hyper"), "parameters": list(group.parameters)}
    optional = {"role": group.role, "head_size": group.head_size}
    return tree | {key: value for key, value in optional.items() if value}


def _parameter_tree(param: Parameter) -> dict[str, Any]:
    tree = {
        "name": param.name,
        "shape": None if param.shape is None else list(param.shape),
        "dtype": param.dtype,
        "group": param.group,
        "step": param.step,
        "chain": param.chain,
        "weights": param.weights,
        "slots": {name: _slot_tree(slot) for name, slot in param.slots.items()},
    }
    optional = {"tied": list(param.tied), "extra": _encoded(param.extra, f"{param.name}.extra")}
    return tree | {key: value for key, value in optional.items() if value}


def _slot_tree(slot: SlotRecord) -> dict[str, Any]:
    tree = {"store": slot.store, "signed": slot.signed, "fields": slot.fields}
    optional = {"codebook": slot.codebook, "block": slot.block, "of": slot.of, "within": slot.within}
    tree |= {key: value for key, value in optional.items() if value}
    known = {"beta": slot.beta, "shape": None if slot.shape is None else list(slot.shape)}
    return tree | {key: value for key, value in known.items() if value is not None}


def _encoded(value: Any, place: str, depth: int = 0) -> Any:
    """JSON that reads back as the same value: what JSON lacks becomes an object with one key that starts with `$`."""
    if depth > DEEPEST:
        raise DocumentError(f"{place[:60]}... is nested too deeply")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, TensorValue):
        if len(value.values) > MOST_VALUES:
            raise DocumentError(f"{place} is a tensor of {len(value.values)} numbers: at most {MOST_VALUES} are saved")
        values = [_encoded(v, place) for v in value.values]
        return {"$tensor": {"dtype": value.dtype, "shape": list(value.shape), "values": values}}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise DocumentError(f"{place} has the key {key!r}, which cannot be saved: use strings, none with '$'")
        return {key: _encoded(value[key], f"{place}.{key}", depth + 1) for key in value}
    if isinstance(value, tuple | list):
        items = [_encoded(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if number == value or math.isnan(number):
            return number if math.isfinite(number) else {"$float": str(number)}
    raise DocumentError(
        f"{place} is a {type(value).__name__}, {value!r}, which cannot be saved: use numbers, strings, tuples, lists, "
        "dicts or small tensors"
    )


# --- reading ------------------------------------------------------------------------------------------------------


def from_json(text: str) -> Document:
    """Read a document, every part of it checked; unknown keys are ignored.

    Raises:
        DocumentError: naming the first place that is wrong, or the version if it is a later one.
    """
    try:
        return _checked(_Node(_parsed(text), ""))
    except RecursionError:
        raise DocumentError("it is nested too deeply") from None


def _checked(tree: _Node) -> Document:
    version = tree.at("format_version", int)
    if version.value > FORMAT_VERSION:
        raise DocumentError(
            f"it has format version {version.value}, this optstate reads up to {FORMAT_VERSION}: upgrade optstate"
        )
    if version.value < 1:
        raise version.wrong("must be at least 1")
    clip = _decoded(tree.optional("clip_grad_norm", None))
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float)):
        raise DocumentError(f"clip_grad_norm is {clip!r}: it must be a number or null")
    document = Document(
        recipe=tree.at("recipe", str).value,
        groups=tuple(_group_of(node) for node in tree.at("groups", list).items()),
        parameters=tuple(_parameter_of(node) for node in tree.at("parameters", list).items()),
        clip_grad_norm=clip,
        source=cast("dict[str, Any]", _decoded(tree.optional("source", {}, dict))),
        history=tuple(_decoded(node) for node in tree.optional("history", [], list).items(dict)),
        codebooks={key: _codebook_of(node) for key, node in tree.optional("codebooks", {}, dict).entries(list).items()},
        extra=cast("dict[str, Any]", _decoded(tree.optional("extra", {}, dict))),
        format_version=version.value,
    )
    _check_together(document)
    return document


class _Node:
    """A value in the tree and where it is, for messages."""

    def __init__(self, value: Any, place: str) -> None:
        self.value, self.place = value, place

    def wrong(self, what: str) -> DocumentError:
        shown = self.value if isinstance(self.value, int | float | str | None) else type(self.value).__name__
        return DocumentError(f"{self.place or 'the document'} is {_shortened(shown)}: it {what}")

    def of(self, kind: type) -> _Node:
        if not isinstance(self.value, kind) or (kind is int and isinstance(self.value, bool)):
            names = {dict: "an object", list: "a list", str: "a string", int: "a whole number", bool: "true or false"}
            raise self.wrong(f"must be {names[kind]}")
        return self

    def at(self, key: str, kind: type) -> _Node:
        self.of(dict)
        place = f"{self.place}.{key}" if self.place else key
        if key not in self.value:
            raise DocumentError(f"{place} is missing")
        return _Node(self.value[key], place).of(kind)

    def optional(self, key: str, default: Any, kind: type | None = None) -> _Node:
        place = f"{self.place}.{key}" if self.place else key
        node = _Node(self.of(dict).value.get(key, default), place)
        return node if kind is None else node.of(kind)

    def items(self, kind: type = dict) -> list[_Node]:
        return [_Node(item, f"{self.place}[{i}]").of(kind) for i, item in enumerate(self.value)]

    def entries(self, kind: type) -> dict[str, _Node]:
        return {key: _Node(item, f"{self.place}.{key}").of(kind) for key, item in self.of(dict).value.items()}

    def count(self) -> int:
        """Return a whole number from 0 on, within what is counted anywhere."""
        if self.of(int).value < 0:
            raise self.wrong("must not be negative")
        if self.value > MAX_COUNT:
            raise self.wrong(f"must be {MAX_COUNT} at most")
        return cast(int, self.value)

    def counts(self) -> tuple[int, ...]:
        """Return the sizes of a tensor."""
        if len(self.of(list).value) > MOST_DIMENSIONS:
            raise DocumentError(f"{self.place} has {len(self.value)} dimensions: at most {MOST_DIMENSIONS} are read")
        return tuple(item.count() for item in self.items(int))

    def strings(self) -> tuple[str, ...]:
        return tuple(node.value for node in self.items(str))


def _parsed(text: str) -> Any:
    try:
        return parse_python_json(text, _without_repeats, nan=False)
    except NotJSONError as error:
        raise DocumentError(f"it is not JSON: {error}") from None


def _without_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DocumentError(f"the key {key!r} comes twice in one object")
        found[key] = value
    return found


def _group_of(node: _Node) -> Group:
    head_size = node.optional("head_size", None)
    if head_size.value is not None and head_size.count() < 1:
        raise head_size.wrong("must be at least 1")
    return Group(
        hyper=cast("dict[str, Any]", _decoded(node.at("hyper", dict))),
        parameters=node.at("parameters", list).strings(),
        role=node.optional("role", "", str).value,
        head_size=head_size.value,
    )


def _parameter_of(node: _Node) -> Parameter:
    name, step = node.at("name", str), node.optional("step", None)
    slots = {key: _slot_of(item, name.value, key) for key, item in node.at("slots", dict).entries(dict).items()}
    if step.value is not None:
        step.count()
    elif slots and node.at("chain", str).value:
        raise step.wrong("must be a whole number where there is state")
    return Parameter(
        name=name.value,
        shape=_shape_of(node.optional("shape", None)),
        dtype=node.at("dtype", str).value,
        group=node.at("group", int).count(),
        step=step.value,
        chain=node.at("chain", str).value,
        weights=node.at("weights", str).value,
        slots=slots,
        tied=node.optional("tied", [], list).strings(),
        extra=cast("dict[str, Any]", _decoded(node.optional("extra", {}, dict))),
    )


def _slot_of(node: _Node, parameter: str, slot: str) -> SlotRecord:
    if not slot.isidentifier():
        raise DocumentError(f"{node.place}: {slot!r} cannot be the name of a slot")
    fields = {}
    for name, key in node.at("fields", dict).entries(str).items():
        # Keys follow from names. A key that names another tensor would swap statistics of the same shape.
        if key.value != tensor_key(parameter, slot, name):
            raise key.wrong(f"must be {tensor_key(parameter, slot, name)!r}")
        fields[name] = key.value
    return SlotRecord(
        store=node.at("store", str).value,
        signed=node.at("signed", bool).value,
        fields=fields,
        codebook=node.optional("codebook", "", str).value,
        block=node.optional("block", 0, int).count(),
        of=node.optional("of", "", str).value,
        beta=_beta_of(node.optional("beta", None)),
        shape=_shape_of(node.optional("shape", None)),
        within=node.optional("within", "", str).value,
    )


def _shape_of(node: _Node) -> tuple[int, ...] | None:
    return None if node.value is None else node.counts()


def _beta_of(node: _Node) -> float | None:
    if node.value is None:
        return None
    if isinstance(node.value, bool) or not isinstance(node.value, int | float) or not 0 <= node.value < 1:
        raise node.wrong("must be a number from 0 to below 1")
    return float(node.value)


def _codebook_of(node: _Node) -> tuple[float, ...]:
    """16 or 256 ascending numbers."""
    for value in node.value:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DocumentError(f"{node.place} holds {_shortened(value)} among its numbers")
    if len(node.value) not in (16, 256) or any(a > b for a, b in pairwise(node.value)):
        raise DocumentError(f"{node.place} has {len(node.value)} values: it must be 16 or 256 ascending numbers")
    return tuple(map(float, node.value))


def _check_together(document: Document) -> None:
    """Parameters have one name and one group each, group by group in the same order in both lists."""
    if any(a.group > b.group for a, b in pairwise(document.parameters)):
        raise DocumentError("parameters are not in the order of their groups")
    seen: set[str] = set()
    for i, param in enumerate(document.parameters):
        if param.name in seen:
            raise DocumentError(f"parameters[{i}].name: {param.name!r} comes twice")
        seen.add(param.name)
        if param.group >= len(document.groups):
            raise DocumentError(f"parameters[{i}].group is {param.group}: there are {len(document.groups)} groups")
    for g, (group, held) in enumerate(zip(document.groups, document.members, strict=True)):
        members = tuple(param.name for param in held)
        if members != group.parameters:
            odd = sorted(set(members) ^ set(group.parameters))
            what = f"{odd[0]!r} is in one only" if odd else "the order differs"
            raise DocumentError(f"groups[{g}].parameters differs from the parameters that name group {g}: {what}")


def _decoded(node: _Node, depth: int = 0) -> Any:
    value = node.value
    if depth > DEEPEST:
        raise DocumentError(f"{node.place[:60]}... is nested too deeply")
    if isinstance(value, list):
        return [_decoded(_Node(item, f"{node.place}[{i}]"), depth + 1) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    tag = next((key for key in value if key.startswith("$")), None)
    if tag is None:
        return {key: _decoded(_Node(item, f"{node.place}.{key}"), depth + 1) for key, item in value.items()}
    if len(value) > 1 or tag not in ("$tuple", "$float", "$tensor"):
        raise DocumentError(f"{node.place}: {tag!r} is not a kind of value this optstate knows: upgrade optstate")
    if tag == "$tuple":
        return tuple(_decoded(node.at(tag, list), depth))
    if tag == "$float":
        text = node.at(tag, str)
        if text.value not in ("inf", "-inf", "nan"):
            raise text.wrong("must be inf, -inf or nan")
        return float(text.value)
    return _tensor_of(node.at(tag, dict))


def _tensor_of(node: _Node) -> TensorValue:
    shape = node.at("shape", list).counts()
    values = _decoded(node.at("values", list))
    dtype = node.at("dtype", str)
    if not re.fullmatch(r"[a-z0-9_]{1,32}", dtype.value):
        raise dtype.wrong("must be the name of a dtype")
    if len(values) != math.prod(shape) or len(values) > MOST_VALUES:
        raise DocumentError(f"{node.place} has {len(values)} values for shape {shape}, at most {MOST_VALUES} are read")
    for value in values:
        if not isinstance(value, bool | int | float):
            raise DocumentError(f"{node.place} holds a {type(value).__name__} among its numbers")
    return TensorValue(dtype.value, shape, tuple(values))


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
