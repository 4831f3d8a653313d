"""Codes of the compiled steps: nearest in float64, at most one place from the eager store's, read equal to the bit."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optstate.kernels import Noise, native
from optstate.optimizer.plan import SlotPlan
from optstate.optimizer.whole_steps.operands import KeptMoment
from optstate.recipes import AdamW
from optstate.stores import Block4, Block8, Float8
from optstate.stores.blockwise import Blockwise
from tests.support.compiled import every_pattern, needs_compiled_steps

pytestmark = needs_compiled_steps

STORES = [Block8(), Block8(64), Float8(), Block4(), Block4(1024)]
SLOTS = ["exp_avg", "exp_avg_sq"]


def wide_numbers(count: int) -> Tensor:
    """Random fp32 numbers whose magnitudes go from below the smallest scale to above a tenth of the largest number."""
    generator = torch.Generator().manual_seed(0)
    exponent = torch.rand(count, generator=generator, dtype=torch.float64) * 80 - 42
    return (torch.randn(count, generator=generator, dtype=torch.float64) * 10**exponent).clamp(-3e38, 3e38).float()


def values(block: int) -> Tensor:
    """What is encoded: in runs of blocks, the last block short."""
    bf16 = every_pattern(torch.bfloat16).float()
    bf16 = bf16[bf16.isfinite()]
    normal = torch.randn(20 * block, generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([3.4028234663852886e38, 1e38, -1e37, 1.0, 1e-30, 1e-38, 1e-45, 0.0])
    runs = [
        bf16,  # ascending magnitudes: blocks of nearly equal numbers
        bf16[torch.randperm(len(bf16), generator=torch.Generator().manual_seed(2))],
        wide_numbers(50 * block),
        normal,
        normal * 1e-3 ** torch.rand(20 * block, generator=torch.Generator().manual_seed(3)),
        normal[: 2 * block] * 2.0**-122,
        torch.full((block,), 1e-45),
        torch.zeros(2 * block),
        ends.repeat(block // 8),
    ]
    whole = [run[: len(run) // block * block] for run in runs]
    return torch.cat([*whole, normal[:7]])


def slot_of(store: Blockwise, name: str, count: int) -> tuple[SlotPlan, Any]:
    """The plan of a moment of `count` elements, and what its operand wants to know of a step."""
    param = nn.Parameter(torch.zeros(count))
    plan = next(iter(AdamW([("p", param)], first=store, second=store).plan()))
    return plan.slots[name], SimpleNamespace(param=param, spec=plan.spec, step=1)


def encode_and_decode(slot: SlotPlan, ctx: Any, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Fields and values as the compiled code writes and reads them."""
    fields = {name: torch.zeros(field.shape, dtype=field.dtype) for name, field in slot.fields.items()}
    state = {slot.keys[name]: field for name, field in fields.items()}
    kept = KeptMoment.of(slot)
    assert kept is not None
    moment = kept.operand(state, ctx, 0.1)
    assert moment is not None
    native.function("encode")(ctypes.byref(moment), value.data_ptr(), 0, len(value))
    decoded = torch.empty(len(value))
    native.function("decode")(ctypes.byref(moment), decoded.data_ptr(), 0, len(value))
    return fields, decoded


def places(slot: SlotPlan, codes: Tensor, count: int) -> Tensor:
    """The place of each element's code among the values in ascending order."""
    codes = codes.view(torch.uint8)
    if isinstance(slot.store, Block4):
        codes = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)
    codes = codes[:count].int()
    return torch.where(codes < 128, codes, 128 - codes) if isinstance(slot.store, Float8) else codes


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("store", STORES, ids=str)
def test_codes_are_nearest_and_read_to_the_bit(store: Blockwise, name: str) -> None:
    """An error is at most (1 + 1e-5) times that of the best code, in float64.

    The tolerance is that of fp32: a place up to 128 is known to 2**-18, so that of two codes at nearly the same
    distance the farther may be taken. A positive second moment has the first code above zero at least.
    """
    signed = name == "exp_avg"
    value = values(store.block) if signed else values(store.block).abs()
    slot, ctx = slot_of(store, name, len(value))
    fields, decoded = encode_and_decode(slot, ctx, value)
    expected = slot.store.encode(value.clone(), Noise("p", 1))
    assert torch.equal(fields["absmax"].view(-1), expected["absmax"].view(-1))
    count = len(value)
    mine, theirs = (places(slot, each["codes"].view(-1), count) for each in (fields, expected))
    assert (mine - theirs).abs().max() <= 1
    assert torch.equal(decoded, slot.store.read(fields, (count,)))
    if not isinstance(slot.store, Block4) or signed:
        assert not decoded[value == 0].any()
    if not signed:
        assert bool((decoded[value > 0] > 0).all())

    scale = fields["absmax"].view(-1).double().repeat_interleave(store.block)[:count]
    scaled = value.double() / scale
    book = torch.unique(slot.store.decode(every_code(slot), 256).double())
    above = torch.searchsorted(book, scaled).clamp(0, len(book) - 1)
    best = torch.minimum((book[above] - scaled).abs(), (book[(above - 1).clamp(min=0)] - scaled).abs())
    error = (slot.store.decode(fields["codes"].view(-1), count).double() - scaled).abs()
    is_kept_above_zero = (value > 0) & (mine == 1) & (not signed)
    assert bool((error <= best * (1 + 1e-5))[~is_kept_above_zero].all())


def every_code(slot: SlotPlan) -> Tensor:
    codes = torch.arange(256, dtype=torch.uint8)
    if isinstance(slot.store, Float8):
        codes = codes[(codes & 127) != 127]  # NaN
        codes = torch.cat([codes, codes[:2]])
        return codes.view(torch.float8_e4m3fn)
    return codes[:128] if isinstance(slot.store, Block4) else codes


@pytest.mark.parametrize("store", [Block8(), Block4()], ids=str)
def test_every_value_of_a_map_has_its_own_code(store: Blockwise) -> None:
    """The values of all codes, of which the largest is 1, so that the scale is 1, are written as those codes."""
    for name in SLOTS:
        slot, ctx = slot_of(store, name, 4096)
        book = slot.store.codebook.values  # type: ignore[union-attr]
        value = torch.zeros(4096)
        value[: len(book)] = book
        fields, decoded = encode_and_decode(slot, ctx, value)
        assert torch.equal(decoded[: len(book)], book)
        assert float(fields["absmax"].view(-1)[0]) == 1.0


def test_tables_do_not_depend_on_torchs_default_dtype_and_device() -> None:
    """A program may change both before the first step."""
    from optstate.optimizer.whole_steps import operands

    slot, ctx = slot_of(Block8(), "exp_avg", 8192)
    value = torch.randn(8192, generator=torch.Generator().manual_seed(0))
    expected, _ = encode_and_decode(slot, ctx, value)
    operands._tables.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            kept = KeptMoment.of(slot)
            assert kept is not None
            codes = torch.zeros(8192, dtype=torch.uint8, device="cpu")
            absmax = torch.zeros(32, dtype=torch.float32, device="cpu")
            moment = kept.operand({slot.keys["codes"]: codes, slot.keys["absmax"]: absmax}, ctx, 0.1)
            assert moment is not None
    finally:
        torch.set_default_dtype(torch.float32)
    native.function("encode")(ctypes.byref(moment), value.data_ptr(), 0, len(value))
    operands._tables.cache_clear()
    assert torch.equal(codes, expected["codes"].view(-1))
