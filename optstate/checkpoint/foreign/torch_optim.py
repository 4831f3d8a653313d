"""Files of torch's own optimizers: told apart by hyper-parameters and by what is kept. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optstate.checkpoint.checkpoint import Checkpoint
from optstate.checkpoint.foreign import layouts
from optstate.checkpoint.foreign.drafts import FIRST, SECOND, Meaning, hyper
from optstate.checkpoint.foreign.layouts import Groups, Kept, Layout
from optstate.checkpoint.foreign.trees import StateDict, number_of, stem_of

__all__ = ["ADAM", "no_weight_decay", "read", "read_as_adamw"]

ADAM = {
    "exp_avg": Kept(FIRST, "exp_avg"),
    "exp_avg_sq": Kept(SECOND, "exp_avg_sq"),
}
AMSGRAD = {"max_exp_avg_sq": Kept(Meaning("square_max", signed=False), "max_exp_avg_sq")}


def _minimizes(group: Mapping[str, Any]) -> bool:
    return not group.get("maximize")


def no_weight_decay(groups: Groups) -> bool:
    """Whether it makes no difference how weight decay is applied."""
    return all(number_of(group.get("weight_decay")) == 0 for group in groups)


def _adam_recipe(groups: Groups) -> str:
    plain = all(_minimizes(group) and not group["amsgrad"] for group in groups)
    # Files before torch 2.7 do not say it, and are read as AdamW's.
    decoupled = all(group.get("decoupled_weight_decay", True) for group in groups)
    return "adamw" if plain and (decoupled or no_weight_decay(groups)) else ""


def _sgd_recipe(groups: Groups) -> str:
    return "sgd" if all(map(_minimizes, groups)) else ""


def _adafactor_recipe(groups: Groups) -> str:
    return "adafactor" if all(map(_minimizes, groups)) else ""


def _kept(**meanings: Meaning) -> dict[str, Kept]:
    return {name: Kept(meaning, name) for name, meaning in meanings.items()}


FACTORED = Kept(Meaning("square", signed=False), "variance", "row_var", "col_var", squeezed=True)

LAYOUTS = (
    Layout("Adam", frozenset({"betas", "eps", "amsgrad"}), ADAM | AMSGRAD, recipe=_adam_recipe),
    Layout(
        "SGD",
        frozenset({"momentum", "dampening", "nesterov"}),
        _kept(momentum_buffer=Meaning("update_sum")),
        recipe=_sgd_recipe,
    ),
    Layout(
        "RMSprop",
        frozenset({"alpha", "centered", "momentum"}),
        _kept(
            square_avg=Meaning("square", signed=False, beta=hyper("alpha")),
            momentum_buffer=Meaning("update_sum"),
            grad_avg=Meaning("gradient", beta=hyper("alpha")),
        ),
    ),
    Layout(
        "Adagrad",
        frozenset({"lr_decay", "initial_accumulator_value"}),
        _kept(sum=Meaning("square_sum", signed=False)),
    ),
    Layout("Adafactor", frozenset({"beta2_decay", "d"}), {"exp_avg_sq": FACTORED}, recipe=_adafactor_recipe),
    # Its momentum is an average, `lerp(gradient, 1 - momentum)`, other than SGD's.
    Layout(
        "Muon",
        frozenset({"ns_coefficients", "ns_steps"}),
        _kept(momentum_buffer=Meaning("gradient", beta=hyper("momentum"))),
    ),
    Layout("NAdam", frozenset({"betas", "momentum_decay"}), ADAM, others=frozenset({"mu_product"})),
    Layout(
        "Adadelta", frozenset({"rho"}), _kept(square_avg=Meaning("square", False, hyper("rho")), acc_delta=Meaning())
    ),
)


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of one of torch's optimizers; None if it is none of them.

    optimizer: "Adam" or "AdamW", which files before torch 2.7 do not tell apart.
    """
    layout = layouts.matching(found, LAYOUTS)
    if layout is None:
        return None
    if layout.optimizer != "Adam":
        return layouts.read(found, layout, "torch", "torch")
    told = {bool(group["decoupled_weight_decay"]) for group in found.groups if "decoupled_weight_decay" in group}
    if told:
        return layouts.read(found, layout, "torch", "torch", optimizer="AdamW" if True in told else "Adam")
    name, notes = read_as_adamw(found, optimizer, "AdamW")
    checkpoint = layouts.read(found, layout, "torch", "torch", notes, optimizer=name)
    return checkpoint if name == "AdamW" or no_weight_decay(found.groups) else layouts.without_recipe(checkpoint)


def read_as_adamw(found: StateDict, optimizer: str | None, name: str) -> tuple[str, list[str]]:
    """The name of an optimizer that is `name` or the same with "Adam" for "AdamW", and a note if it was assumed."""
    other = name.replace("AdamW", "Adam")
    if optimizer is not None and stem_of(optimizer) in ("adam", "adamw"):
        return name if stem_of(optimizer) == "adamw" else other, []
    if no_weight_decay(found.groups):
        return name, []
    return name, [
        f"read as {name}'s: the file does not say whether weight decay is decoupled; if not, give --optimizer {other}"
    ]
