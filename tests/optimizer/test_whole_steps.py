"""Whole steps compiled from C against the transforms in eager PyTorch, which they stand for."""

from __future__ import annotations

import copy
import ctypes
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optstate
from adalomo import Adafactor, AdaLomo, Lomo
from optstate import updates
from optstate.kernels.native import loading
from optstate.memory import peak_extra_bytes
from optstate.optimizer.plan import ParamPlan
from optstate.recipes import CAME, SGD, SM3, AdamFactor, AdamMini, AdamW, AdamW4bit, AdamW8bit, Lion, Lion8bit, SGDM8bit
from optstate.stores import Block4, Float8, Full, NonFiniteGradientError
from optstate.testing import devices
from optstate.updates import add_decayed_weights, chain, clip_by_value, momentum, scale_by_adam, scale_by_rms
from optstate.weights import Kahan, Plain, Split, StochasticRounding, Weights
from tests.support.compiled import needs_compiled_steps
from tests.support.models import assert_same, state_of

pytestmark = needs_compiled_steps

BF16 = Full("bfloat16")


def of_chain(*transforms: Any) -> Callable[..., optstate.Optimizer]:
    """Return what makes an optimizer of a chain."""
    return partial(
        lambda params, recipe, **options: optstate.Optimizer(params, recipe, **options),
        recipe=chain(*transforms),
        lr=0.01,
    )


