"""Steps of `AdamW8bit`, `Lion8bit` and `SGDM8bit` by bitsandbytes' kernels, where they were asked for by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from optstate.kernels import Codebook
from optstate.kernels.bitsandbytes_blocks import BLOCK, BlockMoment, BlockRule, step_blocks
from optstate.optimizer.plan import ParamPlan, SlotPlan
from optstate.optimizer.whole_steps.operands import as_number
from optstate.spec import is_fake
from optstate.store_layouts import is_small
from optstate.stores import Block8, Full
from optstate.updates import Context, Transform, add_decayed_weights, momentum, scale_by_adam, sign_momentum
from optstate.weights import Plain

__all__ = ["SteppedByBitsandbytes", "keeps_small_moments"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SteppedByBitsandbytes:
    """One operator of bitsandbytes that reads and writes the codes and the scales of our `Block8`.

    The step is the one that the chain means. What differs is how moments become codes, which bitsandbytes' kernel does
    in its own way: on a CPU a moment of zero gets a code of a small number, and a small one a code that is not always
    the nearest.
    """

    plan: ParamPlan
    rule: scale_by_adam | sign_momentum | momentum
    decay: add_decayed_weights | None

    checks_gradient: ClassVar[bool] = False
    words: ClassVar[str] = "bitsandbytes"
    passes: ClassVar[int] = 2

    @staticmethod
    def of(plan: ParamPlan) -> SteppedByBitsandbytes | str:
        """Return the step of a plan, or why there is none and what to do, as the end of a sentence."""
        rule, decay = _known(plan.chain.transforms)
        if rule is None:
            return f'bitsandbytes has no kernel for the chain {plan.chain}: leave the backend to "auto"'
        for slot in plan.slots.values():
            why = _why_not_kept(slot)
            if why:
                return why
        if plan.spec.dtype not in DTYPES:
            return f'bitsandbytes steps fp32, bf16 and fp16, not {plan.spec.dtype}: leave the backend to "auto"'
        if not isinstance(plan.weights, Plain):
            return (
                f"bitsandbytes rounds weights to nearest, and these are written by {plan.weights}: build the optimizer "
                'with weights=optstate.weights.Plain(), or leave the backend to "auto"'
            )
        return SteppedByBitsandbytes(plan, rule, decay)

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written: the gradient twice, the parameter and its state once each way."""
        return 4 * self.plan.spec.local_numel * self.plan.spec.dtype.itemsize + 2 * self.plan.nbytes

    def run(self, state: Mapping[str, Any], ctx: Context) -> bool:
        """Step the parameter; see `WholeStep.run`. Only a step without values is left to the transforms.

        Raises:
            ValueError: for what the kernel cannot be given, before anything is written.
        """
        if is_fake(ctx.param):
            return False
        rule = self._read(ctx)
        param, grad = ctx.param.detach(), ctx.grad.detach()
        if type(ctx.param) not in (Tensor, nn.Parameter) or not param.is_contiguous() or param.is_neg():
            self._refuse("its numbers do not lie side by side in memory: use param.contiguous()")
        if grad.dtype != param.dtype:
            self._refuse(f"its gradient is {grad.dtype}, and bitsandbytes wants the weight's {param.dtype}")
        moments = [self._moment(slot, state) for slot in self.plan.slots.values()]
        ctx.guard.begin_writing()
        step_blocks(param.view(-1), grad.contiguous().view(-1), moments, rule, ctx.guard.finite)
        return True

    def _read(self, ctx: Context) -> BlockRule:
        """Return the numbers of this step."""
        lr, grad_scale = as_number(ctx.group["lr"]), as_number(ctx.grad_scale)
        if lr is None or grad_scale is None:
            what = "learning rate" if lr is None else "coefficient of the clip by a global norm"
            self._refuse(f"the {what} is known to a device only, and bitsandbytes wants a number of the host")
        decay = 0.0 if self.decay is None else float(ctx.read(self.decay.rate))
        match self.rule:
            case scale_by_adam() as adam:
                beta1, beta2 = map(ctx.read, adam.betas)
                return BlockRule("adam", lr, decay, beta1, beta2, ctx.read(adam.eps), ctx.step, grad_scale)
            case sign_momentum() as lion:
                beta1, beta2 = map(ctx.read, lion.betas)
                return BlockRule("lion", lr, decay, beta1, beta2, 0.0, ctx.step, grad_scale)
        if ctx.read(self.rule.dampening):
            self._refuse("bitsandbytes' momentum has no dampening: set dampening=0")
        return BlockRule("momentum", lr, decay, ctx.read(self.rule.beta), 0.0, 0.0, ctx.step, grad_scale)

    def _moment(self, slot: SlotPlan, state: Mapping[str, Any]) -> BlockMoment:
        codes, absmax = state[slot.keys["codes"]], state[slot.keys["absmax"]]
        for tensor, field in ((codes, slot.fields["codes"]), (absmax, slot.fields["absmax"])):
            if tensor.dtype != field.dtype or not tensor.is_contiguous():
                self._refuse(f"the state of {slot.name} is not as it was planned: load it by load_state_dict()")
        book = slot.store.codebook
        assert book is not None
        return BlockMoment(codes.view(-1), absmax.view(-1), _values(book, codes.device))

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(f'bitsandbytes cannot step {self.plan.spec.name!r}: {why}, or call use_backend("auto")')


def keeps_small_moments(plan: ParamPlan) -> bool:
    """Return whether a chain that bitsandbytes knows keeps its moments in fp32, of a small parameter.

    bitsandbytes does so, too, below the same number of elements; these have no codes, and any backend may step them.
    """
    knows = _known(plan.chain.transforms)[0] is not None
    return knows and is_small(plan.spec.shape) and all(slot.store == Full() for slot in plan.slots.values())


def _known(
    transforms: tuple[Transform, ...],
) -> tuple[scale_by_adam | sign_momentum | momentum | None, add_decayed_weights | None]:
    """Return the rule and the weight decay of a chain that bitsandbytes has a kernel for; None for another chain."""
    match transforms:
        case ((scale_by_adam() | sign_momentum()) as rule,):
            return rule, None
        case ((scale_by_adam() | sign_momentum()) as rule, add_decayed_weights() as decay):
            return rule, decay
        case (momentum(heavy_ball=True, nesterov=False, decoupled=False) as rule,):
            return rule, None
        case (add_decayed_weights() as decay, momentum(heavy_ball=True, nesterov=False, decoupled=False) as rule):
            return rule, decay
    return None, None


def _why_not_kept(slot: SlotPlan) -> str:
    """Return why bitsandbytes cannot step what is kept in a slot, and what to do; "" if it can."""
    if isinstance(slot.store, Block8) and slot.store.block == BLOCK:
        return ""
    if slot.store.scale_block == BLOCK and isinstance(getattr(slot.store, "blocks", None), Block8):
        return (
            f"the blocks of {slot.name} are split among devices, and bitsandbytes wants whole ones: split the "
            f'parameter at multiples of {BLOCK} elements, or leave the backend to "auto"'
        )
    return (
        f"{slot.name} is kept in {slot.store}, and bitsandbytes' kernels know blocks of {BLOCK} elements in its 8-bit "
        f'code books: keep it in Block8({BLOCK}), or leave the backend to "auto"'
    )


@cache
def _values(book: Codebook, device: torch.device) -> Tensor:
    return book.values.to(device)
