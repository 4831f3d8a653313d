"""Steps by bitsandbytes' kernels, which were asked for by name, beside our own steps; the kernels run on the CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optstate
from optstate import recipes
from optstate.kernels import backend, bitsandbytes_blocks
from optstate.kernels.bitsandbytes_blocks import BlockMoment, BlockRule, step_blocks, why_no_bitsandbytes
from optstate.kernels.native import loading
from optstate.recipes import AdamW, AdamW8bit, Lion8bit, SGDM8bit
from optstate.stores import Block8, NonFiniteGradientError
from optstate.weights import Plain, StochasticRounding
from tests.support.models import assert_same, state_of

pytestmark = pytest.mark.peer

CPU = torch.device("cpu")
SHAPES = [(70, 130), (20, 256), (4100,), (10,)]
"""Whole blocks, a short block at the end of a matrix and of a vector, and a parameter too small for codes."""
CASES: dict[str, Callable[..., optstate.Optimizer]] = {
    "adamw8bit": partial(AdamW8bit, lr=1e-2, weight_decay=0.1),
    "lion8bit": partial(Lion8bit, lr=1e-3, weight_decay=0.1),
    "sgdm8bit": partial(SGDM8bit, lr=1e-2, weight_decay=0.1),
}


def build(
    make: Callable[..., optstate.Optimizer], name: str = "bitsandbytes", dtype: torch.dtype = torch.float32
) -> tuple[list[nn.Parameter], optstate.Optimizer]:
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = make([(f"p{i}", param) for i, param in enumerate(params)], weights=Plain())
    optimizer.use_backend(name)
    return params, optimizer


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """Gradients of another size in every step, rows of other sizes within one; a row of zeros."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator) * 10.0 ** (step % 3 - 2)
        if param.ndim > 1:
            grad *= torch.logspace(-3, 0, param.shape[0])[:, None]
            grad[0] = 0.0
        param.grad = grad.to(param.dtype)


def take_over(
    params: list[nn.Parameter], optimizer: optstate.Optimizer, others: list[nn.Parameter], other: Any
) -> None:
    """Copy the weights and the state of another optimizer."""
    with torch.no_grad():
        for param, theirs in zip(params, others, strict=True):
            param.copy_(theirs)
            for key, value in other.state[theirs].items():
                if isinstance(value, Tensor):
                    optimizer.state[param][key].copy_(value)


# --- the same step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_step_of_bitsandbytes_is_ours(name: str, dtype: torch.dtype) -> None:
    """From equal weights and state, in each of five steps, the first among them.

    Weights: 5e-6 of what moved in fp32, where both round each operation; in 16 bits the neighbour in one place of a
    thousand. Scales: two roundings of fp32, and of a block of zeros 0 there and 2**-120 here. Codes: the same in 98 of
    100 places, else the neighbour, or one that stands for a number which is 2.5e-5 of the block's largest apart at
    most: bitsandbytes' CPU code has no code for zero, and does not find the nearest of small numbers.
    """
    theirs, own = build(CASES[name], "eager", dtype)
    ours, kernel = build(CASES[name], "bitsandbytes", dtype)
    assert kernel.plan().steps[:3] == ("bitsandbytes",) * 3
    assert "bitsandbytes" not in kernel.plan().steps[3]
    counted = different = 0
    for step in range(1, 6):
        before = [param.detach().clone() for param in theirs]
        for params, optimizer in ((theirs, own), (ours, kernel)):
            give_gradients(params, step)
            optimizer.step()
        for mine, other, past in zip(ours, theirs, before, strict=True):
            apart, moved = (mine - other).detach().double(), (other - past).detach().double()
            if dtype == torch.float32:
                assert apart.norm() <= 5e-6 * moved.norm()
            else:
                assert (apart != 0).double().mean() <= 1e-3
                assert (apart.abs() <= 2 * torch.finfo(dtype).eps * past.double().abs()).all()
            for key, value in own.state[other].items():
                here = kernel.state[mine][key]
                if key.endswith("absmax"):
                    torch.testing.assert_close(here, value, rtol=2.0**-22, atol=2.0**-119)
                elif key.endswith("codes"):
                    off, values = (here.int() - value.int()).abs(), Block8(signed="sq" not in key).codebook.values
                    is_zero = kernel.state[mine][key.replace("codes", "absmax")] == 0
                    off[is_zero.repeat_interleave(256)[: off.numel()].view(off.shape)] = 0
                    near = (values[here.int()] - values[value.int()]).abs() <= 2.5e-5
                    assert bool((near | (off <= 1)).all())
                    counted, different = counted + off.numel(), different + int((off > 0)[value != 127].sum())
        take_over(ours, kernel, theirs, own)
    assert different <= 0.02 * counted


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_from_either_backend(name: str) -> None:
    """State by one backend is read by the other; by the same one a run goes on to the bit."""
    params, optimizer = build(CASES[name])
    for step in (1, 2):
        give_gradients(params, step)
        optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), [param.detach().clone() for param in params]
    give_gradients(params, 3)
    optimizer.step()
    for other in ("bitsandbytes", "eager"):
        again, resumed = build(CASES[name], other)
        with torch.no_grad():
            for param, weight in zip(again, weights, strict=True):
                param.copy_(weight)
        resumed.load_state_dict(saved)
        give_gradients(again, 3)
        resumed.step()
        for param, expected in zip(again, params, strict=True):
            if other == "bitsandbytes":
                assert torch.equal(param, expected)
            else:  # one step from the same codes: only the order of roundings differs
                torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_a_fused_step_is_that_of_step(name: str) -> None:
    (params, stepped), (others, fused) = build(CASES[name]), build(CASES[name])
    optstate.fuse_backward(fused)
    for _ in range(3):
        for each, optimizer in ((params, stepped), (others, fused)):
            sum((param.sin().square().sum() for param in each), torch.zeros(())).backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(params, others, strict=True):
        assert torch.equal(mine, other)
    assert_same(state_of(stepped), state_of(fused))


