"""Python's collector of cyclic garbage, kept from searching what is not garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["paused"]


@contextmanager
def paused() -> Iterator[None]:
    """Inside, garbage that refers to itself is not looked for; afterwards what was made inside counts as old.

    For imports: torch and transformers make half a million objects, all of them to stay, and the collector goes through
    these again and again while they come, which takes a third of the time. What is old is gone through only with
    everything else, not at once. A collector that is off already stays off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else the program's own frozen objects would thaw
            gc.freeze()
            gc.unfreeze()  # into the oldest generation, where they can be found and collected
        gc.enable()
