"""A statistic kept element by element."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optstate.spec import FieldSpec, ParamSpec
from optstate.stores.base import Fields, Store

__all__ = ["Full"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALLEST_BF16_WEIGHT = 2.0**-8
"""bf16 keeps 8 significant bits: a step below half a unit in the last place, 2**-9 to 2**-8 of the value, is lost."""


@dataclass(frozen=True)
class Full(Store):
    """One number per element, as wide as `dtype`: None is fp32 (fp64 for fp64 parameters).

    Bytes per element: 4 (fp32), 2 (bf16). Worst relative error of a stored value: none (fp32), 2**-8 (bf16).

    Raises:
        ValueError: for a dtype other than float32 and bfloat16; and, when a chain is built, for a bf16
            second moment whose average uses weights below 2**-8 (beta above 0.996): rounding to nearest would
            stop it from ever decaying.
    """

    dtype: str | None = None

    def __post_init__(self) -> None:
        name = str(self.dtype).removeprefix("torch.") if self.dtype is not None else None
        if name is not None and name not in DTYPES:
            raise ValueError(
                f"Full(dtype={self.dtype!r}) is not a format for statistics: use one of {', '.join(DTYPES)}"
            )
        object.__setattr__(self, "dtype", name)

    def check(self, signed: bool, smallest_weight: float) -> None:
        if self.dtype == "bfloat16" and not signed and smallest_weight < SMALLEST_BF16_WEIGHT:
            raise ValueError(
                f"a bfloat16 second moment does not decay with an averaging weight of {smallest_weight:.3g} "
                f"(less than {SMALLEST_BF16_WEIGHT:.3g} is rounded away): keep it in Full(), or lower beta2"
            )

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        dtype = spec.accumulator if self.dtype is None else DTYPES[self.dtype]
        return {"": FieldSpec(spec.shape, dtype, tuple(range(spec.ndim)))}

    def read(self, fields: Fields) -> Tensor:
        stored = fields[""]
        return stored.float() if stored.dtype == torch.bfloat16 else stored

    def write(self, fields: Fields, value: Tensor) -> None:
        fields[""].copy_(value)
