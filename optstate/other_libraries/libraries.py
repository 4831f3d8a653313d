"""One table of flags for each library: what its optimizers keep in their param groups, and what of it changes the rule.

Read off torch 2.13, transformers 4.46 and 5.23, bitsandbytes 0.50, torchao 0.18, lion-pytorch 0.2.5, pytorch_optimizer
4.1, came-pytorch 0.1.3, galore-torch 1.0, lomo-optim 0.1.1, adam-mini 1.1.1, torch-SM3 0.1, schedulefree 1.4 and
DeepSpeed 0.19. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from optstate.other_libraries.flags import OtherRule, Switch
from optstate.plugins import Plugins

__all__ = ["ALL", "FORMATS", "find_rule", "find_rule_by_keys", "other_formats", "stem_of"]

ADAM_NUMBERS = frozenset({"lr", "betas", "eps", "weight_decay"})
DECOUPLED_ADAM = "scale_by_adam > add_decayed_weights"
L2_ADAM = "add_decayed_weights > scale_by_adam"
L2_LION = "add_decayed_weights > sign_momentum"

MAXIMIZE = Switch((False,), "it goes uphill", advice="give the loss the opposite sign")
AMSGRAD = Switch((False,), "it divides by the largest second moment so far, which our recipes do not keep")
UNCORRECTED = Switch((True,), "its averages are not corrected for beginning at zero")
L2 = "weight decay is added to the gradient (an L2 penalty) and goes through the averages"
BEFORE_ADAM = (
    "to go on with it, build optstate.Optimizer(params, optstate.chain(updates.add_decayed_weights(...), "
    "updates.scale_by_adam(...)))"
)
BEFORE_LION = BEFORE_ADAM.replace("scale_by_adam", "sign_momentum")


def _coupled(absent: bool) -> Switch:
    """`decoupled_weight_decay` of torch's Adam. absent: what files that do not have it are taken for."""
    return Switch((True,), L2, absent, "weight_decay", L2_ADAM, BEFORE_ADAM)


# --- torch --------------------------------------------------------------------------------------------------------

ADAMW = OtherRule(
    "torch",
    "AdamW",
    "adamw",
    needs=frozenset({"betas", "eps", "amsgrad"}),
    numbers=ADAM_NUMBERS,
    switches={
        "maximize": MAXIMIZE,
        "amsgrad": AMSGRAD,
        "decoupled_weight_decay": _coupled(absent=True),
        "bias_correction": UNCORRECTED,  # of DeepSpeed's Adam on CPUs
    },
    chain=DECOUPLED_ADAM,
)
ADAM = replace(ADAMW, optimizer="Adam", switches={**ADAMW.switches, "decoupled_weight_decay": _coupled(absent=False)})
"""The class of the same groups in files before torch 2.7, which do not say whether weight decay is decoupled."""

SGD = OtherRule(
    "torch",
    "SGD",
    "sgd",
    needs=frozenset({"momentum", "dampening", "nesterov"}),
    numbers=frozenset({"lr", "momentum", "dampening", "weight_decay", "nesterov"}),  # nesterov: an argument of ours
    switches={"maximize": MAXIMIZE},
    lacks=frozenset({"weight_decouple"}),
)
ADAFACTOR = OtherRule(
    "torch",
    "Adafactor",
    "adafactor",
    needs=frozenset({"beta2_decay", "d"}),
    numbers=frozenset({"lr", "beta2_decay", "eps", "d", "weight_decay"}),
    switches={"maximize": MAXIMIZE},
)
OUTSIDE = "eps is added to the root of an average of squares that is not corrected for beginning at zero"
RMSPROP = OtherRule("torch", "RMSprop", why=OUTSIDE, needs=frozenset({"alpha", "centered", "momentum"}))
ADAGRAD = OtherRule(
    "torch",
    "Adagrad",
    why="the learning rate falls by lr_decay, and eps is added to the root of the sum of squares",
    needs=frozenset({"lr_decay", "initial_accumulator_value"}),
)
MUON = OtherRule("torch", "Muon", why="steps are made orthogonal", needs=frozenset({"ns_coefficients", "ns_steps"}))
NADAM = OtherRule(
    "torch",
    "NAdam",
    why="its momentum follows a schedule (momentum_decay) and looks ahead",
    needs=frozenset({"betas", "momentum_decay"}),
)
RADAM = OtherRule(
    "torch",
    "RAdam",
    why="its first steps go without the second moment, and later ones are rectified by the number of steps",
    needs=frozenset({"betas", "eps", "weight_decay", "foreach", "differentiable"}),
    lacks=frozenset({"amsgrad", "momentum_decay", "fused"}),
)
ADADELTA = OtherRule("torch", "Adadelta", why="steps are scaled by an average of past steps", needs=frozenset({"rho"}))
ADAMAX = OtherRule(
    "torch",
    "Adamax",
    why="it divides by a decaying maximum of gradients",
    needs=RADAM.needs,
    lacks=RADAM.lacks | {"decoupled_weight_decay"},
)
ASGD = OtherRule("torch", "ASGD", why="weights are averaged", needs=frozenset({"lambd", "alpha", "t0"}))
RPROP = OtherRule(
    "torch", "Rprop", why="every element has a step size of its own", needs=frozenset({"etas", "step_sizes"})
)
SPARSE_ADAM = OtherRule(
    "torch",
    "SparseAdam",
    why="elements without a gradient keep their averages and their weight",
    needs=frozenset({"betas", "eps", "maximize"}),
    lacks=frozenset({"weight_decay", "amsgrad", "capturable", "foreach"}),
)

