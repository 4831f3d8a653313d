"""bitsandbytes' kernels for moments in 8-bit blocks: whether they can be used here, and a step by them.

The operator is the same on every device that bitsandbytes knows, so what is tested on a CPU holds for the others as far
as calls go. What another device's kernel means by its numbers is not assumed: a step of one block, made once for each
kind of device, tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from optstate.kernels.chunking import slice_elements

__all__ = ["BLOCK", "BlockMoment", "BlockRule", "step_blocks", "why_no_bitsandbytes"]

BLOCK = 256
"""Elements per scale, which bitsandbytes' kernels have fixed."""

RuleName = Literal["adam", "lion", "momentum"]
RULES: tuple[RuleName, ...] = ("adam", "lion", "momentum")


@dataclass(frozen=True)
class BlockRule:
    """The numbers of one step: `param <- param * (1 - lr * decay) - lr * update`; of the heavy ball a penalty.

    beta1, beta2, eps: of the rule. step: count of the parameter's updates. grad_scale: multiplies the gradient.
    """

    name: RuleName
    lr: float
    decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    step: int = 1
    grad_scale: float = 1.0


@dataclass(frozen=True)
class BlockMoment:
    """A moment as the kernels keep it: flat uint8 codes, fp32 scales, and the 256 values of the codes."""

    codes: Tensor
    absmax: Tensor
    values: Tensor

    def piece(self, start: int, stop: int) -> BlockMoment:
        """Return the moment of the elements from `start`, the beginning of a block, to `stop`."""
        return BlockMoment(self.codes[start:stop], self.absmax[start // BLOCK : -(-stop // BLOCK)], self.values)


def _is_installed() -> bool:
    """Return whether the package bitsandbytes can be imported."""
    found = find_spec("bitsandbytes")
    return found is not None and found.origin is not None  # a mere folder of that name has none


def why_no_bitsandbytes(device: torch.device | None = None) -> str:
    """Return why bitsandbytes' kernels cannot make steps, as the end of a sentence; "" if they can.

    device: where; None to ask for any device. The first answer for a kind of device makes the host wait for it.
    """
    if not _is_installed():
        return "the package bitsandbytes is not installed: pip install 'optstate[bitsandbytes]'"
    why = _why_no_operator()
    if why or device is None:
        return why
    found = {_order_of(rule, device.type, device.index) for rule in RULES}
    return next((order for order in sorted(found) if order not in (BEFORE, AFTER)), "")


def step_blocks(
    param: Tensor, grad: Tensor, moments: Sequence[BlockMoment], rule: BlockRule, finite: Tensor | None = None
) -> None:
    """Step a flat parameter and its one or two moments by bitsandbytes' kernel, slice by slice.

    Args:
        param: fp32, bf16 or fp16, contiguous; written, rounded to nearest.
        grad: of the same size and dtype, contiguous.
        moments: written.
        rule: the numbers of the step.
        finite: 0-d bool, where only the device knows whether the gradient is finite: if not, nothing changes. The
            kernel then works on copies, a slice at a time, as it cannot be told.
    """
    if _order_of(rule.name, param.device.type, param.device.index) == AFTER:
        rule = _with_decay_after(rule)
    size = max(slice_elements(param.device) // BLOCK, 1) * BLOCK
    for start in range(0, param.numel(), size):
        stop = min(start + size, param.numel())
        kept = [moment.piece(start, stop) for moment in moments]
        written = [param[start:stop], *(tensor for moment in kept for tensor in (moment.codes, moment.absmax))]
        if finite is None:
            _call(written, grad[start:stop], kept, rule)
            continue
        copies = [tensor.clone() for tensor in written]
        _call(copies, grad[start:stop], kept, rule)
        for tensor, copy in zip(written, copies, strict=True):
            torch.where(finite, copy, tensor, out=tensor)


def _call(written: Sequence[Tensor], grad: Tensor, moments: Sequence[BlockMoment], rule: BlockRule) -> None:
    """Call the operator. written: the parameter, then codes and scales of each moment; moments: for their values."""
    param, codes, absmax, *second = written
    codes2, absmax2 = second or (None, None)
    _operator()(
        rule.name,
        grad,
        param,
        codes,
        codes2,
        rule.beta1,
        rule.beta2,
        0.0,  # beta3 and alpha, of a rule that is not used
        0.0,
        rule.eps,
        rule.step,
        rule.lr,
        moments[0].values,
        moments[1].values if second else None,
        absmax,
        absmax2,
        rule.decay,
        rule.grad_scale,
    )


def _with_decay_after(rule: BlockRule) -> BlockRule:
    """Return numbers with which a kernel that decays the weight after its step does what `BlockRule` says.

    `(p - a u) (1 - a d)` is `p (1 - lr decay) - lr u` with `a = lr / (1 - lr decay)` and `a d = lr decay`.
    """
    keep = 1.0 - rule.lr * rule.decay
    if rule.name == "momentum" or keep <= 0.0:
        return rule
    return BlockRule(
        rule.name,
        rule.lr / keep,
        rule.decay * keep,
        rule.beta1,
        rule.beta2,
        rule.eps,
        rule.step,
        rule.grad_scale,
    )


# --- what is installed ------------------------------------------------------------------------------------------------


@cache
def _why_no_operator() -> str:
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        return f"the package bitsandbytes cannot be imported: {_line(error)}"
    if not hasattr(torch.ops.bitsandbytes, "optimizer_update_8bit_blockwise"):
        return "this version of bitsandbytes has no operator for 8-bit steps: install 0.50 or newer"
    return ""


def _operator() -> Any:
    return torch.ops.bitsandbytes.optimizer_update_8bit_blockwise.default


BEFORE, AFTER = "before", "after"


@cache
def _order_of(name: RuleName, device_type: str, index: int | None) -> str:
    """Return whether the kernel decays the weight before or after its step; else why it cannot be used.

    One block is stepped whose result is known: of a weight, a gradient and an update of 1.
    """
    device = torch.device(device_type, index) if index is not None else torch.device(device_type)
    lr = decay = 0.5
    param, grad = (torch.ones(BLOCK, device=device) for _ in range(2))
    values = torch.linspace(-1.0, 1.0, 256, device=device)
    count = 2 if name == "adam" else 1
    moments = []
    for _ in range(count):
        codes = torch.full((BLOCK,), 127, dtype=torch.uint8, device=device)
        moments.append(BlockMoment(codes, torch.zeros(1, device=device), values))
    rule = BlockRule(name, lr, decay, 0.9, 0.99, 1e-8, step=1)
    written = [param, *(tensor for moment in moments for tensor in (moment.codes, moment.absmax))]
    share = {"adam": 0.1, "lion": 0.01, "momentum": 1.0 + decay}[name]
    meant = 1.0 - lr * (1.0 + decay) if name == "momentum" else 1.0 - lr * decay - lr
    try:
        _call(written, grad, moments, rule)
        weight, scale, code = float(param[0]), float(moments[0].absmax[0]), int(moments[0].codes[0])
    except Exception as error:
        return f"bitsandbytes makes no 8-bit steps on {device_type}: {_line(error)}"
    if abs(scale - share) > 1e-3 * share or code != 255:
        return f"bitsandbytes' {name} kernel keeps another moment on {device_type} than is known here"
    if abs(weight - meant) < 1e-3:
        return BEFORE
    if name != "momentum" and abs(weight - (1.0 - lr) * (1.0 - lr * decay)) < 1e-3:
        return AFTER
    return f"bitsandbytes' {name} kernel makes another step on {device_type} than is known here"


def _line(error: BaseException) -> str:
    """Return the first line of an error, with its class."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__
