"""The transform that trains at a mix of two sequences of weights, and evaluates at their average (Schedule-Free)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate import kernels
from optstate.kernels import WeightCodec
from optstate.spec import ParamSpec
from optstate.stores import Full, Slot, Store
from optstate.updates.base import Context, State, Transform, Update
from optstate.updates.hyper import Hyper, Rule

__all__ = ["schedule_free"]


@dataclass(frozen=True)
class schedule_free(Transform):
    """Average the weights instead of lowering the learning rate: the last transform of a chain.

    With `u` the update, weight decay included, at the weights `y` that the parameter holds (Defazio et al. 2024, arXiv
    2405.15682, algorithm 1, as the official code runs it)::

        z <- z - lr u                      (z = y before the first step)
        x <- (1 - c) x + c z               c = w / (sum of all w),  w = t**r * (largest lr so far)**weight_lr_power
        y <- (1 - beta) z + beta x

    The parameter holds `y`, the state `z`. `Optimizer.eval()` makes the parameter hold `x`, the weights to evaluate and
    to keep, and `Optimizer.train()` makes it hold `y` again.

    Args:
        beta: weight of `x` in `y`; group key `betas`, first place.
        store: of `z`, slot `z`: numbers as large as the weights, which move by a learning rate.
        warmup_steps: steps over which the learning rate grows linearly to the group's.
        r, weight_lr_power: exponents of the weights of the average.

    Raises:
        ValueError: for numbers out of range.
    """

    beta: float | Hyper = 0.9
    store: Store = Full()
    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0

    elementwise: ClassVar[bool] = False
    asks_nothing: ClassVar[bool] = True
    absorbs_decay: ClassVar[bool] = True
    applies_lr: ClassVar[bool] = True
    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {"beta": Rule("betas", 0, low=0.01, below=1.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.warmup_steps, bool) or not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps!r}: give a whole number of steps, 0 for none")
        for name in ("r", "weight_lr_power"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a finite number, 0 at least")

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        number = Slot(Full(), signed=False, spec=spec.like((), ()))
        return {"z": Slot(self.store, smallest_weight=0.0), "weight_sum": number, "lr_max": number}

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        return 3

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        step = kernels.values(update.whole(ctx))
        lr = ctx.group["lr"] * min(1.0, ctx.step / max(self.warmup_steps, 1))
        beta, old = ctx.read(self.beta), self._old(state, ctx)
        share = self._share(state, lr, ctx)
        state["z"].hold(torch.sub(old, step * lr), weight=0.0)
        moved = step * (lr * (1 - beta * (1 - share))) - old * share
        return Update(moved, decay=share, finite=update.finite)

    def averaged(self, param: Tensor, z: Tensor, group: Mapping[str, Any], codec: WeightCodec | None) -> Tensor:
        """Return `x`, the average of all `z`, from `y`, which the parameter holds, and `z`."""
        assert isinstance(self.beta, Hyper)
        return torch.lerp(value_of(param, z.dtype, codec, 0), z, 1 - 1 / self.beta.read(group))

    def _old(self, state: State, ctx: Context) -> Tensor:
        """Return `z` before the step."""
        if ctx.step > 1:
            return state["z"].read()
        return value_of(ctx.param, ctx.spec.accumulator, ctx.codec, ctx.start)

    def _share(self, state: State, lr: Any, ctx: Context) -> Tensor:
        """Return which share of the average the new `z` gets, and keep what the next step needs of this one."""
        largest = torch.maximum(state["lr_max"].read(), ctx.tensor(lr))
        weight = largest**self.weight_lr_power * ctx.step**self.r
        total = state["weight_sum"].read() + weight
        state["lr_max"].hold(largest)
        state["weight_sum"].hold(total)
        return torch.where(total > 0, weight / total, 0.0)


def value_of(param: Tensor, dtype: torch.dtype, codec: WeightCodec | None, start: int) -> Tensor:
    """Return the value of a parameter, with the bits that are kept beside the parameter, as a new tensor."""
    value = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
    kernels.add_weight(value, param.detach(), 1.0, codec, start)
    return value
