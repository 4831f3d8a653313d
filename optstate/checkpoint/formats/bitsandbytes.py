"""Files of bitsandbytes' optimizers, with 8 or 32 bits, nested as since 0.50 or flat as before. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.dtypes import BITS
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.files.torch_types import type_name
from optstate.checkpoint.formats.parameter_reader import FIRST, SECOND, Draft, Meaning, Source, checkpoint_of, hyper
from optstate.checkpoint.formats.state_dict import StateDict, number_of, stem_of
from optstate.text import shown

__all__ = ["NESTED", "read"]

NESTED = "__bnb_optimizer_quant_state__"


@dataclass(frozen=True)
class _Rule:
    """An optimizer: what its one or two states are, and which of our recipes does the same, by bits."""

    slots: Mapping[str, Meaning]
    recipes: tuple[str, str] = ("", "")


RULES = {
    # Its Adam decays weights as its AdamW does.
    "AdamW": _Rule({"exp_avg": FIRST, "exp_avg_sq": SECOND}, ("adamw", "adamw8bit")),
    "LAMB": _Rule({"exp_avg": FIRST, "exp_avg_sq": SECOND}),
    "AdEMAMix": _Rule({"exp_avg": FIRST, "exp_avg_sq": SECOND}),
    "Lion": _Rule({"exp_avg": Meaning("gradient", beta=hyper("betas", 1))}, ("lion", "lion8bit")),
    "SGD": _Rule({"momentum_buffer": Meaning("update_sum")}, ("sgd", "sgdm8bit")),
    "LARS": _Rule({"momentum_buffer": Meaning()}),
    "RMSprop": _Rule({"square_avg": Meaning("square", signed=False, beta=hyper("betas", 0))}),
    "Adagrad": _Rule({"sum": Meaning("square_sum", signed=False)}),
    "": _Rule({"state1": Meaning()}),
}
AMBIGUOUS = ("Lion", "SGD", "RMSprop", "Adagrad", "LARS")
UNTOLD = "the file does not say which optimizer it is: {}; give --optimizer to say what state1 is"
ASSUMED = "read as Lion's: SGD with dampening, which bitsandbytes ignores, looks the same; give --optimizer SGD for it"


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """A checkpoint of one of bitsandbytes' optimizers; None if it is not its layout.

    optimizer: its name, as "Lion" or "Lion8bit", where the file does not tell.
    """
    nested = NESTED in found.kept
    if not nested and "state1" not in found.kept:
        return None
    found = _unnested(found)
    name, notes = _name(found, optimizer)
    eight = any(isinstance(value, Stored) and value.dtype == "U8" for s in found.state.values() for value in s.values())
    rule = RULES[name]
    full_name = (name + ("8bit" if eight else "")) if name else "unknown"
    source = Source("bitsandbytes", "bitsandbytes", full_name, rule.recipes[eight], {"nested": nested})

    def say(draft: Draft) -> None:
        draft.take_step()
        for number, (slot, meaning) in enumerate(rule.slots.items(), 1):
            if f"state{number}" in draft.left:
                state = _state(draft, number)
                if name == "AdEMAMix" and number == 1:
                    _take_pair(draft, state)
                else:
                    _take(draft, slot, state, meaning)

    return checkpoint_of(found, source, say, notes)


def _unnested(found: StateDict) -> StateDict:
    """The flat form; the keys beside the nested ones stay."""
    state = {}
    for ident, kept in found.state.items():
        inner = kept.get(NESTED, {})
        if not isinstance(inner, dict) or not all(isinstance(key, str) for key in inner):
            reason = f"parameter '{found.names[ident]}': {NESTED} is {type_name(inner)}, not a dict of tensors"
            raise CheckpointError(found.path, reason)
        state[ident] = {key: value for key, value in kept.items() if key != NESTED} | inner
    return replace(found, state=state)


# --- which optimizer ----------------------------------------------------------------------------------------------


def _name(found: StateDict, optimizer: str | None) -> tuple[str, list[str]]:
    """Its name, and what to say about that; "" where nothing tells."""
    if "state2" in found.kept:
        three = all(hyper("betas", 2)(group) is not None for group in found.groups)
        return ("AdEMAMix" if three else "LAMB" if "unorm_vec" in found.kept else "AdamW"), []
    if optimizer is not None:
        given = next((name for name in AMBIGUOUS if name.lower() == stem_of(optimizer)), None)
        if given is None:
            reason = f"its parameters have one statistic, which is not how bitsandbytes keeps {shown(optimizer)}"
            raise CheckpointError(found.path, f"{reason}: give {' or '.join(AMBIGUOUS)}", refused=True)
        return given, []
    told = {_of_group(group, "unorm_vec" in found.kept) for group in found.groups}
    name = told.pop() if len(told) == 1 else ""
    if not name:
        return "", [UNTOLD.format(" or ".join(AMBIGUOUS))]
    return name, [ASSUMED] if name == "Lion" else []


def _of_group(group: Mapping[str, Any], clipped: bool) -> str:
    """What the hyper-parameters of one group tell of a rule with one state.

    Lion, SGD and LARS have no eps; Adagrad has no betas; `betas` are (momentum, dampening) of SGD and LARS, and
    dampening is 0 in all runs that mean what they do; only LARS keeps a norm.
    """
    first, second, eps = hyper("betas", 0)(group), hyper("betas", 1)(group), number_of(group.get("eps"))
    if first is None or second is None or eps is None:
        return ""
    if clipped:
        return "LARS" if eps == 0 else ""
    if eps > 0:
        return "RMSprop" if first > 0 else "Adagrad" if second == 0 else ""
    if first == 0:
        return ""
    return "Lion" if second > 0 else "SGD"


# --- one state ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """`state<number>` with what belongs to it."""

    number: int
    value: Stored
    scales: Any
    qmap: Any


def _state(draft: Draft, number: int) -> _State:
    value = draft.tensor(f"state{number}")
    if value.stride is not None:
        # The kernels go through memory, whatever the strides say, so which element a number belongs to is not certain.
        raise draft.error(f"state{number} is not contiguous, its strides are {list(value.stride)}")
    return _State(number, value, draft.left.pop(f"absmax{number}", None), draft.left.pop(f"qmap{number}", None))


def _take(draft: Draft, slot: str, state: _State, meaning: Meaning) -> None:
    number, value = state.number, state.value
    if value.dtype != "U8":
        draft.whole(slot, value, meaning, f"state{number}")
        return
    if not isinstance(state.scales, Stored):
        hint = "bitsandbytes wrote one scale per tensor before it had blocks" if f"max{number}" in draft.left else ""
        raise draft.error(f"state{number} has codes without absmax{number}", hint)
    if not isinstance(state.qmap, Stored):
        raise draft.error(f"state{number} has codes without their map qmap{number}")
    block = draft.block_of(f"state{number}", value.elements, state.scales.elements)
    fields = {"codes": value, "absmax": state.scales}
    draft.codes(slot, "Block8", fields, meaning, value.shape, block, (state.qmap, 256))


def _take_pair(draft: Draft, state: _State) -> None:
    """AdEMAMix's fast and slow average, which are one tensor. The slow one's beta may follow a schedule."""
    slow = Meaning() if draft.hyper.get("t_beta3") is not None else Meaning("gradient", beta=hyper("betas", 2))
    values = _halves(draft, f"state{state.number}", state.value)
    scales: tuple[Any, Any] = (None, None)
    if isinstance(state.scales, Stored):
        scales = _halves(draft, f"absmax{state.number}", state.scales)
    _take(draft, "exp_avg", replace(state, value=values[0], scales=scales[0]), FIRST)
    _take(draft, "exp_avg_slow", replace(state, value=values[1], scales=scales[1]), slow)


def _halves(draft: Draft, key: str, value: Stored) -> tuple[Stored, Stored]:
    """The two tensors that a contiguous tensor of shape [2, ...] consists of."""
    if value.shape[:1] != (2,):
        raise draft.error(f"{key} has shape {list(value.shape)}: AdEMAMix keeps two averages in it")
    first = replace(value, shape=value.shape[1:])
    return first, replace(first, start=value.start + first.elements * BITS[value.dtype] // 8)
