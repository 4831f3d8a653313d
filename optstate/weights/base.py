"""The base class of all ways to write the new value of a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from optstate.kernels import WeightCodec
from optstate.spec import FieldSpec, ParamSpec
from optstate.text import short

__all__ = ["Weights"]


class Weights:
    """A way to write fp32 results to a parameter; holds no tensors. Subclasses are frozen dataclasses."""

    is_random: ClassVar[bool] = False
    """Whether results are rounded by random bits, which are a function of the parameter's name."""

    def __str__(self) -> str:
        return short(self)

    @property
    def alignment(self) -> int:
        """Number of elements of the flattened parameter at a multiple of which every slice must begin."""
        return 1

    def resolve(self, spec: ParamSpec) -> Weights:
        """Return the way in which this parameter is written: `self`, or `Plain` where results need no rounding.

        Raises:
            ValueError: if a parameter of this dtype cannot be written in this way.
        """
        return self

    def fields(self, spec: ParamSpec) -> dict[str, FieldSpec]:
        """Return the tensors kept beside the parameter, under the slot `weight`, each with one number per element."""
        return {}

    def codec(self, spec: ParamSpec, step: int, fields: Mapping[str, Tensor]) -> WeightCodec | None:
        """Return what reads and writes chunks of the parameter at this step; None to round to nearest, as torch does.

        Args:
            spec: of the parameter.
            step: count of the parameter's updates.
            fields: the tensors that `fields` declares, local parts.
        """
        return None
