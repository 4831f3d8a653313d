"""CAME's and SM3's steps in Triton, under its interpreter, beside the same steps of the transforms."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import optstate
from optstate import recipes, stores, weights
from optstate.kernels.triton_steps import interprets
from optstate.optimizer.chain_step import context
from optstate.stores import Guard, NonFiniteGradientError

pytest.importorskip("triton", reason="triton is not installed")
if not interprets():
    pytest.skip("needs TRITON_INTERPRET=1: test_in_interpreter.py starts it", allow_module_level=True)

from tests.kernels.triton.test_steps import Make, compare, counted_launches, train


def made(name: str, **more: Any) -> Make:
    return partial(recipes.get(name), lr=1e-2, **more)


CASES: dict[str, Make] = {
    "came": made("came", weight_decay=0.1),
    "came without a clip": made("came", clip_threshold=None),
    "sm3": made("sm3"),
    "sm3 with momentum": made("sm3", momentum=0.9),
    "sm3 with momentum in bf16": made("sm3", momentum=0.9, store=stores.Full("bfloat16", stochastic=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_matrix_in_bf16(name: str) -> None:
    """There are two strips, of which the second is not full."""
    compare(CASES[name], (140, 20), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["came", "sm3"])
def test_a_matrix_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    compare(CASES[name], (20, 70), dtype)


@pytest.mark.parametrize("how", [weights.Plain(), weights.Kahan(), weights.Split(8), weights.Split(16)], ids=str)
@pytest.mark.parametrize("name", ["came", "sm3"])
def test_every_way_of_writing_weights(name: str, how: Any) -> None:
    compare(made(name, weights=how), (20, 33), torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("came", (3, 300)), ("came", (77,)), ("came", ()), ("came", (2, 64, 65)), ("sm3", (1, 300)), ("sm3", (77,))],
    ids=str,
)
def test_any_shape(name: str, shape: tuple[int, ...]) -> None:
    """Vectors keep one statistic less; several matrices have statistics each; wide ones have several tiles in a row."""
    compare(CASES[name], shape, torch.float32)


def test_maxima_of_three_dimensions_are_left_to_the_transforms() -> None:
    _, optimizer = train(CASES["sm3"], (2, 3, 4), torch.float32, "triton", steps=1)
    assert "no whole step" in optimizer.plan().steps[0]


@pytest.mark.parametrize("shape", [(33, 40), (77,)], ids=str)
@pytest.mark.parametrize("name", ["came", "sm3"])
def test_launches_are_as_many_as_declared(name: str, shape: tuple[int, ...]) -> None:
    """All launches are counted but that of the flag, which PyTorch makes."""
    param, optimizer = train(CASES[name], shape, torch.bfloat16, "triton", steps=1)
    step = optimizer.runner.leaf(param).found_step(param.device).step
    with counted_launches() as names:
        optimizer.step()
    assert 1 + len(names) == step.launches
    over_all = [name for name in names if name not in ("move_factored_kernel", "finish_maxima_kernel")]
    assert step.passes == len(over_all)


@pytest.mark.parametrize("bad", [math.nan, 3e19])
@pytest.mark.parametrize("name", ["came", "sm3 with momentum"])
@pytest.mark.parametrize("deferred", [False, True], ids=["known at once", "known to the device"])
def test_a_gradient_that_is_not_finite_changes_no_byte(name: str, bad: float, deferred: bool) -> None:
    """The square of 3e19 overflows. Where only the device knows, as on CUDA, the step is run and writes nothing."""
    param, optimizer = train(CASES[name], (33, 40), torch.bfloat16, "triton", steps=1)
    state = optimizer.state[param]
    tensors = [param, *(value for value in state.values() if isinstance(value, Tensor))]
    before = [tensor.detach().clone() for tensor in tensors]
    grad = torch.ones((33, 40), dtype=torch.bfloat16)
    grad[-1, -1] = bad
    param.grad = grad
    if deferred:
        leaf = optimizer.runner.leaf(param)
        guard = Guard("layer.weight", grad, deferred=True)
        ctx = context(leaf.plan, state, param, grad, optimizer.param_groups[0], 2, guard)
        with torch.no_grad():
            assert leaf.found_step(param.device).step.run(state, ctx)
        assert not guard.finite
    else:
        with pytest.raises(NonFiniteGradientError):
            optimizer.step()
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old.view(torch.uint8), new.detach().view(torch.uint8))


def test_fused_backward_makes_the_same_step() -> None:
    results = []
    for fuses in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(20, 30)
        optimizer = CASES["came"](list(model.named_parameters()))
        optimizer.use_backend("triton")
        if fuses:
            optstate.fuse_backward(optimizer)
        model(torch.ones(4, 20)).square().sum().backward()
        optimizer.step()
        results.append(model.weight.detach().clone())
    assert torch.equal(results[0], results[1])
