"""The hyper-parameters of Adafactor and AdaLomo in each library's words. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optstate.checkpoint.document.document import Group
from optstate.checkpoint.formats.tree_writer import Given, LayoutError, number, numbers
from optstate.text import shown

__all__ = ["AVERAGES_STEPS", "in_adalomo", "in_torch", "in_transformers"]

AVERAGES_STEPS = "scale_by_learning_rate > momentum(decoupled)"
"""In a chain: the first moment averages finished steps, as transformers does, and not updates."""

FP32_EPS = 2.0**-23
_OURS = {
    "lr",
    "decay_rate",
    "eps",
    "clip_threshold",
    "beta1",
    "dampening",
    "weight_decay",
    "clip_grad_value",
    "clip_grad_norm",
}
_TORCH = {"lr", "beta2_decay", "eps", "d", "weight_decay", "foreach", "maximize"}
_TRANSFORMERS = {
    "lr",
    "eps",
    "clip_threshold",
    "decay_rate",
    "beta1",
    "weight_decay",
    "scale_parameter",
    "relative_step",
    "warmup_init",
}
_ADALOMO = {"lr", "weight_decay", "clip_grad_norm", "clip_grad_value", "eps", "eps1", "eps2", "loss_scale"}


@dataclass(frozen=True)
class _Rule:
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


def in_transformers(given: Given, place: int, group: Group) -> dict[str, Any]:
    """As `transformers.Adafactor` has them.

    Raises:
        LayoutError: for what it cannot do.
    """
    rule = _rule_of(given, place, group)
    if rule.floor:
        _refuse(given, place, rule.weight_decay != 0, f"weight_decay={rule.weight_decay}, which acts by lr alone")
        given.note(f"torch's Adafactor takes min(lr, 1 / sqrt(step)) as its learning rate, {given.layout} takes lr")
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


def in_torch(given: Given, place: int, group: Group) -> dict[str, Any]:
    """As `torch.optim.Adafactor` has them.

    Raises:
        LayoutError: for what it cannot do.
    """
    rule = _rule_of(given, place, group)
    if not rule.floor:
        _refuse(given, place, rule.relative, "a relative step size")
        _refuse(given, place, not rule.scale, "scale_parameter=False, where torch always scales by the parameter's RMS")
        decay = f"weight_decay={rule.weight_decay}, scaled by the parameter's RMS, which torch does not do"
        _refuse(given, place, rule.weight_decay != 0, decay)
        given.note("torch's Adafactor takes min(lr, 1 / sqrt(step)) as its learning rate")
    _refuse(given, place, rule.beta1 is not None, f"beta1={rule.beta1}")
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


def in_adalomo(given: Given, place: int, group: Group) -> dict[str, Any]:
    """As pytorch_optimizer's AdaLOMO has them.

    Raises:
        LayoutError: for what it cannot do.
    """
    clips = {"clip_grad_norm": given.document.clip_grad_norm, "clip_grad_value": None}
    clips |= {key: value for key, value in group.hyper.items() if key in clips and value is not None}
    plain = {key: value for key, value in group.hyper.items() if key not in clips}
    rule = _rule_of(given, place, Group(hyper=plain, parameters=group.parameters))
    _refuse(given, place, rule.floor or rule.relative or not rule.scale, "another rule for the step size than AdaLomo")
    _refuse(given, place, rule.beta1 is not None, f"beta1={rule.beta1}")
    if (rule.clip, rule.decay_rate) != (1.0, -0.8):
        given.note(
            "AdaLOMO's file does not hold clip_threshold and decay_rate: build it with "
            f"clip_threshold={rule.clip}, decay_rate={rule.decay_rate}"
        )
    shared = {"lr": rule.lr, "weight_decay": rule.weight_decay}
    return {**shared, **clips, "eps1": rule.eps, "eps2": rule.least_rms, **rule.own}


def _refuse(given: Given, place: int, condition: bool, what: str) -> None:
    if condition:
        raise LayoutError(f"param group {place} has {what}: {given.layout} cannot express it")


# --- what a group does --------------------------------------------------------------------------------------------


def _rule_of(given: Given, place: int, group: Group) -> _Rule:
    hyper = {key: numbers(value) for key, value in group.hyper.items()}
    chains = {param.chain for param in given.members(place)}
    chain = min(chains, default="")
    try:
        return _read(given, place, hyper, chain)
    except KeyError as error:
        raise LayoutError(f"param group {place} has no {error}, which Adafactor's rule needs") from None
    except (IndexError, TypeError, ArithmeticError):
        what = f"eps={shown(repr(hyper.get('eps')))}, or another number, that Adafactor's rule cannot have"
        raise LayoutError(f"param group {place} has {what}") from None


def _read(given: Given, place: int, hyper: Mapping[str, Any], chain: str) -> _Rule:
    if chain or not given.tool:
        return _ours(given, place, hyper, chain)
    if given.tool == "transformers":
        return _transformers(hyper)
    if given.tool == "torch" and "beta2_decay" in hyper:
        _refuse(given, place, bool(hyper.get("maximize")), "maximize=True")
        return _torch(hyper)
    if given.document.recipe == "adalomo":
        return _adalomo(given, place, hyper)
    raise LayoutError(
        f"the hyper-parameters of {given.tool}'s Adafactor are not known here: convert with --recipe adafactor first"
    )


def _ours(given: Given, place: int, hyper: Mapping[str, Any], chain: str) -> _Rule:
    """By the keys and the chain of `adalomo.Adafactor` and `adalomo.AdaLomo`."""
    floor = "scale_by_schedule(cap_by_inverse_root)" in chain
    relative = "scale_by_schedule" in chain and not floor
    lr, eps = number(hyper["lr"]), tuple(hyper["eps"])
    _refuse(given, place, relative and lr != 1.0, f"lr={lr} as a factor on a relative step size")
    _refuse(given, place, hyper.get("clip_grad_value") is not None, f"clip_grad_value={hyper.get('clip_grad_value')}")
    beta1, clip = hyper.get("beta1"), hyper.get("clip_threshold", 1.0)
    return _Rule(
        lr=None if relative else lr,
        eps=eps[0],
        least_rms=eps[1] if len(eps) > 1 else 1e-3,
        clip=math.inf if clip is None else clip,
        decay_rate=hyper.get("decay_rate", -0.8),
        beta1=beta1,
        weight_decay=hyper.get("weight_decay", 0.0),
        scale="scale_by_param_rms" in chain,
        relative=relative,
        warmup="scale_by_schedule(warm_relative_step)" in chain,
        floor=floor,
        own=_own(hyper, _OURS),
    )


def _transformers(hyper: Mapping[str, Any]) -> _Rule:
    return _Rule(
        lr=hyper["lr"],
        eps=hyper["eps"][0],
        least_rms=hyper["eps"][1],
        clip=hyper["clip_threshold"],
        decay_rate=hyper["decay_rate"],
        beta1=hyper["beta1"],
        weight_decay=hyper["weight_decay"],
        scale=hyper["scale_parameter"],
        relative=hyper["relative_step"],
        warmup=hyper["warmup_init"],
        floor=False,
        own=_own(hyper, _TRANSFORMERS),
    )


def _torch(hyper: Mapping[str, Any]) -> _Rule:
    return _Rule(
        lr=hyper["lr"],
        eps=FP32_EPS if hyper["eps"][0] is None else hyper["eps"][0],
        least_rms=hyper["eps"][1],
        clip=hyper["d"],
        decay_rate=hyper["beta2_decay"],
        beta1=None,
        weight_decay=hyper["weight_decay"],
        scale=True,
        relative=False,
        warmup=False,
        floor=True,
        own=_own(hyper, _TORCH),
    )


def _adalomo(given: Given, place: int, hyper: Mapping[str, Any]) -> _Rule:
    """By the keys of lomo-optim and of pytorch_optimizer, whose files lack two of the hyper-parameters."""
    for key in ("clip_grad_norm", "clip_grad_value"):
        _refuse(given, place, hyper.get(key) is not None, f"{key}={hyper.get(key)}")
    given.note("the file does not hold AdaLomo's clip_threshold and decay_rate: 1.0 and -0.8 are assumed")
    least_square, least_rms = hyper["eps"] if "eps" in hyper else (hyper["eps1"], hyper["eps2"])
    return _Rule(
        lr=hyper["lr"],
        eps=least_square,
        least_rms=least_rms,
        clip=1.0,
        decay_rate=-0.8,
        beta1=None,
        weight_decay=hyper["weight_decay"],
        scale=True,
        relative=False,
        warmup=False,
        floor=False,
        own=_own(hyper, _ADALOMO),
    )


def _own(hyper: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    return {key: value for key, value in hyper.items() if key not in known}
