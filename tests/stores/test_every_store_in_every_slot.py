"""Every store in every slot of every chain, beside the same chain with full statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import optstate
from optstate import stores, updates, weights
from optstate.optimizer.plan import ParamPlan
from optstate.stores import AxisMax, Block4, Block8, Factored, Float8, Full, Grouped, Guard, Store
from optstate.updates import Transform
from tests.support.models import assert_same
from tests.support.stored import BF16, FP32, RANK1, SIGNED_SLOTS, Shape, bits_of, chunk_of, noise

pytestmark = pytest.mark.slow


# --- what is refused when a chain is built ---------------------------------------------------------------------------


UNSIGNED_SLOTS: dict[str, Callable[[Store], Transform]] = {
    "rms": lambda s: updates.scale_by_rms(s),
    "adam second": lambda s: updates.scale_by_adam(second=s),
    "rss": lambda s: updates.scale_by_rss(s),
    "confidence residual": lambda s: updates.scale_by_confidence(residual=s),
}

# --- every store in every slot ---------------------------------------------------------------------------------------


ANY_SIGN: list[Store] = [Full(), Full("bfloat16"), Block8(), Block4(), RANK1, Float8()]


SUMMARIES: list[Store] = [Factored(), AxisMax(), Grouped("row"), Grouped("head"), Grouped("tensor"), Grouped(2)]


SLOTS = SIGNED_SLOTS | UNSIGNED_SLOTS


SHAPES: dict[Shape, int] = {(): 1, (5000,): 10, (70, 90): 7, (3, 40, 50): 3, (8, 4, 12, 12): 4}  # with a head size


STEPS = 3


# The relative L2 distance of the total update from that of Full(), on gradients without structure: measured at most
# half to two thirds of these. For summaries gradients are of one size in a step, so that they are exact.
DISTANCES: dict[Any, float] = {Full: 0.04, Block8: 0.06, Float8: 0.1, Block4: 0.3}


ROUNDED_WEIGHTS = 0.03
"""bf16 parameters are rounded stochastically, by bits that depend on their name."""


@dataclass(frozen=True)
class Case:
    """A store in a slot. even: gradients whose elements are all of one size in a step."""

    slot: str
    store: Store
    even: bool = False

    @property
    def name(self) -> str:
        return f"{self.slot} {self.store}{' even' * self.even}"

    @property
    def shapes(self) -> list[Shape]:
        return [s for s in SHAPES if self.store != Grouped(2) or (s and s[0] % 2 == 0)]

    @property
    def reference(self) -> Case:
        return replace(self, store=Full())


CASES = [
    *(Case(slot, store) for slot in SLOTS for store in ANY_SIGN),
    *(Case(slot, store, even=True) for slot in UNSIGNED_SLOTS for store in [Full(), *SUMMARIES]),
]


every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)


def gradient(shape: Shape, step: int, even: bool) -> Tensor:
    value = noise(shape, 100 * step + len(shape))
    return value.sign() * (step + 1) if even else value


@dataclass(frozen=True)
class Run:
    """Every case's parameters, stepped by one optimizer that gives each its own chain."""

    params: dict[tuple[Case, Shape], nn.Parameter]
    before: dict[tuple[Case, Shape], Tensor]
    optimizer: optstate.Optimizer

    @cached_property
    def plans(self) -> dict[str, ParamPlan]:
        return {plan.spec.name: plan for plan in self.optimizer.plan()}


def build(dtype: torch.dtype, *tail: Transform, how: Any = "auto") -> Run:
    params = {(c, s): nn.Parameter((noise(s, 7) * 0.1).to(dtype)) for c in CASES for s in c.shapes}
    groups = [
        {"params": [(f"{c.name}/{s}", p) for (c, s), p in params.items() if s == shape], "head_size": head}
        for shape, head in SHAPES.items()
    ]
    chains = {c.name: updates.chain(SLOTS[c.slot](c.store), *tail) for c in CASES}
    rules = [(lambda spec, name=name: spec.name.split("/")[0] == name, chain) for name, chain in chains.items()]
    optimizer = optstate.Optimizer(groups, optstate.route(rules, default=updates.chain()), lr=0.1, weights=how)
    return Run(params, {key: p.detach().clone() for key, p in params.items()}, optimizer)


