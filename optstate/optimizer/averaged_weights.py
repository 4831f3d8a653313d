"""Weights that a model is evaluated with, in the place of those that it is trained with."""

from __future__ import annotations

import torch
from torch import Tensor

from optstate.distributed.placement import here
from optstate.optimizer.step_runner import StepRunner
from optstate.updates import schedule_free

__all__ = ["AveragedWeights"]


class AveragedWeights:
    """Puts averaged weights into parameters, and puts back to the bit what was there.

    runner: of the optimizer. Its marks refuse steps, and state that is saved or loaded, in between.
    """

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self._trained: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def show(self) -> None:
        """Make every parameter hold its average, where its chain has one and a step was made."""
        runner = self._runner
        for param in runner.params():
            plan = runner.leaf(param).plan
            last = next((t for t in plan.chain.transforms if isinstance(t, schedule_free)), None)
            state = runner.optimizer.state.get(param, {})
            if last is None or not state.get("step"):
                continue
            part, local = here(param), {key: here(v) for key, v in state.items() if isinstance(v, Tensor)}
            slot = plan.slots["z"]
            z = slot.store.read({field: local[key] for field, key in slot.keys.items()}, tuple(part.shape))
            kept = {field: local[key] for field, key in plan.weight_keys.items()}
            codec = plan.weights.codec(plan.spec, state["step"], kept)
            group = runner.optimizer.param_groups[runner.leaf(param).group]
            average = last.averaged(part, z.to(plan.spec.accumulator), group, codec)
            self._trained[param] = part.clone()
            part.copy_(average)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make every parameter hold what it did before."""
        for param, trained in self._trained.items():
            here(param).copy_(trained)
        self._trained.clear()
