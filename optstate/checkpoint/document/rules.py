"""The rule that another tool's state belongs to: where it is not the one of a recipe of ours, and why. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from optstate.checkpoint.document.document import Document, Group, TensorValue
from optstate.checkpoint.files.issues import Issue
from optstate.other_libraries import Departure, OtherRule, departures, find_rule, followed, strays
from optstate.text import shown

__all__ = [
    "base_recipe",
    "doubts",
    "follows_recipe",
    "is_known_rule",
    "is_own",
    "library_of",
    "other_chains",
    "plain_hyper",
    "reasons",
    "rule_issues",
    "rule_notes",
    "stray_keys",
]

OWN = ("", "optstate-state_dict")
"""The kinds of state whose rule is a chain of ours."""

UNKNOWN = "unknown"


def library_of(document: Document) -> str:
    """Whose hyper-parameters a document has, "" for our own; folders of training stacks hold those of a library."""
    source = document.source
    return str(source.get("layout") or source.get("kind") or "")


def other_rule(document: Document) -> OtherRule | None:
    """Return the table's entry for the class whose state it is; None for our own, and for classes that nobody knows."""
    return find_rule(library_of(document), str(document.source.get("optimizer", "")))


def base_recipe(document: Document) -> str:
    """Return the recipe of the same rule while all switches are at rest, "" for none; the document's own first."""
    rule = other_rule(document)
    return document.recipe or (rule.recipe if rule is not None else "")


def plain_hyper(group: Group) -> dict[str, Any]:
    """Return a group's hyper-parameters, tensors of one number as that number."""
    return {
        key: value.values[0] if isinstance(value, TensorValue) and len(value.values) == 1 else value
        for key, value in group.hyper.items()
    }


def is_own(document: Document) -> bool:
    """Whether it is the state of an optimizer of ours, whose rule is a chain."""
    return library_of(document) in OWN


def _departures(document: Document) -> list[Departure]:
    rule = other_rule(document)
    if is_own(document) or library_of(document) == UNKNOWN or (rule is not None and not rule.recipe):
        return []  # what is no recipe's rule anyway needs no list of flags
    return departures(rule, [plain_hyper(group) for group in document.groups])


def _marks(document: Document) -> list[str]:
    """Return what the state of parameters tells of the rule, beside their groups."""
    rule = other_rule(document)
    found = dict.fromkeys(key for param in document.parameters for key in param.extra)
    return [f"parameters keep {key}: {rule.marks[key]}" for key in found if rule is not None and key in rule.marks]


def follows_recipe(document: Document) -> bool:
    """Whether all groups do what the recipe does that is named after their class."""
    return not _departures(document) and not _marks(document)


def other_chains(document: Document, place: int) -> tuple[bool, set[str]]:
    """Return what the group at `place` follows: whether the recipe, and which chains of ours besides, in words."""
    if is_own(document) or not is_known_rule(document) or _marks(document):
        return False, set()
    return followed(other_rule(document), plain_hyper(document.groups[place]))


def is_known_rule(document: Document) -> bool:
    """Whether it is said what a step of this state does: by chains of ours, or by a class that is known."""
    return is_own(document) or library_of(document) != UNKNOWN


def reasons(document: Document, place: int | None = None) -> list[str]:
    """Why the rule is none that a recipe of ours follows, clause by clause; of one group, or of all. [] for our own.

    What can be done about it follows in brackets.
    """
    if is_own(document):
        return []
    if not is_known_rule(document):
        return ["the file is of an optimizer that is not known here"]
    found = [_advised(d) for d in _departures(document) if place in (None, d.group)]
    rule = other_rule(document)
    if not document.recipe and (rule is None or not rule.recipe):
        name = str(document.source.get("optimizer", "")) or UNKNOWN
        why = f": {rule.why}" if rule is not None else ", whose rule is not known here"
        found.append(f"the file is of the optimizer {shown(name)} ({shown(library_of(document))}){why}")
    return [*found, *_marks(document)]


def _advised(departure: Departure) -> str:
    return f"{shown(str(departure))}" + (f" ({departure.advice})" if departure.advice else "")


def stray_keys(document: Document) -> list[str]:
    """Hyper-parameters that nobody knows, which are carried along."""
    rule = other_rule(document)
    if rule is None or not rule.recipe:
        return []
    return strays(rule, [plain_hyper(group) for group in document.groups])


def rule_notes(document: Document) -> list[str]:
    """Return what a person should know of the rule of another tool's file."""
    found = [f"{shown(str(departure))}; no recipe does that" for departure in _departures(document)]
    found += [f"{mark}; no recipe does that" for mark in _marks(document)]
    if keys := stray_keys(document):
        found.append(f"hyper-parameters that are not known here are carried along: {', '.join(map(shown, keys))}")
    return found


def doubts(document: Document) -> list[str]:
    """Return what the file does not tell of its rule, and what is assumed."""
    rule, decaying = other_rule(document), [group for group in document.groups if not _no_decay(group)]
    if rule is None or not decaying:
        return []
    coupled = rule.switches.get("decoupled_weight_decay")
    if coupled is not None and coupled.absent and any("decoupled_weight_decay" not in g.hyper for g in decaying):
        return ["the file does not say whether weight decay is decoupled: it is taken for decoupled"]
    return [f"the file does not say {rule.untold}: it is taken for not"] if rule.untold else []


def _no_decay(group: Group) -> bool:
    return bool(plain_hyper(group).get("weight_decay", 0) == 0)


def rule_issues(document: Document) -> Iterator[Issue]:
    """Warnings of `check`: the file is sound, and going on from it with one of our recipes changes the rule."""
    for note in rule_notes(document):
        yield Issue("warning", "param groups", note)
