"""Files of lion-pytorch's Lion. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.checkpoint import Checkpoint
from optstate.checkpoint.foreign import layouts
from optstate.checkpoint.foreign.drafts import Meaning, hyper
from optstate.checkpoint.foreign.layouts import Kept, Layout
from optstate.checkpoint.foreign.trees import StateDict
from optstate.others import libraries

__all__ = ["MOMENTUM", "read"]

MOMENTUM = Meaning("gradient", beta=hyper("betas", 1))

LION = Layout("Lion", libraries.LION, {"exp_avg": Kept(MOMENTUM, "exp_avg")})


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of lion-pytorch; None if it is not its layout."""
    return layouts.read(found, LION, "lion-pytorch", "lion-pytorch") if LION.fits(found) else None