CASES: dict[str, Callable[..., optstate.Optimizer]] = {
    "adalomo": partial(AdaLomo, weight_decay=0.1),
    "adalomo clipped": partial(AdaLomo, clip_grad_value=0.3),
    "adafactor": Adafactor,
    "adafactor with momentum": partial(Adafactor, beta1=0.9, weight_decay=0.01),
    "lomo": partial(Lomo, weight_decay=0.1, clip_grad_value=0.3),
    "adamw": partial(AdamW, weight_decay=0.1),
    "adamw8bit": AdamW8bit,
    "adamw4bit": AdamW4bit,
    "adamfactor": AdamFactor,
    "adam-mini": AdamMini,
    "lion": partial(Lion, weight_decay=0.1),
    "lion8bit": Lion8bit,
    "sgd": partial(SGD, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "sgd nesterov": partial(SGD, momentum=0.9, nesterov=True),
    "sgdm8bit": SGDM8bit,
    "came": partial(CAME, weight_decay=0.1),
    "sm3": SM3,
    "adam with a penalty": of_chain(clip_by_value(0.5), add_decayed_weights(0.1), scale_by_adam(Float8(), Block4())),
    "adam in bf16": of_chain(scale_by_adam(BF16, BF16), add_decayed_weights(0.1)),
    "average": of_chain(add_decayed_weights(0.1), momentum(BF16, nesterov=True, decoupled=True)),
    "rmsprop": of_chain(scale_by_rms(Full()), updates.clip_by_rms(0.5), updates.scale_by_param_rms()),
}
"""Every rule, store, place of a decay and clip that the compiled steps know."""

WRITTEN: list[tuple[torch.dtype, Weights]] = [
    (torch.float32, Plain()),
    *((torch.bfloat16, way) for way in (Plain(), StochasticRounding(3), Kahan(), Split(8), Split(16))),
    *((torch.float16, way) for way in (Plain(), StochasticRounding(3), Kahan())),
]

TRANSFORMS = {"adamfactor": ("p5", "p6"), "sm3": ("p5", "p6"), "came": ("p7", "p8", "p9")}
"""Parameters of `SHAPES` of which no whole step is written."""

PAIRED = [
    (name, *WRITTEN[place])
    for i, name in enumerate(CASES)
    for place in (0, 1 + 3 * i % 8, 1 + (3 * i + 1) % 8, 1 + (3 * i + 2) % 8)
]
"""Every case in fp32 and in three other ways, so that every way meets seven cases."""

SHAPES = [
    (70, 66),
    (33, 129),
    (5, 3),
    (1, 7),
    (7, 1),
    (3, 20, 30),
    (8, 3, 3, 3),
    (4100,),
    (9,),
    (),
    (0, 4),
    (3, 2500),
    (2500, 3),
]
"""Matrices of even and odd rows, one row, one column, several matrices, a convolution, vectors, one number, nothing,
rows of several tiles, and several tiles of short rows."""


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def build(
    make: Callable[..., optstate.Optimizer], shapes: Any, dtype: torch.dtype, way: Weights | str, backend: str
) -> tuple[list[nn.Parameter], optstate.Optimizer]:
    params = [nn.Parameter(numbers(shape, i, dtype) * 0.5) for i, shape in enumerate(shapes)]
    optimizer = make([(f"p{i}", param) for i, param in enumerate(params)], weights=way)
    optimizer.use_backend(backend)
    return params, optimizer


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """Gradients of another size in every step, rows of other sizes within one."""
    for i, param in enumerate(params):
        grad = numbers(param.shape, 100 * step + i, torch.float32) * 10.0 ** (step % 3 - 2)
        if param.ndim > 1:
            grad *= torch.logspace(-2, 0, param.shape[-2])[:, None]
        param.grad = grad.to(param.dtype)


def one_step(params: list[nn.Parameter], optimizer: optstate.Optimizer, step: int = 1) -> None:
    give_gradients(params, step)
    optimizer.step()


def places(tensor: Tensor) -> Tensor:
    """The place of every number or code among those of its dtype: neighbours are one apart."""
    if tensor.dtype == torch.uint8:
        return tensor.int()
    size = tensor.element_size()
    pattern = tensor.view(torch.int16 if size == 2 else torch.int8).int()
    return torch.where(pattern < 0, -(pattern & ((1 << (8 * size - 1)) - 1)), pattern)


class Differences:
    """How far the numbers of many tensors are apart, which share one allowance."""

    def __init__(self) -> None:
        self.counted = self.different = 0

    def look(self, name: str, left: Tensor, right: Tensor, before: Tensor, of_nibbles: bool = False) -> None:
        """Compare tensors; those that were rounded must be the same or neighbours, and the same in most places."""
        assert (left.dtype, left.shape) == (right.dtype, right.shape), name
        if not left.numel():
            return
        if left.dtype == torch.float32:
            apart, moved = (left - right).double().norm(), (right - before).double().norm()
            rounding = 2.0**-24 * right.double().norm()  # one of fp32 in each of the two
            assert apart <= 5e-6 * moved + rounding, (name, float(apart / moved))
            return
        halves = [(each >> 4, each & 15) if of_nibbles else (each,) for each in (left, right)]
        for mine, theirs in zip(*halves, strict=True):
            apart = (places(mine) - places(theirs)).abs()
            if left.is_floating_point() and left.element_size() == 2:  # what cancels has the rounding of what it was
                cancels = (left.double() - right.double()).abs() <= 2.0**-22 * before.double().abs()
                apart[cancels] = apart[cancels].clamp(max=1)
            assert int(apart.max()) <= 1, (name, int(apart.max()))
            self.counted += apart.numel()
            self.different += int(apart.sum())


@pytest.mark.parametrize(("name", "dtype", "way"), PAIRED, ids=str)
def test_a_compiled_step_is_that_of_the_transforms(name: str, dtype: torch.dtype, way: Weights) -> None:
    """From equal weights and state, in each of three steps. fp32: 5e-6 of what moved, by the order of sums. What is
    rounded to 16 bits or a code: the same in 99 of 100 places, and else the neighbour, as an fp32 number that lies
    half-way between two may be rounded to either."""
    ours, compiled = build(CASES[name], SHAPES, dtype, way, "native")
    theirs, eager = build(CASES[name], SHAPES, dtype, way, "eager")
    steps = dict(zip(plans(compiled), compiled.plan().steps, strict=True))
    is_written = ("compiled", "PyTorch's fused AdamW")
    others = TRANSFORMS.get(name, ())
    assert all(words.startswith(is_written) for param, words in steps.items() if param not in others)
    found = Differences()
    for step in (1, 2, 3):
        before = [param.detach().clone() for param in theirs]
        earlier = [copy.deepcopy(eager.state.get(param, {})) for param in theirs]
        one_step(theirs, eager, step)
        one_step(ours, compiled, step)
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            kept = compiled.state[mine], eager.state[other]
            if not isinstance(way, Kahan | Split) or dtype == torch.float32:
                found.look(f"p{i}", mine.detach(), other.detach(), before[i])
            else:
                compare_exact_weights(f"p{i}", kept, mine.detach(), other.detach(), before[i], way)
            assert kept[0].keys() == kept[1].keys()
            for key, value in kept[0].items():
                if not isinstance(value, Tensor):
                    assert value == kept[1][key]
                elif not key.startswith("weight."):
                    slots = plans(eager)[f"p{i}"].slots
                    packs = key.endswith("codes") and isinstance(slots[key.partition(".")[0]].store, Block4)
                    past = earlier[i].get(key, torch.zeros_like(value))
                    found.look(f"p{i} {key}", value, kept[1][key], past, packs)
        with torch.no_grad():
            for mine, other in zip(ours, theirs, strict=True):
                mine.copy_(other)
                for key, value in eager.state[other].items():
                    if isinstance(value, Tensor):
                        compiled.state[mine][key].copy_(value)
    assert found.different <= 0.01 * found.counted


def plans(optimizer: optstate.Optimizer) -> dict[str, ParamPlan]:
    """The plan of each parameter, by name."""
    return {plan.spec.name: plan for plan in optimizer.plan()}


def compare_exact_weights(
    name: str, kept: tuple[Any, Any], mine: Tensor, theirs: Tensor, before: Tensor, way: Weights
) -> None:
    """Compare weights with what is kept beside them: as fp32 numbers, up to the last place that is kept."""
    if not mine.numel():
        return
    values = []
    for state, param in zip(kept, (mine, theirs), strict=True):
        if isinstance(way, Kahan):
            values.append(param.double() + state["weight.compensation"].double())
        else:
            word = param.view(torch.int16).int() * (1 << way.bits) + state["weight.correction"].int()
            values.append((word << (16 - way.bits)).view(torch.float32).double())
    place = {16: 2.0**-22, 8: 2.0**-15}[way.bits] if isinstance(way, Split) else 2.0**-15
    if mine.dtype == torch.float16:
        place = 2.0**-21
    apart = (values[0] - values[1]).abs()
    moved = (values[1] - before.double()).abs().max()
    assert bool((apart <= place * values[1].abs() + 2.0**-24 + 2e-5 * moved).all()), (name, float(apart.max()))


# --- the same bits ----------------------------------------------------------------------------------------------------

SAME = [
    "came",
    "sm3",
    "adalomo",
    "adafactor with momentum",
    "adamw8bit",
    "adamw4bit",
    "adam with a penalty",
    "lion",
    "rmsprop",
    "adamfactor",
]


def trained(name: str, dtype: torch.dtype, shapes: Any = SHAPES) -> list[Any]:
    """Weights and state after two compiled steps."""
    params, optimizer = build(CASES[name], shapes, dtype, "auto", "native")
    one_step(params, optimizer, 1)
    one_step(params, optimizer, 2)
    return [[param.detach() for param in params], state_of(optimizer)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SAME)
def test_every_kind_of_processor_gives_the_same_bits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ctypes.CDLL(str(loading.find_library()))
    opened.best_kind.restype = ctypes.c_char_p
    best = opened.best_kind().decode()
    kinds = ["", "_v3", "_v4"][: 1 + ["", "_v3", "_v4"].index(best)]
    found = []
    for kind in kinds:
        functions = loading.functions_for(opened, kind)
        monkeypatch.setattr(loading, "opened", lambda functions=functions: (functions, ""))
        found.append(trained(name, dtype))
    for each in found[1:]:
        assert_same(each, found[0])


@pytest.mark.parametrize("name", SAME)
def test_two_threads_give_the_bits_of_one(name: str) -> None:
    shapes = [(700, 400), (300_000,), (5, 240, 256)]
    alone = trained(name, torch.bfloat16, shapes)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = trained(name, torch.bfloat16, shapes)
    finally:
        torch.set_num_threads(before)
    assert_same(together, alone)


@pytest.mark.parametrize("name", ["adalomo", "adamw8bit", "lion"])
def test_a_fused_backward_makes_the_same_step(name: str) -> None:
    results = []
    for fused in (False, True):
        params, optimizer = build(CASES[name], [(70, 66), (9,)], torch.bfloat16, "auto", "native")
        if fused:
            optstate.fuse_backward(optimizer)
        for step in (1, 2):
            loss = torch.zeros(())
            for i, param in enumerate(params):
                loss = loss + (param * numbers(param.shape, 10 * step + i, torch.bfloat16)).float().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([[param.detach() for param in params], state_of(optimizer)])
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lion", "sgd", "adam in bf16", "adamw8bit", "adamw4bit", "lomo"])
def test_rows_on_several_devices_give_the_bits_of_the_whole(name: str, dtype: torch.dtype) -> None:
    cut = devices.CutParameter(CASES[name], (48, 256), (3, 1), dtype)
    assert all(part.whole_step is not None for part in cut.devices)
    cut.train(3)
    for part, param in zip(cut.devices, cut.params, strict=True):
        assert_same(param, cut.whole.detach()[part.region.index])
        for key, layout in part.plan.layouts.items():
            assert_same(part.state[key], cut.optimizer.state[cut.whole][key][part.index(layout)])


# --- gradients that are refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """Nor one whose square overflows, where squares are kept, as in eager PyTorch."""
    for shape in ((70, 66), (7,)):
        params, optimizer = build(CASES[name], [shape], dtype, "auto", "native")
        one_step(params, optimizer, 1)
        before = copy.deepcopy([params[0].detach(), state_of(optimizer)])
        bad = [float("nan"), float("inf"), -float("inf")]
        plan = plans(optimizer)["p0"]
        if dtype != torch.float16 and plan.largest_square_root < 1e30 and "clip" not in name and "penalty" not in name:
            bad.append(1e20)
        for number in bad:
            give_gradients(params, 2)
            assert params[0].grad is not None
            params[0].grad.view(-1)[-1] = number
            with pytest.raises(NonFiniteGradientError, match="the gradient of 'p0' is not finite or its squares"):
                optimizer.step()
            optimizer.accept_partial_step()
            assert_same([params[0].detach(), state_of(optimizer)], before)


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["adalomo clipped", "lomo", "adamw8bit", "adam-mini"])
def test_the_coefficient_of_a_norm_clip_multiplies_after_the_clamp(name: str, scale: Any) -> None:
    results = []
    for backend in ("native", "eager"):
        params, optimizer = build(CASES[name], [(70, 66)], torch.float32, "auto", backend)
        give_gradients(params, 1)
        optimizer.step_parameter(params[0], scale)
        results.append(params[0].detach())
        assert params[0].grad is not None
        params[0].grad[0, 0] = torch.nan
        with pytest.raises(NonFiniteGradientError):
            optimizer.step_parameter(params[0], scale)
        assert torch.equal(params[0], results[-1])
    before = numbers((70, 66), 0, torch.float32) * 0.5
    Differences().look("p0", results[0], results[1], before)


