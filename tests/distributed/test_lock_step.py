"""Parameters split over two devices, driven in lock-step, against the same parameters in one piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adalomo import AdaLomo
from optstate import kernels
from optstate.distributed.sums import lock_step
from optstate.optimizer.chain_step import run_chain
from optstate.optimizer.plan import ParamPlan, plan_parameter
from optstate.spec import ParamSpec, Region
from optstate.stores import Guard, NonFiniteGradientError, Partial, own_totals, run_alone
from optstate.updates import Context

STEPS = 10
HYPERS = {"lr": 0.1, "weight_decay": 0.2, "clip_threshold": 0.8}

CLOSE = {"rtol": 1e-14, "atol": 1e-14}
"""fp64, values of about 1; sums of halves round differently from sums of the whole, a few 1e-16 in ten steps."""


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    return noise(shape, 100 + step) * (0.1 if step % 2 else 3.0)


class Halves:
    """One parameter in two pieces along `dim`, each with its own shard of the state."""

    def __init__(self, name: str, shape: tuple[int, ...], dim: int, sizes: tuple[int, int], **hypers: Any) -> None:
        whole = noise(shape, len(name))
        self.param = torch.nn.Parameter(whole.clone())
        self.opt = AdaLomo([(name, self.param)], **{**HYPERS, **hypers})
        self.dim, self.sizes, self.shape, self.step = dim, sizes, shape, 0
        self.plans = [self._plan(name, first, size) for first, size in zip((0, sizes[0]), sizes, strict=True)]
        self.plan = self.plans[0]
        self.locals = [piece.clone() for piece in whole.split(sizes, dim)]
        self.states = [self._shard(i) for i in range(2)]

    def _plan(self, name: str, first: int, size: int) -> ParamPlan:
        offset, local, parts = [0] * len(self.shape), list(self.shape), [1] * len(self.shape)
        offset[self.dim], local[self.dim], parts[self.dim] = first, size, 2
        region = Region(self.shape, tuple(offset), tuple(local), tuple(parts))
        spec = ParamSpec(name=name, shape=self.shape, dtype=torch.float64, region=region)
        return plan_parameter(spec, self.opt.recipe, "auto", trainable=True)

    def _shard(self, i: int) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0}
        for slot in self.plan.slots.values():
            for field, key in slot.keys.items():
                spec = slot.fields[field]
                shape = [self.sizes[i] if d == self.dim else n for d, n in zip(spec.dims, spec.shape, strict=True)]
                state[key] = torch.zeros(shape, dtype=spec.dtype)
        return state

    def requests(self, grad: Tensor) -> list[Any]:
        """The step of each half, each of its requests marked with the parameter it belongs to."""
        self.step += 1
        return [self._marked(self._request(i, piece)) for i, piece in enumerate(grad.split(self.sizes, self.dim))]

    def _request(self, i: int, grad: Tensor) -> Any:
        plan, guard = self.plans[i], Guard(self.plan.spec.name, grad)
        if not plan.guards:
            guard.check(kernels.all_finite(grad))
        group = self.opt.param_groups[0]
        return run_chain(plan, self.states[i], Context(plan.spec, self.locals[i], grad, group, self.step, guard))

    def _marked(self, requests: Any) -> Any:
        reply = None
        while True:
            try:
                request = requests.send(reply)
            except StopIteration as stop:
                return stop.value
            reply = yield self, request

    def step_whole(self, grad: Tensor) -> None:
        self.param.grad = grad.clone()
        self.opt.step()

    def check(self) -> None:
        torch.testing.assert_close(torch.cat(self.locals, self.dim), self.param.detach(), **CLOSE)
        for slot in self.plan.slots.values():
            for field, key in slot.keys.items():
                want, dims = self.opt.state[self.param][key], slot.fields[field].dims
                if self.dim in dims:
                    got = torch.cat([state[key] for state in self.states], dims.index(self.dim))
                    torch.testing.assert_close(got, want, **CLOSE)
                else:
                    for state in self.states:
                        torch.testing.assert_close(state[key], want, **CLOSE)


def total(a: Any, b: Any, dim: int, ndim: int) -> tuple[Any, Any]:
    """What two devices get for their requests: sums over what is split, their own for what is not.

    Each device gets tensors of its own, which it may write to.
    """
    if isinstance(a, Partial):
        assert a.dim == b.dim < 0
        return (a.local + b.local, a.local + b.local) if ndim + a.dim == dim else (a.local, b.local)
    if isinstance(a, tuple):
        first, second = zip(*(total(x, y, dim, ndim) for x, y in zip(a, b, strict=True)), strict=True)
        return first, second
    return a + b, a + b


def reduce_pairs(pending: list[tuple[Halves, Any]]) -> list[Any]:
    replies: list[Any] = []
    for (owner, a), (other, b) in zip(pending[::2], pending[1::2], strict=True):
        assert owner is other
        replies += total(a, b, owner.dim, len(owner.shape))
    return replies


def train(*params: Halves) -> list[list[int]]:
    """Ten steps of all parameters together; returns how many parameters asked in each round of each step."""
    rounds: list[list[int]] = []
    for step in range(STEPS):
        rounds.append([])

        def reduce(pending: list[Any], asked: list[int] = rounds[-1]) -> list[Any]:
            asked.append(len(pending) // 2)
            return reduce_pairs(pending)

        grads = [gradient(param.shape, step + 7 * len(param.plan.spec.name)) for param in params]
        with torch.no_grad():
            lock_step([run for param, grad in zip(params, grads, strict=True) for run in param.requests(grad)], reduce)
        for param, grad in zip(params, grads, strict=True):
            param.step_whole(grad)
            param.check()
    return rounds


@pytest.mark.parametrize(
    ("shape", "dim", "sizes"),
    [
        ((7, 5), 0, (4, 3)),
        ((7, 5), 1, (2, 3)),
        ((7, 5), 0, (7, 0)),
        ((7, 5), 0, (0, 7)),
        ((7, 5), 1, (0, 5)),
        ((7, 5), 1, (5, 0)),
        ((2, 1), 0, (1, 1)),
        ((1, 6), 1, (2, 4)),
        ((4, 7, 5), 0, (1, 3)),
        ((4, 7, 5), 0, (4, 0)),
        ((4, 7, 5), 1, (4, 3)),
        ((4, 7, 5), 2, (2, 3)),
        ((4, 3, 2, 2), 0, (3, 1)),
    ],
    ids=str,
)
def test_two_halves_of_a_matrix_equal_the_whole_in_two_rounds_per_step(shape, dim, sizes):
    assert train(Halves("p", shape, dim, sizes)) == [[1, 1]] * STEPS


@pytest.mark.parametrize(("shape", "sizes"), [((7,), (4, 3)), ((7,), (7, 0)), ((2,), (1, 1))], ids=str)
def test_two_halves_of_a_vector_equal_the_whole_in_one_round_per_step(shape, sizes):
    assert train(Halves("p", shape, 0, sizes)) == [[1]] * STEPS


def test_parameters_of_a_group_share_their_rounds():
    group = (
        Halves("rows", (7, 5), 0, (4, 3)),
        Halves("vector", (7,), 0, (5, 2)),
        Halves("columns_", (6, 4), 1, (1, 3)),
        Halves("experts__", (4, 3, 2), 0, (2, 2)),
    )
    # Vectors have no column sums to wait for: they ask only once.
    assert train(*group) == [[4, 3]] * STEPS


@pytest.mark.parametrize(("dim", "sizes"), [(0, (4, 3)), (1, (2, 3))], ids=str)
@pytest.mark.parametrize(
    ("hypers", "rounds"),
    [({"clip_threshold": None}, 1), ({"clip_grad_value": 0.3}, 3), ({"lr": torch.tensor(0.1)}, 2)],
    ids=["no clip", "clip by value", "tensor lr"],
)
def test_two_halves_equal_the_whole_whatever_the_recipe_does(hypers, rounds, dim, sizes):
    # A clamp hides what is not finite, so before it the devices must agree in a round of its own.
    assert train(Halves("p", (7, 5), dim, sizes, **hypers)) == [[1] * rounds] * STEPS


@pytest.mark.parametrize(("dim", "sizes"), [(0, (4, 3)), (1, (2, 3))], ids=["rows", "columns"])
def test_a_gradient_that_is_not_finite_on_one_device_is_refused_on_both(dim, sizes):
    # A device that went on alone would wait for ever in the next round, or write what the other did not.
    halves = Halves("p", (7, 5), dim, sizes)
    before = [piece.clone() for piece in halves.locals]
    grad = gradient((7, 5), 0)
    grad[0, 0] = float("nan")
    runs = halves.requests(grad)
    with torch.no_grad():
        replies = reduce_pairs([next(run) for run in runs])
        for run, reply in zip(runs, replies, strict=True):
            with pytest.raises(NonFiniteGradientError, match="'p'"):
                run.send(reply)
    assert all(torch.equal(a, b) for a, b in zip(halves.locals, before, strict=True))
    assert all((value == 0).all() for state in halves.states for key, value in state.items() if key != "step")


# --- the driver itself ---------------------------------------------------------------------------------------------


def asks(*numbers: int) -> Any:
    """A computation that asks for totals of these numbers and returns what it got."""
    got = []
    for number in numbers:
        got.append((yield number))
    return got


def test_lock_step_drives_computations_of_any_length_and_returns_in_order():
    seen: list[list[int]] = []

    def reduce(pending: list[int]) -> list[int]:
        seen.append(list(pending))
        return [10 * number for number in pending]

    assert lock_step([asks(1), asks(), asks(2, 3, 4), asks(5, 6)], reduce) == [[10], [], [20, 30, 40], [50, 60]]
    assert seen == [[1, 2, 5], [3, 6], [4]]


def test_lock_step_of_nothing_asks_nothing():
    def reduce(pending: list[Any]) -> list[Any]:
        raise AssertionError

    assert lock_step([], reduce) == []
    assert lock_step([asks(), asks()], reduce) == [[], []]


def test_lock_step_refuses_a_wrong_number_of_replies():
    with pytest.raises(ValueError, match="zip"):
        lock_step([asks(1), asks(2)], lambda pending: [0])


def test_an_unsplit_parameter_gets_its_own_sums_back():
    t = torch.arange(3.0)
    request = (t, Partial(t, -1), (Partial(t, -2), t))
    rows, cols, (inner, last) = own_totals(request)
    assert rows is cols is inner is last is t
    assert run_alone(asks(1, 2)) == [1, 2]


def test_lock_step_of_unsplit_parameters_is_what_the_optimizer_does():
    alone, together = (torch.nn.Parameter(noise((7, 5), 0)) for _ in range(2))
    first, second = AdaLomo([("p", alone)], **HYPERS), AdaLomo([("p", together)], **HYPERS)
    for step in range(STEPS):
        alone.grad, together.grad = gradient((7, 5), step), gradient((7, 5), step)
        first.step()
        with torch.no_grad():
            lock_step([second.runner.requests(together)], lambda pending: [own_totals(request) for request in pending])
    assert torch.equal(alone, together)
    assert torch.equal(first.state[alone]["exp_avg_sq.row"], second.state[together]["exp_avg_sq.row"])
    assert torch.equal(first.state[alone]["exp_avg_sq.col"], second.state[together]["exp_avg_sq.col"])
