"""Data of an estimate: the model, the setting of a training run, and the trace of one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

__all__ = ["Alive", "BuildOptions", "Model", "ParamShape", "Setting", "Trace"]

KINDS = ("weights", "gradients", "state", "activations", "logits", "scratch")
"""The kinds of memory of a step; scratch is what updates and losses need for a moment."""


@dataclass(frozen=True)
class ParamShape:
    """The shape of one parameter; tied parameters are one, with the first of their names.

    Attributes:
        dtype: torch's name of the dtype, such as "bfloat16".
    """

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
        """Bytes of the weight."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.numel * dtype.itemsize


@dataclass(frozen=True)
class BuildOptions:
    """The options with which a model is built.

    Attributes:
        layers: number of the identical layers; None for all of them.
        attention: "sdpa" or "eager".
        checkpointing: whether activations are recomputed layer by layer.
    """

    layers: int | None = None
    attention: str = "sdpa"
    checkpointing: bool = False


@dataclass(frozen=True)
class Model:
    """A model for which nothing has been allocated.

    Attributes:
        name: of the model, for people.
        parameters: every parameter, in the model's order.
        origin: where the model is from, in words, with versions.
        buffer_bytes: bytes of all buffers.
        layers: number of identical layers; None if unknown.
        build: makes the module in the default dtype, on fake tensors if the caller is in a FakeTensorMode; None where
            only shapes are known.
        batch: returns the module's arguments for a batch size and a sequence length; the module returns a loss, a tuple
            that begins with a loss, or an object with a `loss`. None where no inputs are known.
        sized: whether the batch follows batch size and sequence length.
        notes: what a reader of the figures should know.
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
        """Number of elements of all parameters."""
        return sum(param.numel for param in self.parameters)


@dataclass(frozen=True)
class Setting:
    """The setting of a training step.

    Attributes:
        fused_backward: whether parameters are updated inside the backward pass.
        dtype: of the weights, torch's name.
        weights: how the weights are written, in words as `str(weights)` prints them, or "auto".
        batch_size: sequences of a micro-batch.
        seq_len: tokens of a sequence.
        grad_accum: micro-batches per step.
        checkpointing: whether activations are recomputed layer by layer.
        attention: "sdpa" or "eager".
        clip: "none", or "norm" for the global norm of all gradients.
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
    """A tensor that is alive at the peak.

    Attributes:
        what: the name of a parameter, or of the operator that made the tensor.
        kind: one of `KINDS`.
        shape, dtype: of the tensor; torch's name of the dtype.
        nbytes: of the tensor's storage.
    """

    what: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Trace:
    """The memory that one traced step needs, in bytes, each storage rounded up to a multiple of 512.

    Attributes:
        peak: the most bytes alive at one moment.
        at_peak: the bytes of the peak by kind.
        phase: place of the peak: "forward", "loss", "backward" or "update", with the module or parameter after a colon
            where known.
        alive: the largest tensors at the peak.
        most: the most bytes of each kind at any moment.
        notes: points at which an accelerator may keep something else.
    """

    peak: int
    at_peak: Mapping[str, int]
    phase: str
    alive: tuple[Alive, ...]
    most: Mapping[str, int]
    notes: tuple[str, ...] = ()
