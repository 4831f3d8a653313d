"""What each of several processes runs for `test_killed_ranks`: one of them is killed, fails, or has other gradients."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import optstate
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files import safetensors_writer
from optstate.checkpoint.files.safetensors_writer import SafetensorsFile
from tests.support.ranks import (
    RECIPES,
    SAVED_ROWS,
    STEPS,
    batch,
    distance,
    loss_of,
    my_part,
    net,
    saved_run,
    shard,
    train,
    whole,
)


def at_call(number: int, function: Callable[..., Any], what: Callable[[], None]) -> Callable[..., Any]:
    """The function, but `what` happens instead of its call of this number, counted from one."""
    calls = 0

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            what()
        return function(*args, **more)

    return counted


def die() -> None:
    """End as an out-of-memory killer or a lost machine ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)


def refusals(optimizer: optstate.Optimizer, file: Path) -> list[str]:
    """What an optimizer says that must neither go on nor be saved."""
    said = []
    for action in (optimizer.step, optimizer.state_dict, lambda: optstate.save(optimizer, file)):
        with pytest.raises(optstate.InconsistentStateError) as caught:
            action()
        said.append(str(caught.value))
    return said


# --- killed --------------------------------------------------------------------------------------------------------

PLACES = ("stepped", "fused", "fused, in backward")
"""Where rank 1 is killed: between the two rounds of sums of a step; between those of the second of four FSDP groups; in
the backward pass, when groups have been updated and others have not."""


def killed_in_a_step(place: str, folder: Path) -> dict[str, Any]:
    """Some steps, both kinds of checkpoint, then a step during which rank 1 is killed. Gives what rank 0 sees."""
    model, optimizer = saved_run("adalomo", folder, fused=place != "stepped")
    deadly = die if dist.get_rank() == 1 else lambda: None
    if place == "fused, in backward":
        model.norm.register_full_backward_hook(lambda *_: deadly())
        sums = dist.all_reduce
    else:
        sums = at_call(2 if place == "stepped" else 4, dist.all_reduce, deadly)
    with patch.object(dist, "all_reduce", sums), pytest.raises(RuntimeError) as caught:
        train(model, optimizer, place != "stepped", dist.get_world_size(), dist.get_rank(), range(STEPS, STEPS + 1))
    cause = caught.value.__cause__
    return {
        "error": f"{caught.type.__name__}: {caught.value}",
        "cause": f"{type(cause).__name__}: {cause}",
        "later": refusals(optimizer, folder / "opt.safetensors"),
    }


def killed_in_a_save(victim: int, folder: Path) -> str:
    """A save, a step, and a save during which one rank is killed. Gives what the other sees."""
    optimizer, file = file_of_an_older_step(folder)
    owner, function = (SafetensorsFile, "put") if victim == 0 else (DTensor, "full_tensor")
    deadly = at_call(4, getattr(owner, function), die if dist.get_rank() == victim else lambda: None)
    with patch.object(owner, function, deadly), pytest.raises(CheckpointError) as caught:
        optstate.save(optimizer, file)
    return f"{caught.value}, from {type(caught.value.__cause__).__name__}"


def file_of_an_older_step(folder: Path) -> tuple[optstate.Optimizer, Path]:
    """An optimizer, and a file that was saved one step before."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = shard(net(SAVED_ROWS), init_device_mesh("cpu", (world,)), True)
    optimizer, file = RECIPES["adalomo"](model.named_parameters()), folder / "opt.safetensors"
    train(model, optimizer, False, world, rank, range(1))
    optstate.save(optimizer, file)
    train(model, optimizer, False, world, rank, range(1, 2))
    return optimizer, file


# --- alive, but one of them fails ----------------------------------------------------------------------------------


def disk_full_on_rank_0(folder: Path) -> tuple[str, list[str], bool]:
    """What this rank sees when the disk is full in the middle of a save, the files left, and whether the next save
    works."""
    optimizer, file = file_of_an_older_step(folder)
    before = file.read_bytes()

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        patch.object(safetensors_writer, "write_at", at_call(3, safetensors_writer.write_at, fail)),
        pytest.raises(CheckpointError) as caught,
    ):
        optstate.save(optimizer, file)
    unchanged = file.read_bytes() == before
    left = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    optstate.save(optimizer, file)
    dist.barrier()
    return str(caught.value), left, unchanged and file.read_bytes() != before


def inconsistent_on_rank_1(folder: Path) -> str:
    """What this rank sees when only rank 1 cannot save, as a step broke off half-way there."""
    optimizer, file = file_of_an_older_step(folder)
    if dist.get_rank() == 1:
        optimizer.runner.consistency.broke_off("layer0", "a test failed")
    with pytest.raises((CheckpointError, optstate.InconsistentStateError)) as caught:
        optstate.save(optimizer, file)
    return f"{caught.type.__name__}: {caught.value}"


# --- gradients on some ranks only ----------------------------------------------------------------------------------


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as caught:
        action()
    return f"{caught.type.__name__}: {caught.value}"


def missing_gradients(names: tuple[str, ...]) -> tuple[str, bool, float]:
    """Rank 1 has no gradient for these parameters, or for none. Gives what is said, whether nothing was changed, and
    how far the run is from an unsharded one once the gradients are there."""
    model, plain = shard(net(), init_device_mesh("cpu", (dist.get_world_size(),)), True), net()
    optimizer, other = RECIPES["adalomo"](model.named_parameters()), RECIPES["adalomo"](plain.named_parameters())
    loss_of(model, my_part(batch(0), dist.get_world_size(), dist.get_rank())).backward()
    loss_of(plain, batch(0)).backward()
    kept = {name: param.grad for name, param in model.named_parameters()}
    if dist.get_rank() == 1:
        for name, param in model.named_parameters():
            if name in names or not names:
                param.grad = None
    before = [whole(param.detach()).clone() for param in model.parameters()]
    said = refused(optimizer.step)
    same = all(torch.equal(whole(p.detach()), b) for p, b in zip(model.parameters(), before, strict=True))
    for name, param in model.named_parameters():
        param.grad = kept[name]
    optimizer.step()
    other.step()
    return said, same, distance(model, plain)


class Experts(nn.Module):
    """Two layers of one shape, of which each rank uses another one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, rank: int) -> Tensor:
        return self.out((self.first, self.second)[rank](x)).mean()


