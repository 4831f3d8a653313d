"""State of bitsandbytes' optimizers, in 8 or 32 bits, nested as since 0.50 or flat as before. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Group, Parameter, SlotRecord
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.dtypes import BITS
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.files.torch_types import type_name
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.hyper_parameters import NEEDED, translate
from optstate.checkpoint.formats.shared.parameter_reader import Draft, Source, build_checkpoint
from optstate.checkpoint.formats.shared.state_dict import StateDict, number_of, stem_of
from optstate.checkpoint.formats.shared.statistics import FIRST, LION, SECOND, SGD, UNKNOWN, Meaning, find_beta
from optstate.checkpoint.formats.shared.tree_writer import (
    LayoutError,
    Tree,
    TreeWriter,
    check_rule,
    check_statistics,
    number,
)
from optstate.other_libraries import libraries
from optstate.text import shown

__all__ = ["FORMAT"]

NAME = "bitsandbytes"

NESTED = "__bnb_optimizer_quant_state__"


@dataclass(frozen=True)
class _Class:
    """An optimizer: what its one or two states are, and which of our recipes does the same, by bits."""

    slots: Mapping[str, Meaning]
    recipes: tuple[str, str] = ("", "")


CLASSES = {
    # Its Adam decays weights as its AdamW does.
    "AdamW": _Class({"exp_avg": FIRST, "exp_avg_sq": SECOND}, ("adamw", "adamw8bit")),
    "LAMB": _Class({"exp_avg": FIRST, "exp_avg_sq": SECOND}),
    "AdEMAMix": _Class({"exp_avg": FIRST, "exp_avg_sq": SECOND}),
    "Lion": _Class(LION, ("lion", "lion8bit")),
    "SGD": _Class(SGD, ("sgd", "sgdm8bit")),
    "LARS": _Class({"momentum_buffer": UNKNOWN}),
    "RMSprop": _Class({"square_avg": Meaning("square", signed=False, beta=("betas", 0))}),
    "Adagrad": _Class({"sum": Meaning("square_sum", signed=False)}),
    "": _Class({"state1": UNKNOWN}),
}
AMBIGUOUS = ("Lion", "SGD", "RMSprop", "Adagrad", "LARS")
UNTOLD = "the file does not say which optimizer it is: {}; give --optimizer to say what state1 is"
ASSUMED = "read as Lion's: SGD with dampening, which bitsandbytes ignores, looks the same; give --optimizer SGD for it"


def read_bitsandbytes(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return a checkpoint of one of bitsandbytes' optimizers; None if it is not its layout.

    optimizer: its name, as "Lion" or "Lion8bit", where the file does not tell.
    """
    nested = NESTED in found.kept
    if not nested and "state1" not in found.kept:
        return None
    found = _unnested(found)
    name, notes = _name(found, optimizer)
    eight = any(isinstance(value, Stored) and value.dtype == "U8" for s in found.state.values() for value in s.values())
    rule = CLASSES[name]
    full_name = (name + ("8bit" if eight else "")) if name else "unknown"
    source = Source(NAME, NAME, full_name, rule.recipes[eight], {"nested": nested})

    def say(draft: Draft) -> None:
        draft.take_step()
        for n, (slot, meaning) in enumerate(rule.slots.items(), 1):
            if f"state{n}" in draft.left:
                state = _state(draft, n)
                if name == "AdEMAMix" and n == 1:
                    _take_pair(draft, state)
                else:
                    _take(draft, slot, state, meaning)

    return build_checkpoint(found, source, say, notes)


def _unnested(found: StateDict) -> StateDict:
    """Return the flat form; the keys beside the nested ones stay."""
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
        three = all(find_beta(group, "betas", 2) is not None for group in found.groups)
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
    """Return what the hyper-parameters of one group tell of a rule with one state.

    Lion, SGD and LARS have no eps; Adagrad has no betas; `betas` are (momentum, dampening) of SGD and LARS, and
    dampening is 0 in all runs that mean what they do; only LARS keeps a norm.
    """
    first, second, eps = find_beta(group, "betas", 0), find_beta(group, "betas", 1), number_of(group.get("eps"))
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
    slow = UNKNOWN if draft.hyper.get("t_beta3") is not None else Meaning("gradient", beta=("betas", 2))
    values = _halves(draft, f"state{state.number}", state.value)
    scales: tuple[Any, Any] = (None, None)
    if isinstance(state.scales, Stored):
        scales = _halves(draft, f"absmax{state.number}", state.scales)
    _take(draft, "exp_avg", replace(state, value=values[0], scales=scales[0]), FIRST)
    _take(draft, "exp_avg_slow", replace(state, value=values[1], scales=scales[1]), slow)


