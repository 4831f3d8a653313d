"""Causal language models as transformers builds them from a config, without weights and without a network."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from optstate.memory.errors import SourceError, checked_dtype, in_words
from optstate.memory.model import BuildOptions, Model, ParamShape
from optstate.memory.sources.modules import buffer_bytes, families, parameters_of, probe
from optstate.text import shown

__all__ = ["LABELS", "causal_lm", "prepared", "token_batch", "transformers_version"]

Batch = tuple[tuple[Any, ...], dict[str, Any]]

LABELS = {"id2label", "label2id", "num_labels"}
"""Keys of classifiers: a language model has no labels, and transformers would make a word for each."""

NOT_SIZES = LABELS | {
    "_attn_implementation",
    "_attn_implementation_internal",
    "_name_or_path",
    "auto_map",
    "dtype",
    "gradient_checkpointing",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys of a config about its file or about a run, for which the setting of an estimate counts instead."""

MOST_MODULES = 200_000
"""Several times the modules of the largest models, in which every expert is several modules."""

SDPA = "sdpa"
CONFIGURATIONS = "transformers.models.auto.configuration_auto"

LEARNED_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "positions_embed", "position_embedding")


def _library(name: str) -> Any:
    """Import a module of transformers, which takes a second and so waits until it is needed."""
    return importlib.import_module(name)


def transformers_version() -> str:
    """Return the installed transformers' version; "" without one that can be imported."""
    try:
        return str(_library("transformers").__version__)
    except ImportError:
        return ""


def causal_lm(config: Mapping[str, Any], name: str, origin: str, dtype: str) -> Model:
    """Describe the causal language model of a config, with everything a trace needs.

    name, origin: of the model, in words. dtype: of its weights, torch's name.

    Raises:
        SourceError: if transformers knows no causal language model of this type, or cannot build it; `build` also if
            it has no such attention or no checkpointing.
    """
    _check_causal(config)
    plain = _without(config, NOT_SIZES)
    torch_dtype = checked_dtype(dtype)
    with _quiet():
        whole = _configured(plain)
        _check_named(plain, whole)
        module = probe(lambda: _made(whole, None), torch_dtype)
    parameters = parameters_of(module)
    own_attention = str(getattr(module.config, "_attn_implementation", SDPA))  # what transformers would take
    positions = getattr(whole, "max_position_embeddings", None)
    learned = positions if _has_learned_positions(parameters) else None

    def build(options: BuildOptions) -> nn.Module:
        with _quiet():
            attention = own_attention if options.attention == SDPA else options.attention
            made = _made(_configured(_with_layers(plain, whole, options.layers)), attention)
            return prepared(made, options.checkpointing)

    return Model(
        name=name,
        parameters=parameters,
        origin=f"{origin}, {type(module).__name__} of transformers {transformers_version()}, torch {torch.__version__}",
        buffer_bytes=buffer_bytes(module),
        layers=_identical_layers(parameters, whole),
        build=build,
        batch=token_batch(learned),
        notes=_notes(config, own_attention, positions, learned),
    )


