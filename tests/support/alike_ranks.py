"""What each of several processes runs for `test_alike_ranks`: they load, hold or save other things than each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import optstate
from adalomo import AdaLomo, Lomo
from optstate import stores, weights
from optstate.checkpoint.live import save
from optstate.distributed.placement import copy_part, here, is_distributed
from optstate.recipes import AdamW


class Model(nn.Module):
    """Two matrices that two and four processes share evenly."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(24, 16, dtype=dtype), nn.Linear(16, 24, dtype=dtype)


def sharded(how: str = "split", **hyper: Any) -> tuple[Model, optstate.Optimizer]:
    """AdamW over parameters that are split, or replicated as DTensors."""
    model, place = Model(), Shard(0) if how == "split" else Replicate()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.first, model.second):
        for name, param in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(distribute_tensor(param.detach(), mesh, [place])))
    return model, AdamW(model.named_parameters(), **hyper)


def steps(model: nn.Module, optimizer: optstate.Optimizer, count: int, seed: int = 0) -> None:
    """Updates from gradients that are the same on all ranks."""
    for step in range(count):
        for i, param in enumerate(model.parameters()):
            values = torch.randn(param.shape, generator=torch.Generator().manual_seed(1000 * seed + 10 * step + i))
            values = values.to(param.dtype)
            param.grad = (
                distribute_tensor(values, param.device_mesh, param.placements) if is_distributed(param) else values
            )
        optimizer.step()
        optimizer.zero_grad()


def bits(optimizer: optstate.Optimizer) -> list[Any]:
    """The state as bytes, as far as it is here."""
    found: list[Any] = []
    for state in optimizer.state.values():
        for key, value in state.items():
            local = here(value).contiguous().unsqueeze(-1).view(torch.uint8) if isinstance(value, Tensor) else value
            found.append((key, local.tolist() if isinstance(local, Tensor) else local))
    return found


