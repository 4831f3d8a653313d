"""What a group of Adafactor or AdaLomo does, whoever wrote the group. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optstate.checkpoint.document.chain_words import ChainWords, TransformWords
from optstate.checkpoint.document.document import Group
from optstate.checkpoint.formats.shared.tree_writer import LayoutError, TreeWriter, number
from optstate.text import shown

__all__ = ["FP32_EPS", "AdafactorRule", "averages_steps", "find_arguments", "read_adafactor_rule", "refuse_if"]

FP32_EPS = 2.0**-23
DEFAULT_EPS = (1e-30, 1e-3)

_KNOWN = frozenset(
    {
        *("lr", "decay_rate", "eps", "clip_threshold", "beta1", "dampening", "weight_decay"),
        *("clip_grad_value", "clip_grad_norm", "loss_scale", "foreach", "maximize"),
        *("scale_parameter", "relative_step", "warmup_init"),
    }
)


def averages_steps(chain: ChainWords) -> bool:
    """Whether the first moment averages finished steps, as transformers does, and not updates."""
    return chain.ends_with(TransformWords("scale_by_learning_rate"), TransformWords("momentum", ("decoupled",)))


def find_arguments(hyper: Mapping[str, Any], chain: ChainWords, of_torch: bool) -> dict[str, Any]:
    """Return the arguments of our Adafactor that are no hyper-parameters of its groups.

    hyper: in our words. chain: empty where the file does not tell it. of_torch: whether the file is torch's.
    """
    told = bool(chain.transforms)
    capped = chain.has("scale_by_schedule", "cap_by_inverse_root") if told else of_torch
    relative = chain.has("scale_by_schedule") and not capped if told else bool(number(hyper.get("relative_step")))
    eps = tuple(hyper.get("eps", ()))
    warm = chain.has("scale_by_schedule", "warm_relative_step")
    return {
        "lr": None if relative else hyper.get("lr"),
        "eps": (*eps, *DEFAULT_EPS[len(eps) :]),  # without scaling groups have no second one
        "relative_step": relative,
        "scale_parameter": chain.has("scale_by_param_rms") if told else hyper.get("scale_parameter", True),
        "warmup_init": warm if told else bool(hyper.get("warmup_init")),
        "momentum_before_lr": not averages_steps(chain) if told else hyper.get("beta1") is None,
        "torch_compatible": capped,
    }


@dataclass(frozen=True)
class AdafactorRule:
    """What a group of Adafactor or AdaLomo does.

    lr: None where steps are relative. eps: added to squared gradients; with `floor` it is a floor under the root
    instead, the step size `min(lr, 1 / sqrt(t))`, and weight decay by lr alone: torch's form. least_rms: of a
    parameter. clip: bound on the RMS of an update, infinity for none. scale: whether steps are multiplied by the
    parameter's RMS, and weight decay too. own: keys that no library has.
    """

    lr: float | None
    eps: float
    least_rms: float
    clip: float
    decay_rate: float
    beta1: float | None
    weight_decay: float
    scale: bool
    relative: bool
    warmup: bool
    floor: bool
    own: Mapping[str, Any]


def read_adafactor_rule(writer: TreeWriter, place: int, group: Group) -> AdafactorRule:
    """Return what the group at a place does.

    Raises:
        LayoutError: for what no library can express, or numbers that the rule cannot have.
    """
    hyper = writer.common(group)
    chains = {param.chain: param.transforms for param in writer.members(place)}
    chain = chains[min(chains)] if chains else ChainWords()
    try:
        return _read(writer, place, hyper, find_arguments(hyper, chain, of_torch="beta2_decay" in group.hyper))
    except KeyError as error:
        raise LayoutError(f"param group {place} has no {error}, which Adafactor's rule needs") from None
    except (IndexError, TypeError, ArithmeticError):
        what = f"eps={shown(repr(hyper.get('eps')))}, or another number, that Adafactor's rule cannot have"
        raise LayoutError(f"param group {place} has {what}") from None


def refuse_if(writer: TreeWriter, place: int, condition: bool, what: str) -> None:
    """Raise LayoutError if a condition holds. what: the group at this place has, which the library cannot express."""
    if condition:
        raise LayoutError(f"param group {place} has {what}: {writer.layout} cannot express it")


def _read(writer: TreeWriter, place: int, hyper: Mapping[str, Any], arguments: Mapping[str, Any]) -> AdafactorRule:
    lr, _ = hyper["lr"], hyper["eps"]  # no rule is without them
    relative, clip = arguments["relative_step"], hyper.get("clip_threshold", 1.0)
    refuse_if(writer, place, relative and lr != 1.0, f"lr={lr} as a factor on a relative step size")
    refuse_if(writer, place, bool(hyper.get("maximize")), "maximize=True")
    for key in ("clip_grad_norm", "clip_grad_value"):
        refuse_if(writer, place, hyper.get(key) is not None, f"{key}={hyper.get(key)}")
    if "decay_rate" not in hyper:
        writer.note("the file does not hold AdaLomo's clip_threshold and decay_rate: 1.0 and -0.8 are assumed")
    return AdafactorRule(
        lr=arguments["lr"],
        eps=arguments["eps"][0],
        least_rms=arguments["eps"][1],
        clip=math.inf if clip is None else clip,
        decay_rate=hyper.get("decay_rate", -0.8),
        beta1=hyper.get("beta1"),
        weight_decay=hyper.get("weight_decay", 0.0),
        scale=arguments["scale_parameter"],
        relative=relative,
        warmup=arguments["warmup_init"],
        floor=arguments["torch_compatible"],
        own={key: value for key, value in hyper.items() if key not in _KNOWN},
    )
