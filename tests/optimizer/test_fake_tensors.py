"""A step needs no value: under FakeTensorMode every read of one raises, as on an accelerator it would wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

import optstate
from optstate import recipes, updates
from optstate.kernels import Codebook
from optstate.stores import block_codes
from optstate.weights import Kahan, Plain, Split, StochasticRounding, Weights
from tests.support.models import assert_same

pytestmark = pytest.mark.slow

WAYS = [Plain(), StochasticRounding(3), Kahan(), Split(8), Split(16)]
SHAPES = [(71, 66), (9,), (2, 3, 4)]
"""The first is large enough for codes of 8 and 4 bits."""


@contextmanager
def no_tables() -> Iterator[None]:
    """As at the first use: no codebook has built its tables yet."""
    books = [book for book in vars(block_codes).values() if isinstance(book, Codebook)]
    assert books
    with ExitStack() as stack:
        for book in books:
            stack.enter_context(mock.patch.object(book, "_tables", {}))
        yield


def step(name: str, way: Weights, fused: bool) -> tuple[list[nn.Parameter], optstate.Optimizer]:
    made = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES))
    params = [nn.Parameter(value.to(torch.bfloat16)) for value in made]
    optimizer = recipes.get(name)([(f"p{i}", p) for i, p in enumerate(params)], weights=way)
    with mock.patch(
        "optstate.integrations.engines.refuse_live_objects"
    ):  # looks at all live objects: not what is tested here
        if fused:
            optstate.fuse_backward(optimizer)
        torch.stack([p.float().square().sum() for p in params]).sum().backward()
        optimizer.step()
    return params, optimizer


CHOSEN = [
    (name, way)
    for i, name in enumerate(recipes.names())
    for way in ([Plain(), StochasticRounding(3), Kahan()][i % 3], [Split(8), Split(16)][i % 2])
]
"""Every recipe stepped and, with corrections beside the weights, fused; every way to write weights with several."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), CHOSEN, ids=str)
def test_every_recipe_steps_without_values_and_afterwards_with_them(name: str, way: Weights) -> None:
    fused = isinstance(way, Split)
    real, real_optimizer = step(name, way, fused)
    with no_tables():
        with FakeTensorMode():
            fake, fake_optimizer = step(name, way, fused)
        again, again_optimizer = step(name, way, fused)
    for param, twin in zip(fake, real, strict=True):
        assert isinstance(param, FakeTensor)
        mine, theirs = fake_optimizer.state[param], real_optimizer.state[twin]
        assert mine["step"] == 1
        assert {k: (v.shape, v.dtype) for k, v in mine.items() if k != "step"} == {
            k: (v.shape, v.dtype) for k, v in theirs.items() if k != "step"
        }
    assert fake_optimizer.plan().nbytes == fake_optimizer.state_nbytes() == real_optimizer.state_nbytes()
    for param, twin in zip(again, real, strict=True):
        assert torch.equal(param, twin)
        assert_same(again_optimizer.state[param], real_optimizer.state[twin])


def test_a_step_that_reads_a_value_is_noticed() -> None:
    """What the test above relies on."""

    def reading(step: int, lr: float) -> float:
        return 1.0 if params[0].sum() > 0 else 2.0

    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(3))]
        optimizer = optstate.Optimizer(params, optstate.chain(updates.scale_by_schedule(reading)))
        params[0].grad = torch.ones(3)
        with pytest.raises(DataDependentOutputException):
            optimizer.step()
