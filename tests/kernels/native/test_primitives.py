"""The compiled loops of chains: against the same loops in eager PyTorch, and against float64 closed formulas.

Rounding, random bits and codes are equal to the bit. Arithmetic before them is fp32 in the same order, but for a scale,
which eager PyTorch multiplies into a factor first: values differ by a few roundings, 2**-24 each. Sums of n squares are
made in another order, in 16 lanes and then in float64: relative L2 at most 5e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import optstate
from adalomo import Adafactor, AdaLomo
from optstate import kernels, stores, updates
from optstate.kernels import Noise, Product, eager
from optstate.kernels.backend import choose_backend, compiled_functions, run_with_loops
from optstate.optimizer.whole_steps import find_whole_step
from optstate.recipes import CAME
from optstate.spec import ParamSpec, Region
from optstate.stores import Block4, Block8, Float8
from optstate.stores.base import NO_NOISE
from optstate.testing.devices import CutParameter
from optstate.weights import Kahan, Split, StochasticRounding, Weights
from tests.support.compiled import assert_equal_numbers, every_pattern, needs_compiled_steps

pytestmark = [
    needs_compiled_steps,
    pytest.mark.skipif(choose_backend("auto", torch.device("cpu"))[0] != "native", reason="another backend is chosen"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUMS = {"rtol": 5e-6, "atol": 0.0}
VALUES = {"rtol": 2.0**-21, "atol": 1e-37}


def on_eager(work: Callable[[], Any]) -> Any:
    """Return what `work` returns with the loops of eager PyTorch."""

    def requests() -> Any:
        assert compiled_functions() is None
        yield work()

    return next(run_with_loops("eager", requests()))


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def double_value(product: Product) -> Tensor:
    value = product.dense.double()
    if product.bound is not None:
        value = value.clamp(-product.bound, product.bound)
    for factor in product.factors:
        value = value * factor.double()
    return value * float(product.scale)


shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4) | st.sampled_from([[3, 1025], [130, 7], [2, 3, 1500], [1]])


@st.composite
def products(draw: Any) -> Product:
    """A tensor of an odd shape, with factors that run along any of its dimensions, some of them not contiguous."""
    shape = tuple(draw(shapes))
    seed = draw(st.integers(0, 1000))
    factors = []
    for k in range(draw(st.integers(0, 3))):
        kept = tuple(size if draw(st.booleans()) else 1 for size in shape)
        factor = numbers(kept, seed + k).abs() + 0.1
        if draw(st.booleans()):
            factor = numbers((*kept[::-1], 2), seed + k).abs()[..., 0].permute(*range(len(shape))[::-1]) + 0.1
        factors.append(factor)
    scale: Any = draw(st.sampled_from([1.0, 0.3, torch.tensor(0.7), torch.tensor([[0.2]]).squeeze()]))
    bound = draw(st.sampled_from([None, 0.5]))
    return Product(numbers(shape, seed, draw(st.sampled_from(DTYPES))), tuple(factors), scale, bound)


# --- products -------------------------------------------------------------------------------------------------------


@given(products())
def test_sums_and_values_are_the_closed_formulas(product: Product) -> None:
    value = double_value(product)
    square = value.square()
    torch.testing.assert_close(kernels.multiply_out(product).double(), value, **VALUES)
    torch.testing.assert_close(kernels.sum_of_squares(product).double(), square.sum(), **SUMS)
    rows = kernels.sums_of_rows(product)
    assert rows.shape == (value.shape[0], *(1,) * (value.ndim - 1))
    torch.testing.assert_close(rows.double().view(-1), square.reshape(value.shape[0], -1).sum(-1), **SUMS)
    if value.ndim >= 2:
        rows, cols = kernels.sums(product)
        torch.testing.assert_close(rows.double(), square.sum(-1, keepdim=True), **SUMS)
        torch.testing.assert_close(cols.double(), square.sum(-2, keepdim=True), **SUMS)
        other = numbers(tuple(value.shape), 7)
        away = (value - other.double()).square()
        rows, cols = kernels.sums_of_difference(product, other)
        # a difference of nearly equal numbers has the absolute error of its terms
        torch.testing.assert_close(rows.double(), away.sum(-1, keepdim=True), rtol=5e-6, atol=1e-9)
        torch.testing.assert_close(cols.double(), away.sum(-2, keepdim=True), rtol=5e-6, atol=1e-9)


@given(products(), st.sampled_from(DTYPES), st.sampled_from([0.0, 0.1, 0.75, 1.0]))
def test_averages_move_as_in_eager_pytorch(product: Product, dtype: torch.dtype, weight: float) -> None:
    """Before the one rounding to the target's dtype, values differ by a few roundings of fp32."""
    shape = tuple(product.shape)
    for eps in (None, 0.0, 1e-3):
        mine, theirs = numbers(shape, 5, dtype), numbers(shape, 5, dtype)
        if eps is None:
            kernels.ema(mine, product, weight)
            eager.ema(theirs, product, weight)
        else:
            kernels.ema_of_square(mine, product, weight, eps)
            eager.ema_of_square(theirs, product, weight, eps)
        place = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
        torch.testing.assert_close(mine, theirs, rtol=place, atol=1e-6)
        current = numbers(shape, 6)
        if eps is None:
            new, want = (
                kernels.moved(current, product, weight),
                torch.lerp(current, eager.multiply_out(product), weight),
            )
        else:
            square = eager.multiply_out(product).square() + eps
            new, want = kernels.moved_to_square(current, product, weight, eps), torch.lerp(current, square, weight)
        torch.testing.assert_close(new, want, rtol=2.0**-20, atol=1e-6)
        assert torch.equal(current, numbers(shape, 6))


