"""What optimizers' rules keep: the meaning of every statistic, used to read it and to write it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optstate.checkpoint.formats.shared.state_dict import number_of

__all__ = [
    "ADAFACTOR",
    "ADAM",
    "CAME",
    "FIRST",
    "LION",
    "RECIPE_OF_RULE",
    "RULES",
    "SECOND",
    "SGD",
    "SM3",
    "SQUARE",
    "UNKNOWN",
    "Meaning",
    "find_beta",
]

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

RECIPE_OF_RULE = {"adam": "adamw"} | {rule: rule for rule in RULES.values() if rule != "adam"}


def find_beta(group: Mapping[str, Any], key: str, place: int | None = None) -> float | None:
    """Return the weight of the past under a key of a group, at a place in the pair there; None where there is none.

    A weight of the past is from 0 on and less than 1.
    """
    value = group.get(key)
    if place is not None:
        value = value[place] if isinstance(value, list | tuple) and len(value) > place else None
    number = number_of(value)
    return float(number) if number is not None and 0 <= number < 1 else None


@dataclass(frozen=True)
class Meaning:
    """What a statistic is.

    of, signed: as in `SlotRecord`. beta: the key of the weight of the past in the library's group and the place under
    that key, `("betas", 0)` or `("beta1", None)`; None where the average did not begin at zero or is none. dims: the
    fewest dimensions of parameters that need the statistic. when: a key of our recipe's group, if only parameters whose
    group has a value there need the statistic.
    """

    of: str = ""
    signed: bool = True
    beta: tuple[str, int | None] | None = None
    dims: int = 0
    when: str = ""

    def beta_in(self, group: Mapping[str, Any]) -> float | None:
        """Return the weight of the past in a group's hyper-parameters."""
        return None if self.beta is None else find_beta(group, *self.beta)

    def is_needed(self, shape: tuple[int, ...] | None, group: Mapping[str, Any]) -> bool:
        """Whether a step fails on a parameter of this shape that has state and no such statistic."""
        if len(shape or ()) < self.dims:
            return False
        value = group.get(self.when)
        number = number_of(value)
        return not self.when or bool(value if number is None else number)


UNKNOWN = Meaning()
FIRST = Meaning("gradient", beta=("betas", 0))
SECOND = Meaning("square", signed=False, beta=("betas", 1))
SQUARE = Meaning("square", signed=False)
"""An average of squares that needs no correction for beginning at zero, as Adafactor's."""

ADAM = {
    "exp_avg": FIRST,
    "exp_avg_sq": SECOND,
    "max_exp_avg_sq": Meaning("square_max", signed=False, when="amsgrad"),
}
LION = {"exp_avg": Meaning("gradient", beta=("betas", 1))}
SGD = {"momentum_buffer": Meaning("update_sum", when="momentum")}
ADAFACTOR = {"exp_avg": Meaning("update", beta=("beta1", None), when="beta1"), "exp_avg_sq": SQUARE}
CAME = {
    "exp_avg": Meaning("update", beta=("betas", 0)),
    "exp_avg_sq": SECOND,
    "exp_avg_res": Meaning("distance", signed=False, beta=("betas", 2), dims=2),
}
SM3 = {
    "exp_avg": Meaning("update", beta=("momentum", None), when="momentum"),
    "accumulator": Meaning("square_sum", signed=False),
}
