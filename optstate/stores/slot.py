"""Slots: the declaration of a statistic that a transform keeps, and the meanings that a statistic can have."""

from __future__ import annotations

from dataclasses import dataclass, replace

from optstate.spec import ParamSpec
from optstate.stores.base import Store

__all__ = ["MEANINGS", "Slot"]

TURNED, TURNED_SQUARE = "turned", "turned_square"


@dataclass(frozen=True)
class Slot:
    """The declaration of one statistic that a transform keeps.

    Attributes:
        store: how the statistic is kept.
        signed: whether the statistic can be negative; second moments cannot.
        smallest_weight: the least `1 - beta` that the moving average ever uses; a store with few mantissa bits rounds
            steps of a small weight away.
        of: what is averaged or summed, a key of `MEANINGS`; "" for anything else.
        beta: set for an average that began at zero and gives the past this weight at every step: after t steps the
            average is `1 - beta**t` times the average proper, whether or not its transform corrects for the factor.
        spec: of the tensor that the statistic is of, where that is another one than the parameter: `spec.like(...)`.
    """

    store: Store
    signed: bool = True
    smallest_weight: float = 1.0
    of: str = ""
    beta: float | None = None
    spec: ParamSpec | None = None

    @property
    def of_squares(self) -> bool:
        """Whether the statistic is of squares, so that a gradient must be refused whose squares overflow."""
        return self.of in ("square", "square_sum", TURNED_SQUARE)

    def turned(self, space: ParamSpec) -> Slot:
        """Return the declaration of the same statistic of another tensor, `space`, made of the gradient.

        No other chain may take the statistic for one of the gradient itself.
        """
        of = TURNED_SQUARE if self.of_squares else TURNED
        return replace(self, of=of, beta=None, spec=space if self.spec is None else self.spec)


MEANINGS = {
    "gradient": "average of gradients",
    "update": "average of updates",
    "update_sum": "decaying sum of updates",
    "square": "average of squared gradients",
    "square_sum": "sum of squared gradients",
    "distance": "average of squared distances of updates from their average",
    TURNED: "of another tensor made of the gradient: a projection, or the gradient in another basis",
    TURNED_SQUARE: "squares of another tensor made of the gradient",
}
"""The meanings of statistics; state can go from one recipe to another that keeps a statistic of the same meaning."""
