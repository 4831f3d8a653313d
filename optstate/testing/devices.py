"""Simulated devices: a parameter cut into parts whose steps run in lock-step in this process.

No process group is needed: what the parts ask for is added up here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from optstate.distributed.sums import lock_step
from optstate.kernels.backend import run_with_loops
from optstate.optimizer.chain_step import context, run_chain
from optstate.optimizer.optimizer import Optimizer
from optstate.optimizer.plan import ParamPlan, StateLayout, plan_parameter
from optstate.optimizer.whole_steps import find_whole_step
from optstate.spec import ParamSpec, Region
from optstate.stores import Guard, Largest, Partial, Whole

__all__ = ["CutParameter", "gradient_of", "noise"]

HEAD_SIZE = 16


def noise(shape: Sequence[int], seed: int) -> Tensor:
    """Return normal numbers of this shape, fp32, which are the same for the same seed."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def gradient_of(shape: Sequence[int], step: int) -> Tensor:
    """Return the gradient of a step, fp32: small in odd steps, large in even ones."""
    return noise(shape, 100 + step) * (0.1 if step % 2 else 3.0)


def _cut(size: int, parts: int, index: int) -> slice:
    """Which part of a dimension a device has: chunks as `torch.chunk` makes them, the last ones smaller or empty."""
    chunk = -(-size // parts)
    return slice(min(index * chunk, size), min((index + 1) * chunk, size))


class DevicePart:
    """What one simulated device has: its place among the parts, its plan, and its part of the state."""

    def __init__(self, spec: ParamSpec, place: tuple[int, ...], optimizer: Optimizer) -> None:
        self.place, self.plan = place, plan_parameter(spec, optimizer.recipe, "auto", trainable=True)
        assert spec.region is not None
        self.region = spec.region
        self.whole_step = find_whole_step(self.plan, torch.device("cpu")).step
        self.backend = "auto"
        self.state: dict[str, Any] = {}
        for key, layout in self.plan.layouts.items():
            self.state[key] = torch.zeros(layout.shape, dtype=layout.dtype)[self.index(layout)].clone()

    def index(self, layout: StateLayout) -> tuple[slice, ...]:
        """Return what cuts this device's part out of a whole tensor of the state."""
        if not layout.dims:
            return (slice(None),) * len(layout.shape)
        return tuple(
            slice(None) if d is None else _cut(n, self.region.parts[d], self.place[d])
            for n, d in zip(layout.shape, layout.dims, strict=True)
        )

    def is_cut(self, layout: StateLayout) -> bool:
        """Return whether devices have different parts of a tensor of the state."""
        return any(d is not None and self.region.parts[d] > 1 for d in layout.dims)

    def step(self, param: Tensor, grad: Tensor, group: dict[str, Any], step: int) -> Iterator[Any]:
        """Run one step; yields every request with the device that makes it."""
        guard = Guard(self.plan.spec.name, grad)
        if not self.plan.guards:
            guard.check(torch.isfinite(grad).all())
        ctx = context(self.plan, self.state, param, grad, group, step, guard)
        requests: Any = run_with_loops(self.backend, run_chain(self.plan, self.state, ctx, self.whole_step))
        reply = None
        while True:
            try:
                request = requests.send(reply)
            except StopIteration:
                return
            reply = yield self, request


class CutParameter:
    """A parameter in one piece, and the same one cut `parts[d]` times along every dimension d.

    recipe: makes an optimizer of a list with one param group.

    Attributes:
        rounds: how often the devices asked for something in every step.

    Raises:
        ValueError: if the recipe cannot keep a parameter in these parts.
    """

    def __init__(
        self,
        recipe: Callable[..., Optimizer],
        shape: Sequence[int],
        parts: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shape, self.parts = tuple(shape), tuple(parts)
        self.whole = nn.Parameter(noise(shape, 1).to(dtype))
        self.optimizer = recipe([{"params": [("p", self.whole)], "head_size": HEAD_SIZE}])
        self.devices = [self._part(place) for place in product(*map(range, parts))]
        if any(part.whole_step is None for part in self.devices):  # the same arithmetic on both sides
            self.optimizer.use_backend("eager")
            self.use_backend("eager")
        self.params = [self.whole.detach()[part.region.index].clone() for part in self.devices]
        self.rounds: list[int] = []

    def _part(self, place: tuple[int, ...]) -> DevicePart:
        index = [_cut(n, count, i) for n, count, i in zip(self.shape, self.parts, place, strict=True)]
        offset, size = tuple(s.start for s in index), tuple(s.stop - s.start for s in index)
        region = Region(self.shape, offset, size, self.parts)
        spec = ParamSpec(name="p", shape=self.shape, dtype=self.whole.dtype, head_size=HEAD_SIZE, region=region)
        return DevicePart(spec, place, self.optimizer)

    @property
    def plan(self) -> ParamPlan:
        """The plan of the first device."""
        return self.devices[0].plan

    def use_backend(self, backend: str) -> None:
        """Have the loops of the devices made by a backend."""
        for part in self.devices:
            part.backend = backend

    def train(self, steps: int) -> None:
        """Make steps on all devices, and on the whole parameter."""
        for step in range(1, steps + 1):
            grad = gradient_of(self.shape, step).to(self.whole.dtype)
            self.step_parts([grad[part.region.index].clone() for part in self.devices], step)
            self.whole.grad = grad.clone()
            self.optimizer.step()

    def step_parts(self, grads: Sequence[Tensor], step: int) -> None:
        """Make one step on all devices, each with its part of the gradient."""
        group = self.optimizer.param_groups[0]
        self.rounds.append(0)
        with torch.no_grad():
            everything = zip(self.devices, self.params, grads, strict=True)
            lock_step([part.step(param, grad, group, step) for part, param, grad in everything], self._reply)  # type: ignore[arg-type]

    def _reply(self, pending: list[tuple[DevicePart, Any]]) -> list[Any]:
        self.rounds[-1] += 1
        if len(pending) != len(self.devices):
            raise RuntimeError(f"{len(pending)} of {len(self.devices)} devices ask for a sum: the others would wait")
        return [self._total(part, request, pending, ()) for part, request in pending]

    def _total(
        self, part: DevicePart, request: Any, pending: list[tuple[DevicePart, Any]], path: tuple[int, ...]
    ) -> Any:
        """Add a device's request up over the devices that differ from it in the dimensions asked."""
        if isinstance(request, tuple) and not isinstance(request, Partial | Largest | Whole):
            return tuple(self._total(part, item, pending, (*path, i)) for i, item in enumerate(request))
        if isinstance(request, Whole):
            return self._gathered(request, pending, path)
        ndim = len(self.shape)
        dim = None if isinstance(request, Tensor) else request.dim
        dims = range(ndim) if dim is None else [d % ndim for d in ([dim] if isinstance(dim, int) else dim)]
        values = []
        for other, theirs in pending:
            if all(other.place[d] == part.place[d] for d in range(ndim) if d not in dims):
                for i in path:
                    theirs = theirs[i]
                if type(theirs) is not type(request):
                    raise RuntimeError(f"one device asks for {type(request)}, another for {type(theirs)}")
                values.append(theirs if isinstance(theirs, Tensor) else theirs.local)
        stacked = torch.stack(values)
        return stacked.amax(0) if isinstance(request, Largest) else stacked.sum(0)

    def _gathered(self, request: Whole, pending: list[tuple[DevicePart, Any]], path: tuple[int, ...]) -> Tensor:
        """Put a tensor together of which every device has a part."""
        whole = torch.full(request.spec.shape, math.nan, dtype=request.local.dtype)
        for _, theirs in pending:
            for i in path:
                theirs = theirs[i]
            region = theirs.spec.region
            whole[() if region is None else region.index] = theirs.local
        return whole

    def joined(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the parameter and its state, put together.

        Raises:
            RuntimeError: if what several devices have is not the same on all of them.
        """
        param, seen = torch.full(self.shape, math.nan, dtype=self.whole.dtype), dict[str, Tensor]()
        for part, mine in zip(self.devices, self.params, strict=True):
            param[part.region.index] = mine
            for key, layout in part.plan.layouts.items():
                whole = seen.setdefault(key, torch.zeros(layout.shape, dtype=layout.dtype))
                if not part.is_cut(layout) and part is not self.devices[0] and not torch.equal(whole, part.state[key]):
                    raise RuntimeError(f"{key} is kept by every device, and differs between them")
                whole[part.index(layout)] = part.state[key]
        return param, seen

    def whole_state(self) -> dict[str, Tensor]:
        """Return the state of the parameter in one piece."""
        return {key: value for key, value in self.optimizer.state[self.whole].items() if key != "step"}
