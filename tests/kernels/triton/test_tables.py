"""Launches that step many parameters by a table: the bits of single launches, few launches, tables that are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optstate
from adalomo import AdaLomo
from optstate import recipes, stores, updates, weights
from optstate.kernels.triton_steps import interprets
from optstate.kernels.triton_steps.tables import Table
from optstate.optimizer.chain_step import context
from optstate.optimizer.whole_steps.triton_tables import Job, TritonTables
from optstate.stores import Guard, NonFiniteGradientError

pytest.importorskip("triton", reason="triton is not installed")
if not interprets():
    pytest.skip("needs TRITON_INTERPRET=1: test_in_interpreter.py starts it", allow_module_level=True)

from tests.kernels.triton.test_steps import Make, adam, counted_launches, of

Shapes = Sequence[tuple[int, ...]]

SHAPES: Shapes = [(16, 70), (1030,), (7,), (32,)]
"""Two sizes are multiples of 16; one has two tiles, of which the second is not full."""

CODED: Shapes = [(4112,), (4, 1040)]


def build(make: Make, shapes: Shapes = SHAPES, dtype: torch.dtype = torch.bfloat16) -> Any:
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = make([(f"layer.{i}", param) for i, param in enumerate(params)])
    optimizer.use_backend("triton")
    return optimizer


def params_of(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def give_gradients(optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params_of(optimizer):
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def step_alone(optimizer: Any) -> None:
    """Make the steps of all parameters in launches of their own, as a fused backward pass does."""
    for param in params_of(optimizer):
        optimizer.step_parameter(param)
    optimizer.runner.consistency.close()


def tensors_of(optimizer: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for param in params_of(optimizer):
        state = optimizer.state[param]
        found += [param.detach(), *(value for value in state.values() if isinstance(value, Tensor))]
    return found


def have_same_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(ours, theirs, strict=True)
    )


CASES: dict[str, Make] = {
    "descent": of(optstate.chain(updates.clip_by_value(0.5), updates.add_decayed_weights(0.1))),
    "adam with an L2 penalty": of(optstate.chain(updates.add_decayed_weights(0.1), updates.scale_by_adam())),
    "adam, random bf16 moments": of(adam(stores.Full("bfloat16", True), stores.Full("bfloat16", True))),
    "adam in blocks of 8 bits": of(adam(stores.Block8(), stores.Block8())),
    "adam in 8-bit floats": of(adam(stores.Float8(), stores.Float8()), weights=weights.Kahan()),
    "adam in blocks of 4 bits": of(adam(stores.Block4(), stores.Block4())),
    "lion": of(optstate.chain(updates.sign_momentum(stores.Full("bfloat16"))), weights=weights.Split(8)),
    "root of a sum": of(optstate.chain(updates.scale_by_rss(stores.Full())), weights=weights.Split(16)),
    "adalomo's vectors": lambda named: AdaLomo(named, lr=1e-2, weight_decay=0.1),
    "came's vectors": lambda named: recipes.get("came")(named, lr=1e-2, weight_decay=0.1),
}


TABLES = {
    "check_table_kernel",
    "elementwise_table_kernel",
    "move_full_table_kernel",
    "apply_full_table_kernel",
}


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_single_launches(name: str) -> None:
    """Codes need 4,096 elements. The last parameter of a descent has two chunks, of which the second is not full."""
    shapes = CODED if "blocks" in name or "floats" in name else [*SHAPES, (16, 1026)] if name == "descent" else SHAPES
    ours, theirs = build(CASES[name], shapes), build(CASES[name], shapes)
    seeds = (1,) if shapes is CODED else (1, 2)
    for seed in seeds:
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        with counted_launches() as names:
            ours.step()
        assert TABLES.issuperset(names) or name.startswith(("adalomo", "came"))
        step_alone(theirs)
    assert have_same_bits(tensors_of(ours), tensors_of(theirs))
    assert {ours.state[param]["step"] for param in params_of(ours)} == {len(seeds)}


def test_launches_do_not_grow_with_the_parameters() -> None:
    """Parameters whose size is a multiple of 16 are read 16 bytes at once, in launches of their own."""
    for times in (1, 3):
        optimizer = build(CASES["lion"], [(16,), (32,)] * times + [(7,), (9,)] * times)
        give_gradients(optimizer, 1)
        with counted_launches() as names:
            optimizer.step()
        assert sorted(names) == ["check_table_kernel"] * 2 + ["elementwise_table_kernel"] * 2


def test_adalomo_steps_matrices_alone_and_vectors_together() -> None:
    optimizer = build(CASES["adalomo's vectors"], [(5, 6), (16,), (32,)])
    give_gradients(optimizer, 1)
    with counted_launches() as names:
        optimizer.step()
    assert names[:3] == ["check_table_kernel", "move_full_table_kernel", "apply_full_table_kernel"]
    assert names[3:] == ["sum_squares_kernel", "move_factored_kernel", "measure_kernel", "apply_factored_kernel"]


def test_a_table_is_kept_while_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make, replace = Table.of, Table.replace_gradients
    monkeypatch.setattr(Table, "of", lambda rows, chunk: made.append(len(rows)) or make(rows, chunk))
    moved: list[int] = []
    monkeypatch.setattr(
        Table, "replace_gradients", lambda self, found: moved.append(len(found)) or replace(self, found)
    )
    ours, theirs = build(CASES["lion"], [(16,), (32,)]), build(CASES["lion"], [(16,), (32,)])

    def step(seed: int, keep: bool) -> tuple[int, int]:
        for optimizer in (ours, theirs):
            generator = torch.Generator().manual_seed(seed)
            for param in params_of(optimizer):
                grad = torch.randn(param.shape, generator=generator).to(param.dtype)
                if keep:
                    param.grad.copy_(grad)
                else:
                    kept.append(grad)  # alive, so that the next one lies elsewhere
                    param.grad = grad
        ours.step()
        step_alone(theirs)
        return len(made), len(moved)

    kept: list[Tensor] = []
    assert step(1, keep=False) == (1, 0)
    assert step(2, keep=True) == (1, 0)
    assert step(3, keep=False) == (1, 1)
    for optimizer in (ours, theirs):
        param = params_of(optimizer)[0]
        kept.append(param.data)
        param.data = param.data.clone()
    assert step(4, keep=True) == (2, 1)
    assert have_same_bits(tensors_of(ours), tensors_of(theirs))


def test_what_kernels_cannot_read_is_stepped_alone() -> None:
    """A gradient with gaps goes to the transforms; one that begins at an odd place to a launch of its own."""
    ours, theirs = (
        build(CASES["lion"], [(32,), (32,), (32,), (32,)]),
        build(CASES["lion"], [(32,), (32,), (32,), (32,)]),
    )
    for optimizer in (ours, theirs):
        give_gradients(optimizer, 1)
        params = params_of(optimizer)
        for place, room, step in ((1, 64, 2), (2, 33, 1)):
            moved = torch.zeros(room, dtype=torch.bfloat16)[room % 2 :: step]
            params[place].grad = moved.copy_(params[place].grad)
    with counted_launches() as names:
        ours.step()
    step_alone(theirs)
    assert have_same_bits(tensors_of(ours), tensors_of(theirs))
    assert names == ["check_table_kernel", "elementwise_table_kernel", "finite_kernel", "elementwise_kernel"]


@pytest.mark.parametrize("name", ["adam with an L2 penalty", "adalomo's vectors"])
def test_a_gradient_that_is_not_finite_stops_only_its_parameter(name: str) -> None:
    """On a device the flags are read later; where the host knows at once, nothing is written at all."""
    optimizer = build(CASES[name], [(1030,), (7,), (9,)])
    give_gradients(optimizer, 1)
    params = params_of(optimizer)
    params[0].grad[-1] = math.nan
    before = [tensor.clone() for tensor in tensors_of(optimizer)]
    with pytest.raises(NonFiniteGradientError, match="layer.0"):
        optimizer.step()
    assert have_same_bits(before, tensors_of(optimizer))
    jobs = []
    for param in params:
        leaf, state = optimizer.runner.leaf(param), optimizer.state[param]
        guard = Guard(leaf.name, param.grad, deferred=True)
        ctx = context(leaf.plan, state, param, param.grad, optimizer.param_groups[0], 1, guard)
        jobs.append(Job(leaf.joined_step(param.device), state, ctx))
    with torch.no_grad():
        assert TritonTables().step_many(jobs) == []
    assert [bool(job.ctx.guard.finite) for job in jobs] == [False, True, True]
    per_param = len(before) // 3
    after = tensors_of(optimizer)
    assert have_same_bits(before[:per_param], after[:per_param])
    assert not any(torch.equal(old, new) for old, new in zip(before[per_param:], after[per_param:], strict=True))


def test_autograd_is_told_of_every_write() -> None:
    optimizer = build(CASES["lion"])
    give_gradients(optimizer, 1)
    versions = [tensor._version for tensor in params_of(optimizer)]
    optimizer.step()
    assert all(new._version > old for new, old in zip(params_of(optimizer), versions, strict=True))


def test_parameters_at_different_steps_are_stepped_apart() -> None:
    """A parameter that had no gradient before has other corrections and other random bits."""
    ours, theirs = build(CASES["adam with an L2 penalty"]), build(CASES["adam with an L2 penalty"])
    for optimizer, step in ((ours, ours.step), (theirs, lambda: step_alone(theirs))):
        give_gradients(optimizer, 1)
        late = params_of(optimizer)[1]
        kept, late.grad = late.grad, None
        if optimizer is ours:
            step()
        else:
            for param in params_of(optimizer):
                if param is not late:
                    optimizer.step_parameter(param)
        late.grad = kept
        step()
    assert have_same_bits(tensors_of(ours), tensors_of(theirs))
