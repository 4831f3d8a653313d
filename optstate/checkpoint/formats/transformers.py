"""Files of transformers' Adafactor and of the AdamW it had. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.formats import tables
from optstate.checkpoint.formats.parameter_reader import Meaning, hyper
from optstate.checkpoint.formats.state_dict import StateDict
from optstate.checkpoint.formats.tables import Kept, Layout
from optstate.checkpoint.formats.torch_optim import ADAM
from optstate.other_libraries import libraries

__all__ = ["ADAFACTOR", "read"]


ADAFACTOR = Layout(
    "Adafactor",
    libraries.HF_ADAFACTOR,
    {
        "exp_avg": Kept(Meaning("update", beta=hyper("beta1")), "exp_avg"),
        "exp_avg_sq": Kept(Meaning("square", signed=False), "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"),
    },
    others=frozenset({"RMS"}),
)

LAYOUTS = (
    ADAFACTOR,
    Layout("AdamW", libraries.OLD_ADAMW, ADAM),
)


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of one of transformers' optimizers; None if it is none of them."""
    layout = tables.matching(found, LAYOUTS)
    return None if layout is None else tables.read(found, layout, "transformers", "transformers")
