"""`optstate.estimate`: the memory that training a model needs, answered before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from optstate import weights as ways
from optstate.memory.errors import QuestionError
from optstate.memory.model import Model, Setting
from optstate.memory.question import Question, find_recipe
from optstate.memory.result import Estimate
from optstate.memory.shard import SHARDS
from optstate.memory.sources import SourceError, find_model
from optstate.memory.verdict import find_gpu as gpu_of
from optstate.optimizer.optimizer import Optimizer
from optstate.weights import Weights

__all__ = ["DTYPES", "WEIGHTS", "estimate"]

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
"""Short names of the dtypes weights may have; torch's own names are taken, too."""

WEIGHTS: dict[str, Weights | str] = {
    "auto": "auto",
    "plain": ways.Plain(),
    "stochastic": ways.StochasticRounding(),
    "kahan": ways.Kahan(),
    "split8": ways.Split(8),
    "split16": ways.Split(16),
}
"""Short names of the ways to write weights."""

ATTENTION = ("sdpa", "eager")
CLIPS = ("none", "norm")

LENGTH = 2048

ModelSource = str | os.PathLike[str] | nn.Module | Callable[[], nn.Module]
RecipeLike = str | Callable[..., Optimizer]


def estimate(
    source: ModelSource,
    *,
    recipe: RecipeLike | Sequence[RecipeLike] = "adalomo",
    fused_backward: bool | None = None,
    dtype: str | torch.dtype = "bfloat16",
    weights: Weights | str = "auto",
    batch_size: int = 1,
    seq_len: int | None = None,
    grad_accum: int = 1,
    checkpointing: bool = False,
    attention: str = "sdpa",
    clip: str = "none",
    world_size: int = 1,
    shard: str = "none",
    example_inputs: Any = None,
    gpu: str | float | None = None,
    exact: bool = False,
) -> Estimate:
    """Tell what training needs in memory, part by part, and whether it fits, from shapes and a step on fake tensors.

    Weights, gradients and optimizer state are exact: they come from the recipe's own plan. Activations, temporaries and
    the peak come from running the model and the real optimizer, hooks included, on tensors without values; where a GPU
    has other kernels than a CPU, the GPU's are counted. Nothing is downloaded, and no GPU is needed. Printing the
    answer shows a table in GiB (2**30 bytes).

    Args:
        source: a published model's name ("llama-7b"), a config.json or a folder with one, a safetensors file or index
            (shapes only), an optimizer's checkpoint (shapes only), "package.module:factory", a module or a function
            that makes one.
        recipe: names as `optstate.recipes.names()` lists them, or functions that make an optimizer of parameters; one
            or several to compare.
        fused_backward: update inside the backward pass; None for what each recipe is made for. On a CPU the gradients
            of small parameters wait for one another, 524,288 elements at most; the figures are of accelerators.
        dtype: of weights and gradients. Files and modules keep their own.
        weights: how weights are written: one of `optstate.weights`, or "auto", "split8", "split16", "kahan", "plain",
            "stochastic".
        batch_size: sequences in one micro-batch.
        seq_len: tokens in a sequence; None for 2048, or as many as the model has positions for.
        grad_accum: micro-batches per step.
        checkpointing: recompute activations layer by layer.
        attention: "sdpa", which keeps what a GPU's fused kernels keep, or "eager".
        clip: "norm" clips by the global norm of all gradients, else "none".
        world_size: devices. Figures are those of one.
        shard: what they divide among them: "none", "zero1" (state), "zero2" (gradients, too), "fsdp" (weights, too).
        example_inputs: what the model is called with where it is no language model of transformers: a function of
            batch size and length, or its name, called with `dtype` as the default; or arguments, which have a size of
            their own.
        gpu: judge whether it fits: a size ("24GiB"; numbers are GiB) or a name ("RTX 4090").
        exact: trace all layers instead of two numbers of layers from which the rest follows.

    Raises:
        QuestionError: a ValueError, for an argument that cannot be.
        SourceError: a ValueError, for a source that no model can be made of.
    """
    named = DTYPES.get(str(dtype).removeprefix("torch."), str(dtype).removeprefix("torch."))
    if named not in DTYPES.values():
        raise QuestionError(f"dtype {named!r}: give {', '.join(DTYPES)}")
    _one_of("attention", attention, ATTENTION)
    _one_of("clip", clip, CLIPS)
    _one_of("shard", shard, SHARDS)
    counts = {"batch_size": batch_size, "grad_accum": grad_accum, "world_size": world_size}
    for name, count in (counts | ({"seq_len": seq_len} if seq_len is not None else {})).items():
        _at_least_one(name, count)
    several: list[Any] = list(recipe) if isinstance(recipe, list | tuple) else [recipe]
    recipes = list(dict.fromkeys(map(find_recipe, several)))
    if not recipes:
        raise QuestionError("recipe is empty: give at least one name")
    chosen = None if gpu is None else gpu_of(gpu)
    way = _way_of(weights)
    if shard != "none" and world_size == 1:
        raise QuestionError(f"shard {shard!r} divides among devices: give world_size (--world-size), too")
    model = find_model(source, inputs=example_inputs, dtype=named)
    if not model.sized and (batch_size != 1 or seq_len is not None):
        reason = "batch_size and seq_len would change nothing: the inputs are given, with a size of their own"
        raise QuestionError(f"{reason}; leave both out, or give a function of batch size and length")
    own = {param.dtype for param in model.parameters}
    setting = Setting(
        dtype=own.pop() if len(own) == 1 else named,
        weights=str(way),
        batch_size=batch_size,
        seq_len=seq_len or LENGTH,
        grad_accum=grad_accum,
        checkpointing=checkpointing,
        attention=attention,
        clip=clip,
    )
    notes = list(model.notes)
    if seq_len is None:
        setting, shortened = _possible_length(model, setting)
        notes += shortened
    question = Question(model, setting, way, fused_backward, chosen, exact, world_size, shard, tuple(recipes))
    return Estimate(
        source=model.name,
        origin=model.origin,
        parameters=model.numel,
        tensors=len(model.parameters),
        setting=setting,
        recipes=tuple(question.answer(one) for one in recipes),
        gpu=chosen,
        world_size=world_size,
        shard=shard,
        notes=tuple(notes),
        versions=_versions(),
        question=question,
        sized=model.sized,
    )


