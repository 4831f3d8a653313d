"""Steps in Triton, under its interpreter, beside the same steps of the transforms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optstate
from adalomo import Adafactor, AdaLomo, Lomo
from optstate import stores, updates, weights
from optstate.kernels.triton_steps import interprets
from optstate.optimizer.chain_step import context
from optstate.stores import Guard, NonFiniteGradientError
from tests.support.pairwise import pairwise

pytest.importorskip("triton", reason="triton is not installed")
if not interprets():
    pytest.skip("needs TRITON_INTERPRET=1: test_in_interpreter.py starts it", allow_module_level=True)

from triton.runtime import interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

TOLERANCE = 5e-6
"""Relative L2 in fp32: sums of 10**5 squares differ by some 1e-7 with their order."""

Make = Callable[[list[tuple[str, nn.Parameter]]], Any]


def train(make: Make, shape: tuple[int, ...], dtype: torch.dtype, backend: str, steps: int = 3) -> tuple[Tensor, Any]:
    """Return a parameter after a few steps, and its optimizer."""
    generator = torch.Generator().manual_seed(1)
    param = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    optimizer = make([("layer.weight", param)])
    optimizer.use_backend(backend)
    for _ in range(steps):
        param.grad = gradient_of(shape, generator).to(dtype)
        optimizer.step()
    return param, optimizer


def require_alike(ours: Tensor, theirs: Tensor) -> None:
    """Require that two results of one step agree: fp32 within the tolerance, codes and lower precisions in one place.

    An fp32 number that differs in its last place may be rounded to the neighbour: of few elements, as the chance is the
    share of that place in a place of the lower precision, 2**-16 in bf16 and 2**-13 in fp16, times some operations.
    """
    assert ours.dtype == theirs.dtype
    if ours.dtype == torch.float32:
        assert (ours.double() - theirs.double()).norm() <= TOLERANCE * theirs.double().norm()
        return
    if ours.dtype in (torch.uint8, torch.float8_e4m3fn):
        apart = (ours.view(torch.uint8).int() - theirs.view(torch.uint8).int()).abs()
        if apart.max() >= 16:  # two codes a byte
            apart = torch.maximum(apart % 16, apart // 16)
    else:
        apart = (places(ours) - places(theirs)).abs()
    assert apart.max() <= 1
    assert (apart > 0).sum() <= 1 + 2e-3 * apart.numel()


def places(x: Tensor) -> Tensor:
    """Number the values of a 16-bit dtype in their order, both zeros alike."""
    word = x.view(torch.int16).int()
    return torch.where(word < 0, -(word & 0x7FFF), word)


def weight_of(param: Tensor, optimizer: Any) -> Tensor:
    """Return the value of a weight, with what is kept beside the parameter: fp32."""
    leaf, state = optimizer.runner.leaf(param), optimizer.state[param]
    fields = {field: state[key] for field, key in leaf.plan.weight_keys.items()}
    codec = leaf.plan.weights.codec(leaf.plan.spec, 1, fields)
    value = torch.empty(param.shape)
    return value.copy_(param.detach()) if codec is None else codec.read(param.detach(), 0, value)


def compare(make: Make, shape: tuple[int, ...], dtype: torch.dtype, words: str = "Triton") -> None:
    """Compare one step with that of the transforms, both from the same weights and state, after two earlier steps."""
    theirs, reference = train(make, shape, dtype, "eager", steps=2)
    ours = nn.Parameter(theirs.detach().clone())
    mine = make([("layer.weight", ours)])
    mine.use_backend("triton")
    for key, value in reference.state[theirs].items():
        if isinstance(value, Tensor):
            mine.runner.state_of(ours)[key].copy_(value)
        else:
            mine.runner.state_of(ours)[key] = value
    grad = gradient_of(shape, torch.Generator().manual_seed(2)).to(dtype)
    for param, optimizer in ((ours, mine), (theirs, reference)):
        param.grad = grad.clone()
        optimizer.step()
    assert mine.plan().steps == (words,)
    weight_keys = mine.runner.leaf(ours).plan.weight_keys.values()
    if weight_keys:
        written, expected = weight_of(ours, mine), weight_of(theirs, reference)
        places_kept = 2.0**-15 if dtype == torch.bfloat16 else 2.0**-20  # Split(8) and Kahan round the weight, too
        assert (written - expected).abs().max() <= places_kept * expected.abs().max()
    require_alike(ours.detach(), theirs.detach())
    for key, value in reference.state[theirs].items():
        if isinstance(value, Tensor) and key not in weight_keys:
            require_alike(mine.state[ours][key], value)


def gradient_of(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A gradient whose rows have different sizes."""
    scale = 10.0 ** torch.randint(-3, 2, shape[:1], generator=generator)
    return torch.randn(shape, generator=generator) * (scale.view(-1, *(1,) * (len(shape) - 1)) if shape else scale)


