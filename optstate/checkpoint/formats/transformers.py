"""State of transformers' Adafactor and of the AdamW that transformers had. Imports no torch."""

from __future__ import annotations

from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Group
from optstate.checkpoint.formats.shared.adafactor import averages_steps, read_adafactor_rule, refuse_if
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.checkpoint.formats.shared.statistics import ADAFACTOR as STATISTICS
from optstate.checkpoint.formats.shared.statistics import FIRST, SECOND
from optstate.checkpoint.formats.shared.tables import Kept, Layout, factored, read_tables, whole, write_tables
from optstate.checkpoint.formats.shared.tree_writer import LayoutError, Tree, TreeWriter
from optstate.other_libraries import libraries
from optstate.text import shown

__all__ = ["FORMAT"]

NAME = "transformers"


def _write_hypers(writer: TreeWriter, place: int, group: Group) -> Tree:
    """Return the hyper-parameters of a group as `transformers.Adafactor` has them."""
    rule = read_adafactor_rule(writer, place, group)
    if rule.floor:
        decay = f"weight_decay={rule.weight_decay}, which acts by lr alone"
        refuse_if(writer, place, rule.weight_decay != 0, decay)
        writer.note(f"torch's Adafactor takes min(lr, 1 / sqrt(step)) as its learning rate, {writer.layout} takes lr")
    return {
        "lr": rule.lr,
        "eps": (rule.eps**2 if rule.floor else rule.eps, rule.least_rms),
        "clip_threshold": rule.clip,
        "decay_rate": rule.decay_rate,
        "beta1": rule.beta1,
        "weight_decay": rule.weight_decay,
        "scale_parameter": rule.scale,
        "relative_step": rule.relative,
        "warmup_init": rule.warmup,
        **rule.own,
    }


ADAFACTOR = Layout(
    "Adafactor",
    libraries.HF_ADAFACTOR,
    {"exp_avg": Kept(STATISTICS["exp_avg"], "exp_avg"), **factored("exp_avg_sq", STATISTICS["exp_avg_sq"])},
    step_form="int",
    anew={"RMS": 0.0},
    hypers=_write_hypers,
)
LAYOUTS = (ADAFACTOR, Layout("AdamW", libraries.OLD_ADAMW, whole({"exp_avg": FIRST, "exp_avg_sq": SECOND})))


def read_transformers(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return a checkpoint of one of transformers' optimizers; None if it is none of them."""
    return read_tables(found, LAYOUTS, NAME)


def write_transformers(writer: TreeWriter) -> Tree:
    """Return what transformers' Adafactor keeps; of its own files what the class in the file keeps."""
    tree = write_tables(writer, LAYOUTS, {"adafactor": ADAFACTOR, "adalomo": ADAFACTOR})
    for param in writer.document.parameters:
        if "exp_avg" in param.slots and not writer.same and not averages_steps(param.transforms):
            raise LayoutError(
                f"exp_avg of '{shown(param.name)}' averages updates, transformers' averages finished steps, learning "
                "rate included; convert with --recipe adafactor, which keeps none"
            )
    return tree


def words_of_ours(hyper: dict[str, Any], rule: str) -> dict[str, Any]:
    """Return the hyper-parameters in our words: lr of a relative step is 1, a factor."""
    return hyper | ({"lr": 1.0} if rule == "adafactor" and hyper.get("relative_step") else {})


FORMAT = Format(
    name=NAME,
    read=read_transformers,
    write=write_transformers,
    stores={"": frozenset({"Full"}), "adafactor": frozenset({"Full", "Factored"})},
    rules=tuple(layout.rule for layout in LAYOUTS),
    our_words=words_of_ours,
)
