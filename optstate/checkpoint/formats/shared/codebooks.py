"""Maps of codes in files: checked, and which of them are our own. Imports no torch."""

from __future__ import annotations

import hashlib
import math
import struct
from itertools import pairwise

from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.shared.state_dict import NotPlainError, small_numbers

__all__ = ["KNOWN", "Codebooks", "codebook_id"]

KNOWN = {
    "e732639a65f497b4": "dynamic8_signed",
    "305f002cc11278fb": "dynamic8_unsigned",
    "721d11e3711326d4": "dynamic4_signed",
    "0aeb670b8c9b6b0f": "linear4",
}
"""The first digits of the SHA-256 of the maps that stores use, and their names."""


def codebook_id(values: tuple[float, ...]) -> str:
    """Return the id of `optstate.kernels.Codebook` with these values in fp32: "map:<hash>" for an unknown one."""
    digits = hashlib.sha256(struct.pack(f"<{len(values)}f", *values)).hexdigest()[:16]
    return f"{KNOWN.get(digits, 'map')}:{digits}"


class Codebooks:
    """The maps of one file, each once."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[float, ...]] = {}
        self._read: dict[tuple[str, int], str] = {}

    def add(self, stored: Stored, count: int) -> str:
        """Return the id of a map that must have `count` numbers.

        Raises:
            NotPlainError: if it is not one of `count` ascending numbers.
        """
        place = (stored.path, stored.start)
        if stored.elements != count:
            raise NotPlainError(f"has {stored.elements} numbers: the map of {count} codes has {count}")
        if place not in self._read:
            values = tuple(map(float, small_numbers(stored)))
            odd = next((value for value in values if not math.isfinite(value)), None)
            if odd is not None:
                raise NotPlainError(f"holds {odd}: a map has finite numbers")
            if any(a > b for a, b in pairwise(values)):
                place_of = next(i for i, (a, b) in enumerate(pairwise(values)) if a > b)
                a, b = values[place_of : place_of + 2]
                raise NotPlainError(f"is not ascending: {a:.6g} comes before {b:.6g} at {place_of}")
            ident = codebook_id(values)
            self._read[place], self.values[ident] = ident, values
        return self._read[place]
