"""What one of several devices holds: against PyTorch's own shards, an optimizer for them, and a measured table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import optstate
from optstate import recipes, stores, updates
from optstate.memory.model import Model, ParamShape, Setting
from optstate.memory.shard import SHARDS, PerRank, local_shape, per_rank
from optstate.memory.sources import find_model
from optstate.memory.sources.config import of_config
from optstate.weights import Split

GIB = 2**30
WORLD = 8
FUSED, KEPT = Setting(fused_backward=True), Setting(fused_backward=False)
SHAPES = {"table": (50, 24), "odd": (13, 700), "few": (3, 4096), "vector": (9000,), "experts": (9, 6, 5), "scalar": ()}
SHAPES["even"] = (64, 800)
SPLIT_SHAPES = {name: SHAPES[name] for name in sorted(SHAPES) if SHAPES[name]}
"""In the order that modules take them; `fully_shard` takes no scalars."""


def model_of(shapes: dict[str, tuple[int, ...]], dtype: str = "float32") -> Model:
    return Model("test", tuple(ParamShape(name, shape, dtype) for name, shape in shapes.items()), "test")


def params_of(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.zeros(shape, dtype=dtype))) for name, shape in shapes.items()]


def on_meta(model: Model) -> list[tuple[str, nn.Parameter]]:
    dtypes = {param.name: getattr(torch, param.dtype) for param in model.parameters}
    return [(p.name, nn.Parameter(torch.empty(p.shape, dtype=dtypes[p.name], device="meta"))) for p in model.parameters]


@contextmanager
def one_of(world: int) -> Iterator[Any]:
    """Rank 0 of processes that do not exist: what is there is real, and sums over all of them are not taken."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def sharded(shapes: dict[str, tuple[int, ...]], mesh: Any) -> nn.ParameterDict:
    return fully_shard(nn.ParameterDict(dict(params_of(shapes))), mesh=mesh)


def test_shards_are_those_of_fully_shard() -> None:
    with one_of(WORLD) as mesh:
        for name, param in sharded(SPLIT_SHAPES, mesh).items():
            local: Any = param
            assert tuple(local.to_local().shape) == local_shape(SHAPES[name], WORLD)
    assert local_shape((), WORLD) == ()


def state_or_refusal(count: Callable[[], int]) -> int | str:
    """Bytes of state, or why there is no such optimizer."""
    try:
        return count()
    except ValueError as error:
        return str(error)


def agreed(shapes: dict[str, tuple[int, ...]], build: Callable[[Any], optstate.Optimizer], world: int) -> int | str:
    """What an estimate says, which is what an optimizer for the shards of `fully_shard` has or says."""
    whole = build(params_of(shapes))
    estimated = state_or_refusal(lambda: per_rank(model_of(shapes), whole, KEPT, world, "zero1").state)
    with one_of(world) as mesh:
        shards = sharded(shapes, mesh)
        assert estimated == state_or_refusal(lambda: build(shards.named_parameters()).state_nbytes())
    return estimated


@pytest.mark.parametrize("world", [1, 2, 8, 100])
@pytest.mark.parametrize("name", recipes.names())
def test_state_is_that_of_an_optimizer_for_the_shards(name: str, world: int) -> None:
    """To the byte, for every recipe: rows that do not divide, one row or expert a shard, blocks that end where shards
    do, and blocks that do not."""
    agreed(SPLIT_SHAPES, recipes.get(name), world)


def test_formats_are_decided_on_the_whole_parameter() -> None:
    """A shard under 4096 elements keeps the codes that its parameter has."""
    shapes = {"matrix": (128, 128)}
    for name, per_element in (("adamw8bit", 1.0), ("adamw4bit", 0.5)):
        optimizer = recipes.get(name)(params_of(shapes))
        block = {"adamw8bit": 256, "adamw4bit": 128}[name]
        moment = int(2048 * per_element) + 4 * 2048 // block
        assert per_rank(model_of(shapes), optimizer, KEPT, 8, "fsdp").state == 2 * moment
    local = recipes.get("adamw8bit")(params_of({"matrix": (16, 128)}))
    assert local.state_nbytes() == 2 * 4 * 2048  # what deciding on the shard would have cost


@pytest.mark.parametrize(("by", "groups"), [("row", 8), (4, 2), (8, 1), ("tensor", 1), (16, None)])
def test_groups_of_rows_and_sums_over_everything(by: str | int, groups: int | None) -> None:
    """Eight rows a shard. What becomes of groups of 16 is the store's affair."""
    chain = updates.scale_by_rms(stores.Grouped(by), decay=updates.constant(0.9))
    found = agreed({"matrix": (64, 10)}, lambda params: optstate.Optimizer(params, chain), 8)
    assert groups is None or found == 4 * groups


def test_a_store_that_parts_change_is_told() -> None:
    shapes = {"even": (128, 128), "uneven": (100, 100)}
    optimizer = recipes.get("adamw8bit")(params_of(shapes))
    notes = per_rank(model_of(shapes), optimizer, KEPT, 8, "fsdp").notes
    with one_of(WORLD) as mesh:
        planned = recipes.get("adamw8bit")(sharded(shapes, mesh).named_parameters()).plan()
    changed = [
        slot.note
        for here, whole in zip(planned, optimizer.plan(), strict=True)
        for name, slot in here.slots.items()
        if slot.store != whole.slots[name].store
    ]
    assert list(notes[1:]) == [f"{changed.count(why)} of 4 statistics {why}" for why in dict.fromkeys(changed)]


