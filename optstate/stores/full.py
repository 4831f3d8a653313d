"""Store: one number per element, in fp32 or bf16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optstate import kernels, store_layouts
from optstate.kernels import Noise
from optstate.spec import FieldSpec, ParamSpec
from optstate.stores.base import Fields, Shape, Store

__all__ = ["Full"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALLEST_BF16_WEIGHT = 2.0**-8
"""bf16 keeps 8 significant bits: a step below half a unit in the last place, 2**-9 to 2**-8 of the value, is lost."""


@dataclass(frozen=True)
class Full(Store):
    """One number per element, as wide as `dtype`: None is fp32 (fp64 for fp64 parameters).

    Bytes per element: 4 (fp32), 2 (bf16). Worst relative error of a stored value: none (fp32), 2**-8 (bf16 rounded
    to nearest), 2**-7 (bf16 rounded stochastically, right on average).

    stochastic: round to bf16 at random, up or down, so that the mean is the exact value. None does so in steps where it
        is needed: where the averaging weight is below 2**-8 (beta above 0.996), so that rounding to nearest would
        swallow the step and a second moment would never decay. The random bits are a function of parameter name, slot,
        step and element; nothing needs to be saved.

    Raises:
        ValueError: for a dtype other than float32 and bfloat16, or for a stochastic fp32.
    """

    dtype: str | None = None
    stochastic: bool | None = None

    def __post_init__(self) -> None:
        name = str(self.dtype).removeprefix("torch.") if self.dtype is not None else None
        if name is not None and name not in DTYPES:
            raise ValueError(
                f"Full(dtype={self.dtype!r}) is not a format for statistics: use one of {', '.join(DTYPES)}"
            )
        if not (self.stochastic is None or isinstance(self.stochastic, bool)):
            raise TypeError(f"Full(stochastic={self.stochastic!r}): give True, False or None")
        if self.stochastic and name != "bfloat16":
            raise ValueError(f"Full(dtype={self.dtype!r}, stochastic=True): only bfloat16 is rounded stochastically")
        object.__setattr__(self, "dtype", name)

    @property
    def reads_anew(self) -> bool:
        return self.dtype == "bfloat16"

    def resolve(self, spec: ParamSpec, signed: bool) -> tuple[Store, str]:
        if self.dtype == "bfloat16" and self.stochastic is None:
            return self, f"rounded stochastically where an averaging weight is below {SMALLEST_BF16_WEIGHT:.2g}"
        return self, ""

    def check_weight(self, weight: float) -> None:
        if self.stochastic is False and self.dtype == "bfloat16" and weight < SMALLEST_BF16_WEIGHT:
            raise ValueError(
                f"a bfloat16 statistic rounded to nearest does not decay with an averaging weight of "
                f"{weight:.3g} (less than {SMALLEST_BF16_WEIGHT:.3g} is rounded away): leave out "
                "stochastic=False, keep it in Full(), or lower beta"
            )

    def is_random(self, smallest_weight: float) -> bool:
        swallows = self.dtype == "bfloat16" and smallest_weight < SMALLEST_BF16_WEIGHT
        return self.stochastic is True or (self.stochastic is None and swallows)

    def fields(self, spec: ParamSpec, signed: bool) -> dict[str, FieldSpec]:
        return FieldSpec.of(spec, store_layouts.full_layouts(spec.shape, self.dtype))

    def read(self, fields: Fields, shape: Shape) -> Tensor:
        stored = fields[""].view(shape)
        return stored.float() if stored.dtype == torch.bfloat16 else stored

    def encode(self, value: Tensor, noise: Noise, weight: float = 1.0) -> Fields:
        if self.is_random(weight):
            value = kernels.rounded_bf16(value.float().contiguous(), noise)
        return {"": value}