def test_the_inverse_root_of_adam_is_its_formula() -> None:
    """Four operations of fp32, each exact to 2**-24."""
    x = torch.cat([numbers((5000,), 0).square(), torch.tensor([0.0, 1e-45, 3e38, torch.inf])])
    want = 1 / (x.double().sqrt() / 0.3 + 1e-8)
    torch.testing.assert_close(kernels.inverse_root(x, 0.3, 1e-8).double(), want, rtol=2.0**-21, atol=0.0)


@pytest.mark.parametrize("shape", [(700, 1000), (3, 400, 500), (1 << 20,)], ids=str)
def test_sums_are_the_same_bits_for_any_number_of_threads(shape: tuple[int, ...]) -> None:
    product = Product(numbers(shape, 0, torch.bfloat16), scale=0.3)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            each = [kernels.sum_of_squares(product), kernels.sums_of_rows(product), kernels.multiply_out(product)]
            found.append([*each, *(kernels.sums(product) if len(shape) > 1 else ())])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_sums_of_a_large_tensor_are_those_of_eager_pytorch() -> None:
    product = Product(numbers((1500, 2000), 0), (numbers((1500, 1), 1), numbers((1, 2000), 2)))
    for mine, theirs in zip(kernels.sums(product), eager.sums(product), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) <= 5e-6
    torch.testing.assert_close(kernels.sum_of_squares(product), eager.sum_of_squares(product), **SUMS)


def test_numbers_that_are_not_finite_are_seen_in_every_sum() -> None:
    for bad in (torch.inf, torch.nan):
        x = torch.ones(40, 70)
        x[3, 5] = bad
        rows, cols = kernels.sums(Product(x))
        assert not rows[3].isfinite()
        assert not cols[0, 5].isfinite()
        assert int(rows.isfinite().sum()) == 39
        assert not kernels.sum_of_squares(Product(x)).isfinite()
    assert float(kernels.sum_of_squares(Product(torch.full((9,), 3e38)))) == math.inf


# --- weights --------------------------------------------------------------------------------------------------------

WAYS: list[tuple[Weights | None, torch.dtype]] = [
    *((None, dtype) for dtype in DTYPES),
    (StochasticRounding(3), torch.bfloat16),
    (StochasticRounding(3), torch.float16),
    (Kahan(), torch.bfloat16),
    (Kahan(), torch.float16),
    (Split(16), torch.bfloat16),
    (Split(8), torch.bfloat16),
]