# --- transformers, galore-torch, schedulefree ---------------------------------------------------------------------

HF_ADAFACTOR = OtherRule(
    "transformers",
    "Adafactor",
    "adafactor",
    needs=frozenset({"clip_threshold", "decay_rate", "beta1", "scale_parameter", "relative_step", "warmup_init"}),
    # The three switches are arguments of our Adafactor.
    numbers=frozenset(
        {
            *("lr", "eps", "clip_threshold", "decay_rate", "beta1", "weight_decay"),
            *("scale_parameter", "relative_step", "warmup_init"),
        }
    ),
)
OLD_ADAMW = OtherRule(
    "transformers",
    "AdamW",
    why="eps is added to a root that is not corrected, and weights decay after the step",
    needs=frozenset({"betas", "eps", "correct_bias"}),
)
_PROJECTION = frozenset({"rank", "update_proj_gap", "scale", "proj_type"})
GALORE = replace(OLD_ADAMW, kind="galore", optimizer="GaLoreAdamW", numbers=OLD_ADAMW.numbers | _PROJECTION)
GALORE_ADAFACTOR = replace(
    HF_ADAFACTOR,
    kind="galore",
    optimizer="GaLoreAdafactor",
    recipe="",
    why="its moments are those of projected gradients",
    numbers=HF_ADAFACTOR.numbers | _PROJECTION,
)
_SCHEDULES = frozenset({"k", "r", "lr_max", "weight_sum", "weight_lr_power"})
_AVERAGED = "weights are an average of two sequences, one of which is the state z"
RADAM_FREE = OtherRule(
    "schedulefree", "RAdamScheduleFree", why=_AVERAGED, needs=_SCHEDULES | {"betas", "silent_sgd_phase"}
)
ADAMW_FREE = OtherRule("schedulefree", "AdamWScheduleFree", why=_AVERAGED, needs=_SCHEDULES | {"betas"})
SGD_FREE = OtherRule("schedulefree", "SGDScheduleFree", why=_AVERAGED, needs=_SCHEDULES | {"momentum"})

# --- bitsandbytes, torchao ----------------------------------------------------------------------------------------

CLIPPED = {"gnorm_vec": "gradients are clipped at a percentile of their last hundred norms (percentile_clipping)"}
_BNB_ADAM = ADAM_NUMBERS | {"alpha", "t_alpha", "t_beta3"}
BNB_ADAMW = OtherRule("bitsandbytes", "AdamW", "adamw", numbers=_BNB_ADAM, marks=CLIPPED)
BNB_LION = OtherRule("bitsandbytes", "Lion", "lion", numbers=ADAM_NUMBERS, marks=CLIPPED)
BNB_SGD = OtherRule("bitsandbytes", "SGD", "sgd", numbers=ADAM_NUMBERS, marks=CLIPPED)  # betas: momentum, an unused one
BNB_OTHERS = tuple(
    OtherRule("bitsandbytes", name, why=why, marks=CLIPPED)
    for name, why in (
        ("LAMB", "steps are scaled by the norms of weights and updates"),
        ("LARS", "steps are scaled by the norms of weights and gradients"),
        ("AdEMAMix", "it adds a second, slower average of gradients"),
        ("RMSprop", OUTSIDE),
        ("Adagrad", "eps is added to the root of the sum of squares"),
    )
)
AO_ADAMW = OtherRule("torchao", "AdamW", "adamw", numbers=ADAM_NUMBERS, switches={"amsgrad": AMSGRAD})
AO_ADAM = replace(
    AO_ADAMW, optimizer="Adam", switches={"amsgrad": AMSGRAD, "decoupled_weight_decay": _coupled(absent=False)}
)

