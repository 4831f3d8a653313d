"""What each of several processes runs for `test_distributed`: training on shards beside the same training unsharded."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import optstate
from adalomo import Adafactor, AdaLomo, Lomo
from optstate import recipes, stores, updates
from optstate.distributed.placement import here

STEPS = 3
BATCH = 8
TOKENS = 12
SAVED_ROWS = 7
"""Rows that neither two nor four processes can share evenly."""

EPS = 1e-5
"""For Adam: elements whose gradient is rounding alone would otherwise step by as much as all others."""


def of_matrices(transform: updates.Transform, lr: float = 1e-3) -> Callable[..., optstate.Optimizer]:
    """A transform for matrices, and Adam for what has fewer dimensions."""
    adam = updates.scale_by_adam(eps=EPS)
    recipe = optstate.route([(optstate.is_matrix, optstate.chain(transform))], default=optstate.chain(adam))
    return lambda params: optstate.Optimizer(params, recipe, lr=lr)


ADAM = updates.scale_by_adam(eps=EPS)

RECIPES: dict[str, Callable[..., optstate.Optimizer]] = {
    "adafactor": lambda params: Adafactor(params, lr=1e-3, beta1=0.9),
    "adalomo": lambda params: AdaLomo(params, lr=1e-2, weight_decay=0.01),
    "adamfactor": lambda params: recipes.AdamFactor(params, lr=1e-3, eps=EPS),
    "adammini": lambda params: recipes.AdamMini(params, lr=1e-3, eps=EPS),
    "adamw": lambda params: recipes.AdamW(params, lr=1e-3, eps=EPS),
    "adamw4bit": lambda params: recipes.AdamW4bit(params, lr=1e-3, eps=EPS),
    "adamw8bit": lambda params: recipes.AdamW8bit(params, lr=1e-3, eps=EPS),
    "came": lambda params: recipes.CAME(params, lr=2e-5),
    "lion": lambda params: recipes.Lion(params, lr=1e-4),
    "lion8bit": lambda params: recipes.Lion8bit(params, lr=1e-4),
    "lomo": lambda params: Lomo(params, lr=1e-2),
    "sgd": lambda params: recipes.SGD(params, lr=1e-3, momentum=0.9),
    "sgdm8bit": lambda params: recipes.SGDM8bit(params, lr=1e-3),
    "sm3": lambda params: recipes.SM3(params, lr=1e-2, momentum=0.9),
    "adamsmn": lambda params: recipes.AdamSMN(params, lr=1e-3, eps=EPS),
    "ademamix": lambda params: recipes.AdEMAMix(params, lr=1e-3, eps=EPS),
    "mlorc": lambda params: recipes.MLorc(params, lr=1e-3, eps=1e-2),
    "mlorclion": lambda params: recipes.MLorcLion(params, lr=1e-4),
    "muon": lambda params: recipes.Muon(params, lr=1e-3, eps=EPS),
    "muon8bit": lambda params: recipes.Muon8bit(params, lr=1e-3, eps=EPS),
    "scale": lambda params: recipes.Scale(params, lr=1e-3, eps=EPS),
    "schedulefreeadamw": lambda params: recipes.ScheduleFreeAdamW(params, lr=1e-3, eps=EPS),
    "smmf": lambda params: recipes.SMMF(params, lr=1e-3, eps=EPS),
    "soap": lambda params: recipes.SOAP(params, lr=1e-3, eps=1e-2, precondition_frequency=2),
    "sumo": lambda params: recipes.SUMO(params, lr=1e-3, rank=4, update_proj_gap=2),
    "adamem": lambda params: recipes.AdaMeM(params, lr=1e-3, rank=4, update_proj_gap=2, eps=EPS),
    "adarankgrad": lambda params: recipes.AdaRankGrad(params, lr=1e-3, rank=4, min_rank=2, update_proj_gap=2, eps=EPS),
    "apollo": lambda params: recipes.Apollo(params, lr=1e-3, rank=4, update_proj_gap=2, eps=EPS),
    "apollomini": lambda params: recipes.ApolloMini(params, lr=1e-4, update_proj_gap=2, eps=EPS),
    "fira": lambda params: recipes.Fira(params, lr=1e-3, rank=4, update_proj_gap=2, eps=EPS),
    "galore": lambda params: recipes.GaLore(params, lr=1e-3, rank=4, update_proj_gap=2, eps=EPS),
    "galore2": lambda params: recipes.GaLore2(params, lr=1e-3, rank=4, update_proj_gap=2, eps=EPS),
    "grass": lambda params: recipes.Grass(params, lr=1e-3, rank=4, update_proj_gap=2, eps=EPS),
    "ldadam": lambda params: recipes.LDAdam(params, lr=1e-3, rank=4, eps=EPS),
    "qgalore": lambda params: recipes.QGaLore(params, lr=1e-3, rank=4, update_proj_gap=2, eps=EPS),
    "projected": of_matrices(updates.project(ADAM, rank=4, gap=2)),
    "projected at random": of_matrices(updates.scale_by_projected(ADAM, rank=4, gap=2)),
    "projected, iterated, factored": of_matrices(
        updates.project(updates.scale_by_rms(stores.Factored()), rank=4, gap=2, projection="randomized")
    ),
    "projected anew": of_matrices(updates.project_anew(ADAM, rank=4)),
    "in the eigenbasis": of_matrices(updates.eigenbasis(ADAM, every=2, largest=64)),
    "orthogonal": of_matrices(updates.chain(updates.momentum(), updates.orthogonalize())),
}

IN_PARTS_ALONE = (
    "adamem",
    "adarankgrad",
    "apollo",
    "apollomini",
    "fira",
    "galore",
    "galore2",
    "grass",
    "ldadam",
    "qgalore",
)
"""Their parts are compared in one process; several train the chains "projected ..." that these recipes are made of."""


class Net(nn.Module):
    """Layers of odd sizes, two layer norms, and an output that is tied to the embedding."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 64)
        self.up = nn.Linear(64, 1024)
        self.norm = nn.LayerNorm(1024)
        self.mid = nn.Linear(1024, rows)
        self.down = nn.Linear(rows, 64)
        self.last = nn.LayerNorm(64)
        self.head = nn.Linear(64, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.tanh(self.mid(self.norm(self.up(x)))))
        return self.head(self.last(x))


