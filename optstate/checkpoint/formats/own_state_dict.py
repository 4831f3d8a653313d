"""State of this library's own optimizers as `state_dict()` gives it: `<slot>` or `<slot>.<field>`. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import WEIGHT, Document
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.parameter_reader import BLOCKS, Draft, Source, build_checkpoint
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.checkpoint.formats.shared.statistics import FIRST, LION, SECOND, SGD, SM3, SQUARE, Meaning

__all__ = ["FORMAT", "KIND"]

KIND = "optstate-state_dict"
HEADER = "optstate"

BY_TENSORS = "the stores are told by their tensors alone: optstate.save writes what each of them is"

FIELDS = frozenset(("codes", "absmax", "row", "col", "mean", "compensation", "correction"))
UNSIGNED = ("exp_avg_sq", "exp_avg_res", "max_exp_avg_sq", "square_avg", "accumulator")


def read_own_state_dict(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return a checkpoint of what one of our optimizers keeps; None if it is none of ours.

    `state_dict()` says which store each statistic is in; torch.distributed.checkpoint drops that, and then the tensors
    must tell.

    Raises:
        CheckpointError: naming the first parameter whose tensors contradict each other.
    """
    header = found.rest.get(HEADER)
    stores = header.get("stores") if isinstance(header, dict) else None
    if not isinstance(stores, dict) and not any(key.partition(".")[2] in FIELDS for key in found.kept):
        return None
    words = _words(found, stores if isinstance(stores, dict) else {})
    meanings = _meanings(found)

    def say(draft: Draft) -> None:
        draft.take_step()
        slots = _by_slot(draft)
        told = words.get(draft.name, {})
        for slot in sorted(slots, key=lambda slot: _is_packed(slots[slot])):  # those that tell the shape come first
            _say(draft, slot, slots[slot], meanings.get(slot, Meaning(signed=slot not in UNSIGNED)), told.get(slot, ""))

    bare = replace(found, rest={key: value for key, value in found.rest.items() if key != HEADER})
    checkpoint = build_checkpoint(bare, Source(KIND, "optstate", optimizer or ""), say, [] if words else [BY_TENSORS])
    return replace(checkpoint, document=_told(checkpoint.document, header if isinstance(header, dict) else {}))


def _told(document: Document, header: Mapping[Any, Any]) -> Document:
    """Return the document with what the header says besides: how weights are written, and the fused norm clip."""
    written, clip = header.get("weights"), header.get("clip_grad_norm")
    if isinstance(written, dict):
        ways = [written.get(place) for place in range(len(document.parameters))]
        parameters = tuple(
            replace(param, weights=way) if isinstance(way, str) else param
            for param, way in zip(document.parameters, ways, strict=True)
        )
        document = replace(document, parameters=parameters)
    if isinstance(clip, int | float) and not isinstance(clip, bool):
        document = replace(document, clip_grad_norm=clip)
    return document


def _words(found: StateDict, stores: Mapping[Any, Any]) -> dict[str, dict[str, str]]:
    """Return the store of every slot in words, by the parameter's name."""
    order = [ident for group in found.ids for ident in group]
    told = {found.names[ident]: stores.get(place) for place, ident in enumerate(order)}
    return {
        name: {slot: text for slot, text in of.items() if isinstance(slot, str) and isinstance(text, str)}
        for name, of in told.items()
        if isinstance(of, dict)
    }


def _meanings(found: StateDict) -> dict[str, Meaning]:
    """Return what the statistics are, by the hyper-parameters that the transforms of our own recipes have."""
    slots = {key.partition(".")[0] for key in found.kept} - {"step", WEIGHT}
    known = {
        **SGD,
        "accumulator": SM3["accumulator"],
        **({"exp_avg": SM3["exp_avg"]} if "accumulator" in slots else {}),
    }
    if slots == {"exp_avg", "exp_avg_sq"} and {"betas", "eps"} <= found.keys and "decay_rate" not in found.keys:
        return {"exp_avg": FIRST, "exp_avg_sq": SECOND}
    if slots == {"exp_avg"} and "betas" in found.keys:
        return LION
    if "decay_rate" in found.keys and "exp_avg_res" not in slots:
        momentum = "beta1" if "beta1" in found.keys else "momentum"
        return {
            "exp_avg": Meaning("update", beta=(momentum, None)),
            "exp_avg_sq": SQUARE,
        }
    return known


