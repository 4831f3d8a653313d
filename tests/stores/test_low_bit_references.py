"""8-bit, 4-bit and fp8 statistics beside bitsandbytes and torchao: code books, codes, layouts, trajectories.

torchao rounds to the nearest code, as we do; bitsandbytes' CPU kernel does not (it has no code for zero and errs on
small values), so its codes are compared with ours only where they must agree. Trajectories step along the same
gradients from the same weights. Where a difference is meant, it is asserted, not tolerated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import torchao.optim
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor, nn
from torchao.optim import subclass_4bit, subclass_8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

import optstate
from optstate import updates
from optstate.checkpoint import CheckpointError
from optstate.recipes import AdamW4bit, AdamW8bit, Lion8bit, SGDM8bit
from optstate.spec import ParamSpec
from optstate.stores import Block4, Block8, Float8, Full, Requests, Slot, Store
from optstate.updates import Chain, Context, State, Transform, Update
from optstate.weights import Plain
from tests.support.trajectories import STEPS, Shape, apart, follow, gradient, parameters

pytestmark = pytest.mark.peer

SMALLEST = 4096
"""bitsandbytes' and torchao's: smaller parameters keep fp32 statistics."""
LEAST_MAXIMUM = 2.0**-120
"""Ours: the maximum of a block of zeros. torchao's is 1e-12, and smaller values become zero there."""
BLOCKS: dict[str, Store] = {"block8": Block8(), "block4": Block4(), "fp8": Float8()}


@dataclass(frozen=True)
class keep(Transform):
    """Store what comes in; step along what was stored before."""

    store: Store = Full()
    signed: bool = True

    def slots(self, spec: ParamSpec, group: Any) -> dict[str, Slot]:
        return {"kept": Slot(self.store, signed=self.signed)}

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        before = state["kept"].read().clone()
        yield from state["kept"].ema(update, 1.0)
        return Update(before)


class Kept:
    """One statistic in a store: write values, look at what is stored, read values back."""

    def __init__(self, store: Store, shape: Shape, signed: bool) -> None:
        self.param = nn.Parameter(torch.zeros(shape))
        self.optimizer = optstate.Optimizer([("p", self.param)], keep(store, signed), lr=1.0)

    def write(self, values: Tensor) -> None:
        self.param.grad = values.clone().view(self.param.shape)
        self.optimizer.step()

    def read(self) -> Tensor:
        with torch.no_grad():
            self.param.zero_()
        self.write(torch.zeros_like(self.param))
        return -self.param.detach()

    def __getitem__(self, field: str) -> Tensor:
        tensor = self.optimizer.state[self.param][f"kept.{field}"]
        assert isinstance(tensor, Tensor)
        return tensor


# --- code books ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_the_8_bit_code_book_is_bitsandbytes_and_torchaos_bit_for_bit(signed: bool) -> None:
    """Codes 0 to 255 with a block maximum of 1, decoded."""
    kept = Kept(Block8(), (16, 256), signed)
    kept["codes"].copy_(torch.arange(256).repeat(16, 1))
    kept["absmax"].fill_(1.0)
    values = kept.read()
    book = create_dynamic_map(signed=signed)
    theirs = subclass_8bit.get_qmap_signed() if signed else subclass_8bit.get_qmap_unsigned()
    assert torch.equal(values, book.repeat(16, 1))
    assert torch.equal(book, torch.tensor(theirs))


@pytest.mark.parametrize("signed", [True, False])
def test_the_4_bit_code_book_is_torchaos_bit_for_bit(signed: bool) -> None:
    """All 256 bytes, high nibble first."""
    kept = Kept(Block4(), (32, 128), signed)
    kept["codes"].view(-1).copy_(torch.arange(256).repeat(8))
    kept["absmax"].fill_(1.0)
    book = torch.tensor(subclass_4bit.get_qmap_signed() if signed else subclass_4bit.get_qmap_unsigned())
    pairs = torch.stack([book.repeat_interleave(16), book.repeat(16)], dim=1)
    assert torch.equal(kept.read(), pairs.view(-1).repeat(8).view(32, 128))
    assert bool((book == 0).any()) == signed


