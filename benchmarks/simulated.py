"""One of many devices: a model's shards without values, and optimizers that step them.

Real are `fully_shard`, the optimizers with their plans, state and steps, and every all-reduce they ask for; gradients
share a buffer for each group, as FSDP2 leaves them, and fused updates come from the hooks in FSDP2's order. Not real
are values, and the other devices: tensors are fake, and so is the process group (`FakeStore`), whose sums return at
once. `fully_shard` is called on a model of one layer; the other layers get shards like that one's, as making 4096 parts
of each parameter only to keep the first takes minutes. Steps run as on an accelerator, with its larger pieces, and of
parameters that are alike one is stepped and counts for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import optstate
from optstate.distributed.placement import here
from optstate.kernels.rehearsal import rehearsal
from optstate.memory.model import BuildOptions, Model
from optstate.memory.sources.modules import default_dtype
from optstate.memory.tracing.fakes import fake_mode

LAYER = "model.layers."
Sent = list[tuple[Any, int]]
"""The operation and the bytes of each all-reduce."""


@contextmanager
def one_of(world: int) -> Iterator[Any]:
    """Make this process rank 0 of `world` processes that do not exist, and tensors without values."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        with fake_mode(), rehearsal(on="cuda"):
            yield mesh
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Sharded:
    """A model's parameters as rank 0 has them. groups: names of the root's, then of each layer's, as FSDP2 has them."""

    params: dict[str, nn.Parameter]
    groups: tuple[tuple[str, ...], ...]
    world: int

    @classmethod
    def of(cls, model: Model, mesh: Any) -> Sharded:
        """Shard a model of which only the first layer is built; the other layers share its shards."""
        assert model.build is not None
        with default_dtype(torch.bfloat16):
            module = model.build(BuildOptions(layers=1))
        fully_shard(module.get_submodule(f"{LAYER}0"), mesh=mesh)
        fully_shard(module, mesh=mesh)
        first = dict(module.named_parameters())
        params, layers = {}, {}
        for param in model.parameters:
            number = layer_of(param.name)
            like = first[param.name.replace(f"{LAYER}{number}.", f"{LAYER}0.")]
            params[param.name] = like if number in (0, None) else nn.Parameter(torch.empty_like(like))
            layers.setdefault(number, []).append(param.name)
        groups = (layers.pop(None), *layers.values())
        return cls(params, tuple(map(tuple, groups)), mesh.size())

    @property
    def weights(self) -> int:
        """Bytes of weights on rank 0."""
        return nbytes(self.params.values())

    @property
    def group_bytes(self) -> list[int]:
        """Bytes of each group on rank 0."""
        return [nbytes(self.params[name] for name in group) for group in self.groups]

    @property
    def padded(self) -> list[int]:
        """Bytes of each group when it is gathered or scattered: every device's part is as large as rank 0's."""
        return [self.world * size for size in self.group_bytes]

    @property
    def sent(self) -> int:
        """Bytes that FSDP2 sends from a device in a step: a ring passes on all but one part of what it gathers.

        Layers are gathered for the forward and for the backward pass, the root once; all gradients are scattered.
        """
        root, *layers = self.padded
        return (2 * root + 3 * sum(layers)) * (self.world - 1) // self.world

    @property
    def collectives(self) -> int:
        """Number of collective operations of FSDP2 in a step."""
        return 2 + 3 * (len(self.groups) - 1)


def layer_of(name: str) -> int | None:
    """Return the number of a parameter's layer; None for the root's."""
    return int(name.removeprefix(LAYER).partition(".")[0]) if name.startswith(LAYER) else None