def test_a_large_parameter_is_stepped_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of two blocks give the same as the whole, so that temporaries stay as small as a slice."""
    (params, whole), (others, sliced) = build(CASES["adamw8bit"]), build(CASES["adamw8bit"])
    for step in (1, 2):
        monkeypatch.undo()
        give_gradients(params, step)
        whole.step()
        monkeypatch.setattr(bitsandbytes_blocks, "slice_elements", lambda device: 600)
        give_gradients(others, step)
        sliced.step()
    for mine, other in zip(params[:3], others[:3], strict=True):
        assert torch.equal(mine, other)
        assert_same(whole.state[mine], sliced.state[other])


# --- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", CASES)
def test_a_gradient_that_is_not_finite_writes_nothing(name: str, bad: float) -> None:
    params, optimizer = build(CASES[name])
    give_gradients(params, 1)
    optimizer.step()
    give_gradients(params, 2)
    assert params[0].grad is not None
    params[0].grad[3, 5] = bad
    before = params[0].detach().clone(), copy.deepcopy(optimizer.state[params[0]]), params[0]._version
    with pytest.raises(NonFiniteGradientError, match="gradient of 'p0' is not finite"):
        optimizer.step()
    assert torch.equal(params[0], before[0])
    assert_same(optimizer.state[params[0]], before[1])
    assert params[0]._version == before[2]


def test_what_is_written_is_known_to_autograd() -> None:
    params, optimizer = build(CASES["adamw8bit"])
    give_gradients(params, 1)
    tensors = [params[0], *(v for v in optimizer.state[params[0]].values() if isinstance(v, Tensor))]
    versions = [tensor._version for tensor in tensors]
    loss = params[0].square().sum()
    optimizer.step()
    assert all(tensor._version > version for tensor, version in zip(tensors, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def block_of(count: int) -> tuple[Tensor, Tensor, list[BlockMoment]]:
    """A flat parameter, a gradient and two moments in codes."""
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(count, generator=generator) for _ in range(2))
    moments = []
    for signed in (True, False):
        codes = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
        absmax = torch.rand(-(-count // 256), generator=generator)
        moments.append(BlockMoment(codes, absmax, Block8(signed=signed).codebook.values))
    return param, grad, moments


@pytest.mark.parametrize("count", [256, 1000])
def test_where_only_a_device_knows_the_flag_it_decides_there(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: a gradient that is not finite leaves every bit, another one makes the same step."""
    monkeypatch.setattr(bitsandbytes_blocks, "slice_elements", lambda device: 512)
    rule = BlockRule("adam", 0.01, 0.1, 0.9, 0.999, 1e-8, step=3)
    results = {}
    for finite in (None, torch.tensor(True), torch.tensor(False)):
        param, grad, moments = block_of(count)
        if finite is not None and not finite:
            grad[7] = math.nan
        step_blocks(param, grad, moments, rule, finite)
        results[None if finite is None else bool(finite)] = [param, *(t for m in moments for t in (m.codes, m.absmax))]
    param, _, moments = block_of(count)
    untouched = [param, *(t for m in moments for t in (m.codes, m.absmax))]
    assert all(map(torch.equal, results[False], untouched))
    assert all(map(torch.equal, results[True], results[None]))
    assert not torch.equal(results[True][0], param)


# --- kernels of other devices ---------------------------------------------------------------------------------------


@pytest.fixture
def other_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., None]], None]]:
    """Put another kernel in the place of bitsandbytes' own."""
    own = bitsandbytes_blocks._operator()

    def use(kernel: Callable[..., None]) -> None:
        bitsandbytes_blocks._order_of.cache_clear()
        monkeypatch.setattr(bitsandbytes_blocks, "_operator", lambda: partial(kernel, own))

    yield use
    bitsandbytes_blocks._order_of.cache_clear()


def decays_after(own: Any, name: str, grad: Tensor, param: Tensor, *args: Any) -> None:
    """A kernel that multiplies the weight by `1 - lr * decay` after its step, as those for CUDA devices do for Adam."""
    lr, decay = args[8], args[13]
    if name != "adam":
        own(name, grad, param, *args)
        return
    own(name, grad, param, *args[:13], 0.0, *args[14:])
    param.mul_(1 - lr * decay)


def test_a_kernel_that_decays_after_its_step_makes_the_step_that_is_meant(other_kernel: Any) -> None:
    """At lr 0.3 and decay 0.5 the two orders are 15 % of the step apart; after the change 1e-5 of it, as numbers are
    rounded in another order."""
    make = partial(AdamW8bit, lr=0.3, weight_decay=0.5)
    params, meant = build(make)
    give_gradients(params, 1)
    before = params[0].detach().clone()
    meant.step()
    other_kernel(decays_after)
    others, optimizer = build(make)
    assert bitsandbytes_blocks._order_of("adam", "cpu", None) == "after"
    give_gradients(others, 1)
    optimizer.step()
    assert (others[0] - params[0]).norm() <= 1e-5 * (params[0] - before).norm()


def test_a_kernel_that_does_otherwise_is_refused(other_kernel: Any) -> None:
    def twice(own: Any, name: str, grad: Tensor, param: Tensor, *args: Any) -> None:
        own(name, grad, param, *args)
        param.add_(1.0)

    other_kernel(twice)
    with pytest.raises(ValueError, match=r"cannot be used: bitsandbytes' adam kernel makes another step on cpu than"):
        build(CASES["adamw8bit"])


def test_a_device_without_a_kernel_is_refused() -> None:
    why = why_no_bitsandbytes(torch.device("meta"))
    assert why.startswith("bitsandbytes makes no 8-bit steps on meta: ")
    assert "\n" not in why


# --- what is refused ------------------------------------------------------------------------------------------------


def large(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    return [("w", nn.Parameter(torch.ones(64, 128, dtype=dtype)))]


BF16 = torch.bfloat16
REFUSED: dict[str, tuple[Callable[[], optstate.Optimizer], str]] = {
    "block": (lambda: AdamW8bit(large(), block=2048), r"exp_avg is kept in Block8\(block=2048\), .* keep it in Block8"),
    "4 bits": (lambda: recipes.AdamW4bit(large()), r"exp_avg is kept in Block4\(.*8-bit code books"),
    "fp32": (lambda: AdamW(large()), r"exp_avg is kept in Full\(\)"),
    "one of two": (lambda: AdamW(large(), first=Block8()), r"exp_avg_sq is kept in Full\(\)"),
    "stochastic": (
        lambda: AdamW8bit(large(BF16)),
        r"written by StochasticRounding.*weights=optstate.weights.Plain\(\)",
    ),
    "nesterov": (
        lambda: SGDM8bit(large(), nesterov=True),
        r"no kernel for the chain .*momentum\(nesterov, heavy_ball\)",
    ),
    "fp64": (lambda: AdamW8bit(large(torch.float64)), "bitsandbytes steps fp32, bf16 and fp16, not torch.float64"),
    "chain": (lambda: recipes.CAME(large()), "no kernel for the chain"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_bitsandbytes_cannot_step_is_refused_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the optimizer's word nothing is changed; by the environment's nothing is built."""
    make, words = REFUSED[name]
    optimizer = make()
    steps = optimizer.plan().steps
    with pytest.raises(ValueError, match=f"^backend=\"bitsandbytes\" cannot step 'w': .*{words}") as caught:
        optimizer.use_backend("bitsandbytes")
    assert "\n" not in str(caught.value)
    assert optimizer.plan().steps == steps
    monkeypatch.setattr(backend, "CHOSEN_OUTSIDE", "bitsandbytes")
    with pytest.raises(ValueError, match="^OPTSTATE_BACKEND=bitsandbytes cannot step 'w': "):
        make()


def test_parameters_that_come_later_are_looked_at() -> None:
    params, optimizer = build(CASES["adamw8bit"])
    with pytest.raises(ValueError, match=r"cannot step 'q': bitsandbytes steps fp32, bf16 and fp16"):
        optimizer.add_param_group({"params": [("q", nn.Parameter(torch.ones(64, 128, dtype=torch.float64)))]})
    assert len(optimizer.plan()) == len(params)


def test_what_only_a_step_knows_is_refused_before_anything_is_written() -> None:
    def try_step(dampening: float = 0.0, transposed: bool = False) -> None:
        param = nn.Parameter(torch.ones(64, 128).t() if transposed else torch.ones(64, 128))
        optimizer = SGDM8bit([("w", param)])
        optimizer.use_backend("bitsandbytes")
        optimizer.param_groups[0]["dampening"] = dampening
        param.grad = torch.ones(param.shape)
        try:
            optimizer.step()
        finally:
            assert bool((param == 1).all())
            assert optimizer.state[param]["step"] == 0

    with pytest.raises(ValueError, match=r"cannot step 'w': bitsandbytes' momentum has no dampening"):
        try_step(dampening=0.5)
    with pytest.raises(ValueError, match=r"cannot step 'w': its numbers do not lie side by side"):
        try_step(transposed=True)


def test_a_frozen_parameter_that_does_not_fit_is_no_obstacle() -> None:
    frozen = nn.Parameter(torch.ones(64, 128, dtype=BF16), requires_grad=False)
    optimizer = AdamW8bit([*large(), ("frozen", frozen)], weights=StochasticRounding())
    optimizer.use_backend("bitsandbytes")
    assert optimizer.plan().steps[0] == "bitsandbytes"
    assert optimizer.plan().steps[1].startswith("transforms (bitsandbytes rounds weights to nearest")


def test_small_parameters_need_nothing_of_bitsandbytes() -> None:
    """They keep fp32 moments, there as here, and are written stochastically."""
    optimizer = AdamW8bit([("b", nn.Parameter(torch.ones(100, dtype=BF16)))])
    optimizer.use_backend("bitsandbytes")
    assert optimizer.plan().steps == AdamW8bit([("b", nn.Parameter(torch.ones(100, dtype=BF16)))]).plan().steps


@pytest.mark.parametrize("spec", [None, ModuleSpec("bitsandbytes", None)], ids=["nothing", "a folder of that name"])
def test_without_bitsandbytes_it_is_refused_with_how_to_get_it(
    spec: ModuleSpec | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitsandbytes_blocks, "find_spec", lambda name: spec)
    optimizer = AdamW8bit(large())
    words = "cannot be used: the package bitsandbytes is not installed: pip install 'optstate\\[bitsandbytes\\]'"
    with pytest.raises(ValueError, match=f'^backend="bitsandbytes" {words}'):
        optimizer.use_backend("bitsandbytes")
    monkeypatch.setattr(backend, "CHOSEN_OUTSIDE", "bitsandbytes")
    with pytest.raises(ValueError, match=f"^OPTSTATE_BACKEND=bitsandbytes {words}"):
        AdamW8bit(large())


@pytest.mark.skipif(bool(loading.why_missing()), reason=loading.why_missing())
def test_it_is_never_taken_unless_asked_for() -> None:
    assert AdamW8bit(large()).plan().steps == ("compiled",)
