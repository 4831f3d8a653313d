"""Split and Kahan: a bf16 or fp16 parameter with more bits than it shows.

Expected values are computed from the stored bits as the documentation defines them, with numpy integers and float64.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optstate
from adalomo import Adafactor, AdaLomo, Lomo
from optstate import recipes, stores, updates
from optstate.kernels import WeightCodec
from optstate.memory import peak_extra_bytes
from optstate.optimizer.whole_steps import Found
from optstate.recipes import (
    CAME,
    SGD,
    SM3,
    SMMF,
    SOAP,
    SUMO,
    AdamFactor,
    AdamMini,
    AdamSMN,
    AdamW,
    AdamW4bit,
    AdamW8bit,
    AdEMAMix,
    Lion,
    Lion8bit,
    MLorc,
    MLorcLion,
    Muon,
    Muon8bit,
    Scale,
    ScheduleFreeAdamW,
    SGDM8bit,
)
from optstate.spec import ParamSpec
from optstate.weights import Kahan, Plain, Split, StochasticRounding, Weights, as_weights
from tests.support.models import assert_same

pytestmark = pytest.mark.slow

chunking = importlib.import_module("optstate.kernels.chunking")  # `kernels.chunks` itself is the function

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MEGABYTE = 10**6

WAYS = [Plain(), StochasticRounding(3), Kahan(), Split(8), Split(16)]
KEEPING = [Kahan(), Split(8), Split(16)]
EXTRA_BYTES = {Kahan(): 2, Split(8): 1, Split(16): 2}

each_way = pytest.mark.parametrize("way", WAYS, ids=str)
each_keeping = pytest.mark.parametrize("way", KEEPING, ids=str)


@contextmanager
def chunk_of(limit: int) -> Iterator[None]:
    with mock.patch.object(chunking, "CPU_CHUNK", limit):
        yield


def gaussians(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(way: Weights, shape: tuple[int, ...], dtype: torch.dtype = BF16) -> tuple[WeightCodec, Tensor]:
    """A codec over fields of zeros, and the one field."""
    spec = ParamSpec(name="p", shape=shape, dtype=dtype)
    fields = {k: torch.zeros(f.shape, dtype=f.dtype) for k, f in way.fields(spec).items()}
    codec = way.codec(spec, 1, fields)
    assert codec is not None
    return codec, next(iter(fields.values()))


def bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The bit patterns of a tensor of 16 or 32 bits per element, as integers."""
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()


def master_bits(param: Tensor, correction: Tensor) -> np.ndarray[Any, Any]:
    """Split's definition: `(param << 16) + (correction << bits not kept)`, as the int32 pattern of an fp32 number."""
    dropped = 8 if correction.dtype == torch.int8 else 0
    word = (bits(param).astype(np.int64) << 16) + (correction.view(param.shape).numpy().astype(np.int64) << dropped)
    return word.astype(np.uint32).view(np.int32)


def weight_of(param: Tensor, state: dict[str, Any]) -> Tensor:
    """The value of a parameter, exact in fp64, by the definition of how it is kept."""
    if "weight.correction" in state:
        exact = master_bits(param, state["weight.correction"]).view(np.float32).astype(np.float64)
        return torch.from_numpy(np.asarray(exact))
    value = param.detach().double()
    return value + state["weight.compensation"].double() if "weight.compensation" in state else value


