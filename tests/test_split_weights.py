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
from optstate.recipes import (
    CAME,
    SGD,
    SM3,
    AdamFactor,
    AdamMini,
    AdamW,
    AdamW4bit,
    AdamW8bit,
    Lion,
    Lion8bit,
    SGDM8bit,
)
from optstate.spec import ParamSpec
from optstate.weights import Kahan, Plain, Split, StochasticRounding, Weights, as_weights
from tests.models import assert_same

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
        return torch.from_numpy(exact)
    value = param.detach().double()
    return value + state["weight.compensation"].double() if "weight.compensation" in state else value


def patterns() -> Tensor:
    """fp32 numbers of every kind: each upper half with lower halves at the ends, at ties and beside them, and others."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    edges = np.array([0, 1, 0x7F, 0x80, 0x81, 0x7FFF, 0x8000, 0x8001, 0xFF7F, 0xFF80, 0xFFFF], dtype=np.uint32)
    others = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    return torch.from_numpy(np.concatenate([(upper[:, None] | edges).ravel(), others]).view(np.float32))


def nearest_bf16(value: Tensor) -> Tensor:
    """fp32 rounded to bf16, to nearest with ties away from zero, by distances in float64; 2**128 stands for infinity."""
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


def test_every_recipe_of_the_registry_is_trained() -> None:
    assert {name for name in TRAINED if name in recipes.names()} == set(recipes.names())


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    """Representable in bf16, rows of different sizes."""
    noise = gaussians(100 + step, *shape)
    rows = torch.logspace(-2, 0, shape[0]).view(-1, *[1] * (len(shape) - 1)) if shape else torch.ones(())
    return (noise * rows).to(BF16)


def trained(
    recipe: Any, dtype: torch.dtype, way: Weights, fused: bool = False, transposed: bool = False, steps: int = 5
) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    """Parameters and their state after steps with gradients that do not depend on the weights."""
    params = [nn.Parameter(gaussians(i, *shape).to(BF16).to(dtype)) for i, shape in enumerate(SHAPES)]
    if transposed:
        params = [nn.Parameter(p.detach().mT.contiguous().mT) if p.ndim >= 2 else p for p in params]
        assert not params[0].is_contiguous()
    optimizer = recipe([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-2, weights=way)
    # PyTorch's fused AdamW, which only fp32 and fp64 parameters get, rounds in another order.
    with mock.patch("optstate.optimizer.stepped_by_torch", return_value=False):
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


def assert_equal_training(low: list[Any], full: list[Any]) -> None:
    for (param, state), (exact, reference) in zip(low, full, strict=True):
        assert np.array_equal(master_bits(param, state["weight.correction"]), bits(exact))
        assert_same({k: v for k, v in state.items() if k != "weight.correction"}, reference)


@pytest.mark.parametrize("chunk", [1 << 19, 1 << 10], ids=["whole", "slices"])
@pytest.mark.parametrize("fused", [False, True], ids=["step", "fused"])
@pytest.mark.parametrize("name", TRAINED)
def test_split_16_trains_a_bf16_parameter_bit_for_bit_as_fp32(name: str, fused: bool, chunk: int) -> None:
    with chunk_of(chunk):
        low = trained(TRAINED[name], BF16, Split(16), fused)
        full = trained(TRAINED[name], FP32, Plain(), fused)
    assert_equal_training(low, full)
    assert low[0][1]["weight.correction"].count_nonzero() > 4000  # the correction was needed


@pytest.mark.parametrize("chunk", [1 << 19, 1 << 10], ids=["whole", "slices"])
@pytest.mark.parametrize("fused", [False, True], ids=["step", "fused"])
@pytest.mark.parametrize("name", TRAINED)
def test_split_16_trains_a_transposed_parameter_alike(name: str, fused: bool, chunk: int) -> None:
    with chunk_of(chunk):
        low = trained(TRAINED[name], BF16, Split(16), fused, transposed=True)
        full = trained(TRAINED[name], FP32, Plain(), fused, transposed=True)
    assert_equal_training(low, full)
