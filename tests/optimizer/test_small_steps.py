"""Small parameters that are stepped together, against the same parameters stepped alone: the same bits, always."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optstate
from adalomo import AdaLomo, Lomo
from optstate import recipes
from optstate.optimizer import small_updates
from optstate.optimizer.parameters import HELD_ELEMENTS, SMALL_ELEMENTS
from optstate.optimizer.small_steps import SmallSteps
from optstate.stores import NonFiniteGradientError
from optstate.weights import Kahan, Plain, StochasticRounding, Weights
from tests.optimizer.test_whole_steps import CASES, PAIRED, SHAPES, build, give_gradients
from tests.support.compiled import needs_compiled_steps
from tests.support.models import assert_same, state_of

pytestmark = needs_compiled_steps

MANY = [*SHAPES, (70, 66), (9,), (40, 40)]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each call took that stepped several."""
    counts: list[int] = []
    begin = SmallSteps.begin

    def counted(self: SmallSteps, found: Any, numbers: Any) -> Any:
        counts.append(len(found.params))
        return begin(self, found, numbers)

    monkeypatch.setattr(SmallSteps, "begin", counted)
    return counts


def alone(params: list[nn.Parameter], optimizer: optstate.Optimizer) -> None:
    """Step one parameter after the other."""
    for param in params:
        optimizer.step_parameter(param)
    optimizer.runner.consistency.close()


def values(params: list[nn.Parameter], optimizer: optstate.Optimizer) -> list[Any]:
    return [[param.detach().clone() for param in params], state_of(optimizer)]


def both(
    change: Callable[[list[nn.Parameter], optstate.Optimizer], None], name: str = "adamw8bit", **options: Any
) -> None:
    """Step twice, change something, step twice more: together and alone."""
    results = []
    for is_alone in (False, True):
        params, optimizer = build(
            CASES[name], [(70, 66), (33, 40), (9,), (5000,)], options.get("dtype", torch.float32), "auto", "native"
        )
        for step in (1, 2, 3, 4):
            give_gradients(params, step)
            if step == 3:
                change(params, optimizer)
            if is_alone:
                alone([param for param in params if param.grad is not None], optimizer)
            else:
                optimizer.step()
        results.append(values(params, optimizer))
    assert_same(*results)


@pytest.mark.parametrize(("name", "dtype", "way"), PAIRED, ids=str)
def test_every_step_is_that_of_the_parameter_alone(
    name: str, dtype: torch.dtype, way: Weights, together: list[int]
) -> None:
    results = []
    for is_alone in (False, True):
        params, optimizer = build(CASES[name], MANY, dtype, way, "native")
        for step in (1, 2, 3):
            give_gradients(params, step)
            if is_alone:
                alone(params, optimizer)
            else:
                optimizer.step()
        results.append(values(params, optimizer))
    assert_same(*results)
    assert len(together) >= 3
    assert sum(together) >= 9  # of AdamFactor the vectors alone, as the sums of matrices are made beforehand


@pytest.mark.parametrize("name", ["adalomo", "adamw8bit", "came", "sm3", "lion", "adam in bf16"])
def test_a_fused_backward_makes_the_same_steps(name: str, together: list[int]) -> None:
    results = []
    for fused in (False, True):
        params, optimizer = build(CASES[name], [(70, 66), (9,), (33, 40)], torch.bfloat16, "auto", "native")
        if fused:
            optstate.fuse_backward(optimizer)
        for step in (1, 2, 3):
            give_gradients(params, step)
            grads = [param.grad for param in params]
            for param in params:
                param.grad = None
            sum((param * grad).sum() for param, grad in zip(params, grads, strict=True)).backward()  # type: ignore[union-attr]
            assert not fused or all(param.grad is None for param in params)
            optimizer.step()
            optimizer.zero_grad()
        results.append(values(params, optimizer))
    assert_same(*results)
    assert set(together) == {2 if name == "came" else 3}  # no whole step is written for vectors


def test_two_threads_give_the_bits_of_one() -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            params, optimizer = build(
                CASES["adalomo"], [(200, 250)] * 11 + [(9,)] * 5, torch.bfloat16, "auto", "native"
            )
            for step in (1, 2):
                give_gradients(params, step)
                optimizer.step()
            results.append(values(params, optimizer))
    finally:
        torch.set_num_threads(before)
    assert_same(*results)