# --- Lion, CAME, SM3, the LOMO family, Adam-mini ------------------------------------------------------------------

LION = OtherRule(
    "lion-pytorch",
    "Lion",
    "lion",
    needs=frozenset({"lr", "betas", "weight_decay"}),
    lacks=frozenset({"eps", "foreach", "maximize", "weight_decouple"}),
    numbers=frozenset({"lr", "betas", "weight_decay"}),
    switches={
        "cautious_factor": Switch((1,), "parts of a step that go against the gradient are scaled down"),
        "cautious_wd": Switch((False,), "weights only decay where the step agrees", number="weight_decay"),
    },
    untold="whether weight_decay was divided by the first learning rate (decoupled_weight_decay=True)",
)
_PO = {
    "use_gc": Switch((False, None), "gradients are centred"),
    "adanorm": Switch((False, None), "gradients are scaled by an average of their norms"),
    "cautious": Switch((False, None), "parts of a step that go against the gradient are left out"),
    "fixed_decay": Switch((False,), "weights decay by weight_decay alone, without lr", number="weight_decay"),
}
_PO_COMMON = frozenset({"lr", "betas", "weight_decay", "weight_decouple", "fixed_decay"})
_PO_NUMBERS = frozenset({"lr", "betas", "weight_decay", "eps1", "eps2", "step", "adanorm_r"})
_PO_COUPLED = Switch((True,), L2, number="weight_decay")
PO_ADAFACTOR = OtherRule(
    "pytorch_optimizer",
    "Adafactor",
    why="its decay rate and its clipping are not in the file",
    needs=_PO_COMMON | {"eps1", "eps2", "ams_bound", "scale_parameter", "relative_step"},
)
PO_CAME = OtherRule(
    "pytorch_optimizer",
    "CAME",
    "came",
    needs=_PO_COMMON | {"eps1", "eps2", "ams_bound"},
    lacks=frozenset({"scale_parameter"}),
    numbers=_PO_NUMBERS,
    switches={**_PO, "weight_decouple": _PO_COUPLED, "ams_bound": AMSGRAD},
)
PO_LION = OtherRule(
    "pytorch_optimizer",
    "Lion",
    "lion",
    needs=_PO_COMMON,
    lacks=frozenset({"eps", "eps1"}),
    numbers=_PO_NUMBERS,
    switches={**_PO, "weight_decouple": replace(_PO_COUPLED, chain=L2_LION, advice=BEFORE_LION)},
)
CAME = OtherRule(
    "came-pytorch",
    "CAME",
    "came",
    needs=frozenset({"lr", "betas", "eps", "clip_threshold"}),
    lacks=frozenset({"decay_rate", "amsgrad", "weight_decouple"}),
    numbers=frozenset({"lr", "eps", "clip_threshold", "betas", "weight_decay"}),
)
SM3 = OtherRule(
    "torch-SM3",
    "SM3",
    "sm3",
    numbers=frozenset({"lr", "momentum", "eps"}),
    switches={"beta": Switch((0,), "sums of squares are averages of this weight, and maxima stay")},
)
PO_SM3 = replace(SM3, kind="pytorch_optimizer", numbers=SM3.numbers | {"step"})
_LOMO = frozenset({"lr", "weight_decay", "clip_grad_norm", "clip_grad_value"})
ADALOMO = OtherRule(
    "lomo-optim",
    "AdaLomo",
    "adalomo",
    needs=_LOMO | {"eps"},
    numbers=_LOMO | {"eps"},
)
PO_ADALOMO = replace(ADALOMO, kind="pytorch_optimizer", needs=frozenset(), numbers=_LOMO | {"eps1", "eps2"})
LOMO = OtherRule(
    "lomo-optim", "Lomo", "lomo", needs=frozenset({"lr", "clip_grad_norm", "clip_grad_value"}), numbers=_LOMO
)
ADAM_MINI = OtherRule(
    "adam-mini",
    "Adam_mini",
    "adammini",
    needs=frozenset({"name", "beta1", "beta2", "eps"}),
    numbers=frozenset({"lr", "beta1", "beta2", "eps", "weight_decay"}),
)

