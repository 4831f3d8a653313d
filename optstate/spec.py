"""What the rest of the library needs to know about a parameter and about the tensors kept for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "ROLES",
    "FieldSpec",
    "ParamSpec",
    "Region",
    "accumulator_dtype",
    "can_be_stepped",
    "is_fake",
    "is_matrix",
    "is_vector",
]


ROLES = ("embedding", "head", "query_key", "norm", "bias", "matrix", "vector")
"""The roles a recipe of this library may ask for. A parameter with several (tied weights) gets the first of them."""


STEPPED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@cache
def can_be_stepped(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be updated: integers, packed codes and numbers of 8 bits and less cannot."""
    return dtype in STEPPED


@cache
def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics and update arithmetic use: fp32, or fp64 for fp64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Region:
    """The box of a parameter that this device holds, where the parameter is split over several.

    whole: shape of the parameter. offset, shape: of the box. parts: into how many parts each dimension is cut, 1 where
    it is not. Parts have the same size where that divides the dimension; else the last ones are smaller or empty.
    """

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    parts: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements here."""
        return math.prod(self.shape)

    @property
    def index(self) -> tuple[slice, ...]:
        """What cuts the box out of the whole parameter."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    @property
    def start(self) -> int | None:
        """Where the box begins in the flattened parameter, if it is one run of consecutive elements of it."""
        if any(n > 1 for n in self.parts[1:]):
            return None
        return self.offset[0] * math.prod(self.whole[1:])

    def is_even(self, dim: int) -> bool:
        """Whether all parts of a dimension have the same size."""
        return self.whole[dim] % self.parts[dim] == 0


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter as every decision sees it: by its global shape, never by its local shard.

    `role` is declared by the caller (a param group's `role` entry), never read from the name;
    without a declaration it is "matrix" from two dimensions on and "vector" below.
    `region` is the part of it on this device; None if that is all of it.
    `name` is without what wrappers put into it, such as `module.`; `given` is the name with that, "" if it is the same.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str = ""
    head_size: int | None = None
    region: Region | None = None
    given: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.role:
            object.__setattr__(self, "role", "matrix" if len(self.shape) >= 2 else "vector")

    @cached_property
    def numel(self) -> int:
        """Number of elements over all shards."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @cached_property
    def accumulator(self) -> torch.dtype:
        """The dtype of this parameter's full-precision statistics."""
        return accumulator_dtype(self.dtype)

    @cached_property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of what is on this device."""
        return self.shape if self.region is None else self.region.shape

    @cached_property
    def local_numel(self) -> int:
        """Number of elements on this device."""
        return math.prod(self.local_shape)

    def splits_at(self, per: int) -> bool:
        """Whether every device has a run of the flattened parameter, all of one length, a multiple of `per`.

        A flat field with an entry per `per` elements then divides among the devices as the parameter does.
        """
        region = self.region
        return region is None or (region.start is not None and region.is_even(0) and region.numel % per == 0)

    def has_rows_of(self, per: int) -> bool:
        """Whether the last dimension, and what every device has of it, is a multiple of `per`: runs of so many elements
        of the flattened parameter are then whole on a device, and those of a row make up a row of a field."""
        if self.region is None or not self.shape:
            return self.region is None
        size, parts = self.shape[-1], self.region.parts[-1]
        return size % per == 0 and -(-size // parts) % per == 0

    def keeps_together(self, per: int) -> bool:
        """Whether each run of `per` elements of the flattened parameter, counted from its start, is on one device."""
        return self.splits_at(per) or self.has_rows_of(per)

    def is_sharded(self, dim: int) -> bool:
        """Whether dimension `dim` (negative counts from the end) is split over devices."""
        return self.region is not None and self.region.parts[dim] > 1


@dataclass(frozen=True)
class FieldSpec:
    """One stored tensor: its global shape in a file, its dtype, and the parameter dimension behind each of its own.

    `dims[i]` is the parameter dimension that dimension `i` of the field runs along, so a field is sharded
    exactly as far as the parameter is: the row means of an `[m, n]` matrix have `dims == (0,)`.
    `per` is how many consecutive elements of the flattened parameter share one entry of the flattened field, where
    the field belongs to them alone: 1 for a number per element, 256 for the maxima of blocks of 256. Such a field is
    flat in a file; see `layout` for memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    dims: tuple[int, ...]
    per: int = 1

    def layout(self, spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Its shape in memory, whatever devices there are, and the parameter dimension behind each of its own, along
        which it is split as far as the parameter is.

        A field with an entry per so many elements has the parameter's rows, where these are made up of so many each;
        else it is flat. Every device has all of it where the parameter is split within them.
        """
        if self.per == 1:
            return self.shape, self.dims
        if spec.shape and spec.shape[-1] % self.per == 0:
            dims = tuple(range(spec.ndim)) if spec.has_rows_of(self.per) else ()
            return (*spec.shape[:-1], spec.shape[-1] // self.per), dims
        return self.shape, (0,) if spec.splits_at(self.per) else ()

    def largest_part(self, spec: ParamSpec) -> int:
        """Elements of the tensor on the device that has most of it: the first."""
        shape, dims = self.layout(spec)
        if spec.region is not None and dims:
            shape = tuple(-(-size // spec.region.parts[dim]) for size, dim in zip(shape, dims, strict=True))
        return math.prod(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor over all shards."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_matrix(spec: ParamSpec) -> bool:
    """Route predicate: parameters with two or more dimensions."""
    return spec.ndim >= 2


def is_vector(spec: ParamSpec) -> bool:
    """Route predicate: parameters with at most one dimension (norms, biases, scalars)."""
    return spec.ndim <= 1


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has sizes and no values: under FakeTensorMode, or on the meta device."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta
