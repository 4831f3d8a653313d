"""Every kernel against the same computation written plainly in fp64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optstate import kernels
from optstate.kernels import Product
from optstate.memory import peak_extra_bytes
from optstate.spec import accumulator_dtype

chunking = importlib.import_module("optstate.kernels.chunking")  # `kernels.chunks` itself is the function

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (FP32, FP64, BF16, FP16)
LAYOUTS = ("contiguous", "transposed", "every second", "channels last", "expanded")
FACTORS = ("row", "column", "full", "scalar", "other")
COMMON = settings(deadline=None, derandomize=True, database=None)
MANY, SOME = settings(COMMON, max_examples=150), settings(COMMON, max_examples=80)

# Values are at most a few units, tensors at most a few hundred elements. An fp32 result is then off by some
# roundings of 6e-8 each, an fp64 result by some of 1e-16, and a sum of n such squares by at most n times that.
ELEMENT = {FP32: 1e-6, FP64: 1e-14}
SUM = {FP32: 2e-5, FP64: 1e-13}


@contextmanager
def chunk_of(limit: int) -> Iterator[None]:
    with mock.patch.object(chunking, "CPU_CHUNK", limit):
        yield


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A tensor with these values (for "expanded": of this shape) whose strides are as the layout says."""
    if layout == "transposed" and values.ndim >= 2:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "every second" and values.ndim:
        wide = values.new_zeros((*values.shape[:-1], 2 * values.shape[-1]))
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "channels last" and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "expanded" and values.ndim and values.shape[0]:
        return values[:1].expand(values.shape)
    return values


def factor_shape(shape: tuple[int, ...], kind: str, mask: int) -> tuple[int, ...]:
    if kind == "full":
        return shape
    if kind == "scalar" or not shape:
        return (1,) * len(shape)
    if kind == "row":
        return (*shape[:-1], 1)
    if kind == "column" and len(shape) >= 2:
        return (*shape[:-2], 1, shape[-1])
    return tuple(n if mask >> i & 1 else 1 for i, n in enumerate(shape))


def shapes(min_dims: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    return st.one_of(
        st.lists(st.integers(0, 6), min_size=min_dims, max_size=4).map(tuple),
        st.tuples(st.integers(1, 12), st.integers(1, 40)),  # matrices: chunks of several rows, rows of several chunks
    )


limits = st.sampled_from((1, 7, 64, 1 << 18))
scales = st.sampled_from((1.0, -0.75, 0.0, 2.5, "tensor"))


def scalar_of(scale: float | str, dtype: torch.dtype) -> float | Tensor:
    return torch.tensor(-1.25, dtype=dtype) if scale == "tensor" else scale


@st.composite
def products(draw, min_dims: int = 0, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Product:
    shape, dtype = draw(shapes(min_dims)), draw(st.sampled_from(dtypes))
    layout, seed = draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 99))
    kinds = draw(st.one_of(st.lists(st.sampled_from(FACTORS), max_size=3), st.just(["row", "column"])))
    acc = accumulator_dtype(dtype)
    return Product(
        laid_out(noise(shape, seed).to(dtype), layout),
        tuple(noise(factor_shape(shape, k, draw(st.integers(0, 15))), seed + i).to(acc) for i, k in enumerate(kinds)),
        scalar_of(draw(scales), acc),
        draw(st.sampled_from((None, 0.5))),
    )


def value64(product: Product) -> Tensor:
    x = product.dense.double()
    if product.bound is not None:
        x = x.clamp(-product.bound, product.bound)
    for factor in product.factors:
        x = x * factor.double()
    return x * float(product.scale)


def same(got: Tensor, want: Tensor, rtol: float) -> None:
    """Equal shape, and every element within `rtol` of the largest, as cancellation leaves errors of that size."""
    assert got.shape == want.shape
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * scale)


def copies(*tensors: Tensor) -> list[Tensor]:
    return [t.clone() for t in tensors]


def half_unit(x: Tensor) -> Tensor:
    """Half the spacing of x's dtype at and above each |x|, as fp64: the most that rounding once to x can cost."""
    bits = {BF16: 8, FP16: 11}[x.dtype]
    smallest = {BF16: -133, FP16: -24}[x.dtype]
    exponent = torch.frexp(x.double()).exponent.double()
    return torch.exp2((exponent - bits).clamp(min=smallest)) / 2


# --- chunks --------------------------------------------------------------------------------------------------------


@MANY
@given(shapes(), st.sampled_from(LAYOUTS), st.sampled_from(FACTORS), st.integers(0, 15), limits)
def test_chunks_cover_a_tensor_once_in_row_major_order_with_what_broadcasts_beside_it(shape, layout, kind, mask, limit):
    index = laid_out(torch.arange(math.prod(shape)).view(shape), "contiguous" if layout == "expanded" else layout)
    factor = noise(factor_shape(shape, kind, mask), 1)
    pieces = list(kernels.chunks((index, factor), limit))
    assert all(0 < piece.numel() <= limit for piece, _ in pieces)
    flat = torch.cat([piece.flatten() for piece, _ in pieces] or [index.new_empty(0)])
    assert flat.tolist() == list(range(math.prod(shape)))
    beside = torch.cat([f.expand(piece.shape).flatten() for piece, f in pieces] or [factor.new_empty(0)])
    assert torch.equal(beside, factor.expand(shape).flatten())


def test_chunks_are_views():
    x, row = torch.zeros(5, 9), torch.zeros(5, 1)
    for piece, r in kernels.chunks((x, row), 4):
        piece.add_(1)
        r.add_(1)
    assert (x == 1).all()
    assert (row == 3).all()  # nine elements in pieces of four: three visits


# --- sums ----------------------------------------------------------------------------------------------------------


@MANY
@given(products(min_dims=2), limits)
def test_sums_are_row_and_column_sums_of_squares(product, limit):
    with chunk_of(limit):
        rows, cols = kernels.sums(product)
    square, dtype = value64(product) ** 2, accumulator_dtype(product.dense.dtype)
    assert rows.dtype == cols.dtype == dtype
    same(rows, square.sum(-1, keepdim=True), SUM[dtype])
    same(cols, square.sum(-2, keepdim=True), SUM[dtype])


@MANY
@given(products(), limits)
def test_sum_of_squares_is_the_sum_of_all_squares(product, limit):
    with chunk_of(limit):
        total = kernels.sum_of_squares(product)
    assert total.dtype == accumulator_dtype(product.dense.dtype)
    same(total, (value64(product) ** 2).sum(), SUM[total.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_million_squares_lose_little_precision(dtype):
    x = noise((1000, 1100), 0).to(dtype)
    square = x.double() ** 2
    rows, cols = kernels.sums(Product(x))
    # 2**18 squares are added in fp32 at once, in the lanes of a processor's vectors.
    tolerance = 1e-13 if dtype == FP64 else 1e-5
    torch.testing.assert_close(rows.double(), square.sum(-1, keepdim=True), rtol=tolerance, atol=0)
    torch.testing.assert_close(cols.double(), square.sum(-2, keepdim=True), rtol=tolerance, atol=0)
    torch.testing.assert_close(kernels.sum_of_squares(Product(x)).double(), square.sum(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("value", [0.3, 0.7, 1.1])
def test_equal_squares_lose_little_precision(value):
    # The hardest case: every addition rounds the same way. A tensor filled with one number is a common start.
    x = torch.full((1000, 1100), value)
    want = x[0, 0].double().item() ** 2 * x.numel()
    rows, cols = kernels.sums(Product(x))
    assert rows.double().sum().item() == pytest.approx(want, rel=1e-5)
    assert cols.double().sum().item() == pytest.approx(want, rel=1e-4)  # one plain sum over a chunk's rows
    assert kernels.sum_of_squares(Product(x)).item() == pytest.approx(want, rel=1e-5)


def test_a_factor_whose_square_overflows_counts_for_nothing_where_the_gradient_is_zero():
    # An unused embedding row beside gradients of 1e5: its mean square is eps = 1e-30, a factor of 3e19.
    dense, row = torch.ones(3, 4), torch.ones(3, 1)
    dense[0], row[0] = 0, 3e19
    product = Product(dense, (row, torch.ones(1, 4)))
    assert kernels.sum_of_squares(product).item() == 8
    with chunk_of(8):
        assert kernels.sum_of_squares(product).item() == 8


@pytest.mark.parametrize("shape", [(3, 4), (1, 5), (5, 1), (2, 3, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("second", FACTORS[:4])
@pytest.mark.parametrize("first", FACTORS[:4])
def test_any_two_factors_are_squared_and_summed(first, second, shape):
    factors = tuple(noise(factor_shape(shape, kind, 0), i).float() for i, kind in enumerate((first, second)))
    product = Product(noise(shape, 7).float(), factors)
    for limit in (2, 8, 1 << 18):
        with chunk_of(limit):
            same(kernels.sum_of_squares(product), (value64(product) ** 2).sum(), SUM[FP32])


def test_squares_that_overflow_half_precision_are_summed():
    x = torch.full((8, 8), 6e4, dtype=FP16)
    square = float(x[0, 0]) ** 2
    assert kernels.sums(Product(x))[0].flatten().tolist() == pytest.approx([8 * square] * 8)
    assert kernels.sum_of_squares(Product(x)).item() == pytest.approx(64 * square)


# --- evaluate ------------------------------------------------------------------------------------------------------


@MANY
@given(products(), limits)
def test_evaluate_multiplies_out_into_new_contiguous_memory(product, limit):
    before = copies(product.dense, *product.factors)
    with chunk_of(limit):
        value = kernels.multiply_out(product)
    assert value.dtype == accumulator_dtype(product.dense.dtype)
    assert value.is_contiguous()
    same(value, value64(product), ELEMENT[value.dtype])
    value.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(before, (product.dense, *product.factors), strict=True))


@SOME
@given(products(), limits)
def test_a_gradient_known_on_the_device_not_to_be_finite_reads_as_finite_numbers(product, limit):
    x = product.dense
    x = torch.where(x > 0.3, math.inf, torch.where(x < -0.3, math.nan, x))
    product = replace(product, dense=x, finite=torch.tensor(False))
    with chunk_of(limit):
        assert kernels.multiply_out(product).isfinite().all()
        assert kernels.sum_of_squares(product).isfinite()
        param = noise(product.shape, 5).float()
        kept = param.clone()
        kernels.apply_update(param, replace(product, scale=torch.tensor(0.0)))
    assert torch.equal(param, kept)


# --- moving averages -----------------------------------------------------------------------------------------------

weights = st.sampled_from((0.0, 0.125, 0.75, 1.0, "tensor"))
eps_values = st.sampled_from((0.0, 0.25))


@st.composite
def averages(draw) -> tuple[Product, Tensor, float | Tensor]:
    product = draw(products())
    target = noise(product.shape, draw(st.integers(100, 199))).abs()
    target = target.to(draw(st.sampled_from([FP64] if product.dense.dtype == FP64 else [FP32, BF16])))
    layout = draw(st.sampled_from([name for name in LAYOUTS if name != "expanded"]))
    weight = draw(weights)
    return product, laid_out(target, layout), torch.tensor(0.375) if weight == "tensor" else weight


def check_average(got: Tensor, old: Tensor, towards: Tensor, weight: float) -> None:
    want = old.double() + weight * (towards - old.double())
    if got.dtype == BF16:
        # One rounding to 8 bits, and fp32's errors before it.
        assert ((got.double() - want).abs() <= half_unit(got) + 1e-6 * (old.double().abs() + towards.abs())).all()
    else:
        same(got, want, ELEMENT[got.dtype])


@MANY
@given(averages(), limits)
def test_ema_moves_towards_the_value_and_rounds_once(case, limit):
    product, target, weight = case
    old = target.clone()
    with chunk_of(limit):
        kernels.ema(target, product, weight)
    check_average(target, old, value64(product), float(weight))


@MANY
@given(averages(), eps_values, limits)
def test_ema_of_square_moves_towards_the_square_plus_eps_and_rounds_once(case, eps, limit):
    product, target, weight = case
    old = target.clone()
    with chunk_of(limit):
        kernels.ema_of_square(target, product, weight, eps)
    check_average(target, old, value64(product) ** 2 + eps, float(weight))


# --- apply ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    product: Product
    param: Tensor
    decay: float | Tensor
    limit: int

    @property
    def want(self) -> Tensor:
        return self.param.double() * (1 - float(self.decay)) - value64(self.product)


@st.composite
def cases(draw, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    product = draw(products(dtypes=dtypes))
    dtype, shape = product.dense.dtype, product.shape
    param = laid_out(noise(shape, 500).to(dtype), draw(st.sampled_from(LAYOUTS[:-1])))
    decay = draw(st.sampled_from((0.0, 0.125, 0.3, "tensor")))
    acc = accumulator_dtype(dtype)
    return Case(product, param, torch.tensor(0.25, dtype=acc) if decay == "tensor" else decay, draw(limits))


@MANY
@given(cases(dtypes=(FP32, FP64)))
def test_apply_decays_the_parameter_and_subtracts_the_value(case):
    param = case.param.clone()
    before = copies(case.product.dense, *case.product.factors)
    with chunk_of(case.limit):
        kernels.apply_update(param, case.product, case.decay)
    same(param, case.want, ELEMENT[param.dtype])
    assert all(torch.equal(a, b) for a, b in zip(before, (case.product.dense, *case.product.factors), strict=True))


@MANY
@given(cases(dtypes=(BF16, FP16)))
def test_low_precision_apply_rounds_the_exact_result_once(case):
    param = laid_out(case.param, "contiguous").clone()
    with chunk_of(case.limit):
        kernels.apply_update(param, case.product, case.decay)
    # Half a unit in the last place is what one rounding costs; a second one would cost another half. fp32 arithmetic
    # before it adds some 6e-8 of the largest term, seen beside half a unit only where two terms cancel.
    terms = case.param.double().abs() + value64(case.product).abs()
    assert ((param.double() - case.want).abs() <= half_unit(param) + 1e-6 * terms).all()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["plain", "tensor scale", "factors", "bound"])
def test_low_precision_apply_is_fp32_arithmetic_rounded_to_nearest(dtype, decay, kind):
    m, n = 500, 700
    dense, param = noise((m, n), 0).to(dtype), noise((m, n), 1).to(dtype)
    row, col = noise((m, 1), 2).float(), noise((1, n), 3).float()
    product = {
        "plain": Product(dense, scale=0.037),
        "tensor scale": Product(dense, scale=torch.tensor(0.037)),
        "factors": Product(dense, (row, col)),
        "bound": Product(dense, bound=0.5, scale=0.037),
    }[kind]
    x = dense.float() if product.bound is None else dense.float().clamp(-0.5, 0.5)
    x = x * row * col if product.factors else x * 0.037
    keep = param.float() * (1 - decay) if decay else param.float()
    want = (keep - x).to(dtype)
    kernels.apply_update(param, product, decay)
    wrong = param != want
    # A fused multiply-add skips one fp32 rounding of 2**-24; it shows only where the sum lies that close to the
    # middle of two neighbours: at 8 or 11 bits, less than one element in 1000, and then one neighbour away.
    assert wrong.float().mean() < 1e-3
    assert ((param.double() - want.double()).abs()[wrong] <= 2 * half_unit(want)[wrong] * 2).all()


@MANY
@given(cases())
def test_a_writer_sees_every_new_value_at_its_flat_index_and_alone_writes(case):
    param = case.param.clone()
    seen, starts = [], []

    class Recording(kernels.WeightCodec):
        def write(self, param: Tensor, value: Tensor, start: int) -> None:
            assert param.shape == value.shape
            assert value.dtype == accumulator_dtype(param.dtype)
            starts.append(start)
            seen.append(value.flatten().clone())

    with chunk_of(max(case.limit, 4)):  # where there is a codec, chunks are smaller
        kernels.apply_update(param, case.product, case.decay, Recording())
    assert torch.equal(param, case.param)
    assert starts == [sum(len(s) for s in seen[:i]) for i in range(len(seen))]
    flat = torch.cat(seen) if seen else torch.empty(0)
    same(flat.view(param.shape), case.want, ELEMENT[accumulator_dtype(param.dtype)])


def test_a_writer_writes_into_the_parameter_whatever_its_strides():
    class Rounding(kernels.WeightCodec):
        def write(self, param: Tensor, value: Tensor, start: int) -> None:
            param.copy_(value)

    param = torch.zeros(6, 5, dtype=BF16).t()
    with chunk_of(16):
        kernels.apply_update(param, Product(torch.arange(30.0).view(5, 6)), codec=Rounding())
    assert torch.equal(param, -torch.arange(30.0).view(5, 6).bfloat16())


# --- all_finite ----------------------------------------------------------------------------------------------------


@SOME
@given(shapes(), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.integers(0, 99))
def test_all_finite_holds_for_finite_numbers(shape, dtype, layout, seed):
    values = noise(shape, seed).sign() * 6e4  # fp16 holds up to 65504: the sum of a few would be infinite in fp16
    assert kernels.all_finite(laid_out(values.to(dtype), layout)).item() is True


@SOME
@given(shapes(), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS[:-1]), st.data())
def test_all_finite_sees_one_bad_element_anywhere(shape, dtype, layout, data):
    x = laid_out(noise(shape, 0).to(dtype), layout)
    if x.numel() == 0:
        return
    at = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    x[at] = data.draw(st.sampled_from((math.inf, -math.inf, math.nan)))
    assert kernels.all_finite(x).item() is False


def test_all_finite_sees_infinities_that_cancel():
    assert not kernels.all_finite(torch.tensor([math.inf, -math.inf, 1.0]))


# --- scratch -------------------------------------------------------------------------------------------------------

LIMIT = 8_000_000
MATRIX = (3072, 2048)  # 6 million elements: 12 MB in bf16, and 25 MB as fp32 numbers
ROW, COLUMN = torch.ones(MATRIX[0], 1), torch.ones(1, MATRIX[1])


@pytest.mark.slow
@pytest.mark.parametrize("factors", [(), (ROW, COLUMN)], ids=["no factors", "row and column"])
@pytest.mark.parametrize("kernel", ["apply", "sums", "sum_of_squares"])
def test_scratch_does_not_grow_with_the_parameter(kernel, factors):
    dense = torch.ones(MATRIX, dtype=BF16)
    product = Product(dense, factors, scale=torch.tensor(1e-3))
    if kernel == "apply":
        param = torch.ones(MATRIX, dtype=BF16)
        assert peak_extra_bytes(lambda: kernels.apply_update(param, product, 0.1)) <= LIMIT
    else:
        assert peak_extra_bytes(lambda: getattr(kernels, kernel)(product)) <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 6 << 20), (6 << 20,), (6 << 16, 16)], ids=["one row", "vector", "tall"])
def test_apply_needs_little_scratch_whatever_the_shape(shape):
    param, dense = torch.ones(shape, dtype=BF16), torch.ones(shape, dtype=BF16)
    assert peak_extra_bytes(lambda: kernels.apply_update(param, Product(dense, scale=torch.tensor(1e-3)))) <= LIMIT


@pytest.mark.slow
def test_averages_need_little_scratch():
    target, dense = torch.zeros(6 << 20), torch.ones(6 << 20, dtype=BF16)
    assert peak_extra_bytes(lambda: kernels.ema_of_square(target, Product(dense), 0.1)) <= LIMIT
    assert peak_extra_bytes(lambda: kernels.ema(target, Product(dense), 0.1)) <= LIMIT