# --- single quantisations --------------------------------------------------------------------------------------------


def hard_values(signed: bool, book: Tensor, block: int) -> Tensor:
    """Blocks of random values of several kinds, of code-book values and of values beside every midpoint."""
    generator = torch.Generator().manual_seed(5)

    def noise() -> Tensor:
        return torch.randn(6, block, generator=generator)

    heavy = noise() ** 5
    sparse = noise() * (noise() > 1)
    wide = noise() * torch.logspace(-9, 0, block)
    low = -noise().abs().clamp(max=0.5)
    low[:, 3] = -0.75  # the largest by magnitude is negative: the signed map of 8 bits has no -1
    scales = noise() * torch.logspace(-30, 30, 6)[:, None]
    middle = ((book[1:].double() + book[:-1].double()) / 2).float()
    beside = torch.zeros(4, block)
    beside[:, 0] = 1.0
    for row, factor in enumerate((1 - 1e-5, 1 + 1e-5, 1 - 1e-3, 1 + 1e-3)):
        beside[row, 1 : 1 + len(middle)] = middle[: block - 1] * factor
    exact = torch.zeros(1, block)
    exact[0, : len(book)] = book
    exact[0, -1] = 1.0
    values = torch.cat([noise(), heavy, sparse, wide, low, scales, beside, exact, torch.zeros(2, block)]).view(-1)
    return values if signed else values.abs()


def nearest(values: Tensor, book: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes of minimal distance in fp64, by comparing with every value of the book, and where that is a near tie."""
    rows = values.view(-1, block).double()
    scaled = (rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-300)).view(-1, 1)
    distance = (scaled - book.double()).abs()
    two = distance.topk(2, dim=1, largest=False)
    # Scaling in fp32 is off by 2**-23: closer than that to a midpoint either side is right.
    tie = (two.values[:, 1] - two.values[:, 0]) <= 2**-22 * scaled.abs().view(-1)
    return two.indices[:, 0], tie


def unpacked(codes: Tensor) -> Tensor:
    return torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)


@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_codes_are_the_nearest_and_torchaos(signed: bool) -> None:
    book = create_dynamic_map(signed=signed)
    values = hard_values(signed, book, 256)
    kept = Kept(Block8(), (len(values) // 256, 256), signed)
    kept.write(values)
    codes, (expected, tie) = kept["codes"].view(-1).long(), nearest(values, book, 256)
    torchaos = subclass_8bit.OptimState8bit.zeros((len(values),), signed)
    torchaos.copy_(values)
    # The one rule of ours that is not "nearest": a second moment above zero gets no code of zero (torchao: zero).
    vanishing = (values > 0) & (expected == 0) & (not signed)
    assert vanishing.any() == (not signed)
    assert torch.equal(codes[vanishing], torch.ones_like(codes[vanishing]))
    assert not torchaos.codes[vanishing].any()
    plain = ~tie & ~vanishing
    assert (~tie).sum() > 0.98 * len(values)
    assert torch.equal(codes[plain], expected[plain])
    block_of_tiny = values.view(-1, 256).abs().amax(1) < 1e-12  # torchao divides by at least 1e-12
    comparable = plain & ~block_of_tiny.repeat_interleave(256)
    assert torch.equal(codes[comparable], torchaos.codes[comparable].long())
    assert torch.equal(kept["absmax"].view(-1), values.view(-1, 256).abs().amax(1).clamp(min=LEAST_MAXIMUM))


@pytest.mark.parametrize("signed", [True, False])
def test_4_bit_codes_are_the_nearest_and_torchaos(signed: bool) -> None:
    book = torch.tensor(subclass_4bit.get_qmap_signed() if signed else subclass_4bit.get_qmap_unsigned())
    values = hard_values(signed, book, 128)
    kept = Kept(Block4(), (len(values) // 128, 128), signed)
    kept.write(values)
    codes, (expected, tie) = unpacked(kept["codes"].view(-1)).long(), nearest(values, book, 128)
    torchaos = subclass_4bit.OptimState4bit.zeros((len(values),), signed)
    torchaos.copy_(values)
    assert (~tie).sum() > 0.98 * len(values)
    assert torch.equal(codes[~tie], expected[~tie])
    comparable = ~tie & ~(values.view(-1, 128).abs().amax(1) < 1e-12).repeat_interleave(128)
    assert torch.equal(codes[comparable], unpacked(torchaos.codes)[comparable].long())
    assert torch.equal(kept["absmax"].view(-1), values.view(-1, 128).abs().amax(1).clamp(min=LEAST_MAXIMUM))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("signed", [True, False])
def test_zero_stays_zero(name: str, signed: bool) -> None:
    """Zeros beside other values, and blocks of zeros only, are read back as exact zeros.

    The exception is the unsigned 4-bit map, which has no zero: zeros read as a sixteenth of the block's maximum, as in
    torchao. In a block of zeros only that is 2**-124, whose root is nothing beside an eps of 1e-8.
    """
    kept = Kept(BLOCKS[name], (32, 256), signed)
    values = torch.zeros(32, 256)
    values[:16, ::3] = torch.rand(16, 86, generator=torch.Generator().manual_seed(1)) + 0.5
    kept.write(values)
    back = kept.read()
    if name == "block4" and not signed:
        torchaos = subclass_4bit.OptimState4bit.zeros((32, 256), signed)
        torchaos.copy_(values)
        assert torch.equal(back[:16], torchaos.dequantize()[:16])
        assert (back[:16][values[:16] == 0] > 0.05).all()
        assert (back[16:] == LEAST_MAXIMUM / 16).all()
        assert (torchaos.dequantize()[16:] > 1e-14).all()
    else:
        assert not back[values == 0].any()
        assert back[values != 0].all()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_second_moment_above_zero_stays_above_zero(name: str) -> None:
    """Down to the smallest numbers beside a maximum of one, and in blocks of tiny numbers only. In torchao only the
    4-bit map, which has no zero, does not lose them."""
    kept = Kept(BLOCKS[name], (32, 256), signed=False)
    values = torch.logspace(-36, 0, 256).repeat(32, 1)
    values[16:] = torch.logspace(-38, -36, 256)
    kept.write(values)
    assert (kept.read() > 0).all()
    torchaos = {
        "block8": subclass_8bit.OptimState8bit.zeros((32, 256), signed=False),
        "block4": subclass_4bit.OptimState4bit.zeros((32, 256), signed=False),
        "fp8": OptimStateFp8.zeros((32, 256)),
    }[name]
    torchaos.copy_(values)
    assert (torchaos.dequantize() > 0).all() == (name == "block4")


def test_bitsandbytes_cpu_kernel_turns_zeros_into_small_numbers() -> None:
    """Signed code 131 and unsigned code 7 instead of 127 and 0: the reason why it is no reference for small values."""
    values = torch.zeros(256)
    values[0] = 1.0
    for signed, zero, wrong in ((True, 127, 131), (False, 0, 7)):
        book = create_dynamic_map(signed=signed)
        codes, _ = torch.ops.bitsandbytes.quantize_blockwise(values, book, 256)
        assert book[zero] == 0
        assert (codes[1:] == wrong).all()
        kept = Kept(Block8(), (16, 256), signed)
        kept.write(values.repeat(16, 1))
        assert (kept["codes"][:, 1:] == zero).all()


@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_codes_are_bitsandbytes_for_large_values(signed: bool) -> None:
    """Above 1 % of the block's maximum its CPU kernel differs by a code at most, and that rarely."""
    book = create_dynamic_map(signed=signed)
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    values = values if signed else values.square()
    kept = Kept(Block8(), (64, 256), signed)
    kept.write(values)
    theirs, absmax = torch.ops.bitsandbytes.quantize_blockwise(values, book, 256)
    large = values.abs() > 0.01 * values.abs().amax(1, keepdim=True)
    assert large.float().mean() > 0.5
    off = (kept["codes"].int() - theirs.int())[large].abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() < 0.005
    assert torch.equal(kept["absmax"].view(-1), absmax)


def test_fp8_codes_are_torchaos() -> None:
    """e4m3 of the value over the block's maximum over 448. An fp32 rounding may decide a tie: one code, rarely."""
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)) ** 3
    kept = Kept(Float8(), (64, 256), signed=True)
    kept.write(values)
    theirs = OptimStateFp8.zeros((64, 256))
    theirs.copy_(values)
    ours = kept["codes"].view(torch.float8_e4m3fn).float()
    off = ours != theirs.codes.float()
    assert off.float().mean() < 1e-3
    assert torch.all((ours - theirs.codes.float()).abs() <= theirs.codes.float().abs() / 8)
    same = ~off
    assert torch.allclose(kept.read()[same], theirs.dequantize()[same], rtol=1e-6, atol=0.0)


# --- what is kept ----------------------------------------------------------------------------------------------------


SHAPES = [(64, 64), (67, 131), (5000,), (3, 40, 41), (9, 512)]


def entries(shape: Shape, per: int) -> Shape:
    """One for every `per` elements: in rows where these hold so many each, else flat."""
    if shape[-1] % per == 0:
        return (*shape[:-1], shape[-1] // per)
    return (math.ceil(math.prod(shape) / per),)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout_of_8_bit_statistics(shape: Shape) -> None:
    (p,) = parameters(shape)
    optimizer = AdamW8bit([p])
    blocks = math.ceil(p.numel() / 256)
    for slot in ("exp_avg", "exp_avg_sq"):
        codes, absmax = optimizer.state[p][f"{slot}.codes"], optimizer.state[p][f"{slot}.absmax"]
        assert (codes.dtype, codes.shape) == (torch.uint8, p.shape)
        assert (absmax.dtype, absmax.shape) == (torch.float32, entries(shape, 256))
    assert optimizer.state_nbytes() == 2 * (p.numel() + 4 * blocks)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout_of_4_bit_statistics(shape: Shape) -> None:
    """Two codes a byte in row-major order, as torchao's; an odd count leaves half a byte."""
    (p,) = parameters(shape)
    optimizer = AdamW4bit([p])
    nbytes, blocks = math.ceil(p.numel() / 2), math.ceil(p.numel() / 128)
    for slot in ("exp_avg", "exp_avg_sq"):
        codes, absmax = optimizer.state[p][f"{slot}.codes"], optimizer.state[p][f"{slot}.absmax"]
        assert (codes.dtype, codes.shape) == (torch.uint8, entries(shape, 2))
        assert (absmax.dtype, absmax.shape) == (torch.float32, entries(shape, 128))
    assert optimizer.state_nbytes() == 2 * (nbytes + 4 * blocks)


@pytest.mark.parametrize("block", [64, 1024])
def test_other_block_sizes(block: int) -> None:
    (p,) = parameters((67, 131))
    assert AdamW8bit([p], block=block).state[p]["exp_avg.absmax"].shape == (math.ceil(67 * 131 / block),)


@pytest.mark.parametrize(
    ("recipe", "reference", "bound"),
    [
        (AdamW8bit, bitsandbytes.optim.AdamW8bit, 2e-6),
        (Lion8bit, bitsandbytes.optim.Lion8bit, 2e-6),
        (SGDM8bit, partial(bitsandbytes.optim.SGD8bit, momentum=0.9), 2e-6),
        (AdamW8bit, torchao.optim.AdamW8bit, 2e-5),
        (AdamW4bit, torchao.optim.AdamW4bit, 2e-5),
    ],
    ids=["bitsandbytes", "bitsandbytes lion", "bitsandbytes sgd", "torchao 8 bits", "torchao 4 bits"],
)
def test_small_parameters_keep_fp32_as_in_both(
    recipe: Callable[..., Any], reference: Callable[..., Any], bound: float
) -> None:
    """Fewer than 4096 elements: full statistics, the plan says so, and the trajectory is the unquantised one's.

    torchao computes `1 - beta2**step` in fp32, which is 1e-5 off at the first step.
    """
    shapes = [(63, 65), (SMALLEST - 1,)]
    left, right = parameters(*shapes), parameters(*shapes)
    ours, theirs = recipe(left, lr=1e-2), reference(right, lr=1e-2)
    assert apart(follow(ours, left), follow(theirs, right)) < bound
    for p, q in zip(left, right, strict=True):
        assert {t.dtype for t in ours.state[p].values() if isinstance(t, Tensor)} == {torch.float32}
        assert torch.uint8 not in {t.dtype for t in theirs.state[q].values() if isinstance(t, Tensor)}
    assert "4096" in str(ours.plan())


# --- trajectories ----------------------------------------------------------------------------------------------------

ADAM: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
SHAPE: Shape = (64, 128)


def distance(ours: torch.optim.Optimizer, p: nn.Parameter, theirs: torch.optim.Optimizer, q: nn.Parameter) -> float:
    return apart(follow(ours, [p]), follow(theirs, [q]))


def pair(shape: Shape = SHAPE, dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, nn.Parameter]:
    (p,), (q,) = parameters(shape, dtype=dtype), parameters(shape, dtype=dtype)
    return p, q


def adamw_of_fp8(params: list[nn.Parameter]) -> optstate.Optimizer:
    chain = updates.chain(
        updates.scale_by_adam(Float8(), Float8(), betas=ADAM["betas"], eps=ADAM["eps"]),
        updates.add_decayed_weights(ADAM["weight_decay"]),
    )
    return optstate.Optimizer(params, chain, lr=ADAM["lr"])


@pytest.mark.parametrize(
    ("ours", "theirs", "bound"),
    [
        (lambda p: AdamW8bit(p, **ADAM), lambda p: torchao.optim.AdamW8bit(p, **ADAM), 3e-4),
        (lambda p: AdamW4bit(p, **ADAM), lambda p: torchao.optim.AdamW4bit(p, **ADAM), 3e-3),
        (adamw_of_fp8, lambda p: torchao.optim.AdamWFp8(p, **ADAM), 1e-3),
    ],
    ids=["8 bits", "4 bits", "fp8"],
)
def test_low_bit_adamw_is_torchaos(ours: Callable[..., Any], theirs: Callable[..., Any], bound: float) -> None:
    """Same arithmetic in another order: 1e-5 of the total update, as torchao's bias corrections are fp32. The bounds
    leave room for a few values that another processor's rounding puts on the other side of a midpoint: the next
    code is up to 6 % (8 bits), 12 % (fp8) or half (4 bits) off. Rounding the moments before the step is taken, or
    blocks that begin elsewhere, would show as 1e-2."""
    p, q = pair()
    assert distance(ours([p]), p, theirs([q]), q) < bound


@pytest.mark.parametrize("shape", [(1024, 1031), (2, 600, 512), (640_000,)], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_parameters_of_several_chunks(bits: int, shape: Shape) -> None:
    """More than 2**19 elements are stepped in slices, which must begin where blocks do, also where rows do not.

    All but two elements in ten thousand move alike, to 1e-3 lr; the rest are those whose second moment torchao loses
    (see below), and ties.
    """
    ours, theirs = (AdamW8bit, torchao.optim.AdamW8bit) if bits == 8 else (AdamW4bit, torchao.optim.AdamW4bit)
    p, q = pair(shape)
    left, right = ours([p], **ADAM), theirs([q], **ADAM)
    (a,), (b,) = follow(left, [p], steps=3), follow(right, [q], steps=3)
    assert ((a - b).abs() > 1e-3 * ADAM["lr"]).float().mean() < 2e-4
    for slot in ("exp_avg", "exp_avg_sq"):
        differ = left.state[p][f"{slot}.codes"].view(-1) != right.state[q][slot].codes.view(-1)
        assert differ.float().mean() < 1e-4
        assert torch.allclose(left.state[p][f"{slot}.absmax"].view(-1), right.state[q][slot].scale, rtol=1e-3, atol=0.0)


def test_8_bit_adamw_is_near_bitsandbytes() -> None:
    """Its kernel rounds some values to a neighbour of the nearest code, small ones up to 0.1 % of the maximum off."""
    p, q = pair()
    assert distance(AdamW8bit([p], **ADAM), p, bitsandbytes.optim.AdamW8bit([q], **ADAM), q) < 5e-3


@pytest.mark.parametrize("shape", [(67, 131), (5001,)], ids=str)
def test_blocks_that_do_not_divide_the_parameter(shape: Shape) -> None:
    """A short last block as in bitsandbytes. torchao quantises nothing then, and says nothing."""
    p, q = pair(shape)
    assert distance(AdamW8bit([p], **ADAM), p, bitsandbytes.optim.AdamW8bit([q], **ADAM), q) < 5e-3
    (r,) = parameters(shape)
    unquantised = torchao.optim.AdamW8bit([r], **ADAM)
    follow(unquantised, [r], steps=1)
    assert type(unquantised.state[r]["exp_avg"]) is Tensor


@pytest.mark.parametrize(
    ("ours", "low", "high"),
    [
        (lambda p: AdamW8bit(p, **ADAM), 1e-3, 4e-2),
        (adamw_of_fp8, 1e-3, 8e-2),
        (lambda p: AdamW4bit(p, **ADAM), 1e-2, 0.4),
    ],
    ids=["8 bits", "fp8", "4 bits"],
)
def test_low_bit_adamw_stays_near_adamw(ours: Callable[..., Any], low: float, high: float) -> None:
    """How much the format costs; not nothing, or nothing was quantised."""
    p, q = pair()
    assert low < distance(ours([p]), p, torch.optim.AdamW([q], **ADAM), q) < high


def test_8_bit_adamw_of_bf16_weights_is_torchaos() -> None:
    """Both compute in fp32 and round once, to nearest here: all but a few weights agree to the bit."""
    p, q = pair(dtype=torch.bfloat16)
    follow(AdamW8bit([p], weights=Plain(), **ADAM), [p])
    follow(torchao.optim.AdamW8bit([q], **ADAM), [q])
    assert (p != q).float().mean() < 0.01


def test_8_bit_lion_is_near_bitsandbytes() -> None:
    """Only signs matter, and a momentum that is a code off may turn one around where the mix is near zero. A sign is
    2 lr of a total update of about 4 lr: the bound allows two in a thousand elements over all 20 steps."""
    p, q = pair()
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
    assert distance(Lion8bit([p], **options), p, bitsandbytes.optim.Lion8bit([q], **options), q) < 2e-2
    assert Lion8bit([p]).state_nbytes() == p.numel() + 4 * p.numel() // 256


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_8_bit_momentum_is_near_bitsandbytes(weight_decay: float) -> None:
    """The heavy ball with an L2 penalty, as `torch.optim.SGD`'s."""
    p, q = pair()
    ours = SGDM8bit([p], lr=0.05, momentum=0.9, weight_decay=weight_decay)
    theirs = bitsandbytes.optim.SGD8bit([q], lr=0.05, momentum=0.9, weight_decay=weight_decay)
    assert distance(ours, p, theirs, q) < 5e-3


@pytest.mark.parametrize("options", [{"dampening": 0.4}, {"nesterov": True}], ids=str)
def test_8_bit_momentum_heeds_what_bitsandbytes_ignores(options: dict[str, Any]) -> None:
    """`SGD8bit` takes dampening and nesterov and steps as if it had not: ours follows `torch.optim.SGD`."""
    common: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}
    (p, q), (r, s) = pair(), pair()
    ours = follow(SGDM8bit([p], **common, **options), [p])
    exact = follow(torch.optim.SGD([q], **common, **options), [q])
    assert apart(ours, exact) < 3e-2
    ignoring = follow(bitsandbytes.optim.SGD8bit([r], **common, **options), [r])
    assert apart(ignoring, exact) > 0.05
    assert torch.equal(ignoring[0], follow(bitsandbytes.optim.SGD8bit([s], **common), [s])[0])


# --- where we mean to differ -----------------------------------------------------------------------------------------


def test_elements_without_gradient_drift_in_bitsandbytes_and_not_here() -> None:
    """Embedding rows that no batch uses share blocks with rows in use: 64 columns, four rows a block of 256.

    With no weight decay nothing should move them.
    """
    p, q = pair((128, 64))
    untouched = torch.arange(128) % 4 == 2
    ours = AdamW8bit([p], lr=1e-2, weight_decay=0.0)
    theirs = bitsandbytes.optim.AdamW8bit([q], lr=1e-2, weight_decay=0.0)
    before = p.detach().clone()
    for step in range(STEPS):
        for weight, optimizer in ((p, ours), (q, theirs)):
            weight.grad = gradient((128, 64), step)
            weight.grad[untouched] = 0.0
            optimizer.step()
    assert torch.equal(p[untouched], before[untouched])
    assert (q[untouched] != before[untouched]).all()


@pytest.mark.parametrize("role", ["embedding", "head"])
def test_4_bit_adamw_keeps_8_bits_of_token_tables_where_torchao_keeps_4(role: str) -> None:
    p, q = pair()
    ours = AdamW4bit([{"params": [("p", p)], "role": role}], **ADAM)
    theirs = torchao.optim.AdamW4bit([q], **ADAM)
    ours_moved, theirs_moved = follow(ours, [p]), follow(theirs, [q])
    assert ours.state[p]["exp_avg.codes"].shape == SHAPE
    assert ours.state[p]["exp_avg_sq.codes"].shape == SHAPE
    assert theirs.state[q]["exp_avg"].codes.numel() == q.numel() // 2
    assert apart(ours_moved, theirs_moved) > 1e-2


def test_a_small_second_moment_does_not_vanish_and_blow_up_the_step_as_in_torchao() -> None:
    """A gradient of 1e-4 once, beside gradients of 1: v is 1e-8 of the block's largest, below the smallest code.

    torchao stores zero, and the next step is m / eps. Here it becomes the smallest code, and the step is shorter than
    the exact one. Later gradients are zero for these elements.
    """
    p, q = pair()
    (r,) = parameters(SHAPE)
    small = torch.zeros(SHAPE, dtype=torch.bool)
    small[:, ::7] = True
    moved = {}
    for name, weight, optimizer in (
        ("ours", p, AdamW8bit([p], lr=1e-3, weight_decay=0.0)),
        ("torchao", q, torchao.optim.AdamW8bit([q], lr=1e-3, weight_decay=0.0)),
        ("exact", r, torch.optim.AdamW([r], lr=1e-3, weight_decay=0.0)),
    ):
        before = weight.detach().clone()
        with torch.compiler.set_stance("force_eager"):
            for later in (False, True):
                weight.grad = torch.where(small, 0.0 if later else 1e-4, 1.0).expand(SHAPE).clone()
                optimizer.step()
        moved[name] = (weight.detach() - before)[small].abs().max().item()
    assert 1e-3 < moved["exact"] < 2e-3
    assert moved["ours"] < moved["exact"]
    assert moved["torchao"] > 100 * moved["exact"]


# --- 4 bits with row and column maxima -------------------------------------------------------------------------------


def rank1_adamw(weight: Tensor) -> Tensor:
    """The total update of `STEPS` steps with v in 4 bits under rank-1 normalisation, codes by brute force.

    arXiv 2309.01507: the scale of v[i, j] is the smaller of the largest v in row i and in column j, of more
    dimensions the smallest of one maximum for each. m has blocks of 128.
    """
    lr, (beta1, beta2), eps, weight_decay = ADAM["lr"], ADAM["betas"], ADAM["eps"], ADAM["weight_decay"]
    first = torch.tensor(subclass_4bit.get_qmap_signed())
    second = torch.tensor(subclass_4bit.get_qmap_unsigned())

    def rounded(value: Tensor, scale: Tensor, book: Tensor) -> Tensor:
        share = value / scale.clamp(min=1e-30)
        return book[(share.unsqueeze(-1) - book).abs().argmin(-1)] * scale

    p, m, v = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(STEPS):
        g = gradient(tuple(weight.shape), step)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        c1, c2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
        p = p * (1 - lr * weight_decay) - lr * (m / c1) / ((v / c2).sqrt() + eps)
        blocks = m.view(-1, 128)
        m = rounded(blocks, blocks.abs().amax(1, keepdim=True), first).view_as(m)
        maxima = [v.amax([d for d in range(v.ndim) if d != dim], keepdim=True) for dim in range(v.ndim)]
        v = rounded(v, reduce(torch.minimum, maxima), second)
    return p - weight


@pytest.mark.parametrize("shape", [SHAPE, (4, 32, 64)], ids=str)
def test_4_bit_adamw_with_rank_1_scales_follows_its_formulas(shape: Shape) -> None:
    (p,) = parameters(shape)
    expected = rank1_adamw(p.detach().clone())
    assert apart(follow(AdamW4bit([p], rank1=True, **ADAM), [p]), [expected]) < 3e-3


def test_rank_1_scales_of_vectors_are_blocks() -> None:
    """One dimension has no rows and columns: blocks of 128, as without rank1."""
    p, q = pair((5000,))
    assert apart(follow(AdamW4bit([p], rank1=True, **ADAM), [p]), follow(AdamW4bit([q], **ADAM), [q])) == 0.0


def test_4_bit_adamw_keeps_8_bits_of_declared_embeddings_and_heads_in_both_moments() -> None:
    """By the roles of a model, in the plan and in what is allocated: a byte an element and a scale per 256."""
    layers = {"embed": nn.Embedding(96, 64), "fc": nn.Linear(64, 80), "head": nn.Linear(80, 96, bias=False)}
    model = nn.ModuleDict(layers)
    for rank1 in (False, True):
        optimizer = AdamW4bit(optstate.declare_roles(model), rank1=rank1)
        stores = {param.spec.name: param.stores for param in optimizer.plan()}
        for name, weight in (("embed.weight", model["embed"].weight), ("head.weight", model["head"].weight)):
            assert stores[name] == {"exp_avg": "Block8()", "exp_avg_sq": "Block8()"}
            state = {key: value for key, value in optimizer.state[weight].items() if isinstance(value, torch.Tensor)}
            assert sum(value.nbytes for value in state.values()) == 2 * (weight.numel() + 4 * weight.numel() // 256)
        assert all(store.startswith("Block4(") for store in stores["fc.weight"].values())


def test_files_with_4_bits_in_the_second_moments_of_heads_need_consent(tmp_path: Path) -> None:
    """As they were written before; converted, each number is within what 4 and 8 bits round."""

    def chain(second: Store) -> Chain:
        return optstate.chain(updates.scale_by_adam(Block8(), second), updates.add_decayed_weights(0.01))

    (p,) = parameters(SHAPE)
    groups = [{"params": [("p", p)], "role": "head"}]
    before = optstate.Optimizer(groups, chain(Block4()), lr=1e-3)
    follow(before, [p])
    optstate.save(before, tmp_path / "opt.safetensors")
    after = AdamW4bit(groups)
    with pytest.raises(CheckpointError, match=r"exp_avg_sq was saved in Block4.*kept in Block8.*allow_lossy=True"):
        optstate.load(after, tmp_path / "opt.safetensors")
    with pytest.raises(ValueError, match="exp_avg_sq in Block4"):
        after.load_state_dict(before.state_dict())
    assert after.state[p]["step"] == 0
    optstate.load(after, tmp_path / "opt.safetensors", allow_lossy=True)
    assert torch.equal(after.state[p]["exp_avg.codes"], before.state[p]["exp_avg.codes"])
    four, eight = (
        store.read({key: optimizer.state[p][f"exp_avg_sq.{key}"] for key in ("codes", "absmax")}, SHAPE)
        for store, optimizer in ((Block4(signed=False), before), (Block8(signed=False), after))
    )
    # half a step of the unsigned 8-bit map is at most 0.35 % of the largest in a block
    assert (four - eight).abs().max() <= 0.0036 * four.max()
    assert not torch.equal(four, eight)
