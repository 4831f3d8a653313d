"""What a run that is to be estimated looks like, and what is known of its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

__all__ = ["Alive", "BuildOptions", "Model", "ParamShape", "Setting", "Trace"]

KINDS = ("weights", "gradients", "state", "activations", "logits", "scratch")
"""What a byte that is alive during a step can belong to: scratch is what updates and losses need for a moment."""


@dataclass(frozen=True)
class ParamShape:
    """One parameter. dtype: torch's name of it. Tied parameters are one, with the first of their names."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its weight."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.numel * dtype.itemsize


@dataclass(frozen=True)
class BuildOptions:
    """How a model is to be built. layers: of its identical ones, None for all of them."""

    layers: int | None = None
    attention: str = "sdpa"
    checkpointing: bool = False


@dataclass(frozen=True)
class Model:
    """A model that nothing has been allocated for.

    parameters: every one of them, in the model's order. buffer_bytes: of its buffers. layers: how many identical layers
    it has, None if that is unknown. build: makes the module, in the default dtype, on fake tensors if the caller is in
    a FakeTensorMode; None where only shapes are known. batch: arguments of the module for a batch size and a sequence
    length; what it returns has a `loss`, begins with it, or is it. sized: whether the batch follows these two. origin:
    where this is from, in words, with versions.
    """

    name: str
    parameters: tuple[ParamShape, ...]
    origin: str
    buffer_bytes: int = 0
    layers: int | None = None
    build: Callable[[BuildOptions], nn.Module] | None = field(default=None, repr=False)
    batch: Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]] | None = field(default=None, repr=False)
    sized: bool = True
    notes: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(param.numel for param in self.parameters)


@dataclass(frozen=True)
class Setting:
    """How a step is run.

    dtype: of the weights, torch's name. weights: how they are written, in words as `str(weights)` prints them, or
    "auto". clip: "none", or "norm" by the global norm of all gradients. grad_accum: micro-batches per step.
    """

    fused_backward: bool = False
    dtype: str = "bfloat16"
    weights: str = "auto"
    batch_size: int = 1
    seq_len: int = 2048
    grad_accum: int = 1
    checkpointing: bool = False
    attention: str = "sdpa"
    clip: str = "none"


@dataclass(frozen=True)
class Alive:
    """A tensor that is alive at the peak. what: a parameter's name or the operator that made it. kind: of `KINDS`."""

    what: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Trace:
    """What one step was seen to need, in bytes, each storage rounded up to a multiple of 512.

    peak: the most bytes alive at one moment. at_peak: of these, by kind. phase: where that was: "forward", "loss",
    "backward" or "update", with the module or parameter after a colon where known. alive: the largest tensors then.
    most: the most bytes of each kind at any moment. notes: where an accelerator may keep something else.
    """

    peak: int
    at_peak: Mapping[str, int]
    phase: str
    alive: tuple[Alive, ...]
    most: Mapping[str, int]
    notes: tuple[str, ...] = ()
