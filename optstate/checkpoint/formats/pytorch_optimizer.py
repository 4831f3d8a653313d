"""State of pytorch_optimizer: CAME, Adafactor, Lion, SM3 and AdaLOMO. Its groups count the steps. Imports no torch."""

from __future__ import annotations

from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Group, Parameter
from optstate.checkpoint.formats.shared.adafactor import read_adafactor_rule, refuse_if
from optstate.checkpoint.formats.shared.axis_maxima import is_sm3, read_sm3, write_accumulators
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.hyper_parameters import NEEDED, find_pair, translate
from optstate.checkpoint.formats.shared.state_by_name import ADALOMO, is_by_name, read_by_name
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.checkpoint.formats.shared.statistics import ADAFACTOR, LION, SM3, SQUARE, Meaning
from optstate.checkpoint.formats.shared.tables import (
    CAME_SLOTS,
    Kept,
    Layout,
    factored,
    read_tables,
    whole,
    write_kept,
    write_tables,
)
from optstate.checkpoint.formats.shared.tree_writer import (
    FACTORED,
    LayoutError,
    Tree,
    TreeWriter,
    check_rule,
    check_statistics,
)
from optstate.other_libraries import libraries
from optstate.text import shown

__all__ = ["FORMAT"]

NAME = "pytorch_optimizer"

# Keys and defaults in the order of each class of pytorch_optimizer 4.1.
CAME_HYPERS: dict[str, Any] = {
    "lr": NEEDED,
    "foreach": None,
    "betas": NEEDED,
    "weight_decay": NEEDED,
    "weight_decouple": True,
    "fixed_decay": False,
    "ams_bound": False,
    "eps1": NEEDED,
    "eps2": NEEDED,
}
SM3_HYPERS: dict[str, Any] = {"lr": NEEDED, "momentum": 0.0, "beta": 0.0, "eps": NEEDED, "foreach": None}


def _write_came_hypers(writer: TreeWriter, place: int, group: Group) -> Tree:
    hyper = writer.common(group)
    hyper["eps1"], hyper["eps2"] = find_pair(writer, place, hyper, "eps")
    del hyper["eps"]
    clip = hyper.pop("clip_threshold", 1.0)
    if clip is None:
        raise LayoutError(f"param group {place} has clip_threshold=None: pytorch_optimizer's CAME always clips")
    if clip != 1.0:
        writer.note(f"CAME's file does not hold clip_threshold: build it with clip_threshold={clip}")
    return translate(writer, place, hyper, CAME_HYPERS) | _step_of_group(writer, place)


def _step_of_group(writer: TreeWriter, place: int) -> Tree:
    """Return the one count of steps that a group has; parameters that were never updated have none of their own."""
    counts = {param.step for param in writer.members(place) if param.has_state and param.step != 0}
    if len(counts) > 1 or None in counts:
        found = "unknown" if None in counts else ", ".join(map(str, sorted(filter(None, counts))))
        raise LayoutError(
            f"the parameters of group {place} were updated {found} times: {writer.layout} has one count for a group"
        )
    return {"step": counts.pop()} if counts else {}


BOUND = {"exp_avg_sq_hat": Kept(Meaning(signed=False, when="ams_bound"), "exp_avg_sq_hat")}
FIRST = Kept(Meaning("update", beta=("betas", 0)), "exp_avg")
CAME = Layout("CAME", libraries.PO_CAME, CAME_SLOTS | BOUND, step="step", anew={"RMS": 0.0}, hypers=_write_came_hypers)
LAYOUTS = (
    Layout(
        "AdaFactor",
        libraries.PO_ADAFACTOR,
        {"exp_avg": FIRST, **factored("exp_avg_sq", SQUARE), **BOUND},
        step="step",
        others=frozenset({"RMS"}),
    ),
    CAME,
    Layout("Lion", libraries.PO_LION, whole(LION), step="step", others=frozenset({"exp_grad_adanorm"})),
)