def kept(way: Weights | None, spec: ParamSpec, seed: int) -> dict[str, Tensor]:
    """What lies beside a parameter, of likely size."""
    fields = {} if way is None else way.fields(spec)
    found = {}
    for name, field in fields.items():
        shape = spec.shape if spec.region is None else spec.region.shape
        value = numbers(shape, seed)
        found[name] = (value * 1e-3).to(field.dtype) if field.dtype.is_floating_point else (value * 40).to(field.dtype)
    return found


REGIONS = [
    None,
    Region((40, 70), (0, 0), (40, 70), (1, 1)),
    Region((40, 70), (20, 0), (20, 70), (2, 1)),
    Region((40, 70), (0, 35), (40, 35), (1, 2)),
    Region((3, 40, 70), (0, 10, 35), (3, 10, 35), (1, 4, 2)),
    Region((3, 40, 70), (2, 0, 35), (1, 40, 35), (3, 1, 2)),
    Region((1 << 18, 1 << 18), (1 << 17, 0), (4, 1 << 8), (2, 1 << 10)),
]


@pytest.mark.parametrize(("way", "dtype"), WAYS, ids=str)
@pytest.mark.parametrize("region", REGIONS, ids=str)
def test_a_weight_is_written_as_eager_pytorch_writes_it(
    way: Weights | None, dtype: torch.dtype, region: Region | None
) -> None:
    """To the bit: steps and decay are powers of two times whole numbers, so that no arithmetic before it rounds.

    The indices of the last region pass 2**33.
    """
    shape = (37, 129) if region is None else region.shape
    spec = ParamSpec(name="p", shape=shape if region is None else region.whole, dtype=dtype, region=region)
    step = (numbers(shape, 1) * 64).round() / 2**12
    for decay, start, part in ((0.0, 0, slice(None)), (0.25, 0, slice(None)), (0.0, shape[-1], slice(1, None))):
        results = []
        for loops in (kernels, eager):
            param, fields = numbers(shape, 2, dtype), kept(way, spec, 3)
            codec = None if way is None else way.codec(spec, 5, fields)
            here, start_here = (param, 0) if len(shape) != 2 else (param[part], start)
            update = Product(step if len(shape) != 2 else step[part])
            loops.apply_update(here, update, decay, codec, start_here)
            results.append([param, *fields.values()])
            total = kernels.weight_sum_of_squares(param, codec)
            torch.testing.assert_close(total, eager.weight_sum_of_squares(param, codec), **SUMS)
            sums = [torch.ones(shape), torch.ones(shape)]
            kernels.add_weight(sums[0], param, 0.5, codec, 0)
            eager.add_weight(sums[1], param, 0.5, codec, 0)
            torch.testing.assert_close(sums[0], sums[1], rtol=2.0**-22, atol=1e-6)
        for mine, theirs in zip(*results, strict=True):
            if mine.is_floating_point():
                assert_equal_numbers(mine + 0.0, theirs + 0.0)
            else:
                assert torch.equal(mine, theirs)


@given(products(), st.sampled_from(DTYPES), st.sampled_from([0.0, 0.1]))
def test_any_product_is_applied(product: Product, dtype: torch.dtype, decay: float) -> None:
    param = numbers(tuple(product.shape), 8, dtype)
    want = param.double() * (1 - decay) - double_value(product)
    kernels.apply_update(param, product, decay)
    place = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(param.double(), want, rtol=place, atol=1e-5)


@pytest.mark.parametrize("region", REGIONS, ids=str)
@pytest.mark.parametrize(("start", "count"), [(0, 1024), (3, 700), (1, 1), (5, 0)])
def test_random_bits_are_eager_pytorchs(region: Region | None, start: int, count: int) -> None:
    noise = Noise("p", 3, 1, start, region)
    bits = noise.bits16(count, torch.device("cpu"))
    assert bits.dtype == torch.int16
    assert torch.equal(bits, on_eager(lambda: noise.bits16(count, torch.device("cpu"))))


