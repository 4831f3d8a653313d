"""How one statistic is kept between steps."""

from optstate.stores.base import Fields, Partial, Requests, Slot, Store
from optstate.stores.factored import Factored
from optstate.stores.full import Full
from optstate.stores.guard import DeferredFlags, Guard, NonFiniteGradientError
from optstate.stores.statistic import Statistic

__all__ = [
    "DeferredFlags",
    "Factored",
    "Fields",
    "Full",
    "Guard",
    "NonFiniteGradientError",
    "Partial",
    "Requests",
    "Slot",
    "Statistic",
    "Store",
]
