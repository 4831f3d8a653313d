"""Transforms around a chain that works on another tensor made of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from optstate.spec import ParamSpec
from optstate.stores import Requests, Slot
from optstate.stores.requests import about
from optstate.updates.base import Context, State, Transform, Update, run_transform
from optstate.updates.chain import as_chain

__all__ = ["Around", "run_inside"]


@dataclass(frozen=True)
class Around(Transform):
    """The base of transforms that run a chain on another tensor: a projection of the gradient, or it in another basis.

    A subclass says what that tensor is (`space`) and what it keeps itself (`own_slots`), and runs the chain by `inside`
    when it is called. The statistics of the inner chain are of the other tensor: their sizes, their parts on devices
    and what a file says of them follow from `space`.

    Args:
        inner: the chain. It sees neither the parameter nor the learning rate.

    Raises:
        ValueError: if the inner chain reads the parameter or multiplies by the learning rate.
    """

    inner: Transform

    elementwise: ClassVar[bool] = False
    absorbs_decay: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", as_chain(self.inner))
        super().__post_init__()
        if self.inner.reads_param or self.inner.applies_lr:
            raise ValueError(
                f"the chain inside of {type(self).__name__} sees no parameter and no learning rate: put what needs "
                f"them behind {type(self).__name__}(...), not into it, where {self.inner} stands"
            )

    @property
    def period(self) -> int:
        return self.inner.period

    def space(self, spec: ParamSpec) -> ParamSpec:
        """Return the specification of the tensor that the inner chain works on, made with `spec.like`."""
        raise NotImplementedError

    def own_slots(self, spec: ParamSpec) -> dict[str, Slot]:
        """Return what the transform keeps itself, by slot name."""
        return {}

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        space = self.space(spec)
        inner = {name: slot.turned(space) for name, slot in self.inner.slots(space, group).items()}
        return {**self.own_slots(spec), **inner}

    def check_slots(self, group: Mapping[str, Any]) -> None:
        self.inner.check_slots(group)
        super().check_slots(group)

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        return 4

    def inside(self, value: Tensor, state: State, ctx: Context, step: int = 0) -> Requests[Update]:
        """Run the inner chain on a value of `space`; drive with `yield from`.

        Args:
            value: this device's part of it, fp32.
            state: of the parameter.
            ctx: of the parameter.
            step: the count of updates that the inner chain sees; 0 for the parameter's own.
        """
        return (yield from run_inside(self.inner, value, self.space(ctx.spec), state, ctx, step))


def run_inside(
    chain: Transform, value: Tensor, space: ParamSpec, state: State, ctx: Context, step: int = 0
) -> Requests[Update]:
    """Run a chain on another tensor than the gradient; arguments as for `Around.inside`. Drive with `yield from`."""
    inside = replace(
        ctx,
        spec=space,
        param=value,
        grad=value,
        grad_scale=1.0,
        step=step or ctx.step,
        codec=None,
        start=0,
        is_whole=space.region is None,
        param_squares=None,
    )
    update = Update(value, finite=ctx.guard.finite)
    return (yield from about(run_transform(chain, update, state, inside), space))