# --- DeepSpeed ----------------------------------------------------------------------------------------------------

FUSED_ADAM = OtherRule(
    "deepspeed",
    "FusedAdam",
    "adamw",
    needs=frozenset({"bias_correction", "betas", "eps"}),
    lacks=frozenset({"amsgrad", "max_coeff", "grad_averaging", "weight_decouple"}),
    numbers=ADAM_NUMBERS | {"step"},
    switches={"bias_correction": UNCORRECTED},
    untold="whether weight decay is an L2 penalty (adam_w_mode=False)",
    chain=DECOUPLED_ADAM,
)
"""DeepSpeed's own Adam on GPUs. That on CPUs has the hyper-parameters of torch's; LAMB has `max_coeff`."""


def stem_of(optimizer: str) -> str:
    """Return an optimizer's name without spelling and bits: "adamw" of "PagedAdamW8bit" and of "adam_w"."""
    stem = optimizer.lower().replace("_", "").replace("-", "").removeprefix("paged")
    for bits in ("8bit", "4bit", "32bit", "fp8"):
        stem = stem.removesuffix(bits)
    return stem


ALL = (
    *(ADAMW, ADAM, SGD, ADAFACTOR, RMSPROP, ADAGRAD, MUON, NADAM, RADAM, ADADELTA, ADAMAX, ASGD, RPROP, SPARSE_ADAM),
    *(HF_ADAFACTOR, OLD_ADAMW, GALORE, GALORE_ADAFACTOR, RADAM_FREE, ADAMW_FREE, SGD_FREE),
    *(BNB_ADAMW, BNB_LION, BNB_SGD, *BNB_OTHERS, AO_ADAMW, AO_ADAM),
    *(LION, PO_ADAFACTOR, PO_CAME, PO_LION, CAME, SM3, PO_SM3, ADALOMO, PO_ADALOMO, LOMO, ADAM_MINI, FUSED_ADAM),
)

_BY_NAME: Mapping[tuple[str, str], OtherRule] = {(rule.kind, stem_of(rule.optimizer)): rule for rule in ALL}


def find_rule(kind: str, optimizer: str) -> OtherRule | None:
    """Return the rule of a library's class; None if the class is not in the table.

    kind: which library, as `Document.source` has it. optimizer: in any spelling, with or without bits, as
    "AdamW8bit".
    """
    found = _BY_NAME.get((kind, stem_of(optimizer)))
    if found is not None or kind in _KINDS or not kind:
        return found
    rules = (rule for declared in other_formats() for rule in declared.rules)
    return next((rule for rule in rules if (rule.kind, stem_of(rule.optimizer)) == (kind, stem_of(optimizer))), None)


def _problem(name: str, declared: Any) -> str:
    """Return in words why an object cannot be a format; "" if it can."""
    if all(kind.__name__ != "Format" for kind in type(declared).__mro__):  # which is above this room
        return f"it is a {type(declared).__name__}, no optstate.formats.Format"
    if declared.name != name:
        return f"its `name` is {declared.name!r}, and files say whose they are by that: both must be alike"
    known = isinstance(declared.rules, tuple) and all(isinstance(rule, OtherRule) for rule in declared.rules)
    return "" if known else "its `rules` are no tuple of OtherRule"


_KINDS = frozenset(rule.kind for rule in ALL)

OWN_FORMATS = _KINDS | {"lerobot", "optstate", "optstate-state_dict", "torch.distributed.checkpoint"}
"""The names of this library's formats, which no other package can have."""

FORMATS: Plugins[Any] = Plugins("format", "optstate.formats", _problem, OWN_FORMATS)
"""Formats of other packages, which declare their own rules."""


def find_rule_by_keys(groups: Iterable[Mapping[str, object]]) -> OtherRule | None:
    """Return the rule that param groups follow by their keys alone; None if the keys are nobody's.

    Only rules whose state looks like Adam's are told apart by keys; other rules are told by their statistics.
    """
    keys = [set(group) for group in groups]
    common = set.intersection(*keys) if keys else set()
    return next((rule for rule in _LIKE_ADAM if rule.fits(common)), None)


_LIKE_ADAM = (ADAMW, NADAM, FUSED_ADAM, ADAMAX, RADAM, SPARSE_ADAM, OLD_ADAMW)


def other_formats() -> list[Any]:
    """Return the formats of other packages that can be used, each a `Format`."""
    return [FORMATS.get(name) for name in FORMATS.names()]
