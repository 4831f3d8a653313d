"""How a new parameter value is written."""

from __future__ import annotations

from optstate.describe import short
from optstate.kernels import WriteChunk
from optstate.spec import ParamSpec

__all__ = ["Weights"]


class Weights:
    """Describes how fp32 results are written to a parameter. Subclasses are frozen dataclasses."""

    def __str__(self) -> str:
        return short(self)

    def resolve(self, spec: ParamSpec) -> Weights:
        """The way this parameter is written: itself, or `Plain` where results need no rounding."""
        return self

    def writer(self, spec: ParamSpec, step: int) -> WriteChunk | None:
        """Writes one chunk of the parameter at this step; None rounds to nearest, as PyTorch does."""
        return None
