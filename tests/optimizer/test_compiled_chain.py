"""Chains that no whole step knows, compiled by inductor on request, beside the same transforms in eager PyTorch."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optstate
from optstate import updates
from optstate.optimizer import compiled_chain
from optstate.stores import Full, NonFiniteGradientError
from optstate.updates import Context, State, Transform, Update
from tests.support.models import assert_same, state_of

pytestmark = [pytest.mark.slow, pytest.mark.peer]

SHAPES = [(20 + 3 * i, 30 + 7 * i) for i in range(25)] + [(50 + 9 * i,) for i in range(24)] + [(1,)]
"""Fifty shapes of two numbers of dimensions, each with another rest."""

CHAIN = updates.chain(
    updates.scale_by_rms(Full(), eps=1e-8, slot="mean_square"),
    updates.scale_by_adam(),
    updates.add_decayed_weights(0.1),
)
"""Every element goes its own way, and no whole step knows it."""


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    try:
        compiled_chain.require_compiler()
    except RuntimeError as error:
        pytest.skip(str(error))


def build(compiled: bool, shapes: Any = SHAPES) -> tuple[list[nn.Parameter], optstate.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]
    optimizer = optstate.Optimizer([(f"p{i}", param) for i, param in enumerate(params)], CHAIN, lr=0.01)
    if compiled:
        optimizer.compile()
    return params, optimizer


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype) * 10.0 ** (step % 3 - 1)


def graphs(optimizer: optstate.Optimizer) -> int:
    compiler = optimizer.runner.parameters.compiler
    assert compiler is not None
    return compiler.count


def test_two_graphs_step_fifty_shapes_as_the_transforms_do(capfd: pytest.CaptureFixture[str]) -> None:
    """Four steps with another learning rate each. Weights are rounded stochastically: with other bits nine of ten would
    differ. fp32 state: 1e-6 of its norm, as quotients are rounded in another order; of the weights one in a thousand is
    rounded to the neighbour."""
    (theirs, eager), (ours, compiled) = build(False), build(True)
    assert compiled.plan().steps == (
        "transforms, compiled by inductor (no whole step is written for this chain)",
    ) * len(SHAPES)
    assert not capfd.readouterr().err
    for step in range(1, 5):
        for params, optimizer in ((theirs, eager), (ours, compiled)):
            optimizer.param_groups[0]["lr"] = 0.01 * step
            give_gradients(params, step)
            optimizer.step()
    assert graphs(compiled) == 2  # one for each role: matrices and vectors
    said = capfd.readouterr().err
    assert said.startswith(f"optstate compiles the step of {CHAIN} (bfloat16, 1-d), ")
    assert said.count("\n") == 2
    different = 0
    for mine, other in zip(ours, theirs, strict=True):
        different += int((mine != other).sum())
        torch.testing.assert_close(mine, other, rtol=2.0**-7, atol=1e-6)
        for key, value in eager.state[other].items():
            if isinstance(value, Tensor):
                here = compiled.state[mine][key]
                assert (here - value).norm() <= 1e-6 * value.norm(), key
            else:
                assert value == compiled.state[mine][key]
    assert different <= 1e-3 * sum(param.numel() for param in ours)


def test_fused_resumed_and_copied_it_is_the_same_to_the_bit() -> None:
    shapes = [(40, 33), (100,)]
    params, optimizer = build(True, shapes)
    others, fused = build(True, shapes)
    handle = optstate.fuse_backward(fused)
    for _ in range(2):
        for each, stepped in ((params, optimizer), (others, fused)):
            sum((param.float().sin().square().sum() for param in each), torch.zeros(())).backward()
            stepped.step()
            stepped.zero_grad()
    handle.remove()
    assert all(map(torch.equal, params, others))
    assert_same(state_of(optimizer), state_of(fused))
    twins = copy.deepcopy((params, optimizer))
    assert twins[1].plan().steps == optimizer.plan().steps
    again, resumed = build(True, shapes)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for mine, other in zip(again, params, strict=True):
            mine.copy_(other)
    for each, stepped in ((params, optimizer), (again, resumed), twins):
        give_gradients(each, 3)
        stepped.step()
    assert all(map(torch.equal, params, again))
    assert all(map(torch.equal, params, twins[0]))


def test_the_laws_hold_in_a_compiled_step() -> None:
    """A gradient that is not finite writes nothing; what is written is known to autograd."""
    params, optimizer = build(True, [(40, 33)])
    give_gradients(params, 1)
    versions = [params[0]._version, optimizer.state[params[0]]["exp_avg"]._version]
    loss = params[0].square().sum()
    optimizer.step()
    assert params[0]._version > versions[0]
    assert optimizer.state[params[0]]["exp_avg"]._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    give_gradients(params, 2)
    assert params[0].grad is not None
    params[0].grad[2, 3] = math.nan
    before = params[0].detach().clone(), copy.deepcopy(optimizer.state[params[0]])
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    assert torch.equal(params[0], before[0])
    assert_same(optimizer.state[params[0]], before[1])


@dataclass(frozen=True)
class look(Transform):
    """A transform that reads a value on the host."""

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        return update.scaled(2.0) if float(update.dense.sum()) > 0 else update


def test_a_chain_that_reads_values_is_refused_before_anything_is_written() -> None:
    param = nn.Parameter(torch.ones(8, 9))
    optimizer = optstate.Optimizer([("w", param)], updates.chain(look()), lr=1.0)
    optimizer.compile()
    param.grad = torch.ones(8, 9)
    with pytest.raises(
        ValueError, match="^the step of 'w' cannot be compiled: one of its transforms asks for values"
    ) as e:
        optimizer.step()
    assert "\n" not in str(e.value)
    assert bool((param == 1).all())


def test_without_a_compiler_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    _, optimizer = build(False, [(4, 4)])
    with pytest.raises(
        RuntimeError, match=r"^optimizer.compile\(\) needs a C\+\+ compiler, and none was found: install"
    ):
        optimizer.compile()
    assert "compiled by inductor" not in optimizer.plan().steps[0]


def test_whole_steps_stay_what_they_are() -> None:
    optimizer = optstate.recipes.Lion([("w", nn.Parameter(torch.ones(4, 4)))])
    steps = optimizer.plan().steps
    optimizer.compile()
    if steps == ("compiled",):
        assert optimizer.plan().steps == steps
