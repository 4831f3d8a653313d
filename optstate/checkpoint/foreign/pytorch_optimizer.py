"""Files of pytorch_optimizer: CAME, Adafactor, Lion and AdaLOMO. Its groups count the steps. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.checkpoint import Checkpoint
from optstate.checkpoint.foreign import layouts
from optstate.checkpoint.foreign.came_pytorch import SLOTS as CAME
from optstate.checkpoint.foreign.drafts import Meaning, hyper
from optstate.checkpoint.foreign.layouts import Groups, Kept, Layout
from optstate.checkpoint.foreign.lion_pytorch import MOMENTUM
from optstate.checkpoint.foreign.lomo_optim import read_by_name
from optstate.checkpoint.foreign.trees import StateDict

__all__ = ["read"]

COMMON = frozenset({"lr", "betas", "weight_decay", "weight_decouple", "fixed_decay"})
BOUND = {"exp_avg_sq_hat": Kept(Meaning(signed=False), "exp_avg_sq_hat")}
ADAFACTOR = {
    "exp_avg": Kept(Meaning("update", beta=hyper("betas", 0)), "exp_avg"),
    "exp_avg_sq": Kept(Meaning("square", signed=False), "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"),
}


def _decays_as_ours(groups: Groups) -> bool:
    return all(group["weight_decouple"] and not group["fixed_decay"] for group in groups)


def _came_recipe(groups: Groups) -> str:
    return "came" if _decays_as_ours(groups) and not any(group["ams_bound"] for group in groups) else ""


def _lion_recipe(groups: Groups) -> str:
    return "lion" if _decays_as_ours(groups) else ""


LAYOUTS = (
    # Decay rate and clipping are not in the file, so nothing says that it is a rule of ours.
    Layout(
        "AdaFactor",
        COMMON | {"eps1", "eps2", "ams_bound", "scale_parameter", "relative_step"},
        ADAFACTOR | BOUND,
        step="step",
        others=frozenset({"RMS"}),
    ),
    Layout(
        "CAME",
        COMMON | {"eps1", "eps2", "ams_bound"},
        CAME | BOUND,
        step="step",
        others=frozenset({"RMS"}),
        recipe=_came_recipe,
        lacks=frozenset({"scale_parameter"}),
    ),
    Layout(
        "Lion",
        COMMON,
        {"exp_avg": Kept(MOMENTUM, "exp_avg")},
        step="step",
        recipe=_lion_recipe,
        lacks=frozenset({"eps", "eps1"}),
    ),
)


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of pytorch_optimizer; None if it is not a layout of its that is known."""
    if {"num_steps", "exp_avg_sq_row", "exp_avg_sq_col"} <= found.rest.keys():
        return read_by_name(found, found.rest, "num_steps", "pytorch_optimizer", "AdaLOMO")
    layout = layouts.matching(found, LAYOUTS)
    return None if layout is None else layouts.read(found, layout, "pytorch_optimizer", "pytorch_optimizer")