def _halves(draft: Draft, key: str, value: Stored) -> tuple[Stored, Stored]:
    """Return the two tensors that a contiguous tensor of shape [2, ...] consists of."""
    if value.shape[:1] != (2,):
        raise draft.error(f"{key} has shape {list(value.shape)}: AdEMAMix keeps two averages in it")
    first = replace(value, shape=value.shape[1:])
    return first, replace(first, start=value.start + first.elements * BITS[value.dtype] // 8)


# --- writing ------------------------------------------------------------------------------------------------------

HIDDEN = ("max1", "max2", "new_max1", "new_max2", "gnorm_vec", "unorm_vec")
"""What bitsandbytes keeps among the nested keys besides codes, maps and maxima."""

PLACES = {"exp_avg_sq": 2, "state2": 2}
"""Of statistics that are not the first."""

BLOCK = 256  # fixed
STORES_IN_WORDS = f"Block8() of {BLOCK} elements or Full()"

MOMENTS = {"exp_avg": FIRST, "exp_avg_sq": SECOND}
HYPERS: Mapping[str, Mapping[str, Any]] = {
    "adam": {
        "lr": NEEDED,
        "betas": NEEDED,
        "eps": NEEDED,
        "weight_decay": NEEDED,
        "alpha": 0.0,
        "t_alpha": None,
        "t_beta3": None,
    },
    "lion": {"lr": NEEDED, "betas": NEEDED, "eps": 0.0, "weight_decay": NEEDED},
    "sgd": {"lr": NEEDED, "betas": NEEDED, "eps": 0.0, "weight_decay": NEEDED},
}
"""By rule: the keys and defaults of the class, in order (0.50)."""


def write_bitsandbytes(writer: TreeWriter) -> Tree:
    """Return what bitsandbytes' AdamW, Lion and SGD keep, in 8 bits or fp32 parameter by parameter.

    Raises:
        LayoutError: for what they do not keep.
    """
    rule = "" if writer.same else check_rule(writer, *HYPERS)
    meanings = {"adam": MOMENTS, "lion": LION}.get(rule, SGD)
    nested = writer.document.source.get("nested", True)

    def state_of(param: Parameter) -> Tree:
        check_statistics(writer, param, meanings)
        if not param.slots and not writer.same:
            return {}
        outside = _count(writer, param, rule)
        inside = _quantised(writer, param)
        for key, value in writer.extra(param).items():
            (inside if key in HIDDEN else outside)[key] = value
        return outside | ({NESTED: inside} if nested and inside else inside)

    def hyper_of(place: int, group: Group) -> Tree:
        hyper = writer.common(group)
        if rule == "sgd":
            hyper["betas"] = (hyper.pop("momentum", 0.0), 0)
        return translate(writer, place, hyper, HYPERS[rule])

    return writer.tree(state_of, hyper_of)


def _count(writer: TreeWriter, param: Parameter, rule: str) -> Tree:
    if param.step is None and rule in ("lion", "sgd"):
        writer.note("the file counts no steps, which these rules do not depend on after the first: they are set to 1")
        param = replace(param, step=1)
    return writer.step(param, "int")


def _quantised(writer: TreeWriter, param: Parameter) -> Tree:
    """Codes, maps and maxima in bitsandbytes' order; fp32 statistics without maps and maxima."""
    codes: Tree = {}
    maxima: Tree = {}
    for slot, record in sorted(param.slots.items(), key=lambda item: PLACES.get(item[0], 1)):
        n = PLACES.get(slot, 1)
        if f"state{n}" in codes:
            raise LayoutError(
                f"'{shown(param.name)}' has {', '.join(param.slots)}: AdEMAMix keeps two averages in one tensor, "
                "which cannot be put together here; write a file of optstate's own"
            )
        if "codes" in record.fields:
            _check_block8(writer, param, slot, record)
            codes |= {f"state{n}": writer.tensor(record.fields["codes"]), f"qmap{n}": writer.map_of(record)}
            maxima[f"absmax{n}"] = writer.tensor(record.fields["absmax"])
        else:
            codes[f"state{n}"] = writer.full(param, slot, record, STORES_IN_WORDS, "block8")
            if codes[f"state{n}"].dtype != "F32" and not writer.same:
                raise writer.misfit(param, slot, record, STORES_IN_WORDS, "fp32")
    if maxima and len(maxima) < len(param.slots):
        stores = ", ".join(f"{slot} in {record.store}" for slot, record in param.slots.items())
        raise LayoutError(
            f"'{shown(param.name)}' has {stores}: bitsandbytes keeps both in 8 bits or both in fp32; convert both with "
            "--slot"
        )
    return codes | maxima


def _check_block8(writer: TreeWriter, param: Parameter, slot: str, record: SlotRecord) -> None:
    fits = record.store.startswith("Block8(") and record.block == BLOCK
    if not fits or len(writer.document.codebooks.get(record.codebook, ())) not in (0, BLOCK):
        raise writer.misfit(param, slot, record, STORES_IN_WORDS, "block8")


def words_of_ours(hyper: dict[str, Any], rule: str) -> dict[str, Any]:
    """Return the hyper-parameters in our words: SGD's momentum is among `betas`, and eps is of use to Adam alone."""
    if rule not in ("sgd", "lion"):
        return hyper
    hyper = {key: value for key, value in hyper.items() if key != "eps"}
    if rule == "sgd":
        betas = hyper.pop("betas", None)
        hyper["momentum"] = number(betas[0]) if isinstance(betas, tuple | list) and betas else None
    return hyper


_HELD = frozenset({"Full", "Block8"})
FORMAT = Format(
    name=NAME,
    read=read_bitsandbytes,
    write=write_bitsandbytes,
    stores={"": _HELD | {"Unknown"}, "adam": _HELD, "lion": _HELD, "sgd": _HELD},
    rules=(libraries.BNB_ADAMW, libraries.BNB_LION, libraries.BNB_SGD, *libraries.BNB_OTHERS),
    our_words=words_of_ours,
)