@pytest.mark.parametrize("start", [0, 1, (1 << 33) - 3, (1 << 34) + 1])
def test_statistics_are_rounded_to_bf16_with_the_same_bits(start: int) -> None:
    value, noise = numbers((4000,), 0), Noise("p/exp_avg", 2, start=start)
    want = on_eager(lambda: kernels.rounded_bf16(value.clone(), noise)).bfloat16()
    assert torch.equal(kernels.rounded_bf16(value.clone(), noise).bfloat16(), want)


# --- codes ----------------------------------------------------------------------------------------------------------

BLOCKS = [2, 6, 100, 128, 256, 1000, 1024, 2048, 3000, 65536]


def patterns() -> Tensor:
    """All numbers of bf16 in two orders, so that blocks have small and large ratios; then fp32 at every bound."""
    bf16 = every_pattern(torch.bfloat16).float()
    bf16 = bf16[bf16.isfinite()]
    mixed = bf16[torch.randperm(len(bf16), generator=torch.Generator().manual_seed(2))]
    small = torch.exp(numbers((1 << 16,), 3) * 6) * numbers((1 << 16,), 4).sign()
    return torch.cat([bf16, mixed, small, torch.tensor([torch.inf, -torch.inf, 1.0])])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", [Block8, Block4, Float8])
def test_codes_are_those_of_eager_pytorch(kind: Any, block: int, signed: bool) -> None:
    """Every bf16 number among them; blocks of any size, the last one short. Scales and codes are equal to the bit."""
    store = kind(block, signed=signed)
    value = patterns() if signed else patterns().abs()
    mine = store.encode(value.clone(), NO_NOISE)
    theirs = on_eager(lambda: store.encode(value.clone(), NO_NOISE))
    assert torch.equal(mine["absmax"], theirs["absmax"])
    different = (mine["codes"].view(torch.uint8) != theirs["codes"].view(torch.uint8)).nonzero()
    assert not different.numel(), f"{len(different)} differ, first at {different[0].tolist()}"
    read = store.read(mine, value.shape)
    assert torch.equal(read, on_eager(lambda: store.read(mine, value.shape)))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", [Block8, Block4])
def test_numbers_at_the_bounds_between_codes_get_the_lower_one(kind: Any, signed: bool) -> None:
    """At a bound, and at the fp32 numbers beside it, in a block whose scale is 1."""
    store = kind(4096, signed=signed)
    bounds = store.codebook.bounds
    beside = [torch.nextafter(bounds, torch.full_like(bounds, end)) for end in (-torch.inf, torch.inf)]
    value = torch.cat([bounds, *beside, torch.ones(1)]).clamp(-1, 1)
    value = value if signed else value.abs()
    mine = store.encode(value.clone(), NO_NOISE)
    theirs = on_eager(lambda: store.encode(value.clone(), NO_NOISE))
    assert torch.equal(mine["codes"], theirs["codes"])


@given(st.integers(1, 5000), st.integers(1, 40), st.sampled_from([Block8, Block4, Float8]))
def test_blocks_of_any_length_are_read_back(count: int, half: int, kind: Any) -> None:
    store, value = kind(2 * half), numbers((count,), count)
    mine = store.encode(value.clone(), NO_NOISE)
    theirs = on_eager(lambda: store.encode(value.clone(), NO_NOISE))
    assert all(
        torch.equal(mine[name].view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8)) for name in mine
    )
    assert torch.equal(store.read(mine, (count,)), on_eager(lambda: store.read(mine, (count,))))