def _is_packed(fields: Mapping[str, Stored]) -> bool:
    """Whether its tensors do not have the parameter's shape."""
    return "codes" in fields and "row" not in fields and len(fields["codes"].shape) == 1


def _by_slot(draft: Draft) -> dict[str, dict[str, Stored]]:
    slots: dict[str, dict[str, Stored]] = {}
    for key in [key for key, value in draft.left.items() if isinstance(value, Stored)]:
        slot, _, field = key.partition(".")
        slots.setdefault(slot, {})[field] = draft.tensor(key)
    return slots


def _say(draft: Draft, slot: str, fields: dict[str, Stored], meaning: Meaning, words: str) -> None:
    kind = words.partition("(")[0]
    match sorted(fields):
        case [""]:
            draft.whole(slot, fields[""], meaning)
        case ["absmax", "codes"]:
            _codes(draft, slot, fields, meaning, words)
        case ["col", "row"] if kind == "Factored" or (not kind and slot != "accumulator"):
            draft.factors(slot, fields["row"], fields["col"], meaning)
        case _:
            if kind == "AxisMax" or "rank1=True" in words:
                draft.has_shape(_of_axes(fields), slot)
            if "codes" in fields:
                fields["codes"] = _flat(fields["codes"])
            draft.put(slot, words or ("AxisMax()" if slot == "accumulator" else "Unknown()"), meaning, fields)


def _of_axes(fields: Mapping[str, Stored]) -> tuple[int, ...]:
    """Return the shape of a parameter with a vector along every dimension."""
    leading = sorted((key for key in fields if key.startswith("axis")), key=lambda key: (len(key), key))
    return tuple(fields[key].elements for key in [*leading, "row", "col"] if key in fields)


def _codes(draft: Draft, slot: str, fields: dict[str, Stored], meaning: Meaning, words: str) -> None:
    """Say what codes of 8 bits in the parameter's shape are, or of 4 bits, two to a byte.

    In memory maxima and codes of 4 bits are in rows, where these hold whole blocks and bytes; in a file they are flat.
    """
    codes, scales = fields["codes"], fields["absmax"].elements
    shape, kind = draft.shape, words.partition("(")[0]
    fields = {"codes": codes, "absmax": _flat(fields["absmax"])}
    in_pairs = codes.dtype == "U8" and (codes.shape != shape if shape is not None else _looks_packed(codes, scales))
    packed = kind == "Block4" or (not kind and in_pairs)
    if packed:
        fields["codes"] = _flat(codes)
        if shape is None and len(codes.shape) > 1:
            shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    if packed and shape is None:  # an odd number of elements looks like an even one
        block = re.search(r"block=(\d{1,6})", words)
        draft.put(slot, words, meaning, fields, block=int(block[1]) if block else BLOCKS["Block4"])
        return
    store = kind or ("Float8" if codes.dtype == "F8_E4M3" else "Block4" if packed else "Block8")
    shape = shape if packed and shape is not None else codes.shape
    draft.codes(slot, store, fields, meaning, shape, draft.block_of(slot, prod(shape), scales))


def _looks_packed(codes: Stored, scales: int) -> bool:
    """Return whether bytes in rows are two codes each, if nothing else tells.

    Their blocks are then those that `Block4` has unless it is told otherwise, and not `Block8`'s.
    """
    return len(codes.shape) > 1 and scales * BLOCKS["Block4"] == 2 * codes.elements


def _flat(stored: Stored) -> Stored:
    """Return a tensor as it is in a file of our own."""
    return replace(stored, shape=(stored.elements,)) if stored.stride is None else stored


FORMAT = Format(name=KIND, read=read_own_state_dict, names_itself=True)
