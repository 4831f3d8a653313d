"""Which parameters of two checkpoints belong together, and what is said of them differently. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Group, Parameter, TensorValue
from optstate.checkpoint.document.rules import reasons
from optstate.text import shown

__all__ = ["Finding", "Matches", "find_disagreements", "match_parameters"]

MOST_NAMES = 3
"""Names listed before a count."""

ROUNDING = 2.0**-24
"""Relative error of a number kept as fp32."""

Pair = tuple[Parameter, Parameter]


@dataclass(frozen=True)
class Finding:
    """Something that is said on one side, and otherwise on the other."""

    where: str
    a: str
    b: str


@dataclass(frozen=True)
class Matches:
    """The parameters of two checkpoints that belong together, and what to say of those that do not."""

    pairs: tuple[Pair, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def match_parameters(a: Checkpoint, b: Checkpoint) -> Matches:
    """Parameters matched by name, or by place if only one side has names."""
    if a.named != b.named:
        return _matched_by_place(a.document.parameters, b.document.parameters)
    others = {param.name: param for param in b.document.parameters}
    pairs = [(param, others[param.name]) for param in a.document.parameters if param.name in others]
    found = {param.name for param, _ in pairs}
    only_a = [param.name for param in a.document.parameters if param.name not in found]
    only_b = [name for name in others if name not in found]
    findings = [Finding("parameters on one side only", _listed(only_a), _listed(only_b))] if only_a or only_b else []
    return Matches(tuple(pairs), tuple(findings), ())


def _matched_by_place(a: Sequence[Parameter], b: Sequence[Parameter]) -> Matches:
    findings = [Finding("parameters", str(len(a)), str(len(b)))] if len(a) != len(b) else []
    note = "one side has no names: parameters are matched by their places"
    return Matches(tuple(zip(a, b, strict=False)), tuple(findings), (note,))


def _listed(names: Collection[str]) -> str:
    listed = ", ".join(shown(name) for name in list(names)[:MOST_NAMES])
    return (f"{listed} and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else listed) or "-"


def find_disagreements(a: Checkpoint, b: Checkpoint, pairs: Sequence[Pair]) -> tuple[list[Finding], list[str]]:
    """Find what is said differently of matched parameters and their groups, and notes on what only one side says.

    What only one side says of two files of the same kind is a difference; tools differ in what they write down.
    """
    findings = [
        *_of_parameters(pairs, "shape", lambda param: param.shape),
        *_of_parameters(pairs, "dtype", lambda param: param.dtype or None),
        *_of_parameters(pairs, "step", lambda param: param.step),
        *_of_parameters(pairs, "extra", lambda param: param.extra or None),
    ]
    lone, notes = Counter[tuple[str, str]](), []
    if len(a.document.groups) != len(b.document.groups):
        findings.append(Finding("groups", str(len(a.document.groups)), str(len(b.document.groups))))
    for g, h in dict.fromkeys((p.group, q.group) for p, q in pairs):
        where = f"group {g}" if g == h else f"group {g}, {h}"
        for key, left, right in _hyper(a.document.groups[g], b.document.groups[h]):
            if a.kind == b.kind or ABSENT not in (left, right):
                findings.append(Finding(f"{where}: {shown(key)}", _text(left), _text(right)))
            else:
                lone[key, "first" if right is ABSENT else "second"] += 1
    for side in ("first", "second"):
        if keys := sorted(key for key, which in lone if which == side):
            notes.append(f"hyper-parameters on the {side} side only: {', '.join(map(shown, keys))}")
    if sum((p.step is None) != (q.step is None) for p, q in pairs):
        notes.append("one side does not count the steps of every parameter")
    findings += _of_rules(a, b)
    if a.kind == b.kind and not _same(a.document.clip_grad_norm, b.document.clip_grad_norm):
        findings.append(Finding("clip_grad_norm", str(a.document.clip_grad_norm), str(b.document.clip_grad_norm)))
    return findings, notes


def _of_rules(a: Checkpoint, b: Checkpoint) -> Iterator[Finding]:
    """Find where one side follows a rule that none of our recipes does, and the other does not.

    Groups of different tools need not have the same keys.
    """
    left, right = reasons(a.document), reasons(b.document)
    if left != right and a.kind != b.kind:
        yield Finding("rule", _clauses(left, a), _clauses(right, b))


def _clauses(why: list[str], checkpoint: Checkpoint) -> str:
    return "; ".join(why) or checkpoint.document.recipe or "-"


def _of_parameters(pairs: Sequence[Pair], what: str, read: Callable[[Parameter], Any]) -> Iterator[Finding]:
    """Where both sides say something of a parameter and it differs: parameters with the same answers together."""
    members: dict[tuple[str, str], list[str]] = {}
    for p, q in pairs:
        left, right = read(p), read(q)
        if left is not None and right is not None and not _same(left, right):
            members.setdefault((_text(left), _text(right)), []).append(p.name)
    for (left, right), names in members.items():
        yield Finding(f"{what} of {_listed(names)}", left, right)


ABSENT = object()


def _hyper(a: Group, b: Group) -> Iterator[tuple[str, Any, Any]]:
    """Hyper-parameters, and what groups declare, that differ."""
    left, right = _declared(a), _declared(b)
    for key in dict.fromkeys((*left, *right)):
        mine, theirs = left.get(key, ABSENT), right.get(key, ABSENT)
        if mine is ABSENT or theirs is ABSENT or not _same(mine, theirs):
            yield key, mine, theirs


def _declared(group: Group) -> dict[str, Any]:
    declared = {"role": group.role or None, "head_size": group.head_size}
    return group.hyper | {key: value for key, value in declared.items() if value is not None}


def _same(a: Any, b: Any) -> bool:
    """Whether two values mean the same: a list is as good as a tuple, a tensor of one number as good as the number."""
    fp32 = any(isinstance(value, TensorValue) and value.dtype == "float32" for value in (a, b))
    a, b = _plain(a), _plain(b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b)) or (fp32 and abs(a - b) <= ROUNDING * abs(a))
    return bool(a == b)


def _plain(value: Any) -> Any:
    if isinstance(value, TensorValue):
        return value.values[0] if value.shape == () else list(value.values)
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    if value is ABSENT:
        return "-"
    plain = _plain(value)
    return shown(plain if isinstance(plain, str) else repr(plain))