# --- what C code must not read ----------------------------------------------------------------------------------------


class Own(torch.Tensor):
    """A subclass without a behaviour of its own."""


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda grad: grad.t().contiguous().t(),
    "expanded": lambda grad: grad[:1].expand(grad.shape),
    "read with the other sign": lambda grad: torch._neg_view(-grad),
    "of a subclass": lambda grad: grad.clone().as_subclass(Own),
    "in the middle of a tensor": lambda grad: torch.cat([grad.view(-1)[:3], grad.view(-1)])[3:].view(grad.shape),
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("name", ["adalomo", "adamw8bit", "lion", "adam-mini"])
def test_gradients_that_lie_otherwise_make_the_same_step(name: str, kind: str) -> None:
    """Those without an address of their own go to the transforms: 5e-6 of what moved, as above."""
    grad = numbers((70, 66), 7, torch.float32)
    results = []
    for backend, given in (("native", GRADIENTS[kind](grad)), ("eager", GRADIENTS[kind](grad).clone())):
        params, optimizer = build(CASES[name], [(70, 66)], torch.float32, "auto", backend)
        params[0].grad = given
        optimizer.step()
        results.append(params[0].detach())
    Differences().look("p0", *results, numbers((70, 66), 0, torch.float32) * 0.5)


@pytest.mark.parametrize("name", ["adalomo", "adamw8bit", "lion"])
def test_parameters_that_lie_otherwise_make_the_same_step(name: str) -> None:
    results = []
    for place in ("alone", "in the middle", "transposed"):
        value = numbers((70, 66), 0, torch.bfloat16)
        if place == "in the middle":
            value = torch.cat([value.view(-1)[:3], value.view(-1)])[3:].view(70, 66)
        elif place == "transposed":
            value = value.t().contiguous().t()
        param = nn.Parameter(value)
        optimizer = CASES[name]([("p0", param)], weights="auto")
        one_step([param], optimizer)
        results.append(param.detach())
    assert torch.equal(results[0], results[1])
    found = Differences()
    found.look("p0", results[2].contiguous(), results[0], numbers((70, 66), 0, torch.bfloat16))
    assert found.different <= 0.01 * found.counted


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "weight.compensation"])
@pytest.mark.parametrize("change", [lambda t: t[:-1].clone(), lambda t: t.double(), lambda t: torch.zeros(0)])
def test_state_that_somebody_exchanged_is_not_read_beyond_its_end(key: str, change: Any) -> None:
    """The step is that of the transforms, which refuse what does not fit: C code would read and write other memory."""
    outcomes = []
    for backend in ("native", "eager"):
        params, optimizer = build(partial(AdamW, weight_decay=0.1), [(9,)], torch.bfloat16, Kahan(), backend)
        one_step(params, optimizer, 1)
        optimizer.state[params[0]][key] = change(optimizer.state[params[0]][key])
        try:
            one_step(params, optimizer, 2)
            outcomes.append("stepped")
        except Exception as error:
            outcomes.append(type(error).__name__)
    assert outcomes[0] == outcomes[1]


