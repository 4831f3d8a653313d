"""Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) and the variants other libraries ship."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

import optstate
from optstate import stores, updates
from optstate.weights import Weights

__all__ = ["Adafactor"]


class Adafactor(optstate.Optimizer):
    """Factored second moment, update clipping, step sizes relative to the parameter's RMS, optional first moment.

    Without `lr` this is the paper's algorithm 4: `p <- p - a u` with `a = max(eps[1], RMS(p)) * rho(t)` and
    `rho(t) = min(1e-2, 1 / sqrt(t))`. The flags are those of transformers' Adafactor and do the same.

    Args:
        params: as `optstate.Optimizer` takes them; names are recommended.
        lr: step size; None for the relative step. The param groups then hold lr = 1, a factor on rho(t).
        eps: two numbers: added to squared gradients, and the least parameter RMS.
        clip_threshold: bound on the RMS of an update.
        decay_rate: exponent of the averaging weight `t ** decay_rate`.
        beta1: keep a first moment, the average of finished updates; None for none.
        weight_decay: decoupled, multiplied by everything that multiplies the update.
        scale_parameter: multiply by max(eps[1], RMS(p)).
        relative_step: use rho(t); by default exactly when `lr` is None.
        warmup_init: rho(t) = min(1e-6 t, 1 / sqrt(t)).
        momentum_before_lr: average updates, so a new learning rate acts at once. False averages finished steps, as
            transformers does (its issue 34506).
        torch_compatible: the form of `torch.optim.Adafactor`: rho(t) = min(lr, 1 / sqrt(t)), weight decay by lr
            alone, `eps[0]` a floor under the second moment instead of an addend. None for `eps[0]` is fp32's
            machine epsilon whatever the parameter's dtype; torch takes the dtype's own, and in bf16 no longer
            normalises gradients of RMS below 1e-2. Needs parameter-sized temporaries, as the plan shows.
        weights: how results are written; "auto" rounds bf16 and fp16 parameters stochastically.
        fused_backward: update inside `loss.backward()` at once; see `optstate.fuse_backward`.

    Raises:
        TypeError: if `decay_rate` is no number.
        ValueError: for flags that contradict each other, or numbers out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float | None, float] = (1e-30, 1e-3),
        clip_threshold: float | None = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        momentum_before_lr: bool = True,
        torch_compatible: bool = False,
        weights: Weights | str = "auto",
        fused_backward: bool = False,
    ) -> None:
        if not isinstance(eps, tuple | list) or len(eps) != 2:
            raise ValueError(f"eps={eps!r} must be two numbers: added to squared gradients, and least parameter RMS")
        if isinstance(decay_rate, bool) or not isinstance(decay_rate, int | float):
            raise TypeError(f"decay_rate={decay_rate!r} must be a number, such as -0.8")
        if relative_step is None:
            relative_step = lr is None
        _refuse_contradictions(lr, eps, beta1, scale_parameter, relative_step, warmup_init, torch_compatible)

        least_square = updates.hyper("eps", torch.finfo(torch.float32).eps if eps[0] is None else eps[0], index=0)
        least_rms = updates.hyper("eps", eps[1], index=1)
        decay = updates.power_decay(-decay_rate)
        steps: list[updates.Transform] = []
        if torch_compatible:
            steps.append(updates.scale_by_rms(stores.Factored(), decay=decay, eps=None, floor=least_square))
        else:
            steps.append(updates.scale_by_rms(stores.Factored(), decay=decay, eps=least_square))
        steps.append(updates.clip_by_rms(clip_threshold))
        if not torch_compatible:
            steps.append(updates.add_decayed_weights(weight_decay))
        if scale_parameter:
            steps.append(updates.scale_by_param_rms(least_rms))
        if relative_step:
            steps.append(updates.scale_by_schedule(warm_relative_step if warmup_init else relative_step_size))
        if torch_compatible:
            steps.append(updates.scale_by_schedule(cap_by_inverse_root))
            steps.append(updates.add_decayed_weights(weight_decay))
        if beta1 is not None:
            if not momentum_before_lr:
                steps.append(updates.scale_by_learning_rate())
            steps.append(updates.momentum(stores.Full(), beta=updates.hyper("beta1", beta1), decoupled=True))

        super().__init__(params, optstate.chain(*steps), lr=1.0 if lr is None else lr, weights=weights)
        if fused_backward:
            optstate.fuse_backward(self)


def relative_step_size(step: int, lr: float) -> float:
    """Return the relative step size `min(1e-2, 1 / sqrt(t))` (Adafactor, section 8) at step t = 1, 2, ..."""
    return float(min(1e-2, step**-0.5))


def warm_relative_step(step: int, lr: float) -> float:
    """Return the relative step size with a linear start, `min(1e-6 t, 1 / sqrt(t))`, at step t = 1, 2, ..."""
    return float(min(1e-6 * step, step**-0.5))


def cap_by_inverse_root(step: int, lr: float | torch.Tensor) -> float | torch.Tensor:
    """Return the factor that turns lr into `min(lr, 1 / sqrt(t))`, a 0-d tensor if lr is one."""
    if isinstance(lr, torch.Tensor):
        return torch.clamp(step**-0.5 / lr, max=1.0)
    return min(1.0, step**-0.5 / lr) if lr > 0 else 1.0


def _refuse_contradictions(
    lr: float | None,
    eps: tuple[float | None, float],
    beta1: float | None,
    scale_parameter: bool,
    relative_step: bool,
    warmup_init: bool,
    torch_compatible: bool,
) -> None:
    if lr is None and not relative_step:
        raise ValueError("lr=None needs relative_step=True: give a learning rate, or let the step be relative")
    if lr is not None and relative_step:
        raise ValueError(f"lr={lr} and relative_step=True exclude each other: drop one")
    if warmup_init and not relative_step:
        raise ValueError("warmup_init=True needs relative_step=True: leave lr=None, or use a warmup scheduler")
    if torch_compatible and (lr is None or beta1 is not None or not scale_parameter):
        raise ValueError("torch_compatible=True takes an lr, scale_parameter=True and no beta1, as torch's form does")
    if eps[0] is None and not torch_compatible:
        raise ValueError("eps[0]=None belongs to torch_compatible=True: give a small number such as 1e-30")
