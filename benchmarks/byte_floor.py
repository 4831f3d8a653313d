"""The fewest bytes that a step can move between memory and processor, from what a recipe must read and write.

One pass over memory reads the gradient, reads and writes the parameter and every state tensor. Where the update of an
element needs a sum over the whole parameter, what is summed must be read before, and does not fit on the chip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optstate.optimizer.plan import ParamPlan
from optstate.stores import Grouped, Store
from optstate.updates import Transform, clip_by_norm, clip_by_rms, scale_by_confidence


@dataclass(frozen=True)
class Passes:
    """How often a step must read what it also writes or needs in its last pass.

    grad: readings of the gradient. param: readings of the parameter. average: readings of an average that takes the
    gradient's place in the last pass.
    """

    grad: int = 1
    param: int = 1
    average: int = 1


def byte_floor(plan: ParamPlan, group: Mapping[str, Any]) -> int:
    """Return the fewest bytes of one step of one parameter, given its plan and its group's hyper-parameters."""
    passes = passes_of(plan, group)
    of_average = plan.slots["exp_avg"].nbytes if passes.average > 1 else 0
    nbytes = plan.spec.numel * plan.spec.dtype.itemsize
    return lowest(nbytes, plan.nbytes, passes) + (passes.average - 1) * of_average


def lowest(nbytes: int, state: int, passes: Passes) -> int:
    """Return the bytes that are moved for a parameter of `nbytes` with a gradient of as many and `state` bytes."""
    return passes.grad * nbytes + (passes.param + 1) * nbytes + 2 * state


def passes_of(plan: ParamPlan, group: Mapping[str, Any]) -> Passes:
    """Return how often a step must read what."""
    grad, param, average = 1, 1, 1
    for transform in plan.chain.transforms:
        stores = [plan.slots[name].store for name in transform.slots(plan.spec, {})]
        needs_sums = any(is_summed_over_all(store, plan.spec.shape) for store in stores)
        if isinstance(transform, scale_by_confidence):
            average += needs_sums
        elif transform.reads_param:
            param += 1
        else:
            grad += needs_sums or clips_as_a_whole(transform, group)
    return Passes(grad, param, average)


def is_summed_over_all(store: Store, shape: tuple[int, ...]) -> bool:
    """Return whether a statistic in this store is of sums over more of the parameter than one row of it."""
    return store.exact_sums and not (isinstance(store, Grouped) and store.by == "row" and len(shape) > 1)


def clips_as_a_whole(transform: Transform, group: Mapping[str, Any]) -> bool:
    """Return whether a transform bounds the update by a norm of all of it, and is switched on."""
    keys = {clip_by_rms: "clip_threshold", clip_by_norm: "clip_norm"}
    return type(transform) in keys and group.get(keys[type(transform)], math.inf) is not None
