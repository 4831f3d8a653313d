"""Files of pytorch_optimizer: CAME, Adafactor, Lion and AdaLOMO. Its groups count the steps. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.formats import tables
from optstate.checkpoint.formats.came_pytorch import SLOTS as CAME
from optstate.checkpoint.formats.lion_pytorch import MOMENTUM
from optstate.checkpoint.formats.lomo_optim import read_by_name
from optstate.checkpoint.formats.parameter_reader import Meaning, hyper
from optstate.checkpoint.formats.state_dict import StateDict
from optstate.checkpoint.formats.tables import Kept, Layout
from optstate.other_libraries import libraries

__all__ = ["read"]

BOUND = {"exp_avg_sq_hat": Kept(Meaning(signed=False), "exp_avg_sq_hat")}
ADAFACTOR = {
    "exp_avg": Kept(Meaning("update", beta=hyper("betas", 0)), "exp_avg"),
    "exp_avg_sq": Kept(Meaning("square", signed=False), "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"),
}

LAYOUTS = (
    Layout("AdaFactor", libraries.PO_ADAFACTOR, ADAFACTOR | BOUND, step="step", others=frozenset({"RMS"})),
    Layout("CAME", libraries.PO_CAME, CAME | BOUND, step="step", others=frozenset({"RMS"})),
    Layout(
        "Lion",
        libraries.PO_LION,
        {"exp_avg": Kept(MOMENTUM, "exp_avg")},
        step="step",
        others=frozenset({"exp_grad_adanorm"}),
    ),
)


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of pytorch_optimizer; None if it is not a layout of its that is known."""
    if {"num_steps", "exp_avg_sq_row", "exp_avg_sq_col"} <= found.rest.keys():
        return read_by_name(found, found.rest, "num_steps", "pytorch_optimizer", "AdaLOMO")
    layout = tables.matching(found, LAYOUTS)
    return None if layout is None else tables.read(found, layout, "pytorch_optimizer", "pytorch_optimizer")
