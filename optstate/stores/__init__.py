"""How one statistic is kept between steps."""

from optstate.stores.axes import AxisMax
from optstate.stores.base import Fields, Shape, Statistic, Store
from optstate.stores.block_codes import Block4, Block8, Float8
from optstate.stores.factored import Factored
from optstate.stores.full import Full
from optstate.stores.grouped import Grouped
from optstate.stores.guard import DeferredFlags, Guard, NonFiniteGradientError
from optstate.stores.moved_statistic import MovedStatistic
from optstate.stores.requests import Largest, Partial, Requests, own_totals, run_alone, together
from optstate.stores.slot import MEANINGS, Slot

__all__ = [
    "MEANINGS",
    "AxisMax",
    "Block4",
    "Block8",
    "DeferredFlags",
    "Factored",
    "Fields",
    "Float8",
    "Full",
    "Grouped",
    "Guard",
    "Largest",
    "MovedStatistic",
    "NonFiniteGradientError",
    "Partial",
    "Requests",
    "Shape",
    "Slot",
    "Statistic",
    "Store",
    "own_totals",
    "run_alone",
    "together",
]
