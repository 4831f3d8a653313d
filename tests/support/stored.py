"""Statistics made for tests of stores, and what a store makes of them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from hypothesis import settings
from torch import Tensor

from optstate import updates
from optstate.spec import ParamSpec
from optstate.stores import Block4, Store
from optstate.updates import Transform

chunking = importlib.import_module("optstate.kernels.chunking")  # `kernels.chunks` itself is the function


FP32, BF16 = torch.float32, torch.bfloat16


Shape = tuple[int, ...]


COMMON = settings(deadline=None, derandomize=True, database=None, max_examples=20)


def spec_of(shape: Shape, dtype: torch.dtype = FP32, **more: Any) -> ParamSpec:
    return ParamSpec(name="p", shape=shape, dtype=dtype, **more)


RANK1 = Block4(rank1=True)


def stored(store: Store, value: Tensor, signed: bool) -> dict[str, Tensor]:
    shape = tuple(value.shape)
    fields = {k: torch.zeros(f.shape, dtype=f.dtype) for k, f in store.fields(spec_of(shape), signed).items()}
    store.write(fields, value.clone())
    return fields


def read_back(store: Store, value: Tensor, signed: bool) -> Tensor:
    read = store.read(stored(store, value, signed), value.shape)
    assert (read.shape, read.dtype) == (value.shape, FP32)
    return read


def uniform(shape: Shape, seed: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def noise(shape: Shape, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def least_of_axes(value: Tensor) -> Tensor:
    """For every element the smallest of the largest magnitudes along its dimensions, float64."""
    found = torch.full(value.shape, math.inf, dtype=torch.float64)
    for dim in range(value.ndim):
        others = [d for d in range(value.ndim) if d != dim]
        found = torch.minimum(found, value.double().abs().amax(others, keepdim=True))
    return found


@contextmanager
def chunk_of(limit: int) -> Iterator[None]:
    with mock.patch.object(chunking, "CPU_CHUNK", limit):
        yield


def bits_of(fields: dict[str, Tensor]) -> dict[str, Tensor]:
    """8-bit floats as integers: PyTorch does not compare them."""
    return {k: v.view(torch.uint8) if v.dtype == torch.float8_e4m3fn else v for k, v in fields.items()}


SIGNED_SLOTS: dict[str, Callable[[Store], Transform]] = {
    "momentum": lambda s: updates.momentum(s),
    "nesterov": lambda s: updates.momentum(s, nesterov=True),
    "heavy ball": lambda s: updates.momentum(s, heavy_ball=True),
    "heavy ball nesterov": lambda s: updates.momentum(s, heavy_ball=True, nesterov=True),
    "sign momentum": lambda s: updates.sign_momentum(s),
    "adam first": lambda s: updates.scale_by_adam(first=s),
    "confidence first": lambda s: updates.scale_by_confidence(first=s),
}
