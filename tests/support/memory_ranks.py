"""What each of several processes runs for `test_memory_shard_ranks`: steps under FSDP2, and what is in memory then."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import optstate
from optstate import recipes
from optstate.distributed.placement import here
from tests.support import ranks

LAYERS = 3


class Layer(nn.Module):
    """A block of two matrices."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Layers between an embedding and a head of its own; gives the loss."""

    def __init__(self, vocabulary: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, hidden) for _ in range(LAYERS))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


SIZES = {"even": (1024, 256, 512), "uneven": (1003, 256, 511)}
"""Vocabulary, width, hidden units. Of the uneven ones rank 1 has a row less, a fifth of a percent."""


def stack(rows: str) -> Stack:
    return Stack(*SIZES[rows])


def tokens() -> Tensor:
    return torch.arange(16).view(2, 8)


def held(recipe: str, fused: bool, rows: str) -> list[dict[str, Any]]:
    """What every rank holds: bytes of weights and state between steps, of gradients when the first parameter is updated
    that needs them, and the most that is alive during a step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = stack(rows)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = recipes.get(recipe)(model.named_parameters())
    if fused:
        optstate.fuse_backward(optimizer)
    gradients = watch_gradients(optimizer)

    def step() -> None:
        model(tokens()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    with Live([*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]) as live:
        step()
    found = {
        "weights": nbytes(model.parameters()),
        "gradients": max(gradients),
        "state": nbytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)),
        "state_nbytes": optimizer.state_nbytes(),
        "peak": live.most,
    }
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return everywhere


class Live(TorchDispatchMode):
    """Sees every tensor that operators return while it is active, and adds up after each operator how large the
    storages behind those that are still alive are then: FSDP2 empties storages of whole weights and fills them again.

    Not seen: what operators and gloo use inside themselves, which is no part of the model's or FSDP2's memory.
    """

    def __init__(self, there: Iterable[Any]) -> None:
        super().__init__()
        self.most = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._see(list(there))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._see([result, args])
        self.most = max(self.most, self.now)
        return result

    @property
    def now(self) -> int:
        """Bytes of what is alive."""
        alive = [storage for ref in self._storages.values() if (storage := ref()) is not None]
        return sum(storage.nbytes() for storage in alive)

    def _see(self, items: Any) -> None:
        for item in tree_leaves(items):
            if isinstance(item, Tensor):
                storage = here(item.detach()).untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)


def watch_gradients(optimizer: optstate.Optimizer) -> list[int]:
    """Bytes of all gradients that are alive, whenever some are about to be used."""
    seen: list[int] = []
    original = optimizer.runner.update_all

    def update_all(*args: Any, **more: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append(nbytes(p.grad for p in params if p.grad is not None))
        original(*args, **more)

    optimizer.runner.update_all = update_all  # type: ignore[method-assign]
    return seen


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind what of the tensors is on this rank; of memory that several share, once."""
    storages = {local.untyped_storage().data_ptr(): local.untyped_storage() for local in map(here, tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def kept_while_waiting(recipe: str, count: int, shape: tuple[int, ...]) -> int:
    """The most bytes that a step of so many parameters has besides weights, gradients and state."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(0)])) for _ in range(count)]
    optimizer = ranks.RECIPES[recipe]([(f"p{i}", param) for i, param in enumerate(params)])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    gc.collect()
    state = [value for values in optimizer.state.values() for value in values.values()]
    with Live([*params, *(param.grad for param in params), *state]) as live:
        before = live.now
        optimizer.step()
    return live.most - before
