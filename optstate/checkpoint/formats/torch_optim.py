"""State of torch's own optimizers: told apart by hyper-parameters and by what is kept. Imports no torch."""

from __future__ import annotations

import math
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Group
from optstate.checkpoint.formats.shared.adafactor import FP32_EPS, read_adafactor_rule, refuse_if
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.hyper_parameters import NEEDED, translate
from optstate.checkpoint.formats.shared.state_dict import StateDict, tell_adam_from_adamw
from optstate.checkpoint.formats.shared.statistics import ADAM, FIRST, SECOND, SGD, SQUARE, UNKNOWN, Meaning
from optstate.checkpoint.formats.shared.tables import Kept, Layout, by_key, read_table, whole, write_tables
from optstate.checkpoint.formats.shared.tree_writer import LayoutError, Tree, TreeWriter
from optstate.other_libraries import libraries
from optstate.text import shown

__all__ = ["FORMAT"]

NAME = "torch"
MOMENTS = {"exp_avg": FIRST, "exp_avg_sq": SECOND}

# Keys and defaults in the order of each class of torch 2.13.
ADAMW_HYPERS: dict[str, Any] = {
    "lr": NEEDED,
    "betas": NEEDED,
    "eps": NEEDED,
    "weight_decay": NEEDED,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
SGD_HYPERS: dict[str, Any] = {
    "lr": NEEDED,
    "momentum": 0,
    "dampening": 0,
    "weight_decay": NEEDED,
    "nesterov": False,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
}


def _write_sgd_hypers(writer: TreeWriter, place: int, group: Group) -> Tree:
    hyper = writer.common(group)
    if any(param.transforms.has("momentum", "nesterov") for param in writer.members(place)):
        hyper["nesterov"] = True
    return translate(writer, place, hyper, SGD_HYPERS)


def _write_adafactor_hypers(writer: TreeWriter, place: int, group: Group) -> Tree:
    """Return the hyper-parameters of a group as `torch.optim.Adafactor` has them."""
    rule = read_adafactor_rule(writer, place, group)
    if not rule.floor:
        refuse_if(writer, place, rule.relative, "a relative step size")
        scale = "scale_parameter=False, where torch always scales by the parameter's RMS"
        refuse_if(writer, place, not rule.scale, scale)
        decay = f"weight_decay={rule.weight_decay}, scaled by the parameter's RMS, which torch does not do"
        refuse_if(writer, place, rule.weight_decay != 0, decay)
        writer.note("torch's Adafactor takes min(lr, 1 / sqrt(step)) as its learning rate")
    refuse_if(writer, place, rule.beta1 is not None, f"beta1={rule.beta1}")
    return {
        "lr": rule.lr,
        "beta2_decay": rule.decay_rate,
        "eps": (rule.eps if rule.floor else math.sqrt(rule.eps), rule.least_rms),
        "d": rule.clip,
        "weight_decay": rule.weight_decay,
        "foreach": None,
        "maximize": False,
        **rule.own,
    }


ADAMW_LAYOUT = Layout("Adam", libraries.ADAMW, whole(ADAM), step_form="F32", hypers=by_key(ADAMW_HYPERS))
SGD_LAYOUT = Layout("SGD", libraries.SGD, whole(SGD), hypers=_write_sgd_hypers)
ADAFACTOR_LAYOUT = Layout(
    "Adafactor",
    libraries.ADAFACTOR,
    {"exp_avg_sq": Kept(SQUARE, "variance", "row_var", "col_var", squeezed=True)},
    step_form="F32",
    hypers=_write_adafactor_hypers,
)
LAYOUTS = (
    ADAMW_LAYOUT,
    SGD_LAYOUT,
    Layout(
        "RMSprop",
        libraries.RMSPROP,
        whole(
            {
                "square_avg": Meaning("square", signed=False, beta=("alpha", None)),
                "momentum_buffer": Meaning("update_sum"),
                "grad_avg": Meaning("gradient", beta=("alpha", None)),
            }
        ),
    ),
    Layout("Adagrad", libraries.ADAGRAD, whole({"sum": Meaning("square_sum", signed=False)})),
    ADAFACTOR_LAYOUT,
    # Its momentum is an average, `lerp(gradient, 1 - momentum)`, other than SGD's.
    Layout("Muon", libraries.MUON, whole({"momentum_buffer": Meaning("gradient", beta=("momentum", None))})),
    Layout("NAdam", libraries.NADAM, whole(MOMENTS), others=frozenset({"mu_product"})),
    Layout("RAdam", libraries.RADAM, whole(MOMENTS)),
    Layout("SparseAdam", libraries.SPARSE_ADAM, whole(MOMENTS)),
    Layout("Adamax", libraries.ADAMAX, whole({"exp_avg": FIRST, "exp_inf": Meaning(signed=False)})),
    Layout(
        "Adadelta",
        libraries.ADADELTA,
        whole({"square_avg": Meaning("square", signed=False, beta=("rho", None)), "acc_delta": UNKNOWN}),
    ),
    Layout("ASGD", libraries.ASGD, whole({"ax": UNKNOWN}), others=frozenset({"eta", "mu"})),
    Layout("Rprop", libraries.RPROP, whole({"prev": UNKNOWN, "step_size": Meaning(signed=False)})),
)


def read_torch(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return a checkpoint of one of torch's optimizers; None if it is none of them.

    optimizer: "Adam" or "AdamW", which files before torch 2.7 do not tell apart.
    """
    layout = next((layout for layout in LAYOUTS if layout.fits(found)), None)
    if layout is not ADAMW_LAYOUT:
        return None if layout is None else read_table(found, layout, NAME)
    told = {bool(group["decoupled_weight_decay"]) for group in found.groups if "decoupled_weight_decay" in group}
    if told:
        return read_table(found, layout, NAME, optimizer="AdamW" if True in told else "Adam")
    name, notes = tell_adam_from_adamw(found, optimizer, "AdamW")
    return read_table(found, layout, NAME, notes, optimizer=name)


def write_torch(writer: TreeWriter) -> Tree:
    """Return what torch's classes keep: AdamW, SGD and Adafactor of any document, every class of its own files."""
    for param in writer.document.parameters:
        if "exp_avg" in param.slots and not writer.same and writer.document.recipe in ("adafactor", "adalomo"):
            raise LayoutError(
                f"exp_avg of '{shown(param.name)}' has no place in {writer.layout}: its Adafactor keeps no first "
                "moment; convert with --recipe adafactor, which keeps none either"
            )
    by_rule = {
        "adam": ADAMW_LAYOUT,
        "sgd": SGD_LAYOUT,
        "adafactor": ADAFACTOR_LAYOUT,
        "adalomo": ADAFACTOR_LAYOUT,
    }
    return write_tables(writer, LAYOUTS, by_rule)


def words_of_ours(hyper: dict[str, Any], rule: str) -> dict[str, Any]:
    """Return the hyper-parameters in our words; torch's Adafactor has names of its own."""
    if rule != "adafactor" or not {"beta2_decay", "d"} <= hyper.keys():
        return hyper
    eps = hyper.get("eps")
    if isinstance(eps, tuple | list) and len(eps) == 2 and eps[0] is None:
        hyper = hyper | {"eps": (FP32_EPS, eps[1])}
    other = {"decay_rate": hyper["beta2_decay"], "clip_threshold": hyper["d"]}
    return other | {key: value for key, value in hyper.items() if key not in ("beta2_decay", "d")}


FORMAT = Format(
    name=NAME,
    read=read_torch,
    write=write_torch,
    stores={
        "": frozenset({"Full", "Unknown"}),
        "adam": frozenset({"Full"}),
        "sgd": frozenset({"Full"}),
        "adafactor": frozenset({"Full", "Factored"}),
    },
    rules=(*(layout.rule for layout in LAYOUTS), libraries.ADAM),
    our_words=words_of_ours,
)
