"""Transforms around a chain that works on a projection of the gradient: GaLore, APOLLO and LDAdam."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from optstate import kernels
from optstate.spec import ParamSpec
from optstate.stores import Full, Partial, Requests, Slot, Store, Whole
from optstate.updates.around import Around
from optstate.updates.base import Context, State, Update

__all__ = ["Projected", "project", "project_anew", "scale_by_projected"]


@dataclass(frozen=True)
class Projected(Around):
    """The base of transforms whose inner chain sees the gradient projected on `rank` vectors of its shorter side.

    Only for matrices: a recipe routes other parameters elsewhere. A rank above the shorter side counts as that side.
    """

    rank: int = 128

    def is_right(self, spec: ParamSpec) -> bool:
        """Return whether the vectors are rows, multiplied from the right: columns are the shorter side."""
        return spec.shape[0] >= spec.shape[1]

    def rank_of(self, spec: ParamSpec) -> int:
        """Return the number of vectors for a parameter."""
        if spec.ndim != 2:
            raise ValueError(
                f"{type(self).__name__} projects matrices, and {spec.name!r} has shape {spec.shape}: route it elsewhere"
            )
        return min(self.rank, *spec.shape)

    def space(self, spec: ParamSpec) -> ParamSpec:
        m, n = spec.shape
        rank = self.rank_of(spec)
        return spec.like((m, rank), (0, None)) if self.is_right(spec) else spec.like((rank, n), (None, 1))

    def basis(self, spec: ParamSpec) -> ParamSpec:
        """Return the specification of the vectors: `[rank, n]`, or `[m, rank]` on the left."""
        m, n = spec.shape
        rank = self.rank_of(spec)
        return spec.like((rank, n), (None, 1)) if self.is_right(spec) else spec.like((m, rank), (0, None))

    def down(self, value: Tensor, basis: Tensor, spec: ParamSpec) -> Requests[Tensor]:
        """Project a value of the parameter's shape on a basis, parts of both; drive with `yield from`."""
        if self.is_right(spec):
            return (yield Partial(value @ basis.T, -1))
        return (yield Partial(basis.T @ value, -2))

    def up(self, low: Tensor, basis: Tensor, spec: ParamSpec) -> Tensor:
        """Return a projected value in the parameter's shape again."""
        return low @ basis if self.is_right(spec) else basis @ low

    def singular_vectors(self, value: Tensor, spec: ParamSpec) -> Requests[Tensor]:
        """Return this device's part of the leading singular vectors; drive with `yield from`. Synchronises."""
        u, _, vh = torch.linalg.svd((yield Whole(value, spec)), full_matrices=False)
        rank = self.rank_of(spec)
        return self.basis(spec).part(vh[:rank] if self.is_right(spec) else u[:, :rank])
