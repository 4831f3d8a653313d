"""Specifications: what the library knows of a parameter (`ParamSpec`) and of a tensor kept for it (`FieldSpec`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from optstate.store_layouts import ACCUMULATOR, PARAMETER, Layouts

__all__ = [
    "ANY_MATRIX",
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
"""All roles. A parameter with several roles, as tied weights have, gets the one that comes first here."""


STEPPED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@cache
def can_be_stepped(dtype: torch.dtype) -> bool:
    """Return whether weights of this dtype can be updated: fp64, fp32, bf16 and fp16, not integers or 8-bit floats."""
    return dtype in STEPPED


@cache
def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and update arithmetic: fp32, or fp64 for fp64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Region:
    """The box of a parameter that one device holds, where the parameter is split over several devices.

    The parts of a dimension have the same size where their number divides the dimension; else the last parts are
    smaller or empty.

    Attributes:
        whole: shape of the parameter.
        offset: index in the parameter of the box's first element, one number per dimension.
        shape: sizes of the box.
        parts: into how many parts each dimension is cut, 1 where it is not.
    """

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    parts: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements of the box."""
        return math.prod(self.shape)

    @property
    def index(self) -> tuple[slice, ...]:
        """The slices that cut the box out of the whole parameter."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    @property
    def start(self) -> int | None:
        """Flat index in the parameter of the box's first element; None if the box is no run of consecutive elements."""
        if any(n > 1 for n in self.parts[1:]):
            return None
        return self.offset[0] * math.prod(self.whole[1:])

    def is_even(self, dim: int) -> bool:
        """Return whether all parts of dimension `dim` have the same size."""
        return self.whole[dim] % self.parts[dim] == 0


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """The specification of one parameter: every decision is made by the global shape, never by the local shard.

    Attributes:
        name: canonical name, without the words that wrappers put into names, such as `module.`.
        shape: global shape.
        dtype: of the parameter.
        role: one of `ROLES`, declared by the caller (a param group's `role` entry) and never read from the name;
            undeclared parameters are "matrix" from two dimensions on and "vector" below.
        head_size: rows of one attention head; None unless the role is "query_key".
        region: the part of the parameter on this device; None if all of it is here.
        given: the name as the caller gave it; "" if the same as `name`.
        dims: of another tensor that statistics are kept of (see `like`), the parameter's dimension that each dimension
            runs along, None for one that runs along none; None for the parameter itself.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str = ""
    head_size: int | None = None
    region: Region | None = None
    given: str = field(default="", compare=False)
    dims: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        if not self.role:
            object.__setattr__(self, "role", "matrix" if len(self.shape) >= 2 else "vector")

    def renamed(self, name: str, given: str = "") -> ParamSpec:
        """Return the specification of a parameter that differs in nothing but its names.

        What was derived of this one holds for the other; and the constructor of a frozen class takes several times as
        long, which counts where there are thousands of parameters.
        """
        other = object.__new__(ParamSpec)
        other.__dict__.update(self.__dict__, name=name, given=given)
        return other

    def like(self, shape: Sequence[int], dims: Sequence[int | None]) -> ParamSpec:
        """Return the specification of another tensor that is made of this one, to keep statistics of.

        The other tensor is split over devices along the dimensions that it shares with this one, and whole on every
        device otherwise. A statistic of the product of an `[m, n]` matrix with `[n, r]` has `like((m, r), (0, None))`.

        Args:
            shape: global shape of the other tensor.
            dims: for each of its dimensions the dimension of this tensor that it runs along, counted from 0; None for
                a dimension of its own.

        Raises:
            ValueError: if the numbers of dimensions differ, or a shared dimension has another size or occurs twice.
        """
        shape, dims = tuple(shape), tuple(dims)
        shared = [d for d in dims if d is not None]
        fits = len(shape) == len(dims) and len(set(shared)) == len(shared)
        if not fits or any(d is not None and self.shape[d] != size for size, d in zip(shape, dims, strict=True)):
            raise ValueError(f"a tensor of shape {shape} cannot run along {dims} of one of shape {self.shape}")
        region = None
        if self.region is not None and any(self.region.parts[d] > 1 for d in shared):
            whole = Region(shape, (0,) * len(shape), shape, (1,) * len(shape))
            offset, local, parts = (
                tuple(own if d is None else theirs[d] for own, d in zip(default, dims, strict=True))
                for default, theirs in (
                    (whole.offset, self.region.offset),
                    (whole.shape, self.region.shape),
                    (whole.parts, self.region.parts),
                )
            )
            region = Region(shape, offset, local, parts)
        along = dims if self.dims is None else tuple(None if d is None else self.dims[d] for d in dims)
        return replace(self, shape=shape, role="", head_size=None, region=region, dims=along)

    def part(self, whole: Tensor) -> Tensor:
        """Return the part on this device of a tensor of the global shape: a view."""
        return whole if self.region is None else whole[self.region.index]

    def along(self, dims: Sequence[int | None]) -> tuple[int | None, ...]:
        """Return the parameter's dimensions that these dimensions of this tensor run along, None for each of its own.

        Dimensions may be counted from the end. None stands for a dimension that does not run along this tensor either.
        """
        if self.dims is None:
            return tuple(None if d is None else d % max(self.ndim, 1) for d in dims)
        return tuple(None if d is None else self.dims[d] for d in dims)

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
        """Shape of the part on this device."""
        return self.shape if self.region is None else self.region.shape

    @cached_property
    def local_numel(self) -> int:
        """Number of elements on this device."""
        return math.prod(self.local_shape)

    def splits_at(self, per: int) -> bool:
        """Return whether each device has a run of the flattened parameter, all of one length, a multiple of `per`.

        A flat field with an entry per `per` elements then divides among the devices as the parameter does.
        """
        region = self.region
        return region is None or (region.start is not None and region.is_even(0) and region.numel % per == 0)

    def has_rows_of(self, per: int) -> bool:
        """Return whether the last dimension, and every device's share of it, is a multiple of `per`.

        Each run of `per` elements of the flattened parameter is then on one device, and a field with an entry per run
        has as many rows as the parameter.
        """
        if self.region is None or not self.shape:
            return self.region is None
        size, parts = self.shape[-1], self.region.parts[-1]
        return size % per == 0 and -(-size // parts) % per == 0

    def keeps_together(self, per: int) -> bool:
        """Return whether each run of `per` elements of the flattened parameter, counted from 0, is on one device."""
        return self.splits_at(per) or self.has_rows_of(per)

    def is_sharded(self, dim: int) -> bool:
        """Return whether dimension `dim` (negative counts from the end) is split over devices."""
        return self.region is not None and self.region.parts[dim] > 1


@dataclass(frozen=True)
class FieldSpec:
    """The specification of a field, one stored tensor of a statistic.

    Attributes:
        shape: global shape of the tensor in a file.
        dtype: of the tensor.
        dims: `dims[i]` is the parameter dimension that dimension `i` of the tensor runs along, so a field is sharded
            exactly as far as the parameter is: the row means of an `[m, n]` matrix have `dims == (0,)`. None is a
            dimension of the field's own, such as the rank of factors `[m, rank]` with `dims == (0, None)`.
        per: number of consecutive elements of the flattened parameter that share one entry of the flattened field: 1
            for a number per element, 256 for the maxima of blocks of 256. A field with `per` above 1 is flat in a file
            and has the shape that `layout` returns in memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    dims: tuple[int | None, ...]
    per: int = 1

    def layout(self, spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
        """Return the global shape of the field in memory, and the parameter dimension behind each of its dimensions.

        The field is split along these dimensions as far as the parameter is. With `per` above 1 the field has the
        parameter's rows where `per` divides the last dimension, else it is flat; where the parameter is split within
        a run of `per` elements, there are no dimensions, and every device holds all of the field.
        """
        if self.per == 1:
            return self.shape, self.dims
        if spec.shape and spec.shape[-1] % self.per == 0:
            dims = tuple(range(spec.ndim)) if spec.has_rows_of(self.per) else ()
            return (*spec.shape[:-1], spec.shape[-1] // self.per), dims
        return self.shape, (0,) if spec.splits_at(self.per) else ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor over all shards."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, spec: ParamSpec, layouts: Layouts) -> dict[str, FieldSpec]:
        """Return the fields of a parameter that have these layouts, by name."""
        own = {ACCUMULATOR: spec.accumulator, PARAMETER: spec.dtype}
        return {
            name: cls(layout.shape, own.get(layout.dtype) or getattr(torch, layout.dtype), layout.dims, layout.per)
            for name, layout in layouts.items()
        }


ANY_MATRIX = ParamSpec(name="any matrix", shape=(4096, 4096), dtype=torch.float32)
"""What transforms are asked about before there is a parameter: which statistics they keep, and in which stores."""


def is_matrix(spec: ParamSpec) -> bool:
    """Select parameters with two or more dimensions; a rule for `optstate.route`."""
    return spec.ndim >= 2


def is_vector(spec: ParamSpec) -> bool:
    """Select parameters with at most one dimension (norms, biases, scalars); a rule for `optstate.route`."""
    return spec.ndim <= 1


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has sizes but no values: a tensor of FakeTensorMode, or on the meta device."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta
