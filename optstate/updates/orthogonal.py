"""Transforms that make an update's singular values, rows or columns alike: Muon's and its cheaper relatives'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from optstate import kernels
from optstate.spec import ParamSpec
from optstate.stores import Partial, Requests, Slot, Whole
from optstate.updates.base import Context, State, Transform, Update
from optstate.updates.low_rank import SMALL_NORM
from optstate.updates.projected import require_counts

__all__ = ["normalize_columns", "normalize_rows", "orthogonalize"]

A, B, C = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic iteration (Jordan et al. 2024, Muon), which bring singular values near one fast."""

SMALLEST_NORM = 1e-7
"""The least norm that a matrix is divided by before it is iterated, as `torch.optim.Muon` has it."""


def refuse_vectors(transform: Transform, spec: ParamSpec) -> dict[str, Slot]:
    """Return the slots of a transform that keeps nothing, and takes only matrices, when a parameter is planned.

    Raises:
        ValueError: if the parameter has fewer than two dimensions.
    """
    if spec.ndim < 2:
        raise ValueError(
            f"{type(transform).__name__} takes matrices, and {spec.name!r} has {spec.ndim} dimensions: give it another "
            "chain, with optstate.route"
        )
    return {}


@dataclass(frozen=True)
class orthogonalize(Transform):
    """Replace the update by a matrix with the same singular vectors and singular values near one.

    Newton and Schulz's iteration in bf16: `x <- a x + (b A + c A A) x` with `A = x x^T`. Dimensions after the first are
    taken together, as those of a convolution. A parameter that is split is gathered, and every device computes the
    whole. Source: Muon (Jordan et al. 2024), as `torch.optim.Muon` computes it.

    Args:
        steps: iterations.
        shape_scale: "original" multiplies by `sqrt(max(1, rows / columns))`, "match_rms_adamw" by `0.2 sqrt(max(rows,
            columns))` (Liu et al. 2025, arXiv 2502.16982), "none" by one.
    """

    steps: int = 5
    shape_scale: Literal["original", "match_rms_adamw", "none"] = "original"

    elementwise: ClassVar[bool] = False
    absorbs_decay: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "steps")
        if self.shape_scale not in ("original", "match_rms_adamw", "none"):
            raise ValueError(f"shape_scale={self.shape_scale!r}: give 'original', 'match_rms_adamw' or 'none'")

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        return refuse_vectors(self, spec)

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        return 3

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        whole = yield Whole(update.values(ctx), ctx.spec)
        matrix = whole.flatten(1)
        made = iterate(matrix, self.steps).to(whole.dtype).view(whole.shape)
        scale = self._scale(*matrix.shape)
        return Update(ctx.spec.part(made).contiguous(), scale=scale, finite=update.finite)

    def _scale(self, rows: int, columns: int) -> float:
        if self.shape_scale == "none":
            return 1.0
        if self.shape_scale == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))


def iterate(matrix: Tensor, steps: int) -> Tensor:
    """Return Newton and Schulz's iterate of a matrix, in bf16."""
    x = matrix.to(torch.bfloat16)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if is_tall else x


@dataclass(frozen=True)
class Normalized(Transform):
    """The base of transforms that divide every row or column of a matrix by its norm.

    Args:
        rms: divide by the root mean square instead, which is longer by the root of the number of elements.
    """

    rms: bool = False

    elementwise: ClassVar[bool] = False
    absorbs_decay: ClassVar[bool] = True
    dim: ClassVar[int] = -1

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        return refuse_vectors(self, spec)

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        update = update.whole(ctx)
        value = kernels.values(update)
        squares = yield Partial(value.square().sum(self.dim, keepdim=True), self.dim)
        if self.rms:
            return update.times((squares / ctx.spec.shape[self.dim]).sqrt_().clamp_(min=SMALL_NORM).reciprocal_())
        return update.times((squares.sqrt() + SMALL_NORM).reciprocal_())


@dataclass(frozen=True)
class normalize_rows(Normalized):
    """Divide every row of the update, along the last dimension, by its norm.

    SCALE (arXiv 2506.16659) calls rows columns, as it writes a layer's matrix as inputs by outputs.

    Args:
        rms: divide by the root mean square instead, which is longer by the root of the number of elements.
    """


@dataclass(frozen=True)
class normalize_columns(Normalized):
    """Divide every column of the update, along the last dimension but one, by its norm.

    Args:
        rms: divide by the root mean square instead, which is longer by the root of the number of elements.
    """

    dim: ClassVar[int] = -2
