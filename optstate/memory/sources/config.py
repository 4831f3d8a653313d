"""Models known by a config.json or a published name: built by transformers, or shapes alone without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.file_kinds import MAX_HEADER, read_whole
from optstate.checkpoint.files.strict_json import NotJSONError, parse
from optstate.collector import paused
from optstate.memory.errors import SourceError, checked_dtype
from optstate.memory.model import Model, ParamShape
from optstate.memory.sources.builtin import find_config
from optstate.memory.sources.causal_lm import LABELS, causal_lm, transformers_version
from optstate.memory.sources.shapes import ARCHITECTURES, check_number, check_sizes, list_parameters
from optstate.text import shown

__all__ = ["FILE", "of_config", "of_config_file", "of_name"]

FILE = "config.json"


def of_name(name: str, dtype: str) -> Model | None:
    """Describe a published model; None if there is none of this name."""
    config = find_config(name)
    return None if config is None else of_config(config, name.lower(), "sizes as published", dtype)


def of_config_file(path: Path, dtype: str) -> Model:
    """Describe the model of a config.json.

    Raises:
        SourceError: if it is not the config of a causal language model; the message begins with the path.
    """
    config = _config_in(path)
    parent = path.resolve().parent.name
    try:
        return of_config(config, parent if path.name == FILE and parent else path.stem, str(path), dtype)
    except SourceError as error:
        raise SourceError(f"{shown(str(path))}: {error}", usage=error.usage) from error


def of_config(config: Mapping[str, Any], name: str, origin: str, dtype: str) -> Model:
    """Describe the model of a config, built by transformers where that is installed, else by its shapes.

    name, origin: of the model, in words. dtype: of its weights, torch's name.

    Raises:
        SourceError: if there is no causal language model of this kind, or sizes are missing or impossible.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise SourceError("no config of a model: it has no model_type")
    _check_all_sizes(config)
    shapes = list_parameters(config) if kind in ARCHITECTURES else None
    with paused():  # while transformers is imported
        if transformers_version():
            return causal_lm(config, name, origin, dtype)
    if shapes is None:
        known = ", ".join(ARCHITECTURES)
        raise SourceError(f"model_type '{shown(kind)}' needs transformers, which is not installed; without it: {known}")
    checked_dtype(dtype)
    return Model(
        name=name,
        parameters=tuple(ParamShape(param, shape, dtype) for param, shape in shapes),
        origin=f"{origin}, shapes of {kind} models, torch {torch.__version__}",
        notes=("activations are not estimated: install transformers, whose class of the model is run for them",),
    )


def _check_all_sizes(config: Mapping[str, Any]) -> None:
    """Check the sizes in a config and in nested configs, such as those of a model for text and images."""
    check_sizes(config)
    for key, value in config.items():
        if key not in LABELS:
            check_number(key, value)
            if isinstance(value, Mapping):
                _check_all_sizes(value)


def _config_in(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        config = parse(read_whole(path, MAX_HEADER).decode("utf-8"), pairs=dict)
    except CheckpointError as error:
        raise SourceError(str(error)) from error
    except (UnicodeDecodeError, NotJSONError) as error:
        raise SourceError(f"{shown(str(path))}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise SourceError(f"{shown(str(path))}: no config of a model: it holds a {type(config).__name__}")
    return config
