"""What a statistic must be an average of before a library may read it as its own. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optstate.checkpoint.document.document import WEIGHT, Parameter, SlotRecord
from optstate.checkpoint.formats.tree_writer import Given, LayoutError, number, numbers
from optstate.text import shown

__all__ = ["ADAFACTOR", "ADAM", "CAME", "LION", "RULES", "SGD", "SM3", "Meaning", "check_meanings", "rule_of"]

RULES = {
    "adamw": "adam",
    "adamw8bit": "adam",
    "adamw4bit": "adam",
    "lion": "lion",
    "lion8bit": "lion",
    "sgd": "sgd",
    "sgdm8bit": "sgd",
    "adafactor": "adafactor",
    "adalomo": "adalomo",
    "came": "came",
    "sm3": "sm3",
}
"""The rules that other libraries have, by recipe."""

_RECIPES = {"adam": "adamw"} | {rule: rule for rule in RULES.values() if rule != "adam"}


@dataclass(frozen=True)
class Meaning:
    """What a rule keeps in a slot.

    of: as in `SlotRecord`. beta: key and place of the beta in the group, None where the average did not begin at zero
    or is none. dims: fewest dimensions of parameters that need it. when: a key of the group, if only parameters need it
    whose group has a value there.
    """

    of: str
    beta: tuple[str, int | None] | None = None
    dims: int = 0
    when: str = ""

    def needed(self, param: Parameter, hyper: Mapping[str, Any]) -> bool:
        """Whether a step fails on a parameter with state that has no such statistic."""
        dims = 0 if param.shape is None else len(param.shape)
        return dims >= self.dims and (not self.when or bool(number(hyper.get(self.when))))


ADAM = {
    "exp_avg": Meaning("gradient", ("betas", 0)),
    "exp_avg_sq": Meaning("square", ("betas", 1)),
    "max_exp_avg_sq": Meaning("square_max", when="amsgrad"),
}
LION = {"exp_avg": Meaning("gradient", ("betas", 1))}
SGD = {"momentum_buffer": Meaning("update_sum", when="momentum")}
ADAFACTOR = {"exp_avg_sq": Meaning("square"), "exp_avg": Meaning("update", ("beta1", None), when="beta1")}
CAME = {
    "exp_avg": Meaning("update", ("betas", 0)),
    "exp_avg_sq": Meaning("square", ("betas", 1)),
    "exp_avg_res": Meaning("distance", ("betas", 2), dims=2),
}
SM3 = {"accumulator": Meaning("square_sum"), "exp_avg": Meaning("update", ("momentum", None), when="momentum")}


def rule_of(given: Given, *known: str) -> str:
    """The rule that the document's recipe is, one of those that the layout knows.

    Raises:
        LayoutError: for another.
    """
    recipe = given.document.recipe
    rule = RULES.get(recipe, "")
    if rule not in known:
        named = given.document.source.get("optimizer")
        what = f"the recipe {recipe!r}" if recipe else f"{named}" if named else "a chain without a name"
        fitting = " or ".join(dict.fromkeys(f"--recipe {_RECIPES[name]}" for name in known))
        raise LayoutError(f"the state is of {what}: {given.layout} does not have it; convert with {fitting}")
    return rule


def check_meanings(given: Given, param: Parameter, meanings: Mapping[str, Meaning]) -> None:
    """Raise LayoutError unless a parameter keeps what a rule keeps, and nothing else.

    Two libraries may call different averages by one name: Adam corrects its second moment for beginning at zero when
    it is used, Adafactor's needs no correction. State from this very layout is what it is.
    """
    odd = [slot for slot in param.slots if slot not in meanings and not given.same]
    if odd or WEIGHT in param.slots:
        lost = odd[0] if odd else WEIGHT
        raise LayoutError(
            f"{lost} of '{shown(param.name)}' ({param.slots[lost].store}) has no place in {given.layout}; "
            + ("write a file of optstate's own" if lost == WEIGHT else f"leave it out with --slot {lost}=drop")
        )
    if given.same or not param.has_state:
        return
    hyper = given.document.groups[param.group].hyper
    for slot, meaning in meanings.items():
        if slot in param.slots:
            _check(given, param, slot, param.slots[slot], meaning, hyper)
        elif meaning.needed(param, hyper):
            raise LayoutError(
                f"'{shown(param.name)}' has no {slot}, which {given.layout} needs; convert with --recipe "
                f"{given.document.recipe}"
            )


def _check(
    given: Given, param: Parameter, slot: str, record: SlotRecord, meaning: Meaning, hyper: Mapping[str, Any]
) -> None:
    beta = None if meaning.beta is None else _beta(hyper, *meaning.beta)
    if (record.of, record.beta) == (meaning.of, beta):
        return
    there = f"of={record.of!r}, beta={record.beta}" if record.of else "unknown"
    raise LayoutError(
        f"what {slot} of '{shown(param.name)}' averages is {there}, where {given.layout} has of={meaning.of!r}, "
        f"beta={beta}; convert with --recipe {given.document.recipe}"
    )


def _beta(hyper: Mapping[str, Any], key: str, place: int | None) -> float | None:
    value = numbers(hyper.get(key))
    if place is not None:
        value = value[place] if isinstance(value, tuple | list) and place < len(value) else None
    try:
        return None if value is None else float(value)
    except OverflowError:
        return None  # an integer that is no weight of anything