def experts(fused: bool, layers: bool) -> str:
    """FSDP2 adds up the gradients of the two layers as if they were one layer's, and says nothing."""
    model, mesh = Experts(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.first, model.second) if layers else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = RECIPES["adalomo"](model.named_parameters())
    if fused:
        optstate.fuse_backward(optimizer)
        return refused(model(torch.ones(2, 8), dist.get_rank()).backward)
    model(torch.ones(2, 8), dist.get_rank()).backward()
    return refused(optimizer.step)


def experts_with_zeros(fused: bool) -> float:
    """FSDP2 is told to give zeros for unused parameters. Gives the distance from an unsharded run."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, plain = Experts(), Experts()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    model.set_reduce_scatter_unused_params(True)
    optimizer, other = RECIPES["adalomo"](model.named_parameters()), RECIPES["adalomo"](plain.named_parameters())
    if fused:
        optstate.fuse_backward(optimizer)
    for step in range(3):
        x = torch.full((2, 8), 1.0 + step)
        model(x, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        for each in range(world):
            (plain(x, each) / world).backward()
        other.step()
        other.zero_grad()
    return distance(model, plain)


def changing_gradients() -> tuple[list[int], str, float]:
    """Steps in which one or another of three parameters has no gradient, on both ranks, then one in which only rank 1
    lacks one. Gives how often the others are asked in each step, what is said at last, and after how many seconds."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights = [distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]) for _ in range(3)]
    params = [nn.Parameter(weight) for weight in weights]
    optimizer = RECIPES["adalomo"]([(f"layer{i}", param) for i, param in enumerate(params)])

    def give(*which: int) -> None:
        for i, param in enumerate(params):
            param.grad = torch.ones_like(param) if i in which else None

    asked = []
    for which in ((0, 1, 2), (0, 1, 2), (0, 1), (0, 1), (0, 1, 2)):
        give(*which)
        with patch.object(dist, "all_gather_object", Mock(wraps=dist.all_gather_object)) as gather:
            optimizer.step()
        asked.append(gather.call_count)
    give(*((0, 2) if dist.get_rank() == 1 else (0, 1, 2)))
    began = time.perf_counter()
    return asked, refused(optimizer.step), time.perf_counter() - began


def lost_while_clipping() -> tuple[str, str]:
    """The sum for the norm fails. Gives what is said, and what the backend said."""

    def fail() -> None:
        raise RuntimeError("out of order")

    world, rank = dist.get_world_size(), dist.get_rank()
    model = shard(net(), init_device_mesh("cpu", (world,)), True)
    optimizer = RECIPES["adalomo"](model.named_parameters())
    fused = optstate.fuse_backward(optimizer, clip_grad_norm=1.0)
    with fused.accumulate():
        loss_of(model, my_part(batch(0), world, rank)).backward()
    with patch.object(dist, "all_reduce", at_call(1, dist.all_reduce, fail)), pytest.raises(RuntimeError) as caught:
        optimizer.step()
    with pytest.raises(optstate.InconsistentStateError):
        optimizer.state_dict()
    return f"{caught.type.__name__}: {caught.value}", str(caught.value.__cause__)