def test_state_of_a_matrix_that_somebody_exchanged_is_not_read_beyond_its_end() -> None:
    params, optimizer = build(CASES["adalomo"], [(70, 66)], torch.float32, "auto", "native")
    one_step(params, optimizer, 1)
    optimizer.state[params[0]]["exp_avg_sq.row"] = torch.ones(3)
    with pytest.raises(RuntimeError, match="size of tensor"):
        one_step(params, optimizer, 2)


def test_a_parameter_of_another_size_or_dtype_is_refused() -> None:
    for change in (lambda t: t[:5].clone(), torch.Tensor.double):
        params, optimizer = build(CASES["lion"], [(70, 66)], torch.float32, "auto", "native")
        one_step(params, optimizer, 1)
        params[0].data = change(params[0].data)
        give_gradients(params, 2)
        with pytest.raises(RuntimeError, match="when the optimizer was built"):
            optimizer.step()


@pytest.mark.parametrize("name", ["adalomo", "lion"])
def test_a_parameter_whose_memory_moved_is_stepped_where_it_is(name: str) -> None:
    results = []
    for moves in (False, True):
        params, optimizer = build(CASES[name], [(70, 66)], torch.float32, "auto", "native")
        one_step(params, optimizer, 1)
        if moves:
            old = params[0].data
            params[0].data = old.clone()
            old.fill_(torch.nan)
        one_step(params, optimizer, 2)
        results.append(params[0].detach())
    assert torch.equal(*results)