def of(chain: Any, **more: Any) -> Make:
    return lambda named: optstate.Optimizer(named, chain, lr=1e-2, **more)


def adam(first: stores.Store, second: stores.Store, **more: Any) -> Any:
    return optstate.chain(updates.scale_by_adam(first, second, **more), updates.add_decayed_weights(0.1))


ELEMENTWISE = {
    "descent": optstate.chain(updates.add_decayed_weights(0.1)),
    "clamped descent": optstate.chain(updates.clip_by_value(0.5), updates.add_decayed_weights(0.1)),
    "adam": adam(stores.Full(), stores.Full()),
    "adam with an L2 penalty": optstate.chain(updates.add_decayed_weights(0.1), updates.scale_by_adam()),
    "adam in bf16": adam(stores.Full("bfloat16"), stores.Full("bfloat16", stochastic=True)),
    "adam in blocks of 8 bits": adam(stores.Block8(), stores.Block8()),
    "adam in 8-bit floats": adam(stores.Float8(), stores.Float8()),
    "adam in blocks of 4 bits": adam(stores.Block4(), stores.Block4()),
    "lion": optstate.chain(updates.sign_momentum(stores.Full("bfloat16")), updates.add_decayed_weights(0.1)),
    "lion in blocks of 8 bits": optstate.chain(updates.sign_momentum(stores.Block8())),
    "average in blocks of 8 bits": optstate.chain(updates.momentum(stores.Block8())),
    "average that looks ahead": optstate.chain(updates.momentum(nesterov=True)),
    "heavy ball in blocks of 8 bits": optstate.chain(updates.momentum(stores.Block8(), heavy_ball=True, dampening=0.1)),
    "root of a sum": optstate.chain(updates.scale_by_rss(stores.Full())),
    "heavy ball that looks ahead": optstate.chain(updates.momentum(heavy_ball=True, nesterov=True)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name: str, dtype: torch.dtype) -> None:
    shape = (65, 64) if "bit" in name else (37, 41)  # codes are kept of 4096 elements and more
    compare(of(ELEMENTWISE[name]), shape, dtype)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1025,), (2, 3, 1000)])
def test_elementwise_of_any_shape(shape: tuple[int, ...]) -> None:
    compare(of(ELEMENTWISE["lion"]), shape, torch.float16)