def test_what_writing_the_weight_keeps_is_split_too() -> None:
    shapes = {"matrix": (100, 30)}
    optimizer = recipes.get("lomo")(params_of(shapes, torch.bfloat16), weights=Split(16))
    assert per_rank(model_of(shapes, "bfloat16"), optimizer.plan(), KEPT, 8, "zero2").state == 2 * 13 * 30


def figures(shard: str, world: int = WORLD, setting: Setting = KEPT, name: str = "adamw") -> PerRank:
    shapes = {"embed": (80, 10), "layers.0.w": (40, 20), "layers.1.w": (40, 20), "head": (80, 10)}
    return per_rank(model_of(shapes), recipes.get(name)(params_of(shapes)), setting, world, shard)


def test_stages_divide_one_more_thing_each() -> None:
    whole = 4 * 4 * 800
    expected = {"none": (1, 1, 1), "zero1": (1, 1, 8), "zero2": (1, 8, 8), "fsdp": (8, 8, 8)}
    for shard, (weights, gradients, state) in expected.items():
        found = figures(shard)
        assert (found.weights, found.gradients, found.state) == (
            whole // weights,
            whole // gradients,
            2 * whole // state,
        )
        assert (found.whole > 0) is (shard == "fsdp")
        assert found.nbytes == found.weights + found.gradients + found.state + found.whole
        assert found.notes
    assert set(expected) == set(SHARDS)


def test_a_fused_backward_keeps_one_gradient_or_those_of_a_group() -> None:
    assert figures("none", setting=FUSED).gradients == 4 * 800
    assert figures("zero2", setting=FUSED).gradients == 4 * 100
    assert figures("fsdp", setting=FUSED).gradients == 4 * 200


def test_whole_parameters_are_laid_out_in_equal_parts() -> None:
    """Three rows among eight devices take the room of eight when they are gathered or scattered."""
    shapes = {"embed": (8, 10), "layers.0.w": (3, 20), "layers.1.w": (3, 20)}
    found = per_rank(model_of(shapes), recipes.get("lomo")(params_of(shapes)), FUSED, WORLD, "fsdp")
    assert (found.weights, found.gathered) == (4 * (10 + 20 + 20), 2 * 4 * 8 * 20)
    assert found.scattered == 4 * 3 * 20 + 4 * 8 * 20


def test_one_device_is_no_shard() -> None:
    for shard in SHARDS:
        one = figures(shard, world=1)
        assert (one.weights, one.state, one.whole, one.notes) == (4 * 4 * 800, 8 * 4 * 800, 0, ())


def test_frozen_parameters_have_neither_gradients_nor_state() -> None:
    model = Model("test", (ParamShape("w", (16, 8), "float32"), ParamShape("f", (16, 8), "float32", False)), "test")
    params = params_of({"w": (16, 8), "f": (16, 8)})
    params[1][1].requires_grad_(False)
    found = per_rank(model, recipes.get("adamw")(params), KEPT, 8, "fsdp")
    assert (found.weights, found.gradients, found.state) == (2 * 64, 64, 2 * 64)
    assert (found.root, found.root_gradients) == (2 * 512, 512)


def test_a_table_measured_with_pytorchs_own_tracker() -> None:
    """FSDPMemTracker, two layers of LLaMA-7B and its embedding and head in bf16, 8 devices, AdamW with bf16 moments:
    sharded parameters 0.155 GiB, unsharded 0.865 (the root and one layer), all-gather 0.377 (the next layer),
    reduce-scatter 0.377, state 0.311."""
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    model = of_config({"model_type": "llama", "num_hidden_layers": 2, **sizes}, "two layers", "test", "bfloat16")
    moment = stores.Full(dtype="bfloat16")
    adam = updates.scale_by_adam(first=moment, second=moment)
    found = per_rank(model, optstate.Optimizer(on_meta(model), adam), KEPT, WORLD, "fsdp")
    assert round(found.weights / GIB, 3) == 0.155
    assert round(found.root / GIB + found.gathered / 2 / GIB, 3) == 0.865
    assert round(found.gathered / 2 / GIB, 3) == 0.377
    assert round(found.scattered / 2 / GIB, 3) == 0.377
    assert round(found.state / GIB, 3) == 0.311


def test_layers_of_a_published_model() -> None:
    model = find_model("llama-7b")
    found = per_rank(model, recipes.get("adalomo")(on_meta(model)), FUSED, 8, "fsdp")
    layer, root = 202_383_360, 2 * 131_072_000 + 4096
    assert (found.gathered, found.scattered) == (4 * layer, 4 * layer)
    assert (found.root, found.root_gradients, found.root_scattered) == (2 * root, 2 * root, 2 * root)
    assert found.gradients == found.one_root == 2 * root // 8
    assert found.weights == 2 * model.numel // 8


@pytest.mark.parametrize(("world", "shard"), [(0, "fsdp"), (-1, "none"), (2.0, "fsdp"), (8, "zero3"), (8, "")])
def test_what_cannot_be_right(world: Any, shard: str) -> None:
    with pytest.raises(ValueError, match="must be a whole number|is none of none, zero1, zero2, fsdp"):
        figures(shard, world)