def said(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def last() -> bool:
    """Whether this is the one rank that does otherwise."""
    return dist.get_rank() == dist.get_world_size() - 1


# --- loading -------------------------------------------------------------------------------------------------------


def runs(folder: Path) -> None:
    """Files of an optimizer after one and after two steps, and one after two other steps."""
    model, optimizer = sharded()
    for count in (1, 2):
        steps(model, optimizer, 1, seed=count)
        optstate.save(optimizer, folder / f"{count}.safetensors")
        torch.save(whole_dict(optimizer), folder / f"{count}-{dist.get_rank()}.pt")
    model, optimizer = sharded()
    steps(model, optimizer, 2, seed=7)
    optstate.save(optimizer, folder / "other.safetensors")
    torch.save(whole_dict(optimizer), folder / f"other-{dist.get_rank()}.pt")
    dist.barrier()


def whole_dict(optimizer: optstate.Optimizer) -> dict[str, Any]:
    saved = optimizer.state_dict()
    whole = {
        i: {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
        for i, state in saved["state"].items()
    }
    return {**saved, "state": whole}


def loads(what: str, how: str, folder: Path) -> tuple[str, bool, str, bool]:
    """The last rank loads something else. Gives what is said, whether the state is what it was, what is said when all
    load the same afterwards, and whether they then have the same as a new optimizer that loads it."""
    model, optimizer = sharded()
    steps(model, optimizer, 3, seed=3)
    before = bits(optimizer)
    name = {"other steps": "1", "other numbers": "other"}.get(what, "2") if last() else "2"

    def load(name: str, spoilt: bool = False) -> None:
        if how == "file":
            path = folder / f"{name}.safetensors"
            optstate.load(optimizer, folder / "none.safetensors" if spoilt else path)
            return
        saved = torch.load(folder / f"{name}-{dist.get_rank()}.pt", weights_only=True)
        if spoilt:
            del saved["state"][0]
        elif last() and what == "other values":
            saved["param_groups"][0]["lr"] = 0.125
        optimizer.load_state_dict(saved)

    first = said(lambda: load(name, spoilt=what == "failing" and last()))
    same = bits(optimizer) == before
    what = ""
    again = said(lambda: load("2"))
    other, fresh = sharded()
    optstate.load(fresh, folder / "2.safetensors")
    steps(model, optimizer, 1)
    steps(other, fresh, 1)
    return first, same, again, bits(optimizer) == bits(fresh)


def failing_while_copying(folder: Path) -> tuple[str, list[str], str]:
    """Reading fails on the last rank after all have begun: what is said, then, and of a load that succeeds."""
    model, optimizer = sharded()

    def unreadable(own: Tensor, theirs: Tensor) -> None:
        if last():
            raise OSError("the disk is gone")
        copy_part(own, theirs)

    saved = optimizer.state_dict()
    first = said(lambda: optimizer.load_prepared(lambda: (saved, unreadable)))
    later = [said(optimizer.step), said(optimizer.state_dict), said(lambda: optstate.save(optimizer, folder / "x"))]
    again = said(lambda: optstate.load(optimizer, folder / "2.safetensors"))
    steps(model, optimizer, 1)
    return first, later, again


def another_path_to_the_same(folder: Path) -> str:
    """Each rank has a copy of its own: that is no difference."""
    _, optimizer = sharded()
    copy = folder / f"copy{dist.get_rank()}.safetensors"
    copy.write_bytes((folder / "2.safetensors").read_bytes())
    return said(lambda: optstate.load(optimizer, copy))


def loading_while_others_save(folder: Path) -> str:
    """Calls that do not belong together are named."""
    _, optimizer = sharded()
    if last():
        return said(lambda: optstate.load(optimizer, folder / "2.safetensors"))
    return said(lambda: optstate.save(optimizer, folder / "mixed.safetensors"))


def on_two_meshes(folder: Path) -> str:
    """One parameter lies on all ranks, another on the first two and the last two apart. What rank 3 lacks, all say."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    both = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]))
    one = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh["b"], [Shard(0)]))
    optimizer = AdamW([("one", one), ("both", both)])
    saved = optimizer.state_dict()
    if last():
        del saved["state"][0]
    return said(lambda: optimizer.load_state_dict(saved))


# --- holding and saving --------------------------------------------------------------------------------------------


def holds(what: str, how: str) -> tuple[str, bool]:
    """The last rank is built otherwise: what the first step says, and whether nothing was changed."""
    hyper: dict[str, Any] = {"lr": 0.5} if last() and what == "lr" else {}
    model, optimizer = sharded(how.split()[0], **hyper)
    if last() and what == "recipe":
        optimizer = AdaLomo(model.named_parameters())
    if last() and what == "steps":
        optimizer.state[model.first.weight]["step"] = 5
    before = bits(optimizer)
    if "fused" not in how:
        return said(lambda: steps(model, optimizer, 1)), bits(optimizer) == before
    optstate.fuse_backward(optimizer)
    loss = sum((param * param).sum() for param in model.parameters())
    return said(loss.full_tensor().backward), bits(optimizer) == before


def saves(what: str, folder: Path) -> tuple[str, bool]:
    """The last rank drifted from the others: what saving says, and whether there is no file."""
    model, optimizer = sharded("split" if what != "replicas" else "replicated")
    steps(model, optimizer, 1)
    path = folder / f"drift-{what}.safetensors"
    if last():
        if what == "lr":
            optimizer.param_groups[0]["lr"] = 0.5
        elif what in ("steps", "replicas"):
            optimizer.state[model.first.weight]["step"] += 1
        elif what == "path":
            path = folder / "drift-elsewhere.safetensors"
    text = said(lambda: optstate.save(optimizer, path))
    dist.barrier()
    return text, not list(folder.glob("drift-*"))


def without_statistics(folder: Path) -> tuple[int, list[int]]:
    """LOMO keeps nothing but steps: how many files this rank began, and the steps that all load again."""
    model, _ = sharded()
    optimizer = Lomo(model.named_parameters())
    steps(model, optimizer, 2)
    with patch.object(save, "create_set", Mock(wraps=save.create_set)) as begun:
        optstate.save(optimizer, folder / "lomo.safetensors")
    dist.barrier()
    other = Lomo(sharded()[0].named_parameters())
    optstate.load(other, folder / "lomo.safetensors")
    return begun.call_count, [state["step"] for state in other.state.values()]


def moved_on_the_last_rank(folder: Path) -> tuple[str, bool]:
    """Another thread of one rank writes while state is gathered."""
    model, optimizer = sharded()
    steps(model, optimizer, 1)
    path, gathered = folder / "moved.safetensors", DTensor.full_tensor
    calls = []

    def full_tensor(tensor: DTensor, **more: Any) -> Tensor:
        calls.append(1)
        if last() and len(calls) == 3:
            here(optimizer.state[model.first.weight]["exp_avg"]).mul_(2)
        return gathered(tensor, **more)

    DTensor.full_tensor = full_tensor
    try:
        text = said(lambda: optstate.save(optimizer, path))
    finally:
        DTensor.full_tensor = gathered
    dist.barrier()
    return text, not path.exists()


# --- every store and every way to write weights --------------------------------------------------------------------

BF16 = torch.bfloat16
KEPT: dict[str, Any] = {
    **{
        str(store): (torch.float32, {"second": store})
        for store in (
            stores.Full(),
            stores.Full("bfloat16"),
            stores.Block8(),
            stores.Block4(),
            stores.Block4(rank1=True),
            stores.Float8(),
            stores.Factored(),
            stores.Grouped("row"),
            stores.AxisMax(),
        )
    },
    **{
        str(way): (BF16, {"weights": way})
        for way in (weights.StochasticRounding(), weights.Kahan(), weights.Split(8), weights.Split(16))
    },
}
"""9 stores and 4 ways to write weights."""


class Rows(nn.Module):
    """Matrices large enough for blocks, of which two processes have unequal parts: in one rows are whole blocks, in the
    other blocks are shared."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.whole, self.shared = nn.Linear(256, 17, dtype=dtype), nn.Linear(70, 61, dtype=dtype)


def kept(name: str, folder: Path) -> dict[str, bool]:
    """Two steps under FSDP2, then every way to a new optimizer: whether each has the same bits."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    dtype, given = KEPT[name]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def build() -> tuple[nn.Module, optstate.Optimizer]:
        model = Rows(dtype)
        fully_shard(model, mesh=mesh)
        return model, AdamW(model.named_parameters(), **given)

    model, optimizer = build()
    steps(model, optimizer, 2)
    place = folder / f"{list(KEPT).index(name)}"
    optstate.save(optimizer, f"{place}.safetensors")
    found = {}
    _, other = build()
    optstate.load(other, f"{place}.safetensors")
    found["file"] = bits(other) == bits(optimizer)

    unsharded = AdamW(Rows(dtype).named_parameters(), **given)
    optstate.load(unsharded, f"{place}.safetensors")
    found["cut out of the whole"] = bits(optimizer) == bits_of_parts(unsharded, optimizer)

    other_model, other = build()
    saved = get_optimizer_state_dict(model, optimizer)
    dcp.save(saved, checkpoint_id=f"{place}-dcp")
    into = get_optimizer_state_dict(other_model, other)
    dcp.load(into, checkpoint_id=f"{place}-dcp")
    set_optimizer_state_dict(other_model, other, into)
    found["dcp"] = bits(other) == bits(optimizer)

    _, other = build()
    other.load_state_dict(otherwise_placed(optimizer.state_dict(), unsharded))
    found["from other placements"] = bits(other) == bits(optimizer)
    return found


def bits_of_parts(whole: optstate.Optimizer, optimizer: optstate.Optimizer) -> list[Any]:
    """The bytes of this rank's parts of an unsharded optimizer's state, cut as FSDP2 cuts rows."""
    found: list[Any] = []
    for theirs, ours in zip(whole.state.values(), optimizer.state.values(), strict=True):
        for key, value in theirs.items():
            if isinstance(value, Tensor) and any(place.is_shard() for place in ours[key].placements):
                parts = value.chunk(dist.get_world_size())
                value = parts[dist.get_rank()] if dist.get_rank() < len(parts) else value[:0]
            as_bytes = value.contiguous().unsqueeze(-1).view(torch.uint8) if isinstance(value, Tensor) else value
            found.append((key, as_bytes.tolist() if isinstance(value, Tensor) else value))
    return found


def otherwise_placed(saved: dict[str, Any], whole: optstate.Optimizer) -> dict[str, Any]:
    """The same dict with its tensors split along their last dimension, or replicated where they have none."""
    states = list(whole.state.values())

    def moved(value: Any, whole: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        local = whole.reshape(value.shape)
        places = [Shard(value.ndim - 1) if value.ndim > 1 else Replicate()]
        size, rank = value.shape[-1] if value.ndim else 1, dist.get_rank()
        if value.ndim > 1:
            part = -(-size // dist.get_world_size())
            local = local[..., rank * part : (rank + 1) * part]
        stride = torch.empty(value.shape, device="meta").stride()
        return DTensor.from_local(
            local.contiguous(), value.device_mesh, places, run_check=False, shape=value.shape, stride=stride
        )

    state = {i: {k: moved(v, states[i][k]) for k, v in each.items()} for i, each in saved["state"].items()}
    return {**saved, "state": state}
