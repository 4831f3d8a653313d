"""State of adam-mini, read only: a group per parameter, and second moments by block. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.parameter_reader import Draft, Source, build_checkpoint, without
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.checkpoint.formats.shared.statistics import Meaning
from optstate.other_libraries import libraries

__all__ = ["FORMAT"]

NAME = "adam-mini"
FIRST = Meaning("gradient", beta=("beta1", None))
SECOND = Meaning("square", signed=False, beta=("beta2", None))
KEYS = {"step", "m", "v", "vmean", "head_per_gpu", "neuron_per_gpu", "reduced", "block_numel"}

LOWER_CASE = "names are in lower case: adam-mini writes them so"
HEADS = "first moments of queries and keys have the shape of their blocks; the parameter's own is not in the file"


def read_adam_mini(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return a checkpoint of adam-mini; None if it is not its layout."""
    if not {"name", "beta1", "beta2", "eps"} <= found.keys or not found.kept <= KEYS:
        return None
    names = [group["name"] for group in found.groups]
    notes = [HEADS] if "head_per_gpu" in found.kept else []
    about = {}
    alone = all(len(ids) == 1 for ids in found.ids) and all(isinstance(name, str) for name in names)
    if alone and len(set(names)) == len(names):
        found = replace(found, names=dict(zip(found.names, names, strict=True)))
        notes.append(LOWER_CASE)
        about = {"lower_case": True}
    return build_checkpoint(found, Source(NAME, NAME, "Adam_mini", "adammini", about), _say, notes)


def _say(draft: Draft) -> None:
    draft.take_step()
    if not draft.left:
        return
    first = draft.tensor("m")
    if "head_per_gpu" in draft.left:
        draft.put("exp_avg", "Unknown()", FIRST, {"": first})
        draft.put("exp_avg_sq", "Unknown()", SECOND, {"": draft.tensor("vmean")})
    elif "v" in draft.left:
        draft.whole("exp_avg", first, FIRST, "m")
        draft.whole("exp_avg_sq", draft.tensor("v"), SECOND, "v")
    else:
        draft.whole("exp_avg", first, FIRST, "m")
        _blocks(draft, first, draft.tensor("vmean"))


def _blocks(draft: Draft, first: Stored, means: Stored) -> None:
    """One mean per row, or one for all."""
    if means.shape == ():
        draft.put("exp_avg_sq", "Grouped(by='tensor')", SECOND, {"mean": means})
    elif len(first.shape) == 2 and means.shape == (first.shape[0], 1):
        draft.put("exp_avg_sq", "Grouped(by='row')", SECOND, {"mean": without(means, 1)})
    else:
        shape = f"vmean has shape {list(means.shape)} where m has {list(first.shape)}"
        raise draft.error(f"{shape}: it must have one number per row, or one")


def words_of_ours(hyper: dict[str, Any], rule: str) -> dict[str, Any]:
    """Return the hyper-parameters in our words, which have both weights of the past as `betas`."""
    if not {"beta1", "beta2"} <= hyper.keys():
        return hyper
    rest = {key: value for key, value in hyper.items() if key not in ("beta1", "beta2")}
    return rest | {"betas": (hyper["beta1"], hyper["beta2"])}


FORMAT = Format(name=NAME, read=read_adam_mini, rules=(libraries.ADAM_MINI,), our_words=words_of_ours)
