"""AdamW as PyTorch's fused kernel does it, in one pass over memory: taken where it gives the same result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate.kernels import native
from optstate.kernels.native import StepKind
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.whole_steps.base import is_plain
from optstate.stores import Full
from optstate.updates import Context, add_decayed_weights, scale_by_adam
from optstate.weights import Plain

__all__ = ["FusedByTorch"]


@dataclass(frozen=True)
class FusedByTorch:
    """Adam's rule and at most a decoupled decay after it, moments in full and in the parameter's dtype, fp32 or fp64.

    In lower precision PyTorch keeps the moments in that precision too, which this library does not.
    """

    plan: ParamPlan
    adam: scale_by_adam
    decay: add_decayed_weights | None

    checks_gradient: ClassVar[bool] = False

    @staticmethod
    def of(plan: ParamPlan) -> FusedByTorch | None:
        """Return the step of a plan; None if its chain is not exactly this one."""
        exact = plan.spec.dtype == plan.spec.accumulator and isinstance(plan.weights, Plain)
        if not exact or any(slot.store != Full() for slot in plan.slots.values()):
            return None
        match plan.chain.transforms:
            case (scale_by_adam(eps_hat=False) as adam,):
                return FusedByTorch(plan, adam, None)
            case (scale_by_adam(eps_hat=False) as adam, add_decayed_weights() as decay):
                return FusedByTorch(plan, adam, decay)
        return None

    @property
    def words(self) -> str:
        """What the plan says of the step."""
        return "PyTorch's fused AdamW"

    @property
    def passes(self) -> int:
        """Passes over the parameter: the check of the gradient, and the step."""
        return 2

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written: the gradient twice, the parameter and its state once each way."""
        return 4 * self.plan.spec.local_numel * self.plan.spec.dtype.itemsize + 2 * self.plan.nbytes

    @property
    def kind(self) -> StepKind:
        """What a table of steps has in the place of the parameter: a gradient that is looked at."""
        return StepKind.CHECKED

    def fill(self, state: Mapping[str, Any], ctx: Context) -> native.Elementwise | None:
        """Return a structure without operands: the table only looks at the gradient; see `TableStep.fill`."""
        if ctx.guard.deferred or isinstance(ctx.group["lr"], Tensor) or type(ctx.grad_scale) is not float:
            return None
        tensors = ctx.param, ctx.grad, state["exp_avg"], state["exp_avg_sq"]
        shaped = all(each.shape == ctx.param.shape and each.dtype == ctx.param.dtype for each in tensors)
        return native.Elementwise() if ctx.grad_scale == 1.0 and shaped and is_plain(*tensors) else None

    def largest(self, ctx: Context) -> float:
        """Return the largest magnitude of a gradient's element that is not refused; negative for none."""
        return -1.0 if self.plan.guards else self.plan.largest_gradient(ctx.group)

    def room(self, structure: native.Elementwise) -> int:
        """Return how many numbers of 8 bytes the sums of a step take: there are none."""
        return 0

    def with_names(self, structure: native.Elementwise, name: str) -> None:
        """Put the keys of random bits into a structure: there are none."""

    def finish(self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], ctx: Context) -> None:
        """Step parameters whose gradients were looked at, which have the group and the count of updates of `ctx`."""
        beta1, beta2 = map(ctx.read, self.adam.betas)
        torch._fused_adamw_(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [ctx.param.new_full((), ctx.step, dtype=torch.float32)] * len(params),
            lr=float(ctx.group["lr"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=ctx.read(self.decay.rate) if self.decay is not None else 0.0,
            eps=ctx.read(self.adam.eps),
            amsgrad=False,
            maximize=False,
        )

    def run(self, state: Mapping[str, Any], ctx: Context) -> bool:
        """Step the parameter; see `WholeStep.run`."""
        if ctx.param.device.type not in ("cpu", "cuda"):
            return False
        if (
            not (ctx.param.is_contiguous() and ctx.grad.is_contiguous() and ctx.grad.dtype == ctx.param.dtype)
            or ctx.grad.is_neg()
        ):
            return False
        lr, finite = ctx.group["lr"], ctx.guard.finite
        if (
            isinstance(lr, Tensor)
            or ctx.clock is not None
            or isinstance(ctx.grad_scale, Tensor)
            or ctx.grad_scale != 1.0
        ):
            return False
        beta1, beta2 = map(ctx.read, self.adam.betas)
        ctx.guard.begin_writing()
        torch._fused_adamw_(
            [ctx.param.detach()],
            [ctx.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [ctx.param.new_full((), ctx.step, dtype=torch.float32)],
            lr=float(lr),
            beta1=beta1,
            beta2=beta2,
            weight_decay=ctx.read(self.decay.rate) if self.decay is not None else 0.0,
            eps=ctx.read(self.adam.eps),
            amsgrad=False,
            maximize=False,
            found_inf=None if finite is None else finite.logical_not().float(),
        )
        return True
