"""How a new parameter value is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from optstate.kernels import WeightCodec
from optstate.spec import FieldSpec, ParamSpec
from optstate.text import short

__all__ = ["Weights"]


class Weights:
    """Describes how fp32 results are written to a parameter. Subclasses are frozen dataclasses."""

    is_random: ClassVar[bool] = False
    """Whether results are rounded by random bits, which are a function of the parameter's name."""

    def __str__(self) -> str:
        return short(self)

    def resolve(self, spec: ParamSpec) -> Weights:
        """The way this parameter is written: itself, or `Plain` where results need no rounding.

        Raises:
            ValueError: if a parameter of this dtype cannot be written so.
        """
        return self

    def fields(self, spec: ParamSpec) -> dict[str, FieldSpec]:
        """Tensors kept in the state besides the parameter, under the slot `weight`: one number per element each."""
        return {}

    def codec(self, spec: ParamSpec, step: int, fields: Mapping[str, Tensor]) -> WeightCodec | None:
        """Reads and writes chunks of the parameter at this step; None rounds to nearest, as PyTorch does."""
        return None