@cache
def three_steps(dtype: torch.dtype, fused: bool) -> Run:
    run = build(dtype, updates.add_decayed_weights(0.1))
    if fused:
        optstate.fuse_backward(run.optimizer)
    for step in range(STEPS):
        gradients = {key: gradient(key[1], step, key[0].even).to(dtype) for key in run.params}
        if fused:  # the gradient of sum(p * g) is g
            sum((p * gradients[key]).sum().float() for key, p in run.params.items()).backward()
        else:
            for key, p in run.params.items():
                p.grad = gradients[key]
        run.optimizer.step()
    return run


def expected_store(case: Case, shape: Shape) -> bool:
    """Whether the store itself is used, and not Full() in its place."""
    if isinstance(case.store, Block8 | Block4 | Float8):
        return math.prod(shape) >= 4096
    if isinstance(case.store, Factored | AxisMax):
        return len(shape) >= 2
    return len(shape) >= (2 if case.store == Grouped("row") else 1)


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
class TestEveryStoreInEverySlot:
    def test_state_is_finite_and_as_fields_declares(self, case: Case, dtype: torch.dtype) -> None:
        run = three_steps(dtype, fused=False)
        for shape in case.shapes:
            plan, state = run.plans[f"{case.name}/{shape}"], run.optimizer.state[run.params[case, shape]]
            assert run.params[case, shape].isfinite().all()
            assert (run.params[case, shape] != run.before[case, shape]).float().mean() > 0.5
            declared = {}
            for name, slot in plan.slots.items():
                signed = plan.chain.slots(plan.spec, {})[name].signed
                fields = slot.store.fields(plan.spec, signed)
                declared |= {f"{name}.{field}" if field else name: fields[field] for field in fields}
            tensors = {key: value for key, value in state.items() if key != "step"}
            assert state["step"] == STEPS
            assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == {
                k: (f.layout(plan.spec)[0], f.dtype) for k, f in declared.items()
            }
            assert {k: t.numel() for k, t in tensors.items()} == {k: math.prod(f.shape) for k, f in declared.items()}
            assert all(t.float().isfinite().all() for t in tensors.values())
            assert all(t.view(torch.uint8).any() if t.itemsize == 1 else t.any() for t in tensors.values())

    def test_the_store_asked_for_is_used_or_the_plan_says_why_not(self, case: Case, dtype: torch.dtype) -> None:
        plans = three_steps(dtype, fused=False).plans
        name = {"rss": "accumulator", "confidence residual": "exp_avg_res"}.get(case.slot, "exp_avg_sq")
        if case.slot in SIGNED_SLOTS:
            name = "momentum_buffer" if "heavy" in case.slot else "exp_avg"
        for shape in case.shapes:
            slots = plans[f"{case.name}/{shape}"].slots
            if case.slot == "confidence residual" and len(shape) < 2:
                assert name not in slots  # CAME keeps none for vectors
            elif not isinstance(case.store, Full):
                assert isinstance(slots[name].store, Full) != expected_store(case, shape)
                assert bool(slots[name].note) == isinstance(slots[name].store, Full) or len(shape) == 1

    def test_fused_and_stepped_are_the_same_bits(self, case: Case, dtype: torch.dtype) -> None:
        stepped, fused = three_steps(dtype, fused=False), three_steps(dtype, fused=True)
        for shape in case.shapes:
            p, q = stepped.params[case, shape], fused.params[case, shape]
            assert torch.equal(p, q)
            assert_same(bits_of_state(stepped.optimizer, p), bits_of_state(fused.optimizer, q))

    def test_it_ends_near_what_full_statistics_do(self, case: Case, dtype: torch.dtype) -> None:
        run = three_steps(dtype, fused=False)
        for shape in case.shapes:
            exact = run.params[case.reference, shape].detach().float() - run.before[case.reference, shape].float()
            got = run.params[case, shape].detach().float() - run.before[case, shape].float()
            bound = DISTANCES.get(type(case.store), 1e-5)
            if case.slot == "confidence residual" and case.even:
                bound = 0.08  # the residual's sizes vary with the signs of the past
            if dtype == BF16 and case != case.reference:
                bound += ROUNDED_WEIGHTS
            assert (got - exact).norm() <= bound * exact.norm()