def patterns() -> Tensor:
    """All kinds of fp32 numbers: each upper half with lower halves at the ends, at ties and beside them; and others."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    edges = np.array([0, 1, 0x7F, 0x80, 0x81, 0x7FFF, 0x8000, 0x8001, 0xFF7F, 0xFF80, 0xFFFF], dtype=np.uint32)
    others = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    return torch.from_numpy(np.concatenate([(upper[:, None] | edges).ravel(), others]).view(np.float32))


def nearest_bf16(value: Tensor) -> Tensor:
    """fp32 rounded to bf16, to nearest with ties away from zero, by distances in fp64; 2**128 stands for infinity."""
    numbers = torch.arange(1 << 15, dtype=torch.int16).view(BF16).double()
    grid = torch.cat([numbers[numbers.isfinite()], torch.tensor([2.0**128], dtype=FP64)]).numpy()
    x = value.double().abs().numpy()
    above = np.searchsorted(grid, x).clip(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    nearest = np.where(high - x <= x - low, high, low)
    nearest[nearest == 2.0**128] = np.inf
    return torch.from_numpy(np.copysign(nearest, value.numpy())).to(BF16)


# --- Split: what is kept --------------------------------------------------------------------------------------------


def test_split_16_keeps_every_fp32_number_and_the_parameter_is_it_rounded_to_nearest_ties_away() -> None:
    value = patterns()
    codec, correction = kept(Split(16), tuple(value.shape))
    param = torch.zeros(value.shape, dtype=BF16)
    codec.write(param, value.clone(), 0)
    back = codec.read(param, 0, torch.empty_like(value))
    real = ~value.isnan()
    assert real.sum() > 900_000
    assert np.array_equal(bits(back)[real], bits(value)[real])
    assert np.array_equal(master_bits(param, correction)[real], bits(value)[real])
    assert back[~real].isnan().all()
    assert param[~real].isnan().all()
    assert np.array_equal(bits(param)[value.isfinite()], bits(nearest_bf16(value[value.isfinite()])))
    assert torch.equal(param[value.isinf()].float(), value[value.isinf()])


def test_split_8_rounds_to_16_significant_bits_and_no_worse() -> None:
    """Bound: half of the kept bits' last place, 2**-16 of the weight; 2**-142, half of 2**8 units, if subnormal."""
    value = patterns()
    value = value[value.abs() < 3.4e38]  # nearer to the end of fp32 a value rounds to infinity
    codec, correction = kept(Split(8), tuple(value.shape))
    param = torch.zeros(value.shape, dtype=BF16)
    codec.write(param, value.clone(), 0)
    back = codec.read(param, 0, torch.empty_like(value))
    assert np.array_equal(bits(back), master_bits(param, correction))
    error, size = (back.double() - value.double()).abs(), value.double().abs()
    normal = size >= 2.0**-126
    assert (error[normal] <= 2.0**-16 * size[normal]).all()
    assert (error[normal] / size[normal]).max() > 0.99 * 2.0**-16
    assert (error[~normal] <= 2.0**-142).all()
    # The parameter is what the kept number rounds to, and a kept number is kept as it is.
    assert np.array_equal(bits(param), bits(nearest_bf16(back)))
    again, kept_again = param.clone(), correction.clone()
    codec.write(again, back.clone(), 0)
    assert np.array_equal(bits(again), bits(param))
    assert torch.equal(correction, kept_again)


def test_split_8_overflows_to_infinity_as_rounding_does() -> None:
    value = torch.tensor([0x7F7FFF7F, 0x7F7FFF80, 0x7F7FFFFF], dtype=torch.int32).view(FP32)
    value = torch.cat([value, -value])
    codec, _ = kept(Split(8), (6,))
    param = torch.zeros(6, dtype=BF16)
    codec.write(param, value.clone(), 0)
    back = codec.read(param, 0, torch.empty(6))
    largest = torch.tensor(0x7F7FFF00, dtype=torch.int32).view(FP32).item()
    assert back.tolist() == [largest, math.inf, math.inf, -largest, -math.inf, -math.inf]


@pytest.mark.parametrize(("step", "moved"), [(0.99 * 2**-16, 0.0), (1.01 * 2**-16, 2.0**-15)])
def test_split_8_loses_a_step_below_2_to_the_minus_16_and_takes_one_above(step: float, moved: float) -> None:
    param = nn.Parameter(torch.ones(100, dtype=BF16))
    optimizer = optstate.Optimizer([("p", param)], optstate.chain(), lr=step, weights=Split(8))
    for count in (1, 2, 3):
        param.grad = -torch.ones_like(param)
        optimizer.step()
        assert (weight_of(param, optimizer.state[param]) == 1 + count * moved).all()


