"""State of torch-SM3, read only: one accumulator per dimension. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.formats.shared.axis_maxima import is_sm3, read_sm3
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.other_libraries import libraries

__all__ = ["FORMAT"]

NAME = "torch-SM3"


def read_torch_sm3(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return a checkpoint of torch-SM3, which has no `foreach` in its groups; None if it is not its layout."""
    return read_sm3(found, NAME) if is_sm3(found) and "foreach" not in found.keys else None


FORMAT = Format(name=NAME, read=read_torch_sm3, rules=(libraries.SM3,))