def _one_of(name: str, value: object, known: Any) -> None:
    if value not in list(known):
        raise QuestionError(f"{name} {value!r}: give {', '.join(known)}")


def _at_least_one(name: str, count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise QuestionError(f"{name} {count!r}: give a whole number of at least 1")


def _way_of(weights: Weights | str) -> Weights | str:
    """Return the way to write weights that a short name, or the way's own words, stand for."""
    if not isinstance(weights, str):
        if not isinstance(weights, Weights):
            raise QuestionError(f"weights {weights!r}: give {', '.join(WEIGHTS)}, or one of optstate.weights")
        return weights
    if weights in WEIGHTS:
        return WEIGHTS[weights]
    try:
        return ways.parse_weights(weights)
    except ValueError:
        raise QuestionError(f"weights {weights!r}: give {', '.join(WEIGHTS)}") from None


def _possible_length(model: Model, setting: Setting) -> tuple[Setting, list[str]]:
    """Return the setting with sequences that the model has positions for, and a note where they are shorter."""
    if model.batch is None:
        return setting, []
    length = setting.seq_len
    while length > 1:
        try:
            with FakeTensorMode():
                model.batch(1, length)
        except SourceError as error:
            if error.usage:
                length //= 2
                continue
        break
    note = f"sequences of {length} tokens: the model has no positions for {setting.seq_len}"
    return replace(setting, seq_len=length), [note] if length != setting.seq_len else []


def _versions() -> dict[str, str]:
    """Return the versions that the figures depend on: activations differ between them."""
    found = {"torch": str(torch.__version__)}
    try:
        found["transformers"] = version("transformers")
    except PackageNotFoundError:
        found["transformers"] = "not installed"
    return found
