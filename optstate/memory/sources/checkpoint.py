"""Models known by a checkpoint of their optimizer, to estimate the memory of resuming."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from optstate.checkpoint.document.checkpoint import OPTSTATE, Checkpoint
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.formats.shared.embedded_state import WEIGHTS
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.parameter_names import give_names, read_names
from optstate.memory.errors import SourceError, checked_dtype
from optstate.memory.model import Model, ParamShape
from optstate.text import shown

__all__ = ["of_checkpoint", "recipe_of"]


def recipe_of(path: str | os.PathLike[str]) -> str:
    """Return the recipe, as `optstate recipes` lists it, whose state a checkpoint holds; "" if it does not tell.

    Raises:
        SourceError: if the path is not a checkpoint of an optimizer.
    """
    return _opened(path).document.recipe


def of_checkpoint(path: Path, dtype: str, names: str | None = None) -> Model:
    """Describe the model whose optimizer this was. dtype: where the file does not tell it. names: see `read_names`.

    Raises:
        SourceError: if it cannot be read, or says nothing of the shape of a parameter.
    """
    checkpoint = _opened(path)
    if names is not None:
        try:
            checkpoint = give_names(checkpoint, read_names(names))
        except CheckpointError as error:
            raise SourceError(str(error)) from error
    checked_dtype(dtype)
    return Model(
        name=path.name,
        parameters=tuple(_parameters(checkpoint, dtype)),
        origin=f"{path}, optimizer state ({checkpoint.kind}), torch {torch.__version__}",
        notes=_notes(checkpoint, dtype),
    )


def _opened(path: str | os.PathLike[str]) -> Checkpoint:
    try:
        return open_checkpoint(path)
    except CheckpointError as error:
        if WEIGHTS not in error.reason:
            raise SourceError(str(error)) from error
        hint = "give the model's config.json, safetensors file or package.module:factory"
        raise SourceError(f"{error}; {hint}") from error


def _parameters(checkpoint: Checkpoint, dtype: str) -> list[ParamShape]:
    own = checkpoint.kind == OPTSTATE  # only there a parameter without state is known to be frozen
    found = []
    for param in checkpoint.document.parameters:
        if param.shape is None:
            reason = f"the shape of parameter '{shown(param.name)}' is not in the file"
            raise SourceError(f"{shown(checkpoint.path)}: {reason}; give names with shapes (--names)")
        found.append(ParamShape(param.name, param.shape, param.dtype or dtype, param.has_state or not own))
    if not found:
        raise SourceError(f"{shown(checkpoint.path)}: the state of an optimizer without parameters")
    return found


def _notes(checkpoint: Checkpoint, dtype: str) -> tuple[str, ...]:
    document = checkpoint.document
    recipe = document.recipe or str(document.source.get("optimizer") or "an unknown recipe")
    step = f", step {document.steps[-1]}" if document.steps else ""
    notes = [
        f"resuming needs {checkpoint.nbytes / 2**30:.3f} GiB of state as the file has it ({shown(recipe)}{step})",
        "activations are not estimated: optimizer state says only shapes; give the model's config.json for them",
    ]
    if any(not param.dtype for param in document.parameters):
        notes.append(f"the file does not tell the dtype of weights: {dtype} is assumed")
    return (*notes, *checkpoint.notes)