def test_groups_and_steps_keep_their_own_numbers(together: list[int]) -> None:
    """Learning rates of two groups, a schedule, and parameters whose counts of updates differ."""
    results = []
    for is_alone in (False, True):
        params = [nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(i))) for i in range(6)]
        groups = [{"params": params[:3], "lr": 0.1}, {"params": params[3:], "lr": 0.01, "weight_decay": 0.1}]
        optimizer = recipes.get("lion")(groups, lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for step in (1, 2, 3):
            give_gradients(params, step)
            params[step].grad = None
            if is_alone:
                alone([param for param in params if param.grad is not None], optimizer)
            else:
                optimizer.step()
            scheduler.step()
        results.append([[p.detach() for p in params], [s["step"] for s in optimizer.state.values()]])
    assert_same(*results)
    assert together == [5, 5, 5]
    assert results[0][1] == [3, 2, 2, 2, 3, 3]


# --- what is kept from step to step must not outlive what it was made of ---------------------------------------------


def of_param(change: Callable[[Tensor], Tensor]) -> Callable[[list[nn.Parameter], optstate.Optimizer], None]:
    def apply(params: list[nn.Parameter], _: optstate.Optimizer) -> None:
        old = params[1].data
        params[1].data = change(old)
        old.fill_(torch.nan) if params[1].data_ptr() != old.data_ptr() else None

    return apply


def of_state(change: Callable[[Tensor], Tensor]) -> Callable[[list[nn.Parameter], optstate.Optimizer], None]:
    def apply(params: list[nn.Parameter], optimizer: optstate.Optimizer) -> None:
        state = optimizer.state[params[1]]
        for key in [key for key, value in state.items() if isinstance(value, Tensor)]:
            state[key] = change(state[key])

    return apply


def of_grad(change: Callable[[Tensor], Tensor]) -> Callable[[list[nn.Parameter], optstate.Optimizer], None]:
    def apply(params: list[nn.Parameter], _: optstate.Optimizer) -> None:
        assert params[1].grad is not None
        params[1].grad = change(params[1].grad)

    return apply


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor.clone()


def set_learning_rate(_: list[nn.Parameter], optimizer: optstate.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)


def set_steps(params: list[nn.Parameter], optimizer: optstate.Optimizer) -> None:
    optimizer.state[params[1]]["step"] = 7


def add_to_state(params: list[nn.Parameter], optimizer: optstate.Optimizer) -> None:
    optimizer.state[params[1]]["of somebody else"] = torch.ones(3)
    optimizer.state[params[2]]["a word"] = "word"


def replace_states(params: list[nn.Parameter], optimizer: optstate.Optimizer) -> None:
    for param in params:
        entry = optimizer.state[param]
        optimizer.state[param] = {key: entry[key] if key == "step" else entry[key].clone() for key in reversed(entry)}


def load(_: list[nn.Parameter], optimizer: optstate.Optimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def negated(grad: Tensor) -> Tensor:
    view: Tensor = torch._neg_view(-grad)
    return view


CHANGES = {
    "the parameter's memory": of_param(Tensor.clone),
    "the parameter transposed": of_param(transposed),
    "a state's memory": of_state(Tensor.clone),
    "a state transposed": of_state(transposed),
    "a gradient transposed": of_grad(transposed),
    "a gradient with the other sign": of_grad(negated),
    "no gradient": lambda params, _: setattr(params[1], "grad", None),
    "a learning rate that is a tensor": set_learning_rate,
    "a count of updates": set_steps,
    "more in the state": add_to_state,
    "states in another order": replace_states,
    "state that was loaded": load,
}


@pytest.mark.parametrize("name", ["adamw8bit", "adalomo", "adamw"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_exchanged_between_steps_is_noticed(change: str, name: str) -> None:
    both(CHANGES[change], name)


def test_a_gradient_of_another_dtype_is_stepped_as_alone() -> None:
    def change(params: list[nn.Parameter], _: optstate.Optimizer) -> None:
        grad = params[1].grad
        assert grad is not None
        params[1].grad = None
        params[1].grad_dtype = None
        params[1].grad = grad.float() * 1.0001

    if not hasattr(nn.Parameter(torch.ones(1)), "grad_dtype"):
        pytest.skip("this PyTorch allows no gradient of another dtype")
    both(change, "adamw8bit", dtype=torch.bfloat16)


@pytest.mark.parametrize("key", ["exp_avg.codes", "exp_avg.absmax"])
@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t[:-1].clone(), lambda t: t.view(-1, 1)[:2]])
def test_state_that_became_smaller_is_not_written_beyond_its_end(key: str, change: Any) -> None:
    """Also if it begins at the same place: the step of the parameter alone decides, before anything is written."""
    params, optimizer = build(CASES["adamw8bit"], [(70, 66), (70, 66)], torch.float32, "auto", "native")
    for step in (1, 2):
        give_gradients(params, step)
        optimizer.step()
    optimizer.state[params[1]][key] = change(optimizer.state[params[1]][key])
    give_gradients(params, 3)
    with pytest.raises(Exception, match="size|shape"):
        optimizer.step()


def test_a_parameter_of_another_shape_at_the_same_place_is_refused() -> None:
    params, optimizer = build(CASES["lion"], [(70, 66), (70, 66)], torch.float32, "auto", "native")
    give_gradients(params, 1)
    optimizer.step()
    params[1].data = params[1].data.view(66, 70)
    params[1].grad = torch.ones(66, 70)
    with pytest.raises(RuntimeError, match="when the optimizer was built"):
        optimizer.step()


def test_a_name_that_was_taken_later_decides_the_rounding() -> None:
    """Random bits follow names: keys that were kept of another name must not be used."""
    results = []
    for named_first in (False, True):
        param, other = (nn.Parameter(torch.full((40, 40), 0.3, dtype=torch.bfloat16)) for _ in range(2))
        named = [("a", param), ("b", other)]
        optimizer = Lomo(named if named_first else [param, other], lr=1e-3)
        for step in (1, 2):
            if step == 2 and not named_first:
                optimizer.runner.parameters.take_names(["a", "b"], optimizer.param_groups)
            param.data.fill_(0.3)
            other.data.fill_(0.3)
            give_gradients([param, other], step)
            optimizer.step()
        results.append([param.detach(), other.detach()])
    assert_same(*results)


# --- refusals and interrupts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adalomo", "adamw8bit", "came", "sm3", "adamw", "lomo", "adalomo clipped"])
@pytest.mark.parametrize("bad", [0, 2])
def test_a_gradient_that_is_not_finite_stops_where_it_would_alone(name: str, bad: int) -> None:
    """Parameters before it are updated, the others and their versions are as they were."""
    params, optimizer = build(CASES[name], [(70, 66), (9,), (33, 40), (5000,)], torch.float32, "auto", "native")
    give_gradients(params, 1)
    optimizer.step()
    before = values(params, optimizer)
    versions = [param._version for param in params]
    give_gradients(params, 2)
    grad = params[bad].grad
    assert grad is not None
    grad.view(-1)[-1] = torch.nan
    with pytest.raises(NonFiniteGradientError, match=f"the gradient of 'p{bad}' is not finite or its squares"):
        optimizer.step()
    assert [param._version > version for param, version in zip(params, versions, strict=True)] == [
        place < bad for place in range(4)
    ]
    after = values(params, optimizer)
    assert_same(
        [after[0][bad:], [optimizer.state[p]["step"] for p in params]], [before[0][bad:], [2] * bad + [1] * (4 - bad)]
    )
    if bad:
        with pytest.raises(
            optstate.InconsistentStateError, match=f"{bad} parameters were updated, then 'p{bad}' failed"
        ):
            optimizer.step()
    else:
        give_gradients(params, 2)
        optimizer.step()


def test_an_interrupt_while_parameters_are_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = build(CASES["lion"], [(70, 66), (9,)], torch.float32, "auto", "native")
    give_gradients(params, 1)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SmallSteps, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    with pytest.raises(optstate.InconsistentStateError, match="'p0' failed and may itself be updated in part"):
        optimizer.state_dict()


def test_parameters_are_marked_before_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = build(CASES["lion"], [(70, 66), (9,)], torch.float32, "auto", "native")
    give_gradients(params, 1)
    seen = []
    bump = small_updates.increment_version

    def look(tensors: list[Tensor]) -> None:
        seen.append(optimizer.runner.consistency.broken)
        bump(tensors)

    monkeypatch.setattr(small_updates, "increment_version", look)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert seen == [
        "0 parameters were updated, then the update of 'p0' and 1 more was interrupted and may be made in part"
    ]
    assert not torch.equal(before[0], params[0])


# --- a fused backward pass --------------------------------------------------------------------------------------------


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        raise MemoryError


def fused_pair() -> tuple[nn.Parameter, nn.Parameter, optstate.Optimizer, Any]:
    first, last = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    optimizer = AdaLomo([("first", first), ("last", last)], lr=0.1)
    return first, last, optimizer, optstate.fuse_backward(optimizer)


def test_gradients_of_a_pass_that_failed_do_not_reach_the_next_one() -> None:
    results = []
    for fails in (False, True):
        first, last, optimizer, _ = fused_pair()
        if fails:
            with pytest.raises(MemoryError):
                (Fails.apply(torch.ones(2, 4) @ first) @ (3.0 * last)).sum().backward()  # type: ignore[no-untyped-call]
            assert last.grad is None
            with pytest.raises(RuntimeError, match="without a gradient"):
                optimizer.step()
            optimizer.state_dict()  # nothing was changed
        ((torch.ones(2, 4) @ first) @ last).sum().backward()
        optimizer.step()
        results.append([first.detach(), last.detach()])
    assert_same(*results)


def test_at_most_half_a_million_elements_wait() -> None:
    count = HELD_ELEMENTS // SMALL_ELEMENTS + 3
    params = [nn.Parameter(torch.ones(SMALL_ELEMENTS)) for _ in range(count)]
    optimizer = Lomo([(f"p{i}", param) for i, param in enumerate(params)], lr=0.1, fused_backward=True)
    held = []
    hooks = optimizer.runner.hooks

    def look(_: Tensor) -> None:
        held.append(sum(m.grad.numel() for m in hooks._waiting.members))  # type: ignore[union-attr]

    for param in params:
        param.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
    sum(param.sum() for param in params).backward()  # type: ignore[union-attr]
    assert max(held) == HELD_ELEMENTS
    assert all(torch.equal(param, torch.full_like(param, 0.9)) for param in params)
    optimizer.step()


def test_hooks_that_are_removed_in_a_pass_leave_nothing_undone() -> None:
    first, last, optimizer, fused = fused_pair()
    hidden = torch.ones(2, 4) @ first
    hidden.register_hook(lambda _: fused.remove())
    (hidden @ last).sum().backward()
    assert optimizer.state[last]["step"] == 1
    assert first.grad is not None
    assert last.grad is None


def test_a_weight_that_waits_is_not_read_in_its_pass() -> None:
    first, last, _optimizer, _fused = fused_pair()
    hidden = torch.ones(2, 4) @ first
    hidden.register_hook(lambda _: last.detach().sum() and None)
    with pytest.raises(RuntimeError, match="would read 'last' in the backward pass"):
        (hidden @ last).sum().backward()
    last.sum()


def test_sums_of_micro_batches_are_stepped_together(together: list[int]) -> None:
    results = []
    for accumulated in (False, True):
        first, last, optimizer, fused = fused_pair()
        for scale in (1.0, 2.0):
            loss = ((torch.ones(2, 4) @ first) @ last).sum() * (scale if accumulated else 3.0)
            if accumulated:
                with fused.accumulate():
                    loss.backward()
            elif scale == 2.0:
                loss.backward()
        optimizer.step()
        results.append([first.detach(), last.detach()])
    assert_same(*results)
    assert together == [2, 2]


@pytest.mark.parametrize("way", [Plain(), StochasticRounding(1), Kahan()], ids=str)
def test_a_clip_by_the_norm_of_all_gradients_multiplies_each(way: Weights) -> None:
    results = []
    for is_small in (True, False):
        params, optimizer = build(CASES["adamw8bit"], [(70, 66), (9,)], torch.bfloat16, way, "native")
        fused = optstate.fuse_backward(optimizer, clip_grad_norm=0.1)
        if not is_small:
            optimizer.runner.around = lambda update, leaf, param, scale: update(leaf, param, scale)
        loss = sum((param.float() ** 2).sum() for param in params)
        fused.grad_norm(loss)
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        results.append(values(params, optimizer))
    assert_same(*results)