def net(rows: int = 8, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(rows)
    return Net(rows).to(dtype)


def batch(step: int) -> Tensor:
    return torch.randint(TOKENS, (BATCH, 6), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def my_part(ids: Tensor, ranks: int, rank: int) -> Tensor:
    size = len(ids) // ranks
    return ids[rank * size : (rank + 1) * size]


def shard(model: Net, mesh: Any, layers: bool, **more: Any) -> Net:
    if layers:
        for layer in (model.up, model.mid, model.down):
            fully_shard(layer, mesh=mesh, **more)
    fully_shard(model, mesh=mesh, **more)
    return model


def train(
    model: nn.Module,
    optimizer: optstate.Optimizer,
    fused: bool,
    parts: int = 1,
    rank: int = 0,
    steps: range = range(STEPS),
) -> None:
    if fused and optimizer.fused is None:
        optstate.fuse_backward(optimizer)
    for step in steps:
        loss_of(model, my_part(batch(step), parts, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_whole(model: nn.Module, optimizer: optstate.Optimizer, parts: int = 1, steps: range = range(STEPS)) -> None:
    """The run to compare with: the parts of a batch one after the other, so that gradients are added up alike. Two
    processes then get the same bits, and a code of 8 bits cannot fall on the other side of a tie.

    Only rank 0 makes it, whose results are looked at; distances on the other ranks mean nothing."""
    if dist.get_rank() > 0:
        return
    for step in steps:
        for rank in range(parts):
            (loss_of(model, my_part(batch(step), parts, rank)) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distance(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((whole(a.detach()).double() - b.detach().double()).abs().max().item() for a, b in pairs)


def distance_of_state(optimizer: optstate.Optimizer, other: optstate.Optimizer) -> float:
    """The largest difference between numbers kept in full, relative to the largest of their tensor."""
    worst = 0.0
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert a["step"] == b["step"] or dist.get_rank() > 0
        for key, value in b.items():
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                scale = value.abs().max().clamp(min=1e-30)
                worst = max(worst, ((whole(a[key]).view(value.shape) - value).abs().max() / scale).item())
    return worst


# --- cases: each returns what the test wants to know -----------------------------------------------------------------


def equals_unsharded(recipe: str, fused: bool, rows: int, layers: bool, mesh: tuple[int, ...]) -> tuple[float, float]:
    """How far weights and statistics end from those of an unsharded run."""
    names = ("replicate", "shard")[-len(mesh) :]
    device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names)
    model, plain = shard(net(rows), device_mesh, layers), net(rows)
    optimizer, other = RECIPES[recipe](model.named_parameters()), RECIPES[recipe](plain.named_parameters())
    train(model, optimizer, fused, dist.get_world_size(), dist.get_rank())
    train_whole(plain, other, dist.get_world_size())
    return distance(model, plain), distance_of_state(optimizer, other)


def split_both_ways(model: Net, data: int) -> Any:
    """Columns and rows split over two processes; with `data` > 1 FSDP2 over the others. Returns the mesh."""
    mesh = init_device_mesh("cpu", (data, 2), mesh_dim_names=("data", "tensor"))
    split = {"up": ColwiseParallel(output_layouts=Replicate()), "mid": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], split)
    if data > 1:
        for layer in (model.mid, model.down):
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    return mesh


def tensor_parallel(recipe: str, fused: bool, data: int = 1) -> tuple[float, float]:
    """Tensor parallelism, with FSDP2 if `data` > 1."""
    model, plain = net(), net()
    mesh = split_both_ways(model, data)
    optimizer, other = RECIPES[recipe](model.named_parameters()), RECIPES[recipe](plain.named_parameters())
    train(model, optimizer, fused, data, mesh.get_local_rank("data"))
    train_whole(plain, other, data)
    return distance(model, plain), distance_of_state(optimizer, other)


class Uneven(nn.Module):
    """Columns that two processes cannot share evenly; a small parameter comes last in the group."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 7, bias=False)
        self.second = nn.Linear(7, 16, bias=False)
        self.last = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x + self.second(self.first(x).relu()))[:, :3])


def uneven_columns(fused: bool) -> float:
    """All processes must know of a group of gradients alike when it is complete, although their parts differ."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    model = Uneven()
    plain = deepcopy(model)
    rows = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, mesh["tensor"], {"second": rows, "last": rows})
    fully_shard(model, mesh=mesh["data"])
    optimizer, other = RECIPES["adamw"](model.named_parameters()), RECIPES["adamw"](plain.named_parameters())
    if fused:
        optstate.fuse_backward(optimizer)
    for step in range(3):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        model(my_part(x, 2, mesh.get_local_rank("data"))).square().mean().backward()
        plain(x).square().mean().backward()
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    return distance(model, plain)


def one_file_of_two_meshes(recipe: str, folder: Path) -> tuple[bool, bool]:
    """Some parameters lie on the whole mesh, others are whole for tensor parallelism. Whether the file holds what the
    ranks have together, and whether each gets its own part back."""
    model = net()
    split_both_ways(model, 2)
    optimizer = RECIPES[recipe](model.named_parameters())
    train(model, optimizer, False, 2, dist.get_rank() // 2, range(2))
    optstate.save(optimizer, folder / f"{recipe}.safetensors")
    dist.barrier()
    plain, again = net(), net()
    split_both_ways(again, 2)
    unsharded, other = RECIPES[recipe](plain.named_parameters()), RECIPES[recipe](again.named_parameters())
    optstate.load(unsharded, folder / f"{recipe}.safetensors")
    optstate.load(other, folder / f"{recipe}.safetensors")
    gathered = [[whole(v) for v in state.values() if isinstance(v, Tensor)] for state in optimizer.state.values()]
    loaded = [[v for v in state.values() if isinstance(v, Tensor)] for state in unsharded.state.values()]
    return equal(gathered, loaded), equal(parts(optimizer), parts(other))


def file_of_another_format(recipe: str, other: str, folder: Path) -> bool:
    """A file of one recipe's state is loaded by another recipe on several devices, with consent to a loss. Whether
    each gets its part of what an unsharded optimizer gets."""
    file = folder / f"{recipe}-{other}-{dist.get_world_size()}.safetensors"
    rank, world = dist.get_rank(), dist.get_world_size()
    source, plain = net(SAVED_ROWS), net(SAVED_ROWS)
    saved = RECIPES[recipe](source.named_parameters())
    train(source, saved, False, steps=range(2))
    if rank == 0:
        optstate.save(saved, file)
    dist.barrier()
    model = shard(net(SAVED_ROWS), init_device_mesh("cpu", (world,)), True)
    sharded, unsharded = RECIPES[other](model.named_parameters()), RECIPES[other](plain.named_parameters())
    optstate.load(sharded, file, allow_lossy=True)
    optstate.load(unsharded, file, allow_lossy=True)
    ours = [[whole(v) for v in state.values() if isinstance(v, Tensor)] for state in sharded.state.values()]
    return any(map(len, ours)) and equal(ours, parts(unsharded))


def parts(optimizer: optstate.Optimizer) -> list[list[Tensor]]:
    """The tensors of the state of every parameter, as far as they are here."""
    states = optimizer.state.values()
    return [[here(value) for value in state.values() if isinstance(value, Tensor)] for state in states]


def equal(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def rounding_is_that_of_the_whole(layers: bool) -> float:
    """bf16 weights written at random must get the same random bits, wherever an element lies. Gradients are set by
    hand, as sums in bf16 in another order would differ by more than rounding."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, plain = shard(net(7, torch.bfloat16), mesh, layers), net(7, torch.bfloat16)
    optimizer, other = RECIPES["adamw"](model.named_parameters()), RECIPES["adamw"](plain.named_parameters())
    for step in range(3):
        for i, (a, b) in enumerate(zip(model.parameters(), plain.parameters(), strict=True)):
            grad = torch.randn(b.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(b.dtype)
            b.grad = grad
            a.grad = distribute_tensor(grad, a.device_mesh, a.placements)
        optimizer.step()
        other.step()
    return distance(model, plain)


def mixed_precision(fused: bool) -> float:
    """fp32 weights computed with in bf16: the gradients arrive in fp32. Returns how far losses are from fp32's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, plain = shard(net(), mesh, True, mp_policy=policy), net()
    optimizer, other = RECIPES["adalomo"](model.named_parameters()), RECIPES["adalomo"](plain.named_parameters())
    assert all(whole(p).dtype == torch.float32 for p in model.parameters())
    train(model, optimizer, fused, dist.get_world_size(), dist.get_rank())
    train_whole(plain, other, dist.get_world_size())
    with torch.no_grad():
        return abs(loss_of(model, batch(0)).item() - loss_of(plain, batch(0)).item())


def accumulation(fused: bool) -> float:
    """Two micro-batches, gradients scattered only at the second."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, plain = shard(net(), init_device_mesh("cpu", (world,)), True), net()
    optimizer, other = RECIPES["adalomo"](model.named_parameters()), RECIPES["adalomo"](plain.named_parameters())
    if fused:
        optstate.fuse_backward(optimizer)
    for step in range(STEPS):
        for part in (0, 1):
            model.set_requires_gradient_sync(part == 1)
            (loss_of(model, my_part(batch(2 * step + part), world, rank)) / 2).backward()
            (loss_of(plain, batch(2 * step + part)) / 2).backward()
        for o in (optimizer, other):
            o.step()
            o.zero_grad()
    return distance(model, plain)


def clipped_by_the_norm_over_all_devices(how: str) -> float:
    """A fused step is clipped by the norm of the whole, not of the part here: of gradients that are kept, or measured
    beforehand."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, plain = shard(net(), init_device_mesh("cpu", (world,)), True), net()
    optimizer, other = Lomo(model.named_parameters(), lr=0.1), Lomo(plain.named_parameters(), lr=0.1)
    handle = optstate.fuse_backward(optimizer, clip_grad_norm=0.05)
    for step in range(3):
        loss_of(plain, batch(step)).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        assert norm > 0.05
        loss = loss_of(model, my_part(batch(step), world, rank))
        if how == "measured":
            torch.testing.assert_close(handle.grad_norm(loss), norm)
            loss.backward()
        else:
            with handle.accumulate():
                loss.backward()
        optimizer.step()
        other.step()
        other.zero_grad()
    return distance(model, plain)


def measured_beside_another_optimizer(layers: bool) -> tuple[float, float]:
    """`grad_norm` of an optimizer that has some of the parameters. How far its norm is from that of its gradients, and
    the others' gradients from what a single backward adds to what they had. Without `layers` some are not sharded."""
    model, plain = net(), net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if layers:
        shard(model, mesh, True)
    else:
        fully_shard(model.mid, mesh=mesh)
    for each in (model, plain):
        each.up.weight.grad = torch.ones_like(each.up.weight)
    handle = optstate.fuse_backward(Lomo(model.mid.named_parameters(), lr=0.0), clip_grad_norm=1.0)
    loss = loss_of(model, batch(0))
    norm = handle.grad_norm(loss)
    loss.backward()
    loss_of(plain, batch(0)).backward()
    true = torch.stack([p.grad.square().sum() for p in plain.mid.parameters()]).sum().sqrt()
    others = [name for name, _ in plain.named_parameters() if not name.startswith("mid")]
    pairs = [(whole(model.get_parameter(name).grad), plain.get_parameter(name).grad) for name in others]
    return abs(norm - true).item(), max((a - b).abs().max().item() for a, b in pairs)


def gradients_that_differ_on_one_of_two_meshes() -> list[str]:
    """What each of four ranks says where only rank 0 has a gradient for a parameter that it shares with rank 2, and all
    have one for another that all share."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    one = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh["a"], [Shard(0)]))
    both = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]))
    optimizer = RECIPES["adalomo"]([("one", one), ("both", both)])
    both.grad = torch.ones_like(both)
    one.grad = torch.ones_like(one) if dist.get_rank() == 0 else None
    try:
        optimizer.step()
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "nothing"
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, said)
    return found


def collectives(recipe: str, fused: bool, dtype: torch.dtype, rows: int) -> tuple[int, int]:
    """All-reduces of one step and groups of parameters; FSDP2's own are reduce-scatters."""
    model = shard(net(rows, dtype), init_device_mesh("cpu", (dist.get_world_size(),)), True)
    optimizer = RECIPES[recipe](model.named_parameters())
    train(model, optimizer, fused, dist.get_world_size(), dist.get_rank(), range(1))
    with patch.object(dist, "all_reduce", Mock(wraps=dist.all_reduce)) as asked:
        train(model, optimizer, fused, dist.get_world_size(), dist.get_rank(), range(1, 2))
    return asked.call_count, sum(isinstance(module, FSDPModule) for module in model.modules())


def gradients_left(fused: bool) -> int:
    """How many gradients are alive after a backward pass."""
    model = shard(net(), init_device_mesh("cpu", (dist.get_world_size(),)), True)
    optimizer = RECIPES["adalomo"](model.named_parameters())
    if fused:
        optstate.fuse_backward(optimizer)
    loss_of(model, batch(0)).backward()
    left = sum(p.grad is not None for p in model.parameters())
    optimizer.step()
    return left


def unused_parameter(fused: bool) -> float:
    """A parameter of a group has no gradient: the others are updated, nothing waits for it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, plain = net(), net()
    for each in (model, plain):
        each.up.bias2 = nn.Parameter(torch.ones(5))
        each.spare = nn.Parameter(torch.ones(1, 3))
    shard(model, init_device_mesh("cpu", (world,)), True)
    optimizer, other = RECIPES["adalomo"](model.named_parameters()), RECIPES["adalomo"](plain.named_parameters())
    train(model, optimizer, fused, world, rank, range(3))
    train_whole(plain, other, world, range(3))
    return distance(model, plain)


def not_finite_on_one_rank(recipe: str, fused: bool) -> list[str]:
    """What each rank sees when one element of one shard is NaN; nothing may hang, and all must agree."""
    model = shard(net(), init_device_mesh("cpu", (dist.get_world_size(),)), False)
    optimizer = RECIPES[recipe](model.named_parameters())
    if fused:
        optstate.fuse_backward(optimizer)
    before = whole(model.mid.weight.detach()).clone()
    try:
        loss = loss_of(model, batch(0))
        if not fused:
            loss.backward()
            if dist.get_rank() == 1:
                model.mid.weight.grad.to_local()[0, 0] = float("nan")
            optimizer.step()
        else:
            (loss * float("nan")).backward()
    except optstate.NonFiniteGradientError as error:
        said = type(error).__name__
    else:
        said = "nothing"
    same = torch.equal(whole(model.mid.weight.detach()), before)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, f"{said}, unchanged: {same}")
    return found


def replaced_parameters(fused: bool) -> float:
    """The optimizer is built first, the model sharded afterwards and its parameters put into the groups, as
    accelerate's `prepare` does."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, plain = net(), net()
    optimizer, other = RECIPES["adalomo"](model.named_parameters()), RECIPES["adalomo"](plain.named_parameters())
    train(model, optimizer, False, steps=range(2))
    train(plain, other, False, steps=range(2))
    if fused:
        optstate.fuse_backward(optimizer)
    shard(model, init_device_mesh("cpu", (world,)), True)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, fused, world, rank, range(2, 5))
    train_whole(plain, other, world, range(2, 5))
    return distance(model, plain)


def under_ddp() -> float:
    """Stepped AdaLomo under DistributedDataParallel."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, plain = net(), net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer, other = RECIPES["adalomo"](wrapped.named_parameters()), RECIPES["adalomo"](plain.named_parameters())
    train(wrapped, optimizer, False, world, rank)
    train_whole(plain, other, world)
    return distance(model, plain)


def under_fsdp1(own_shapes: bool) -> tuple[str, float]:
    """Stepped under FSDP1, which makes one flat parameter of all, or pieces of it: what AdaLomo says, and AdamW."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    world, rank = dist.get_world_size(), dist.get_rank()
    model, plain = net(), net()
    wrapped = FullyShardedDataParallel(model, use_orig_params=own_shapes, device_id=torch.device("cpu"))
    try:
        RECIPES["adalomo"](wrapped.named_parameters())
    except TypeError as error:
        said = str(error)
    else:
        said = "nothing"
    optimizer, other = RECIPES["adamw"](wrapped.named_parameters()), RECIPES["adamw"](plain.named_parameters())
    train(wrapped, optimizer, False, world, rank)
    train_whole(plain, other, world)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        ours, theirs = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (wrapped, plain))
    return said, (ours[: len(theirs)] - theirs).abs().max().item()  # the end is padding


def fused_under_replicate() -> float:
    """The replacement for DistributedDataParallel: FSDP2's `replicate`."""
    from torch.distributed._composable.replicate_with_fsdp import replicate

    world, rank = dist.get_world_size(), dist.get_rank()
    model, plain = net(), net()
    replicate(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer, other = RECIPES["adalomo"](model.named_parameters()), RECIPES["adalomo"](plain.named_parameters())
    train(model, optimizer, True, world, rank)
    train_whole(plain, other, world)
    return distance(model, plain)


def other_parameters_on_each_rank(file: Path) -> str:
    """What `optstate.save` says where ranks train different parameters, as stages of a pipeline do."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    optimizer = RECIPES["adamw"]([(f"stage{dist.get_rank()}.weight", weight)])
    try:
        optstate.save(optimizer, file)
    except optstate.CheckpointError as error:
        return str(error)
    return "nothing"


def save_distributed(recipe: str, folder: Path) -> None:
    """Some steps, then torch's distributed checkpoint and the one file of `optstate.save`."""
    saved_run(recipe, folder)


def saved_run(recipe: str, folder: Path, fused: bool = False) -> tuple[nn.Module, optstate.Optimizer]:
    """A run that has just saved itself in both ways after some steps."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    world, rank = dist.get_world_size(), dist.get_rank()
    model = shard(net(SAVED_ROWS), init_device_mesh("cpu", (world,)), True)
    optimizer = RECIPES[recipe](model.named_parameters())
    train(model, optimizer, fused, world, rank, range(STEPS))
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "dcp")
    optstate.save(optimizer, folder / "opt.safetensors")
    return model, optimizer


def load_distributed(recipe: str, folder: Path, how: str) -> float:
    """Go on from a distributed checkpoint, or from the one file, and compare with the run that never stopped."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    world, rank = dist.get_world_size(), dist.get_rank()
    model, plain = net(SAVED_ROWS), net(SAVED_ROWS)
    if world > 1:
        shard(model, init_device_mesh("cpu", (world,)), True)
    optimizer, other = RECIPES[recipe](model.named_parameters()), RECIPES[recipe](plain.named_parameters())
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(model, state["model"])
    if how == "dcp":
        set_optimizer_state_dict(model, optimizer, state["optim"])
    else:
        optstate.load(optimizer, folder / "opt.safetensors")
    train(model, optimizer, how == "dcp", world, rank, range(STEPS, 2 * STEPS))
    train_whole(plain, other, 2, range(STEPS))
    train_whole(plain, other, world, range(STEPS, 2 * STEPS))
    return distance(model, plain)
