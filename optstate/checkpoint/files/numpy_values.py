"""Numbers of NumPy in a pickle, as Python's own. Imports neither NumPy nor torch."""

from __future__ import annotations

import struct
from typing import Any

from optstate.checkpoint.files.pickle_objects import Object, Stranger

__all__ = ["element", "scalar"]

DTYPE = "numpy.dtype"
ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")

_FORMS = {
    "b1": "?",
    "i1": "b",
    "u1": "B",
    "i2": "h",
    "u2": "H",
    "i4": "i",
    "u4": "I",
    "i8": "q",
    "u8": "Q",
    "f2": "e",
    "f4": "f",
    "f8": "d",
}
"""NumPy's codes of kind and size, and those of `struct`."""


def scalar(dtype: Any, data: Any = b"") -> Any:
    """A number of NumPy, as `numpy.float64(0.1)`, by its dtype and bytes; of other dtypes, as dates, a `Stranger`."""
    number = _number(dtype, data)
    return Stranger("numpy.generic", (dtype, data)) if number is None else number


def element(value: Any) -> int | float | bool | None:
    """The only element of a NumPy array that has one; None for anything else."""
    if not isinstance(value, Object) or value.name not in ARRAYS or not isinstance(value.state, tuple):
        return None
    return _number(value.state[2], value.state[4]) if len(value.state) == 5 else None


def _number(dtype: Any, data: Any) -> int | float | bool | None:
    if not isinstance(dtype, Object) or dtype.name != DTYPE or not dtype.args or not isinstance(data, bytes):
        return None
    form = _FORMS.get(dtype.args[0]) if isinstance(dtype.args[0], str) else None
    if form is None or len(data) != struct.calcsize(f"<{form}"):
        return None
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "<"
    number: int | float | bool = struct.unpack(f"{'>' if order == '>' else '<'}{form}", data)[0]
    return number
