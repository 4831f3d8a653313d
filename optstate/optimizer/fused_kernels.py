"""Chains whose whole step PyTorch does in one pass over memory: taken where they give the same result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optstate.optimizer.plan import ParamPlan
from optstate.updates import Context

__all__ = ["stepped_by_torch"]


def stepped_by_torch(plan: ParamPlan, state: Mapping[str, Any], ctx: Context) -> bool:
    """Update parameter and state with PyTorch's fused AdamW, if the chain is exactly that; else do nothing.

    That is Adam's rule and at most a decoupled decay after it, both moments in full and in the parameter's dtype,
    fp32 or fp64. In lower precision PyTorch keeps the moments in that precision too, which this library does not.
    """
    if plan.fused_adamw is None or ctx.param.device.type not in ("cpu", "cuda"):
        return False
    adam, rate = plan.fused_adamw
    if not (ctx.param.is_contiguous() and ctx.grad.is_contiguous() and ctx.grad.dtype == ctx.param.dtype):
        return False
    lr, finite = ctx.group["lr"], ctx.guard.finite
    if isinstance(lr, Tensor) or isinstance(ctx.grad_scale, Tensor) or ctx.grad_scale != 1.0:
        return False
    beta1, beta2 = map(ctx.read, adam.betas)
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
        weight_decay=ctx.read(rate.rate) if rate is not None else 0.0,
        eps=ctx.read(adam.eps),
        amsgrad=False,
        maximize=False,
        found_inf=None if finite is None else finite.logical_not().float(),
    )
    return True