def read_pytorch_optimizer(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return a checkpoint of pytorch_optimizer; None if it is not a layout of its that is known."""
    if is_by_name(found, "num_steps"):
        return read_by_name(found, "num_steps", NAME, "AdaLOMO")
    if is_sm3(found) and "foreach" in found.keys:
        return read_sm3(found, NAME)
    return read_tables(found, LAYOUTS, NAME)


def write_pytorch_optimizer(writer: TreeWriter) -> Tree:
    """Return what CAME, SM3 and AdaLOMO keep; of its own files what the class in the file keeps."""
    rule = writer.document.recipe if writer.same else check_rule(writer, "came", "sm3", "adalomo")
    if rule == "adalomo":
        return _write_adalomo(writer)
    optimizer = writer.document.source.get("optimizer") if writer.same else rule.upper()
    return _write_sm3(writer) if optimizer == "SM3" else write_tables(writer, LAYOUTS, {"came": CAME})


def _write_sm3(writer: TreeWriter) -> Tree:
    def state_of(param: Parameter) -> Tree:
        check_statistics(writer, param, SM3)
        state = writer.step(param, "")
        for slot, record in param.slots.items():
            if slot == "accumulator":
                state |= write_accumulators(writer, param, record)
            else:
                state["momentum_buffer"] = writer.full(param, slot, record)
        return state | writer.extra(param)

    def hyper_of(place: int, group: Group) -> Tree:
        return translate(writer, place, writer.common(group), SM3_HYPERS) | _step_of_group(writer, place)

    return writer.tree(state_of, hyper_of)


# --- AdaLOMO ------------------------------------------------------------------------------------------------------


def _write_adalomo(writer: TreeWriter) -> Tree:
    """AdaLOMO keeps its state beside `state`, by the names of the parameters, and one count of steps for all."""
    by_name: dict[str, Tree] = {"exp_avg_sq": {}, "exp_avg_sq_row": {}, "exp_avg_sq_col": {}}
    for param in writer.document.parameters:
        check_statistics(writer, param, ADAFACTOR)
        writer.extra(param)
        for slot, record in param.slots.items():
            if slot == "exp_avg":
                raise LayoutError(
                    f"exp_avg of '{shown(param.name)}' has no place in AdaLOMO; convert with --recipe adalomo"
                )
            if param.name.startswith("#"):
                raise LayoutError(
                    f"the parameter {param.name} has no name, by which pytorch_optimizer's AdaLOMO keeps state; give "
                    "names with --names"
                )
            if record.store == FACTORED and len(writer.tensor(record.fields["row"]).shape) != 1:
                raise LayoutError(f"'{shown(param.name)}' has more than two dimensions: AdaLOMO factors matrices only")
            for key, tensor in write_kept(writer, param, slot, ADALOMO.slots[slot]).items():
                by_name[key][param.name] = tensor
    steps = writer.document.steps
    if len(steps) > 1:
        raise LayoutError(f"parameters were updated {', '.join(map(str, steps))} times: AdaLOMO has one count for all")
    tree = writer.tree(lambda param: {}, lambda place, group: _adalomo_hypers(writer, place, group))
    return {**tree, "num_steps": steps[0] if steps else 0, **by_name}


def _adalomo_hypers(writer: TreeWriter, place: int, group: Group) -> Tree:
    clips = {"clip_grad_norm": writer.document.clip_grad_norm, "clip_grad_value": None}
    clips |= {key: value for key, value in group.hyper.items() if key in clips and value is not None}
    plain = {key: value for key, value in group.hyper.items() if key not in clips}
    rule = read_adafactor_rule(writer, place, Group(hyper=plain, parameters=group.parameters))
    other = rule.floor or rule.relative or not rule.scale
    refuse_if(writer, place, other, "another rule for the step size than AdaLomo")
    refuse_if(writer, place, rule.beta1 is not None, f"beta1={rule.beta1}")
    if (rule.clip, rule.decay_rate) != (1.0, -0.8):
        writer.note(
            "AdaLOMO's file does not hold clip_threshold and decay_rate: build it with "
            f"clip_threshold={rule.clip}, decay_rate={rule.decay_rate}"
        )
    shared = {"lr": rule.lr, "weight_decay": rule.weight_decay}
    return {**shared, **clips, "eps1": rule.eps, "eps2": rule.least_rms, **rule.own}


def words_of_ours(hyper: dict[str, Any], rule: str) -> dict[str, Any]:
    """Return the hyper-parameters in our words, which have both numbers as `eps`."""
    if rule not in ("adalomo", "came") or not {"eps1", "eps2"} <= hyper.keys():
        return hyper
    rest = {key: value for key, value in hyper.items() if key not in ("eps1", "eps2")}
    return rest | {"eps": (hyper["eps1"], hyper["eps2"])}


FORMAT = Format(
    name=NAME,
    read=read_pytorch_optimizer,
    write=write_pytorch_optimizer,
    stores={
        "": frozenset({"Full", "Factored", "AxisMax", "Unknown"}),
        "came": frozenset({"Full", "Factored"}),
        "sm3": frozenset({"Full", "AxisMax"}),
        "adalomo": frozenset({"Full", "Factored"}),
    },
    rules=(*(layout.rule for layout in LAYOUTS), libraries.PO_SM3, libraries.PO_ADALOMO),
    our_words=words_of_ours,
)
