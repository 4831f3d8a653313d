"""Pause Python's collector of cyclic garbage while very many objects are made that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["paused"]


@contextmanager
def paused() -> Iterator[None]:
    """Pause the collector of cyclic garbage, and count the objects made meanwhile as old afterwards.

    This is for imports, and for headers of very many tensors. Torch and transformers make half a million objects, all
    of them to stay, and the collector goes through these again and again while they come, which takes a third of the
    time. Old objects are gone through only together with all others. A collector that is off already stays off.
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