def bits_of_state(optimizer: optstate.Optimizer, param: Tensor) -> dict[str, Any]:
    state = optimizer.state[param]
    return bits_of({k: v for k, v in state.items() if isinstance(v, Tensor)}) | {"step": state["step"]}


def test_lossy_stores_do_differ_from_full_ones() -> None:
    """Or the distances above would compare nothing with nothing. Signs may agree all the same."""
    run = three_steps(FP32, fused=False)
    for case in CASES:
        if not case.even and case.store != Full() and case.slot != "sign momentum":
            assert not torch.equal(run.params[case, (70, 90)], run.params[case.reference, (70, 90)])


@pytest.mark.parametrize(
    ("dtype", "tail", "chunk"),
    [
        (FP32, (), 1 << 19),
        (FP32, (updates.clip_by_rms(1e9),), 1 << 12),
        (BF16, (), 1 << 12),
    ],
    ids=["fp32", "fp32 in place", "bf16 sliced"],
)
def test_a_gradient_found_not_finite_later_leaves_everything_bit_for_bit(
    dtype: torch.dtype, tail: tuple[Transform, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where the flag is read a step later: of every store in every slot, in slices and, where
    a sum over the whole parameter follows, with full statistics of several chunks that move in place."""
    original = Guard.__init__
    monkeypatch.setattr(
        Guard, "__init__", lambda self, name, grad, **more: original(self, name, grad, deferred=True, **more)
    )
    with chunk_of(chunk):
        run = build(dtype, *tail, updates.add_decayed_weights(0.1))
        for (case, shape), p in run.params.items():
            p.grad = gradient(shape, 0, case.even).to(dtype)
            run.optimizer.step_parameter(p)
        for i, ((case, shape), p) in enumerate(run.params.items()):
            before, state = p.detach().clone(), bits_of_state(run.optimizer, p)
            state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            p.grad.view(-1)[p.numel() // 2] = (math.nan, math.inf, -math.inf)[i % 3]
            if p.numel() > 1:  # beside a finite gradient whose square overflows
                p.grad.view(-1)[0] = 1e25
            run.optimizer.step_parameter(p)
            assert torch.equal(p, before), (case.name, shape)
            after = bits_of_state(run.optimizer, p)
            assert after.pop("step") == state.pop("step") + 1  # taken back when the flag is read
            assert_same(after, state)


@pytest.mark.parametrize("store", [*ANY_SIGN, *SUMMARIES], ids=str)
def test_a_step_without_values_changes_nothing_for_later_real_ones(store: Store) -> None:
    """Under FakeTensorMode, as memory estimates run it: sizes come out right, and no fake table is remembered."""

    def step_of(shape: Shape) -> tuple[nn.Parameter, optstate.Optimizer]:
        param = nn.Parameter(torch.ones(shape))
        first = store if store in ANY_SIGN else Full()
        chain = updates.chain(updates.scale_by_adam(first, store), updates.add_decayed_weights(0.1))
        optimizer = optstate.Optimizer([{"params": [("p", param)], "head_size": 7}], chain, weights=weights.Plain())
        param.grad = torch.full(shape, 0.5)
        optimizer.step()
        return param, optimizer

    param, optimizer = step_of((70, 90))
    with FakeTensorMode():
        fake, of_fake = step_of((70, 90))
        sizes = {k: (v.shape, v.dtype) for k, v in of_fake.state[fake].items() if isinstance(v, Tensor)}
    again, optimizer_again = step_of((70, 90))
    assert sizes == {k: (v.shape, v.dtype) for k, v in optimizer.state[param].items() if isinstance(v, Tensor)}
    assert torch.equal(again, param)
    assert_same(bits_of_state(optimizer_again, again), bits_of_state(optimizer, param))
    assert stores.Full().read({"": again.detach()}, (70, 90)).isfinite().all()
