"""How one statistic is kept between steps.

To write a store: subclass `Store` as a frozen dataclass with `fields` (names, shapes and dtypes of what is kept, as
`FieldSpec`s of a parameter), `read` (tensors to numbers) and `encode` (numbers to tensors, with `Noise` for random
rounding). Where elements are not kept independently, set `elementwise = False`, and write `encode_part`, which yields
what it needs of the whole parameter (`Partial` sums, `Largest` values). Where elements are kept in blocks, give
`alignment` and `FieldSpec.per`, and let `resolve` return another store where `ParamSpec.keeps_together` says that
devices would cut a block. A transform declares what it keeps as `Slot`s
and gets a `Statistic` for each. `optstate.testing.check_store` says what is wrong; an entry point of the group
`optstate.stores` lets files name the store. `examples/plugin` is a whole package.
"""

from optstate.kernels import Noise
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores.axes import AxisMax
from optstate.stores.base import Fields, Shape, Statistic, Store
from optstate.stores.block_codes import Block4, Block8, Float8
from optstate.stores.factored import Factored
from optstate.stores.full import Full
from optstate.stores.grouped import Grouped
from optstate.stores.guard import DeferredFlags, Guard, NonFiniteGradientError, refusal_of
from optstate.stores.low_rank import LowRank
from optstate.stores.moved_statistic import MovedStatistic
from optstate.stores.requests import Largest, Partial, Requests, Whole, own_totals, run_alone, together
from optstate.stores.sign_rank1 import SignRank1
from optstate.stores.slot import MEANINGS, Slot

__all__ = [
    "MEANINGS",
    "AxisMax",
    "Block4",
    "Block8",
    "DeferredFlags",
    "Factored",
    "FieldSpec",
    "Fields",
    "Float8",
    "Full",
    "Grouped",
    "Guard",
    "Largest",
    "LowRank",
    "MovedStatistic",
    "Noise",
    "NonFiniteGradientError",
    "ParamSpec",
    "Partial",
    "Requests",
    "Shape",
    "SignRank1",
    "Slot",
    "Statistic",
    "Store",
    "Whole",
    "own_totals",
    "refusal_of",
    "run_alone",
    "together",
]
