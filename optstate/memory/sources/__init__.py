"""Sources of a model to be estimated: a name, a config, weights, optimizer state, Python code."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.file_kinds import (
    FOLDER,
    JSON,
    PICKLE,
    SAFETENSORS,
    TORCH_OLD,
    TORCH_ZIP,
    UNKNOWN,
    ZIP,
    identify,
)
from optstate.memory.errors import SourceError, checked_dtype
from optstate.memory.model import Model
from optstate.memory.sources import config, factory, headers
from optstate.memory.sources.builtin import CONFIGS, unknown_source
from optstate.memory.sources.checkpoint import of_checkpoint, recipe_of
from optstate.text import shown

__all__ = ["SourceError", "find_model", "known_models", "recipe_of"]

READABLE = (FOLDER, JSON, PICKLE, SAFETENSORS, TORCH_OLD, TORCH_ZIP, ZIP)

Source = str | os.PathLike[str] | nn.Module | Callable[[], nn.Module]


def known_models() -> list[str]:
    """List the published models that are known by name, in the order of families and sizes."""
    return list(CONFIGS)


def find_model(source: Source, *, inputs: Any = None, dtype: str = "bfloat16", names: str | None = None) -> Model:
    """Find the model that a source leads to; nothing is allocated, nothing is downloaded.

    Args:
        source: one of these, in this order:
            an `nn.Module`, or a function without arguments that makes one;
            a path: a config.json or a folder with one (built by transformers if that is installed, and never by code
            that comes with a model), a safetensors file, the index or folder of a sharded set (shapes only), the
            checkpoint of an optimizer (shapes only);
            the name of a published model (`known_models`);
            `package.module:factory`, imported as `python -m` would, from the working directory, too.
        inputs: what the model is called with where it is no language model of transformers: `package.module:function`
            or a function, called with batch size and sequence length or with nothing, or the arguments themselves.
        names: what gives names and shapes to the parameters of a checkpoint of an optimizer that does not tell them:
            a JSON file or `package.module:factory`.
        dtype: of weights, torch's name. Files of weights and modules in memory keep their own; a note says so.

    Raises:
        SourceError: if there is no such source, or no model can be made of it.
    """
    checked_dtype(dtype)
    if isinstance(source, nn.Module):
        return factory.of_module(source, inputs, dtype)
    if not isinstance(source, str | os.PathLike):
        if not callable(source):
            raise SourceError(f"a {type(source).__name__} is no source of a model", usage=True)
        return factory.of_callable(source, inputs, dtype)
    text = os.fspath(source)
    if not os.path.lexists(text) and factory.is_name(text):
        return factory.of_named(text, inputs, dtype)
    return _with_inputs(_of_text(text, dtype, names), inputs)


def _of_text(text: str, dtype: str, names: str | None) -> Model:
    """Return the model at a path if there is one, else of a name."""
    if os.path.lexists(text):
        return _of_path(Path(text), dtype, names)
    model = config.of_name(text, dtype)
    if model is None:
        raise unknown_source(text)
    return model


def _with_inputs(model: Model, inputs: Any) -> Model:
    if inputs is None:
        return model
    if model.build is None:
        raise SourceError(f"inputs are of no use for {shown(model.origin)}: only shapes are known", usage=True)
    batch = factory.batch_of(inputs)
    return replace(model, batch=batch, sized=batch is None or batch.sized)


def _of_path(path: Path, dtype: str, names: str | None) -> Model:
    """Return the model of a file or folder by its content: a config before weights, weights before optimizer state."""
    text = str(path)
    try:
        kind = identify(path)
    except CheckpointError as error:
        raise SourceError(str(error)) from error
    if kind == FOLDER and (path / config.FILE).is_file():
        return config.of_config_file(path / config.FILE, dtype)
    index = path.name.endswith(headers.INDEX)
    if not index and (kind == JSON or (kind == UNKNOWN and path.suffix == ".json")):
        return config.of_config_file(path, dtype)
    if kind not in READABLE:
        raise SourceError(f"{shown(text)}: {kind}: no config.json, no safetensors file, no optimizer state")
    if kind in (FOLDER, SAFETENSORS, JSON):
        found = headers.weights_at(path)
        if found:
            return headers.of_headers(path, found, dtype)
    try:
        return of_checkpoint(path, dtype, names)
    except SourceError as error:
        if kind != FOLDER:
            raise
        raise SourceError(f"{error} (there is no {config.FILE} and no safetensors file of weights, either)") from error
