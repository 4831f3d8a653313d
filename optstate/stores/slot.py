"""What a transform keeps of a parameter, and what a statistic can be of."""

from __future__ import annotations

from dataclasses import dataclass

from optstate.stores.base import Store

__all__ = ["MEANINGS", "Slot"]


@dataclass(frozen=True)
class Slot:
    """One statistic that a transform keeps.

    signed: whether it can be negative; second moments cannot.
    smallest_weight: the least `1 - beta` its moving average ever uses; a format with few mantissa bits rounds
        steps of a small weight away.
    of: what is averaged or summed, in the words of `MEANINGS`; "" for anything else.
    beta: set for an average that began at zero and gives the past this weight at every step: after t steps it is
        `1 - beta**t` times the average proper, whether or not its transform corrects for that.
    """

    store: Store
    signed: bool = True
    smallest_weight: float = 1.0
    of: str = ""
    beta: float | None = None

    @property
    def of_squares(self) -> bool:
        """Whether squares of the update go into it, so that a gradient must be refused whose squares overflow."""
        return self.of in ("square", "square_sum")


MEANINGS = {
    "gradient": "average of gradients",
    "update": "average of updates",
    "update_sum": "decaying sum of updates",
    "square": "average of squared gradients",
    "square_sum": "sum of squared gradients",
    "distance": "average of squared distances of updates from their average",
}
"""What a statistic can be, so that state can go from one recipe to another that keeps the same."""