# --- conversions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [(True, True), (True, False), (False, True)], ids=str)
def test_what_a_conversion_changes_is_the_closed_formula(changes: tuple[bool, bool]) -> None:
    """Sums of 3,001 squares of fp32 numbers: relative 1e-5, an error of numbers that are nearly equal included."""
    first, second = numbers((3001,), 0), numbers((3001,), 1).square() + 1e-3
    new = (first * (numbers((3001,), 2) > -1), second * (1 + 0.3 * numbers((3001,), 3).abs()))
    given = (new[0] if changes[0] else None, new[1] if changes[1] else None)
    measured = kernels.measure_adam((first, second), given, (0.5, 0.25), 1e-3)
    assert measured is not None
    m, v = first.double() / 0.5, second.double() / 0.25
    new_m = new[0].double() / 0.5 if changes[0] else m
    new_v = new[1].double() / 0.25 if changes[1] else v

    def update(m: Tensor, v: Tensor) -> Tensor:
        return m / (v.sqrt() + 1e-3)

    def figures(old: Tensor, now: Tensor, after: Tensor) -> list[float]:
        before = update(m, v)
        sums = [old, now - old, before, after - before, after]
        return [*(float(each.double().square().sum()) for each in sums), float(((old != 0) & (now == 0)).sum())]

    if changes[0]:
        assert measured[0][:6] == pytest.approx(figures(first.double(), new[0].double(), update(new_m, v)), rel=1e-5)
    if changes[1]:
        assert measured[1][:6] == pytest.approx(figures(second.double(), new[1].double(), update(m, new_v)), rel=1e-5)
        assert measured[1][6] == pytest.approx(float((second / new[1]).max()), rel=1e-6)
    both = figures(update(m, v), update(new_m, new_v), update(new_m, new_v))
    assert measured[2][:6] == pytest.approx(both, rel=1e-5)


# --- what is left to eager PyTorch -----------------------------------------------------------------------------------


def unusual() -> dict[str, Tensor]:
    whole = numbers((12, 10), 0)
    return {
        "transposed": numbers((10, 12), 0).t(),
        "strided": numbers((12, 20), 0)[:, ::2],
        "negated": torch._neg_view(whole),
        "fp64": whole.double(),
        "subclass": whole.as_subclass(type("Own", (Tensor,), {})),
        "offset": numbers((121,), 0)[1:].view(12, 10),
        "expanded": numbers((1, 10), 0).expand(12, 10),
    }


@pytest.mark.parametrize("kind", unusual())
def test_unusual_tensors_give_the_same(kind: str) -> None:
    dense = unusual()[kind]
    product = Product(dense, scale=0.5)
    value = dense.double() * 0.5
    torch.testing.assert_close(kernels.multiply_out(product).double(), value, **VALUES, check_device=False)
    torch.testing.assert_close(kernels.sum_of_squares(product).double(), value.square().sum(), **SUMS)
    torch.testing.assert_close(kernels.sums(product)[0].double(), value.square().sum(-1, keepdim=True), **SUMS)
    if kind not in ("expanded", "subclass"):  # elements that share memory; a class that knows no other
        param = unusual()[kind].clone(memory_format=torch.preserve_format)
        kernels.apply_update(param, product)
        torch.testing.assert_close(param.double(), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), ()], ids=str)
def test_empty_tensors_and_single_numbers(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 3.0)
    assert float(kernels.sum_of_squares(Product(x))) == (9.0 if shape == () else 0.0)
    assert kernels.multiply_out(Product(x, scale=2.0)).tolist() == (x * 2).tolist()
    param = torch.full(shape, 4.0)
    kernels.apply_update(param, Product(x), 0.5)
    assert torch.equal(param, torch.full(shape, -1.0))


def test_tensors_without_values_stay_without() -> None:
    dense = torch.empty(6, 5, device="meta")
    rows, cols = kernels.sums(Product(dense))
    assert (rows.device.type, tuple(rows.shape), tuple(cols.shape)) == ("meta", (6, 1), (1, 5))
    kernels.apply_update(torch.empty(6, 5, device="meta"), Product(dense))
    assert kernels.multiply_out(Product(dense)).device.type == "meta"


def test_what_is_written_moves_its_version_and_graphs_are_recorded() -> None:
    weight, correction = numbers((64,), 0, torch.bfloat16), torch.zeros(64, dtype=torch.int16)
    spec = ParamSpec(name="p", shape=(64,), dtype=torch.bfloat16)
    versions = weight._version, correction._version
    kernels.apply_update(weight, Product(torch.ones(64)), 0.0, Split(16).codec(spec, 1, {"correction": correction}))
    assert weight._version > versions[0]
    assert correction._version > versions[1]
    average = torch.ones(64)
    kernels.ema(average, Product(torch.ones(64)), 0.5)
    assert average._version == 1
    leaf = nn.Parameter(torch.ones(8))
    with pytest.raises(RuntimeError, match="leaf"):  # as in eager PyTorch, where gradients are recorded
        kernels.apply_update(leaf, Product(torch.ones(8)))
    assert kernels.multiply_out(Product(leaf, scale=2.0)).requires_grad


