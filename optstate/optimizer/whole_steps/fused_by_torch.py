"""AdamW as PyTorch's fused kernel does it, in one pass over memory: taken where it gives the same result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate.optimizer.plan import ParamPlan
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

    def run(self, state: Mapping[str, Any], ctx: Context) -> bool:
        """Step the parameter; see `WholeStep.run`."""
        if ctx.param.device.type not in ("cpu", "cuda"):
            return False
        if not (ctx.param.is_contiguous() and ctx.grad.is_contiguous() and ctx.grad.dtype == ctx.param.dtype):
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