@pytest.mark.parametrize("second", [stores.Grouped("row"), stores.Grouped("tensor"), stores.Factored()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_moment_that_needs_sums(second: stores.Store, dtype: torch.dtype) -> None:
    compare(of(adam(stores.Full(), second)), (37, 41), dtype, "Triton, sums before")


WAYS = [weights.Plain(), weights.StochasticRounding(3), weights.Kahan(), weights.Split(8), weights.Split(16)]


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        (how, dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for how in WAYS
        if dtype == torch.bfloat16 or not isinstance(how, weights.Split)
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", ["sgd", "adalomo", "adalomo of a vector"])
def test_every_way_of_writing_weights(recipe: str, how: Any, dtype: torch.dtype) -> None:
    shape = (1300,) if recipe.endswith("vector") else (40, 33)
    if recipe == "sgd":
        compare(of(ELEMENTWISE["descent"], weights=how), shape, dtype)
    else:
        compare(lambda named: AdaLomo(named, lr=1e-2, weight_decay=0.1, weights=how), shape, dtype)


def adafactor_with_momentum(store: stores.Store) -> Make:
    return of(
        optstate.chain(
            updates.scale_by_rms(stores.Factored()),
            updates.clip_by_rms(1.0),
            updates.scale_by_param_rms(1e-3),
            updates.momentum(store, 0.9),
        )
    )


MATRIX: dict[str, Make] = {
    "adalomo": lambda named: AdaLomo(named, lr=1e-2, weight_decay=0.1),
    "adalomo, clamped": lambda named: AdaLomo(named, lr=1e-2, clip_grad_value=0.5),
    "adafactor": lambda named: Adafactor(named, lr=1e-2, weight_decay=0.1),
    "divided by the root alone": of(optstate.chain(updates.scale_by_rms(stores.Factored()))),
    "clipped": of(optstate.chain(updates.scale_by_rms(stores.Factored()), updates.clip_by_rms(0.5))),
    "momentum": adafactor_with_momentum(stores.Full()),
    "momentum in bf16": adafactor_with_momentum(stores.Full("bfloat16", stochastic=True)),
}


@pytest.mark.parametrize(("name", "shape", "dtype"), pairwise(list(MATRIX), [(18, 300), (700,)], DTYPES), ids=str)
def test_factored(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(MATRIX[name], shape, dtype)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 300), (300, 1), (259, 5), (3, 515), (150, 65), (2, 70, 65), (2, 1, 1, 64, 64)], ids=str
)
def test_factored_of_any_shape(shape: tuple[int, ...]) -> None:
    """Tiles and strips end within the matrix, or are larger than it; several matrices have statistics each."""
    compare(MATRIX["adalomo"], shape, torch.float32)


def test_many_small_matrices_are_left_to_the_transforms() -> None:
    _, optimizer = train(MATRIX["adalomo"], (8, 4, 3, 3), torch.float32, "triton", steps=1)
    assert "no whole step" in optimizer.plan().steps[0]


LARGE = {"elementwise": (65, 64)}
"""4096 elements, of which codes and several matrices are kept, and one tile more where there are tiles."""


@pytest.mark.parametrize(
    ("name", "shape", "bad", "deferred"),
    [
        (name, LARGE.get(name, (2, 64, 64)) if shape == "large" else shape, bad, deferred == "known to the device")
        for name, shape, bad, deferred in pairwise(
            ["adalomo", "momentum", "elementwise", "adalomo, clamped"],
            [(33, 40), (77,), "large"],
            [math.nan, math.inf, 3e19],
            ["known at once", "known to the device"],
            allowed=lambda name, shape, bad, deferred: not (name == "adalomo, clamped" and bad == 3e19),
        )
    ],
    ids=str,
)
def test_a_gradient_that_is_not_finite_changes_no_byte(
    name: str, shape: tuple[int, ...], bad: float, deferred: bool
) -> None:
    """The square of 3e19 overflows. Where only the device knows, as on CUDA, the step is run and writes nothing.

    A clamp makes such a gradient small.
    """
    make = MATRIX.get(name, of(adam(stores.Block8(), stores.Float8())))
    param, optimizer = train(make, shape, torch.bfloat16, "eager", steps=1)
    optimizer.use_backend("triton")
    state = optimizer.state[param]
    tensors = [param, *(value for value in state.values() if isinstance(value, Tensor))]
    before = [tensor.detach().clone() for tensor in tensors]
    grad = torch.ones(shape, dtype=torch.bfloat16)
    grad.view(-1)[-1] = bad
    param.grad = grad
    if not deferred:
        with pytest.raises(NonFiniteGradientError):
            optimizer.step()
    else:
        leaf = optimizer.runner.leaf(param)
        guard = Guard("layer.weight", grad, deferred=True)
        ctx = context(leaf.plan, state, param, grad, optimizer.param_groups[0], 2, guard)
        with torch.no_grad():
            assert leaf.found_step(param.device).step.run(state, ctx)
        assert guard.finite is not None
        assert not guard.finite
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old.view(torch.uint8), new.detach().view(torch.uint8))


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """Collect the names of the kernels that are launched meanwhile."""
    names: list[str] = []
    launch = interpreter.GridExecutor.__call__

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = note
    try:
        yield names
    finally:
        interpreter.GridExecutor.__call__ = launch


@pytest.mark.parametrize("shape", [(33, 40), (77,)], ids=str)
@pytest.mark.parametrize("make", [MATRIX["adalomo"], MATRIX["divided by the root alone"], of(ELEMENTWISE["lion"])])
def test_launches_are_as_many_as_declared(make: Make, shape: tuple[int, ...]) -> None:
    """All launches are counted but that of the flag, which PyTorch makes."""
    param, optimizer = train(make, shape, torch.bfloat16, "triton", steps=1)
    step = optimizer.runner.leaf(param).found_step(param.device).step
    with counted_launches() as names:
        optimizer.step()
    assert 1 + len(names) == step.launches
    assert step.passes == len([name for name in names if name != "move_factored_kernel"])


def test_a_scale_that_only_the_device_knows() -> None:
    """The coefficient of a global norm clip multiplies in the kernels, and no host waits for it."""
    results = []
    for scale in (0.25, torch.tensor(0.25)):
        param, optimizer = train(MATRIX["adalomo"], (33, 40), torch.float32, "triton", steps=1)
        with torch.no_grad():
            optimizer.runner.update(optimizer.runner.leaf(param), param, scale)
        results.append(param.detach())
    assert torch.equal(results[0], results[1])


def test_fused_backward_makes_the_same_step() -> None:
    results = []
    for fuses in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(40, 30)
        optimizer = Lomo(model.named_parameters(), lr=1e-2)
        optimizer.use_backend("triton")
        if fuses:
            optstate.fuse_backward(optimizer)
        model(torch.ones(4, 40)).square().sum().backward()
        optimizer.step()
        results.append(model.weight.detach().clone())
    assert torch.equal(results[0], results[1])