class doubled_adam(scale_by_adam):
    """A rule of somebody else's, made of one of ours."""

    def __call__(self, update: Any, state: Any, ctx: Any) -> Any:
        result = yield from super().__call__(update, state, ctx)
        return result.scaled(2.0)


def test_a_subclass_of_a_transform_is_run_and_not_its_base() -> None:
    results = []
    for rule, lr in ((doubled_adam(), 0.01), (scale_by_adam(), 0.02)):
        param = nn.Parameter(torch.ones(5, 6))
        optimizer = optstate.Optimizer([("p", param)], chain(rule), lr=lr)
        param.grad = torch.ones(5, 6)
        optimizer.step()
        results.append(param.detach())
        steps = optimizer.plan().steps
        assert steps == (
            ("native primitives (a part of this chain is not the library's own)",) if lr == 0.01 else steps
        )
    assert torch.allclose(*results, rtol=1e-6)


@pytest.mark.parametrize("name", ["adalomo", "lion", "adafactor with momentum", "adamw8bit"])
def test_steps_do_not_depend_on_torchs_default_dtype_and_device(name: str) -> None:
    expected = trained(name, torch.bfloat16, SHAPES[:3])
    params, optimizer = build(CASES[name], SHAPES[:3], torch.bfloat16, "auto", "native")
    for step in (1, 2):
        give_gradients(params, step)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
    assert_same([[param.detach() for param in params], state_of(optimizer)], expected)