def simulate(sharded: Sharded, recipe: Callable[..., optstate.Optimizer]) -> dict[str, Any]:
    """Count the bytes on rank 0, and the all-reduces of a step and of a fused one with their bytes sent in rings.

    `state_whole` counts the state that every device has all of.
    """
    optimizer = recipe(sharded.params.items())
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    whole = [v for v in state if all(place.is_replicate() for place in v.placements)]
    with all_reduces() as sent:
        step_alike_once(optimizer, sent)
        for group in sharded.groups:
            give_gradients(sharded, group)
        gradients = nbytes(p.grad for p in sharded.params.values() if p.grad is not None)
        optimizer.step()
        stepped = list(sent)
        optimizer.zero_grad()
        sent.clear()
        fused_gradients = fused_step(sharded, optimizer)
    ring = 2 * (sharded.world - 1) / sharded.world
    return {
        "weights": sharded.weights,
        "gradients": gradients,
        "fused_gradients": fused_gradients,
        "state": nbytes(state),
        "state_whole": nbytes(whole),
        "groups": len(sharded.groups),
        "collectives": len(stepped),
        "sent": ring * bytes_of(stepped),
        "fused_collectives": len(sent),
        "fused_sent": ring * bytes_of(sent),
        "fsdp_sent": sharded.sent,
    }


def give_gradients(sharded: Sharded, group: Iterable[str]) -> None:
    """Give a group its gradients as FSDP2 leaves them after scattering them: views of one buffer."""
    params: list[Any] = [sharded.params[name] for name in group]
    shapes = [(-(-param.shape[0] // sharded.world), *param.shape[1:]) for param in params]
    buffer = torch.empty(sum(torch.Size(shape).numel() for shape in shapes), dtype=params[0].dtype)
    offset = 0
    for param, shape in zip(params, shapes, strict=True):
        local = here(param.detach())
        part = buffer.as_strided(local.shape, local.stride(), offset)
        param.grad = DTensor.from_local(
            part, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )
        offset += torch.Size(shape).numel()


def fused_step(sharded: Sharded, optimizer: optstate.Optimizer) -> int:
    """Run a backward pass in which the groups' gradients arrive, the last layer's first.

    Returns the most bytes of gradients that were alive at once.
    """
    most = 0

    def arrive(grad: Tensor) -> Tensor:
        nonlocal most
        root, *layers = sharded.groups
        for group in (*reversed(layers), root):
            give_gradients(sharded, group)
            most = max(most, nbytes(p.grad for p in sharded.params.values() if p.grad is not None))
            for param in (sharded.params[name] for name in group):
                for hook in list(param._post_accumulate_grad_hooks.values()):
                    hook(param)
        return grad

    handle = optstate.fuse_backward(optimizer)
    loss = torch.ones((), requires_grad=True)
    loss.register_hook(arrive)
    loss.backward()
    optimizer.step()
    handle.remove()
    return most


@contextmanager
def all_reduces() -> Iterator[Sent]:
    """Note the operation and the bytes of every all-reduce."""
    sent: Sent = []
    original = dist.all_reduce

    def noting(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
        sent.append((op, tensor.numel() * tensor.element_size()))
        return original(tensor, op=op, group=group)

    dist.all_reduce = noting
    try:
        yield sent
    finally:
        dist.all_reduce = original


def bytes_of(sent: Sent) -> int:
    return sum(size for _, size in sent)


def step_alike_once(optimizer: optstate.Optimizer, sent: Sent) -> None:
    """Step only one of the parameters that are alike from now on, and count its requests for the others.

    A batch has one all-reduce a round for each operation, of what all of its parameters ask for in that round.
    """
    original = optimizer.runner.update_together
    plans = {p: optimizer.runner.leaf(p).plan for group in optimizer.param_groups for p in group["params"]}
    known: dict[Any, Sent] = {}

    def asked_alone(param: Tensor, *args: Any) -> Sent:
        like = tuple(param.shape), plans[param].chain, tuple(plans[param].stores.items())
        if like not in known:
            before = len(sent)
            original([param], *args)
            known[like] = sent[before:]
            del sent[before:]
        return known[like]

    def step_together(params: list[Tensor], *args: Any) -> None:
        for one_round in zip_longest(*(asked_alone(param, *args) for param in params)):
            together: Counter[Any] = Counter()
            for op, size in filter(None, one_round):
                together[op] += size
            sent.extend(together.items())

    optimizer.runner.update_together = step_together


def nbytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of memory behind the local parts of tensors, counting shared memory once."""
    storages = {
        local.untyped_storage()._cdata: local.untyped_storage() for local in (here(t.detach()) for t in tensors)
    }
    return sum(storage.nbytes() for storage in storages.values())
