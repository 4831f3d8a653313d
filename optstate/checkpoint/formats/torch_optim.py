"""Files of torch's own optimizers: told apart by hyper-parameters and by what is kept. Imports no torch."""

from __future__ import annotations

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.formats import tables
from optstate.checkpoint.formats.parameter_reader import FIRST, SECOND, Meaning, hyper
from optstate.checkpoint.formats.state_dict import StateDict, number_of, stem_of
from optstate.checkpoint.formats.tables import Kept, Layout
from optstate.other_libraries import libraries

__all__ = ["ADAM", "read", "read_as_adamw"]

ADAM = {
    "exp_avg": Kept(FIRST, "exp_avg"),
    "exp_avg_sq": Kept(SECOND, "exp_avg_sq"),
}
AMSGRAD = {"max_exp_avg_sq": Kept(Meaning("square_max", signed=False), "max_exp_avg_sq")}


def _kept(**meanings: Meaning) -> dict[str, Kept]:
    return {name: Kept(meaning, name) for name, meaning in meanings.items()}


FACTORED = Kept(Meaning("square", signed=False), "variance", "row_var", "col_var", squeezed=True)

LAYOUTS = (
    Layout("Adam", libraries.ADAMW, ADAM | AMSGRAD),
    Layout("SGD", libraries.SGD, _kept(momentum_buffer=Meaning("update_sum"))),
    Layout(
        "RMSprop",
        libraries.RMSPROP,
        _kept(
            square_avg=Meaning("square", signed=False, beta=hyper("alpha")),
            momentum_buffer=Meaning("update_sum"),
            grad_avg=Meaning("gradient", beta=hyper("alpha")),
        ),
    ),
    Layout("Adagrad", libraries.ADAGRAD, _kept(sum=Meaning("square_sum", signed=False))),
    Layout("Adafactor", libraries.ADAFACTOR, {"exp_avg_sq": FACTORED}),
    # Its momentum is an average, `lerp(gradient, 1 - momentum)`, other than SGD's.
    Layout("Muon", libraries.MUON, _kept(momentum_buffer=Meaning("gradient", beta=hyper("momentum")))),
    Layout("NAdam", libraries.NADAM, ADAM, others=frozenset({"mu_product"})),
    Layout("RAdam", libraries.RADAM, ADAM),
    Layout("SparseAdam", libraries.SPARSE_ADAM, ADAM),
    Layout(
        "Adamax",
        libraries.ADAMAX,
        _kept(exp_avg=FIRST, exp_inf=Meaning(signed=False)),
    ),
    Layout(
        "Adadelta",
        libraries.ADADELTA,
        _kept(square_avg=Meaning("square", False, hyper("rho")), acc_delta=Meaning()),
    ),
    Layout("ASGD", libraries.ASGD, _kept(ax=Meaning()), others=frozenset({"eta", "mu"})),
    Layout("Rprop", libraries.RPROP, _kept(prev=Meaning(), step_size=Meaning(signed=False))),
)


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of one of torch's optimizers; None if it is none of them.

    optimizer: "Adam" or "AdamW", which files before torch 2.7 do not tell apart.
    """
    layout = tables.matching(found, LAYOUTS)
    if layout is None:
        return None
    if layout.optimizer != "Adam":
        return tables.read(found, layout, "torch", "torch")
    told = {bool(group["decoupled_weight_decay"]) for group in found.groups if "decoupled_weight_decay" in group}
    if told:
        return tables.read(found, layout, "torch", "torch", optimizer="AdamW" if True in told else "Adam")
    name, notes = read_as_adamw(found, optimizer, "AdamW")
    return tables.read(found, layout, "torch", "torch", notes, optimizer=name)


def read_as_adamw(found: StateDict, optimizer: str | None, name: str) -> tuple[str, list[str]]:
    """The name of an optimizer that is `name` or the same with "Adam" for "AdamW", and a note if it was assumed."""
    other = name.replace("AdamW", "Adam")
    if optimizer is not None and stem_of(optimizer) in ("adam", "adamw"):
        return name if stem_of(optimizer) == "adamw" else other, []
    if all(number_of(group.get("weight_decay")) == 0 for group in found.groups):
        return name, []
    return name, [
        f"read as {name}'s: the file does not say whether weight decay is decoupled; if not, give --optimizer {other}"
    ]