def test_a_bad_gradient_is_refused_whatever_the_default_device_is() -> None:
    params, optimizer = build(CASES["adalomo"], [(70, 66)], torch.float32, "auto", "native")
    params[0].grad = torch.full((70, 66), torch.nan)
    with torch.device("meta"), pytest.raises(NonFiniteGradientError):
        optimizer.step()


# --- as an optimizer of torch's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adalomo", "lion", "adamw8bit", "sgd"])
def test_a_learning_rate_may_be_a_tensor_and_follow_a_schedule(name: str) -> None:
    results = []
    for as_tensor in (False, True):
        params, optimizer = build(CASES[name], [(70, 66)], torch.float32, "auto", "native")
        if as_tensor:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for step in (1, 2, 3):
            one_step(params, optimizer, step)
            scheduler.step()
        results.append(params[0].detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("name", CASES)
def test_autograd_is_told_of_every_write(name: str) -> None:
    params, optimizer = build(CASES[name], [(70, 66)], torch.bfloat16, Kahan(), "native")
    one_step(params, optimizer, 1)
    written = [params[0], *(value for value in optimizer.state[params[0]].values() if isinstance(value, Tensor))]
    before = [tensor._version for tensor in written]
    one_step(params, optimizer, 2)
    assert all(tensor._version > version for tensor, version in zip(written, before, strict=True))


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_copies_go_on_alike_with_the_same_backend(backend: str) -> None:
    params, optimizer = build(CASES["adamw8bit"], [(70, 66), (9,)], torch.bfloat16, "auto", backend)
    one_step(params, optimizer, 1)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    one_step(params, optimizer, 2)
    for each in copies:
        others = [param for group in each.param_groups for param in group["params"]]
        assert each.plan().steps == optimizer.plan().steps
        one_step(others, each, 2)
        assert_same([p.detach() for p in others], [p.detach() for p in params])
        assert_same(state_of(each), state_of(optimizer))


def test_a_step_in_inference_mode_is_the_same() -> None:
    results = []
    for mode in (torch.no_grad, torch.inference_mode):
        params, optimizer = build(CASES["lion"], [(70, 66)], torch.bfloat16, "auto", "native")
        give_gradients(params, 1)
        with mode():
            optimizer.step()
        results.append(params[0].detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("adalomo", torch.bfloat16), ("adamw8bit", torch.float32), ("lion", torch.bfloat16), ("rmsprop", torch.float32)],
    ids=str,
)
def test_scratch_of_a_compiled_step_is_at_most_4_mb(name: str, dtype: torch.dtype) -> None:
    params, optimizer = build(CASES[name], [(2048, 3072)], dtype, "auto", "native")
    one_step(params, optimizer, 1)
    assert peak_extra_bytes(optimizer.step) <= 4 * 10**6