# --- steps ----------------------------------------------------------------------------------------------------------

CHAINS: dict[str, tuple[Any, ...]] = {
    "clip, 8-bit adam, decay": (updates.clip_by_norm(1.0), updates.scale_by_adam(Block8(), Block8(64))),
    "bf16 adam after clip": (updates.clip_by_rms(1.0), updates.scale_by_adam(stores.Full("bfloat16"))),
    "lion by rms": (updates.sign_momentum(Block4()), updates.scale_by_param_rms()),
    "factored with floor": (updates.scale_by_rms(stores.Factored(), eps=0.0, floor=1e-3),),
    "rss": (updates.scale_by_rss(stores.Full()), updates.clip_by_norm(0.5), updates.momentum(stores.Float8())),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_that_no_whole_step_knows_takes_the_steps_of_eager_pytorch(name: str, dtype: torch.dtype) -> None:
    """Five steps, in slices: at a rounding's boundary an element may fall on the other side, so 1 % may differ more."""
    params = []
    for backend in ("auto", "eager"):
        param = nn.Parameter(numbers((600, 500), 0, dtype))
        chain = optstate.chain(*CHAINS[name], updates.add_decayed_weights(0.1))
        optimizer = optstate.Optimizer([("p", param)], chain, lr=1e-2)
        optimizer.use_backend(backend)
        for step in range(5):
            param.grad = numbers((600, 500), step + 1, dtype)
            optimizer.step()
        params.append(param.detach().double())
        words = "native primitives (no whole step" if backend == "auto" else "transforms (eager"
        assert optimizer.plan().steps[0].startswith(words)
        assert words in str(optimizer.plan())
    mine, theirs = params
    far = (mine - theirs).abs() > 1e-5 + 1e-4 * theirs.abs()
    assert float(far.double().mean()) < 0.01
    assert float((mine - theirs).norm() / (theirs - numbers((600, 500), 0, dtype).double()).norm()) < 2e-2


@pytest.mark.parametrize("parts", [(2, 1), (1, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("recipe", [AdaLomo, Adafactor, CAME])
def test_parts_of_a_parameter_take_the_steps_of_the_whole_in_eager_pytorch(recipe: Any, parts: tuple[int, int]) -> None:
    """As under FSDP2 and tensor parallel, where sums are asked for over devices: sums differ by 5e-6 of themselves."""
    cut = CutParameter(recipe, (130, 70), parts)
    assert all(part.whole_step is None for part in cut.devices)
    cut.use_backend("native")
    cut.train(4)
    param, state = cut.joined()
    torch.testing.assert_close(param, cut.whole.detach(), rtol=1e-4, atol=1e-6)
    for key, want in cut.whole_state().items():
        torch.testing.assert_close(state[key], want, rtol=1e-4, atol=1e-7)


def test_the_plan_of_a_part_says_what_makes_its_step() -> None:
    part = CutParameter(AdaLomo, (40, 30), (2, 1)).devices[0]
    words = find_whole_step(part.plan, torch.device("cpu")).words
    assert words == "native primitives (no whole step is written for this chain on a part of a parameter)"


def test_another_environment_or_backend_runs_no_compiled_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("a compiled loop ran")

    param = nn.Parameter(numbers((40, 30), 0))
    optimizer = optstate.Optimizer([("p", param)], optstate.chain(*CHAINS["rss"]), lr=1e-2)
    param.grad = torch.ones(40, 30)
    monkeypatch.setattr(kernels.native, "share", forbidden)
    optimizer.use_backend("eager")
    optimizer.step()
    optimizer.use_backend("native")
    with pytest.raises(AssertionError, match="a compiled loop ran"):
        optimizer.step()