def prepared(module: nn.Module, checkpointing: bool) -> nn.Module:
    """Prepare a module as a training run has it: training, without a cache, with checkpoints if these are wanted.

    Raises:
        SourceError: if it has no checkpointing to turn on.
    """
    module.train()
    config: Any = getattr(module, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if checkpointing:
        _checkpoint(module)
    return module


def _checkpoint(module: Any) -> None:
    """Turn checkpointing on, by the method's name since transformers 5.23 or its name before."""
    how = {"use_reentrant": False}
    try:
        if hasattr(module, "activation_checkpointing_enable"):
            module.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
        elif hasattr(module, "gradient_checkpointing_enable"):
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        else:
            hint = "has no gradient_checkpointing_enable(): checkpoint inside it, and leave the setting out"
            raise SourceError(f"the module, a {type(module).__name__}, {hint}")
    except ValueError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{type(module).__name__} cannot checkpoint its activations: {in_words(error)}") from error


def token_batch(most: int | None = None) -> Callable[[int, int], Batch]:
    """Return a function that makes batches of tokens with labels, as a causal language model is trained on.

    Args:
        most: number of learned positions, the longest sequence; None for no bound.
    """

    def batch(batch_size: int, seq_len: int) -> Batch:
        if most is not None and seq_len > most:
            raise SourceError(f"a sequence of {seq_len} tokens: the model has learned positions for {most}", usage=True)
        ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
        labels: Tensor = torch.zeros(batch_size, seq_len, dtype=torch.long)
        return (), {"input_ids": ids, "labels": labels}

    return batch


# --- what the config must say -------------------------------------------------------------------------------------


def _check_causal(config: Mapping[str, Any]) -> None:
    """Refuse a config from which transformers would build another kind of model, or run the model's own code."""
    modeling_auto = _library("transformers.models.auto.modeling_auto")
    kind, known = config["model_type"], modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    text = shown(kind)
    if kind not in _library(CONFIGURATIONS).CONFIG_MAPPING:
        if config.get("auto_map"):
            reason = f"'{text}' is code of its own (auto_map), which is not run"
            raise SourceError(f"{reason}: import it yourself and give package.module:factory")
        raise SourceError(f"transformers {transformers_version()} knows no model_type '{text}'")
    factory = "give package.module:factory for anything else"
    if kind not in known:
        raise SourceError(f"transformers has no causal language model of type '{text}'; {factory}")
    if kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and config.get("is_decoder") is not True:
        raise SourceError(f"'{text}' is an encoder unless is_decoder is true, no causal language model; {factory}")
    classes = config.get("architectures")
    causal = {name.lower() for names in known.values() for name in ([names] if isinstance(names, str) else names)}
    if isinstance(classes, list) and classes and not any(str(name).lower() in causal for name in classes):
        raise SourceError(f"the config is of {shown(str(classes[0]))}, which is no causal language model; {factory}")


def _check_named(plain: Mapping[str, Any], config: Any) -> None:
    """Refuse a config without one of the main sizes: the default of a type is that of another model."""
    names = {**getattr(config, "attribute_map", {})}
    for size in ("vocab_size", "hidden_size", "num_hidden_layers"):
        spellings = {size, names.get(size, size), "n_embed" if size == "hidden_size" else size}
        if hasattr(config, size) and not spellings & set(plain) and not config.sub_configs:
            raise SourceError(f"the config of a {shown(config.model_type)} has no {names.get(size, size)}")


def _without(value: Any, keys: set[str]) -> Any:
    """Return the config without these keys, in parts of it, too."""
    if isinstance(value, Mapping):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return value


def _notes(
    config: Mapping[str, Any], own_attention: str, positions: int | None, learned: int | None
) -> tuple[str, ...]:
    notes = []
    if own_attention != SDPA:
        notes.append(f"it has no {SDPA} attention in transformers: {own_attention} is run")
    if config.get("quantization_config"):
        notes.append("its quantization_config is left out: the weights are counted as trained, unpacked")
    if learned is None and isinstance(positions, int):
        notes.append(f"made for sequences of up to {positions} tokens")
    return tuple(notes)


# --- building -----------------------------------------------------------------------------------------------------


def _configured(plain: Mapping[str, Any]) -> Any:
    """Make a config object of transformers."""
    try:
        return _library(CONFIGURATIONS).CONFIG_MAPPING[plain["model_type"]].from_dict(dict(plain))
    except Exception as error:  # whatever the class of a config says about its values
        raise SourceError(f"the config is not possible: {in_words(error)}") from error


def _made(config: Any, attention: str | None) -> Any:
    """Make a model of transformers in the default dtype; with its choice of attention for None."""
    try:
        with _counted():
            module = _library("transformers").AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, trust_remote_code=False
            )
    except Exception as error:  # whatever a model's constructor says
        with_attention = f" with {shown(attention)} attention" if attention else ""
        raise SourceError(f"transformers cannot build it{with_attention}: {in_words(error)}") from error
    if getattr(module, "loss_type", "") is None:
        module.loss_type = "ForCausalLM"  # what it takes then, after a remark about it
    return module


def _with_layers(plain: Mapping[str, Any], config: Any, layers: int | None) -> Mapping[str, Any]:
    """Return the config with so many of its identical layers."""
    if layers is None:
        return plain
    key = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    changed = {**_without(plain, {"num_hidden_layers", key}), key: layers}
    kinds = plain.get("layer_types")  # where the config leaves them out, its class tells them by the number of layers
    return {**changed, "layer_types": [kinds[0]] * layers} if kinds else changed


def _identical_layers(parameters: tuple[ParamShape, ...], config: Any) -> int | None:
    """Return the number of layers in the config if all have equal parameters and are of one kind; else None."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or len(set(getattr(config, "layer_types", None) or ())) > 1:
        return None
    for layers in families(parameters).values():
        if len(layers) == count:
            shapes = {tuple(_apart(param) for param in layer) for layer in layers}
            return count if len(shapes) == 1 else None
    return None


def _apart(param: ParamShape) -> tuple[Any, ...]:
    """Return a layer's parameter without the layer's number: the part of the name behind it, shape and dtype."""
    rest = param.name.split(".")
    place = next(i for i, part in enumerate(rest) if part.isdigit())
    return (*rest[place + 1 :], param.shape, param.dtype, param.trainable)


def _has_learned_positions(parameters: tuple[ParamShape, ...]) -> bool:
    return any(param.name.removesuffix(".weight").rpartition(".")[2] in LEARNED_POSITIONS for param in parameters)


@contextmanager
def _counted() -> Iterator[None]:
    """End the building of a model that has more modules than any model has, before they fill the memory."""
    count = 0

    def counting(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise ValueError(f"it has more than {MOST_MODULES} modules: a size in it must be wrong")

    handle = register_module_module_registration_hook(counting)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' remarks about token ids and the like, as nothing is generated here."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
