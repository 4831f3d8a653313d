"""Plans for many parameters: those that differ in nothing but their names share what was decided."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from optstate.optimizer.plan import ParamPlan, plan_parameter
from optstate.spec import ANY_MATRIX, ParamSpec
from optstate.updates import Chain, Route, as_route
from optstate.weights import Weights

__all__ = ["Planner"]

StateTensor = tuple[str, tuple[int, ...], torch.dtype]
"""A tensor of the state of a parameter that is whole: its key, its shape in memory and its dtype."""


class Planner:
    """Plans the parameters of one optimizer.

    A route may look at a name. What a chain keeps for a parameter follows from everything else in the specification,
    so slots, stores and sizes are worked out once for each kind of parameter: thousands of layers are few kinds.

    Args:
        route: picks the chain of each parameter.
        weights: how new values are written; "auto" is decided by dtype.
    """

    def __init__(self, route: Route, weights: Weights | str) -> None:
        self.route, self.weights = route, weights
        self._of_kind: dict[Hashable, ParamPlan] = {}
        self._ours: dict[int, bool] = {}
        self._state_of: dict[int, tuple[StateTensor, ...]] = {}

    def plan(self, spec: ParamSpec, trainable: bool) -> ParamPlan:
        """Decide everything about one parameter, as `plan_parameter` does.

        Raises:
            ValueError: if a store or a way to write weights cannot be used for the parameter.
        """
        chain, rule = self.route.pick(spec)
        kind = self._kind(chain, spec)
        known = self._of_kind.get(kind)
        if known is None:
            known = self._of_kind[kind] = plan_parameter(spec, as_route(chain), self.weights, trainable=True)
        plan = object.__new__(ParamPlan)  # as `ParamSpec.renamed`: what was derived of the other holds for this one
        plan.__dict__.update(known.__dict__, spec=spec, rule=rule, trainable=trainable and known.trainable)
        return plan

    def _kind(self, chain: Chain, spec: ParamSpec) -> Hashable:
        """Return what decides a plan: the specification, without the names where all transforms and stores are ours.

        What somebody else's part does with a name is not known.
        """
        if id(chain) not in self._ours:
            self._ours[id(chain)] = _is_ours(chain)
        name = "" if self._ours[id(chain)] else spec.name
        return id(chain), spec.shape, spec.dtype, spec.role, spec.head_size, spec.region, name

    def zeros(self, plan: ParamPlan, device: torch.device) -> Iterable[tuple[str, Tensor]]:
        """Return the state of a whole parameter before its first step: key and tensor of every field."""
        tensors = self._state_of.get(id(plan.slots))  # which all plans of a kind share
        if tensors is None:
            tensors = tuple((key, layout.shape, layout.dtype) for key, layout in plan.layouts.items())
            self._state_of[id(plan.slots)] = tensors
        return [(key, torch.zeros(shape, dtype=dtype, device=device)) for key, shape, dtype in tensors]


def _is_ours(chain: Chain) -> bool:
    """Return whether all transforms and stores of a chain are this library's."""
    parts: list[object] = []
    for transform in chain.transforms:
        parts += [transform, *(slot.store for slot in transform.slots(ANY_MATRIX, {}).values())]
    return all(type(part).__module__.startswith("optstate.") for part in parts)
