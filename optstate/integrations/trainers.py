"""Refuse trainers that are set to clip or accumulate gradients which a fused update has already freed.

Transformers' Trainer clips the norm by default, between backward and `step()`; with every gradient gone it clips
nothing, reports a norm of 0 and trains on. Nothing tells the optimizer: torch's `clip_grad_norm_` only sees parameters
without gradients, which is no error. Leaving a tripwire in `param.grad` is no way out, as a freed gradient is None, and
as Trainer calls the same function with an infinite bound just to measure. What can be known is what a trainer was told:
so the trainer that holds the optimizer is looked up, in the manner of `engines`, and its settings are read before
anything is updated. A call of one's own goes unnoticed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from optstate import kernels
from optstate.integrations.live_objects import instances_of

__all__ = ["refuse_settings"]


def refuse_settings(optimizer: torch.optim.Optimizer, clip_grad_norm: float | None) -> None:
    """Raise RuntimeError if a live trainer that holds `optimizer` will clip freed gradients or is accumulating.

    Called at the first update after fusing or loading, when the trainer has its optimizer. Only trainers whose modules
    are imported are looked for; none is imported here.

    Args:
        optimizer: the fused optimizer.
        clip_grad_norm: the norm that the fused backward clips to by itself, which a trainer may ask for, too; or None.
    """
    checks = [(kind, check) for module, name, check in _KNOWN if (kind := _class(module, name)) is not None]
    if not checks or kernels.rehearsing():
        return
    for item in instances_of(*(kind for kind, _ in checks)):
        for kind, check in checks:
            if isinstance(item, kind):
                check(item, optimizer, clip_grad_norm)


def _class(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def _check_hf(trainer: Any, optimizer: torch.optim.Optimizer, clip_grad_norm: float | None) -> None:
    norm = getattr(getattr(trainer, "args", None), "max_grad_norm", None)
    if norm and _holds(getattr(trainer, "optimizer", None), optimizer) and norm != clip_grad_norm:
        raise RuntimeError(
            f"{type(trainer).__name__} is set to max_grad_norm={norm} and would clip nothing: a fused update has used "
            "and freed the gradients by then. Pass max_grad_norm=0 to its arguments; to clip by the norm, leave the "
            f"update to step(), or use fuse_backward(optimizer, clip_grad_norm={norm}) and call fused.grad_norm(loss) "
            "at the end of compute_loss() (costs a second backward)"
        )


def _check_lightning(trainer: Any, optimizer: torch.optim.Optimizer, clip_grad_norm: float | None) -> None:
    if not any(_holds(item, optimizer) for item in getattr(trainer, "optimizers", None) or ()):
        return
    clip = getattr(trainer, "gradient_clip_val", None)
    by_value = "value" in str(getattr(trainer, "gradient_clip_algorithm", None)).lower()
    if clip and (clip != clip_grad_norm or by_value):
        remedy = (
            "use a recipe's own clip_grad_value"
            if by_value
            else f"use fuse_backward(optimizer, clip_grad_norm={clip}) and call fused.grad_norm(loss) at the end of "
            "training_step() (costs a second backward)"
        )
        raise RuntimeError(
            f"Lightning's Trainer is set to gradient_clip_val={clip} and would clip nothing: a fused update has used "
            "and freed the gradients by then. Leave gradient_clip_val out; to clip, leave the update to step(), or "
            f"{remedy}"
        )
    batches = getattr(trainer, "accumulate_grad_batches", 1)
    if batches != 1:
        raise RuntimeError(
            f"Lightning's Trainer is set to accumulate_grad_batches={batches}, but a fused backward updates at every "
            "batch: set it to 1, leave the update to step(), or optimize manually and run all but the last batch under "
            "fused.accumulate()"
        )


def _check_accelerate(wrapper: Any, optimizer: torch.optim.Optimizer, _: float | None) -> None:
    state = getattr(wrapper, "gradient_state", None)
    if _holds(wrapper, optimizer) and not getattr(state, "sync_gradients", True):
        raise RuntimeError(
            "gradient accumulation is on (gradient_accumulation_steps above 1) and this is not the last micro-batch of "
            "its step, but a fused backward would update already: use 1 and larger batches, leave the update to "
            "step(), or run backward under fused.accumulate() while accelerator.sync_gradients is False"
        )


def _holds(wrapped: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `wrapped` is the optimizer, or a trainer's wrapper around it."""
    while wrapped is not None and wrapped is not optimizer:
        inner = getattr(wrapped, "__dict__", {})
        wrapped = inner.get("optimizer", inner.get("_optimizer"))
    return wrapped is optimizer


_KNOWN: tuple[tuple[str, str, Callable[[Any, torch.optim.Optimizer, float | None], None]], ...] = (
    ("transformers.trainer", "Trainer", _check_hf),
    ("accelerate.optimizer", "AcceleratedOptimizer", _check_accelerate),
    ("lightning.pytorch.trainer.trainer", "Trainer", _check_lightning),
    ("pytorch_lightning.trainer.trainer", "Trainer", _check_lightning),
)