@pytest.mark.parametrize(("way", "bound"), [(Split(8), 2.0**-16), (Kahan(), 2.0**-17)], ids=str)
def test_drift_stays_within_the_sum_of_the_roundings(way: Weights, bound: float) -> None:
    """300 steps between 1e-4 and 1e-2 of the weight: each adds one rounding, and 2**-24 of fp32's own arithmetic."""
    count, start = 300, gaussians(0, 5000).to(BF16)

    def end(weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        param = nn.Parameter(start.clone())
        optimizer = optstate.Optimizer([("p", param)], optstate.chain(), lr=1.0, weights=weights)
        exact, largest = start.double(), start.double().abs()
        for step in range(count):
            param.grad = (gaussians(1 + step, 5000) * torch.logspace(-4, -2, 5000) * start.float()).to(BF16)
            exact = exact - param.grad.double()
            largest = torch.maximum(largest, exact.abs())
            optimizer.step()
        return weight_of(param, optimizer.state[param]), exact, largest

    value, exact, largest = end(way)
    allowed = count * (bound + 2.0**-23) * largest
    assert ((value - exact).abs() <= allowed).all()
    rounded, exact, _ = end(Plain())
    assert ((rounded - exact).abs() > allowed).any()  # the bound is one that plain bf16 does not keep


# --- Split(16) trains as fp32 does ----------------------------------------------------------------------------------

TRAINED: dict[str, Any] = {
    "adafactor": Adafactor,
    "adafactor relative": lambda p, lr, weights: Adafactor(p, weights=weights),
    "adafactor momentum, decay": lambda p, **kw: Adafactor(p, beta1=0.9, weight_decay=0.1, **kw),
    "adafactor as torch": lambda p, **kw: Adafactor(p, torch_compatible=True, weight_decay=0.1, **kw),
    "adalomo": AdaLomo,
    "adalomo decay": lambda p, **kw: AdaLomo(p, weight_decay=0.1, **kw),
    "adalomo clip": lambda p, **kw: AdaLomo(p, clip_threshold=0.5, clip_grad_value=0.5, **kw),
    "adamfactor": AdamFactor,
    "adammini": AdamMini,
    "adamw": AdamW,
    "adamw l2": lambda p, **kw: optstate.Optimizer(
        p, updates.chain(updates.add_decayed_weights(0.1), updates.scale_by_adam()), **kw
    ),
    "adamw4bit": AdamW4bit,
    "adamw4bit rank1": lambda p, **kw: AdamW4bit(p, rank1=True, **kw),
    "adamw8bit": AdamW8bit,
    "came": lambda p, **kw: CAME(p, weight_decay=0.1, **kw),
    "clipped l2": lambda p, **kw: optstate.Optimizer(
        p, updates.chain(updates.add_decayed_weights(0.1), updates.clip_by_rms(0.5)), **kw
    ),
    "adamsmn": AdamSMN,
    "ademamix": AdEMAMix,
    "mlorc": MLorc,
    "mlorclion": MLorcLion,
    "muon": Muon,
    "muon8bit": Muon8bit,
    "scale": Scale,
    "schedulefreeadamw": ScheduleFreeAdamW,
    "smmf": SMMF,
    "soap": SOAP,
    "sumo": SUMO,
    "lion": lambda p, **kw: Lion(p, weight_decay=0.1, **kw),
    "lion8bit": Lion8bit,
    "lomo": Lomo,
    "lomo decay, clip": lambda p, **kw: Lomo(p, weight_decay=0.1, clip_grad_value=0.5, **kw),
    "sgd": SGD,
    "sgd momentum, l2": lambda p, **kw: SGD(p, momentum=0.9, nesterov=True, weight_decay=0.1, **kw),
    "sgdm8bit": SGDM8bit,
    "sm3": SM3,
    "sm3 momentum": lambda p, **kw: SM3(p, momentum=0.9, **kw),
}

SHAPES = [(71, 66), (7, 9), (33,), (3, 4, 5), ()]
"""The first is large enough for codes of 8 and 4 bits."""


PROJECT = {
    *["galore", "galore2", "qgalore", "apollo", "apollomini", "fira", "ldadam", "grass", "adarankgrad", "adamem"]
}
"""Their products are summed in the order of memory, and GRASS leaves most rows alone: `test_low_rank` has them."""


def test_every_recipe_of_the_registry_is_trained() -> None:
    assert {name for name in TRAINED if name in recipes.names()} == set(recipes.names()) - PROJECT


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    """Representable in bf16, rows of different sizes."""
    noise = gaussians(100 + step, *shape)
    rows = torch.logspace(-2, 0, shape[0]).view(-1, *[1] * (len(shape) - 1)) if shape else torch.ones(())
    return (noise * rows).to(BF16)


def trained(
    recipe: Any,
    dtype: torch.dtype,
    way: Weights,
    *,
    fused: bool = False,
    transposed: bool = False,
    chunk: int = 1 << 19,
    steps: int = 5,
) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    """Parameters and their state after steps with gradients that do not depend on the weights."""
    params = [nn.Parameter(gaussians(i, *shape).to(BF16).to(dtype)) for i, shape in enumerate(SHAPES)]
    if transposed:
        params = [nn.Parameter(p.detach().mT.contiguous().mT) if p.ndim >= 2 else p for p in params]
        assert not params[0].is_contiguous()
    optimizer = recipe([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-2, weights=way)
    optimizer.use_backend("eager")  # compiled loops round an average once less, and do not read transposed tensors
    # Whole steps, such as PyTorch's fused AdamW, round in another order. The search for engines among all live objects
    # takes longer than the training.
    by_hand = mock.patch("optstate.optimizer.parameters.find_whole_step", return_value=Found(None))
    unsearched = mock.patch("optstate.integrations.engines.refuse_live_objects")
    with by_hand, unsearched, chunk_of(chunk):
        if fused:
            optstate.fuse_backward(optimizer)
        for step in range(steps):
            grads = [gradient(tuple(p.shape), step).to(dtype) for p in params]
            if fused:
                torch.stack([(p * g).float().sum() for p, g in zip(params, grads, strict=True)]).sum().backward()
            else:
                for p, g in zip(params, grads, strict=True):
                    p.grad = g
            optimizer.step()
    return [(p, optimizer.state[p]) for p in params]


MODES = {
    "step": {},
    "fused": {"fused": True},
    "step in slices": {"chunk": 1 << 10},
    "step, transposed": {"transposed": True},
    "fused in slices, transposed": {"fused": True, "chunk": 1 << 10, "transposed": True},
}


TRAINED_IN_MODES = [
    (name, mode)
    for i, name in enumerate(TRAINED)
    for j, mode in enumerate(MODES)
    if j == 0 or (i + j) % 2 or name.startswith("adamw8bit")
]
"""Every rule in one go, and in half of the other modes, every mode with half of the rules."""


@pytest.mark.parametrize(("name", "mode"), TRAINED_IN_MODES)
def test_split_16_trains_a_bf16_parameter_bit_for_bit_as_fp32(name: str, mode: str) -> None:
    """Except where the root mean square of a transposed fp32 parameter is summed in the order of its memory: that
    differs by 2**-23 of itself, and so may each of 5 steps' roundings of a weight."""
    low = trained(TRAINED[name], BF16, Split(16), **MODES[mode])
    full = trained(TRAINED[name], FP32, Plain(), **MODES[mode])
    assert low[0][1]["weight.correction"].count_nonzero() > 4000  # it was needed
    for (param, state), (exact, reference) in zip(low, full, strict=True):
        if "transposed" in mode and name.startswith(("adalomo", "adafactor")):
            want = exact.detach().double()
            torch.testing.assert_close(weight_of(param, state), want, rtol=5 * 2.0**-23, atol=1e-2 * 5 * 2.0**-23)
        else:
            assert np.array_equal(master_bits(param, state["weight.correction"]), bits(exact))
            assert_same({k: v for k, v in state.items() if k != "weight.correction"}, reference)


@each_keeping
def test_slices_and_strides_change_no_bit_of_how_a_weight_is_kept(way: Weights) -> None:
    """With rules that take no sums over the parameter, whose order would change their last bit."""
    for name in ("adamw8bit", "sgd momentum, l2"):
        whole = trained(TRAINED[name], BF16, way)
        for mode in ("step in slices", "fused in slices, transposed"):
            for (param, state), (other, other_state) in zip(
                whole, trained(TRAINED[name], BF16, way, **MODES[mode]), strict=True
            ):
                assert np.array_equal(bits(other), bits(param))
                assert_same(other_state, state)


# --- Kahan ----------------------------------------------------------------------------------------------------------


def spread(dtype: torch.dtype) -> Tensor:
    """fp32 numbers over the range of a format in which Kahan's bounds hold, all mantissas."""
    low, high = (-110, 126) if dtype == BF16 else (-30, 14)
    exponent = torch.linspace(low, high, 1 << 18, dtype=FP64)
    return (torch.exp2(exponent) * gaussians(0, 1 << 18).sign().double()).float()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_kahan_rounds_a_weight_by_no_more_than_it_says(dtype: torch.dtype) -> None:
    value = spread(dtype)
    codec, compensation = kept(Kahan(), tuple(value.shape), dtype)
    param = torch.zeros(value.shape, dtype=dtype)
    codec.write(param, value.clone(), 0)
    back = codec.read(param, 0, torch.empty_like(value))
    assert torch.equal(back.double(), param.double() + compensation.double())  # the sum is exact
    bound = 2.0**-17 * value.double().abs() if dtype == BF16 else (2.0**-23 * value.double().abs()).clamp(min=2.0**-25)
    share = (back.double() - value.double()).abs() / bound
    assert share.max() <= 1
    assert share.max() > 0.9


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_kahans_parameter_is_the_sum_rounded_to_nearest_and_writing_the_sum_changes_nothing(dtype: torch.dtype) -> None:
    """A compensation that rounds up to half a place makes a tie, which rounding to even may break the other way."""
    value = torch.cat([spread(dtype), gaussians(1, 1 << 18)])
    codec, compensation = kept(Kahan(), tuple(value.shape), dtype)
    param = torch.zeros(value.shape, dtype=dtype)
    codec.write(param, value.clone(), 0)
    total = param.double() + compensation.double()
    assert torch.equal(total.to(dtype), param)
    half = torch.nextafter(param.abs(), torch.tensor(math.inf, dtype=dtype)).double() - param.double().abs()
    assert (compensation.double().abs() == half / 2).sum() > 100  # there were ties
    before, lost = param.clone(), compensation.clone()
    codec.write(param, codec.read(param, 0, torch.empty_like(value)), 0)
    assert torch.equal(param, before)
    assert torch.equal(compensation, lost)


@pytest.mark.parametrize("relative", [1e-5, 1e-4])
def test_a_thousand_steps_far_below_bf16s_spacing_add_up(relative: float) -> None:
    """Exactly under Split(16), up to fp32's arithmetic; under Kahan up to its 2**-17 a step; Plain does not move."""
    start, count = gaussians(2, 2000).to(BF16), 1000
    exact = start.double() * (1 + count * relative)

    def end(way: Weights) -> Tensor:
        param = nn.Parameter(start.clone())
        optimizer = optstate.Optimizer([("p", param)], optstate.chain(), lr=relative, weights=way)
        param.grad = -start
        for _ in range(count):
            optimizer.step()
        return weight_of(param, optimizer.state[param])

    assert torch.equal(end(Plain()), start.double())
    size = exact.abs()
    assert ((end(Kahan()) - exact).abs() <= count * 2.0**-17 * size).all()
    assert ((end(Split(16)) - exact).abs() <= count * 2.0**-24 * size).all()


def test_kahan_carries_fp16_weights() -> None:
    """500 steps: 2**-23 of the weight or 2**-25 each, and 2**-24 of fp32's own arithmetic."""
    count, start = 500, (gaussians(3, 3000) * 0.1).to(FP16)
    results = {}
    for way in (Kahan(), Plain()):
        param = nn.Parameter(start.clone())
        optimizer = optstate.Optimizer([("p", param)], optstate.chain(), lr=1.0, weights=way)
        exact = start.double()
        for step in range(count):
            param.grad = (gaussians(10 + step, 3000) * 1e-5).to(FP16)
            exact = exact - param.grad.double()
            optimizer.step()
        results[way] = (weight_of(param, optimizer.state[param]) - exact).abs()
    allowed = count * (2.0**-23 * exact.abs().clamp(min=0.25) + 2.0**-24 * exact.abs())
    assert (results[Kahan()] <= allowed).all()
    assert (results[Plain()] > allowed).any()


# --- which parameters, and what is refused --------------------------------------------------------------------------


@each_keeping
def test_fp32_and_fp64_parameters_are_written_plainly_and_keep_nothing(way: Weights) -> None:
    for dtype in (FP32, FP64):
        param = nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = Lomo([("p", param)], lr=0.5, weights=way)
        assert optimizer.plan().params[0].weights == Plain()
        assert set(optimizer.state[param]) == {"step"}
        assert optimizer.plan().nbytes == 0
        param.grad = torch.full_like(param, 1.0)
        optimizer.step()
        assert (param == 0.5).all()


@pytest.mark.parametrize("bits_kept", [8, 16])
def test_split_refuses_fp16_when_the_optimizer_is_built(bits_kept: int) -> None:
    params = [("first", nn.Parameter(torch.ones(3, dtype=BF16))), ("half", nn.Parameter(torch.ones(3, dtype=FP16)))]
    with pytest.raises(ValueError, match=r"'half' is fp16.*train it in bf16.*weights.Kahan\(\)"):
        AdamW(params, weights=Split(bits_kept))
    optimizer = AdamW(params[:1], weights=Split(bits_kept))
    with pytest.raises(ValueError, match="'half' is fp16"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.plan()) == 1


@pytest.mark.parametrize("bad", [0, 4, 24, 32, 8.5, "8", None, True])
def test_split_takes_8_or_16_bits(bad: Any) -> None:
    with pytest.raises(ValueError, match="give 8 or 16 correction bits") as error:
        Split(bad)
    assert f"bits={bad!r}" in str(error.value)


def test_auto_is_still_stochastic_rounding() -> None:
    for dtype, used in ((BF16, StochasticRounding()), (FP16, StochasticRounding()), (FP32, Plain()), (FP64, Plain())):
        assert as_weights("auto", ParamSpec(name="p", shape=(3,), dtype=dtype)) == used
    for name in recipes.names():
        param = nn.Parameter(torch.zeros(3, dtype=BF16))
        optimizer = recipes.get(name)([("p", param)])
        assert optimizer.plan().params[0].weights == StochasticRounding()
        assert not [key for key in optimizer.state[param] if key.startswith("weight.")]


@each_keeping
def test_state_and_plan_show_what_is_kept(way: Weights) -> None:
    key, dtype = {
        Kahan(): ("weight.compensation", BF16),
        Split(8): ("weight.correction", torch.int8),
        Split(16): ("weight.correction", torch.int16),
    }[way]
    for shape in ((5, 7), (5,), (2, 3, 4), (), (0, 3)):
        param = nn.Parameter(torch.zeros(shape, dtype=BF16))
        optimizer = Lomo([("p", param)], weights=way)
        assert set(optimizer.state[param]) == {"step", key}
        kept_here = optimizer.state[param][key]
        assert kept_here.dtype == dtype
        assert kept_here.shape == param.shape
        assert not kept_here.any()
        plan = optimizer.plan()
        assert plan.nbytes == optimizer.state_nbytes() == EXTRA_BYTES[way] * param.numel()
        assert str(way) in next(line for line in str(plan).splitlines() if line.startswith("p "))
    beside = AdamW8bit([("p", nn.Parameter(torch.zeros(64, 64, dtype=BF16)))], weights=way).plan()
    plain = AdamW8bit([("p", nn.Parameter(torch.zeros(64, 64, dtype=BF16)))], weights=Plain()).plan()
    assert beside.nbytes - plain.nbytes == EXTRA_BYTES[way] * 64 * 64


# --- unusual weights ------------------------------------------------------------------------------------------------


def with_history(way: Weights, start: Tensor, decay: float = 0.0) -> tuple[nn.Parameter, optstate.Optimizer]:
    """A parameter that has made steps, so that something is kept beside it."""
    param = nn.Parameter(start.clone())
    optimizer = Lomo([("p", param)], lr=1e-3, weight_decay=decay, weights=way)
    for step in range(3):
        param.grad = gaussians(20 + step, *start.shape).to(start.dtype)
        optimizer.step()
    return param, optimizer


@each_keeping
def test_a_parameter_overwritten_from_outside_takes_the_new_value(way: Weights) -> None:
    """What was kept beside it stays: Split's is at most half of the new last place, 2**-8 of the value; Kahan's half of
    the old one, 2**-8 of the old value. The next step starts from the two, Kahan's with a rounding of 2**-17."""
    start = gaussians(4, 40, 50).to(BF16)
    for scale in (1.0, 1e-3, 1e3):
        param, optimizer = with_history(way, start)
        old, new = param.detach().double(), (gaussians(5, 40, 50) * scale).to(BF16)
        new[:10] = 0.0
        new[10:15] = -0.0
        with torch.no_grad():
            param.copy_(new)
        value = weight_of(param, optimizer.state[param])
        whose = old if isinstance(way, Kahan) else new.double()
        allowed = 2.0**-8 * whose.abs()
        zero = (new == 0) & (not isinstance(way, Kahan))
        assert ((value - new.double()).abs() <= allowed)[~zero].all()
        param.grad = torch.zeros_like(param)
        optimizer.step()
        after = weight_of(param, optimizer.state[param])
        again = 2.0**-17 * value.abs() if isinstance(way, Kahan) else 0.0 * value
        assert ((after - value).abs() <= again)[~zero].all()
        # A correction of zero is in units of the least number there is, 2**-149.
        assert (after[zero].abs() <= 2.0**15 * 2.0**-149).all()


@each_way
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_nan_and_infinite_weights_stay_so_and_disturb_no_other(way: Weights, decay: float) -> None:
    start = gaussians(6, 40, 50).to(BF16)
    special = torch.tensor([math.nan, math.inf, -math.inf], dtype=BF16)
    wrong = start.clone()
    wrong.view(-1)[100:103] = special
    right, right_optimizer = with_history(way, start, decay)
    param, optimizer = with_history(way, wrong, decay)
    torch.testing.assert_close(param.detach().view(-1)[100:103], special, rtol=0, atol=0, equal_nan=True)
    value, want = (weight_of(p, o.state[p]).view(-1) for p, o in ((param, optimizer), (right, right_optimizer)))
    torch.testing.assert_close(value[100:103], special.double(), rtol=0, atol=0, equal_nan=True)
    others = torch.ones(2000, dtype=torch.bool)
    others[100:103] = False
    assert torch.equal(value[others], want[others])


@each_way
def test_a_step_that_overflows_makes_an_infinite_weight_that_stays(way: Weights) -> None:
    param = nn.Parameter(torch.tensor([3.3e38, -3.3e38, 1.0], dtype=BF16))
    optimizer = Lomo([("p", param)], lr=1.0, weights=way)
    for _ in range(2):
        param.grad = torch.tensor([-3.3e38, 3.3e38, 0.0], dtype=BF16) / 2
        optimizer.step()
    assert param.tolist() == [math.inf, -math.inf, 1.0]
    assert weight_of(param, optimizer.state[param]).tolist() == [math.inf, -math.inf, 1.0]


# --- rules that read the weight -------------------------------------------------------------------------------------


def off_grid(way: Weights) -> tuple[nn.Parameter, optstate.Optimizer, Tensor]:
    """A parameter of ones whose weights are 0.35 % above them: what a rule reads tells which of the two it took."""
    param = nn.Parameter(torch.ones(60, 50, dtype=BF16))
    optimizer = optstate.Optimizer([("p", param)], optstate.chain(), lr=1.0, weights=way)
    param.grad = torch.full_like(param, -0.0035)
    optimizer.step()
    assert (param == 1).all()
    value = weight_of(param, optimizer.state[param])
    assert (value > 1.0034).all()
    return param, optimizer, value


READING: dict[str, Any] = {
    "parameter's rms": (updates.chain(updates.scale_by_param_rms()), lambda w, g: g * w.square().mean().sqrt()),
    "decay": (updates.chain(updates.add_decayed_weights(0.5)), lambda w, g: g + 0.5 * w),
    "decay before a clamp": (
        updates.chain(updates.add_decayed_weights(0.5), updates.clip_by_value(10.0)),
        lambda w, g: g + 0.5 * w,
    ),
    "decay scaled by the rms": (
        updates.chain(updates.add_decayed_weights(0.5), updates.scale_by_param_rms()),
        lambda w, g: (g + 0.5 * w) * w.square().mean().sqrt(),
    ),
    "decay before an average": (
        updates.chain(updates.add_decayed_weights(0.5), updates.momentum(beta=0.5)),
        lambda w, g: 0.5 * (g + 0.5 * w),
    ),
}


@pytest.mark.parametrize("chunk", [1 << 19, 1 << 9], ids=["whole", "slices"])
@pytest.mark.parametrize("rule", READING)
@each_keeping
def test_a_rule_reads_the_weight_and_not_the_rounded_parameter(way: Weights, rule: str, chunk: int) -> None:
    """Tolerance: the rounding of the result, and 1e-6 for some operations in fp32. The parameter is 0.35 % off."""
    chain, update = READING[rule]
    param, before, value = off_grid(way)
    with chunk_of(chunk):
        optimizer = optstate.Optimizer([("p", param)], chain, lr=0.25, weights=way)
        key = next(iter(optimizer.plan().params[0].weight_keys.values()))
        optimizer.state[param][key].copy_(before.state[param][key])
        param.grad = gaussians(7, 60, 50).to(BF16)
        optimizer.step()
    want = value - 0.25 * update(value, param.grad.double())
    rounding = {Kahan(): 2.0**-17, Split(8): 2.0**-16, Split(16): 2.0**-24}[way]
    allowed = rounding * want.abs() + 1e-6
    assert ((weight_of(param, optimizer.state[param]) - want).abs() <= allowed).all()
    misread = value - 0.25 * update(torch.ones_like(value), param.grad.double())
    assert ((misread - want).abs() > 10 * allowed).float().mean() > 0.5


# --- gradients found not to be finite -------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("name", TRAINED)
def test_a_gradient_found_not_finite_later_changes_no_bit(
    name: str, way: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = stores.Guard.__init__
    monkeypatch.setattr(
        stores.Guard, "__init__", lambda self, p, grad, **more: original(self, p, grad, deferred=True, **more)
    )
    param = nn.Parameter(gaussians(8, 71, 66).to(BF16))
    optimizer = TRAINED[name]([("p", param)], lr=1e-2, weights=way)
    for step in range(3):
        param.grad = gradient((71, 66), step)
        optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[param].items() if isinstance(v, Tensor)}
    weight = bits(param).copy()
    for bad in (math.nan, math.inf):
        param.grad = gradient((71, 66), 3)
        param.grad[3, 5] = bad
        optimizer.step()
        assert np.array_equal(bits(param), weight)
        after = {k: v for k, v in optimizer.state[param].items() if isinstance(v, Tensor)}
        assert_same(after, before)
        with pytest.raises(optstate.NonFiniteGradientError):
            optimizer.step()
        optimizer.accept_partial_step()
        assert optimizer.state[param]["step"] == 3


@each_keeping
def test_a_step_of_size_zero_changes_no_bit(way: Weights) -> None:
    param, optimizer = with_history(way, gaussians(9, 300, 400).to(BF16))
    weight, state = bits(param).copy(), {k: v.clone() for k, v in optimizer.state[param].items() if k != "step"}
    optimizer.param_groups[0]["lr"] = 0.0
    param.grad = gaussians(10, 300, 400).to(BF16)
    optimizer.step()
    assert np.array_equal(bits(param), weight)
    assert_same({k: v for k, v in optimizer.state[param].items() if k != "step"}, state)


# --- scratch --------------------------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("recipe", [AdaLomo, Lomo, AdamW8bit], ids=["adalomo", "lomo", "adamw8bit"])
def test_scratch_is_at_most_8_mb_for_9_mb_of_bf16(recipe: Any, way: Weights) -> None:
    param = nn.Parameter(torch.ones(2048, 2304, dtype=BF16))
    param.grad = torch.ones_like(param)
    optimizer = recipe([("p", param)], lr=1e-3, weight_decay=0.1, weights=way)
    assert peak_extra_bytes(optimizer.step) <= 8 * MEGABYTE


# --- stochastic rounding --------------------------------------------------------------------------------------------

ROUNDED: dict[str, Any] = {
    "second moment": lambda p, **kw: AdamW(p, second=stores.Full("bfloat16"), **kw),
    "both moments": lambda p, **kw: AdamW(p, first=stores.Full("bfloat16", stochastic=True), second=BF16_STORE, **kw),
    "momentum": lambda p, **kw: SGD(p, momentum=0.9, store=BF16_STORE, **kw),
}
BF16_STORE = stores.Full("bfloat16", stochastic=True)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ROUNDED)
def test_statistics_round_to_the_same_bits_whatever_the_slices_and_touch_no_generator(
    name: str, dtype: torch.dtype
) -> None:
    def run(chunk: int, seed: int) -> list[Any]:
        torch.manual_seed(seed)
        generator = torch.get_rng_state()
        result = trained(ROUNDED[name], dtype, StochasticRounding(5), chunk=chunk)
        assert torch.equal(torch.get_rng_state(), generator)
        return result

    whole = run(1 << 19, seed=0)
    rounded_up = whole[0][1]["momentum_buffer" if name == "momentum" else "exp_avg_sq"]
    assert rounded_up.dtype == BF16
    for chunk, seed in ((1 << 10, 1), (1 << 12, 2), (200, 3)):
        for (param, state), (other, other_state) in zip(whole, run(chunk, seed), strict=True):
            assert torch.equal(other, param)
            assert_same(other_state, state)
