"""Kernels alone, under Triton's interpreter: rounding and codes to the bit, flags, and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from optstate import stores
from optstate.kernels import Noise, noise_key
from optstate.kernels.native import MomentKind, StepRule, WriteKind
from optstate.kernels.rounding import random_bits16, round_bf16, round_fp16
from optstate.kernels.rules import ElementRule
from optstate.kernels.triton_steps import TILE, GradientTensor, MomentTensor, WeightTensor, interprets, make_table

pytest.importorskip("triton", reason="triton is not installed")
if not interprets():
    pytest.skip("needs TRITON_INTERPRET=1: test_in_interpreter.py starts it", allow_module_level=True)

from optstate.kernels.triton_steps.elementwise import launch_elementwise
from optstate.kernels.triton_steps.finite import CHECKED, launch_finite_check

NO_MOMENT = MomentTensor()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOW = [torch.bfloat16, torch.float16]


def numbers(count: int, seed: int = 0) -> Tensor:
    """Numbers of many magnitudes, both signs, and a few special ones at the end."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(count, generator=generator) * 10.0 ** torch.randint(-6, 3, (count,), generator=generator)
    value[-4:] = torch.tensor([0.0, 1e-30, -3e-6, 300.0])
    return value


def descend(weight: WeightTensor, grad: Tensor, finite: Tensor | None = None, keep: float = 1.0) -> None:
    """Subtract the gradient from the weight."""
    rule = ElementRule(step=1.0, keep=keep)
    launch_elementwise(weight, GradientTensor(grad), NO_MOMENT, NO_MOMENT, rule, finite, moves_second=False)


class TestRandomBits:
    @pytest.mark.parametrize("start", [0, 1, 777, 2**32 - 5, 2**33 - 501, 2**33 - 500, 3 * 2**33 + 1])
    @pytest.mark.parametrize("dtype", LOW)
    def test_rounding_is_that_of_the_eager_path_to_the_bit(self, dtype: torch.dtype, start: int) -> None:
        """Places beyond 2**33 are those whose hash has other upper bits; tiles may lie across the change."""
        value = numbers(TILE + 300)
        param = torch.zeros(len(value), dtype=dtype)
        key = noise_key("layer.weight", 7, 2**31)
        descend(WeightTensor(param, how=WriteKind.STOCHASTIC, start=start, key=key), -value)
        bits = random_bits16(key, start, len(value), value.device)
        expected = (round_bf16 if dtype == torch.bfloat16 else round_fp16)(value.clone(), bits).to(dtype)
        assert torch.equal(param.view(torch.int16), expected.view(torch.int16))

    @pytest.mark.parametrize("dtype", LOW)
    def test_what_is_not_finite_stays(self, dtype: torch.dtype) -> None:
        value = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
        param = torch.zeros(4, dtype=dtype)
        descend(WeightTensor(param, how=WriteKind.STOCHASTIC, key=5), -value)
        assert torch.equal(param[[0, 1, 3]].float(), value[[0, 1, 3]])
        assert param[2].isnan()


STORES: list[tuple[Any, MomentKind, MomentKind]] = [
    (stores.Block8(), MomentKind.SIGNED8, MomentKind.UNSIGNED8),
    (stores.Block8(64), MomentKind.SIGNED8, MomentKind.UNSIGNED8),
    (stores.Float8(), MomentKind.SIGNED_E4M3, MomentKind.UNSIGNED_E4M3),
    (stores.Block4(), MomentKind.SIGNED4, MomentKind.LINEAR4),
    (stores.Block4(1024), MomentKind.SIGNED4, MomentKind.LINEAR4),
]


def table_of(store: Any) -> Tensor:
    from optstate.stores.block_codes import E4M3

    return make_table(E4M3 if isinstance(store, stores.Float8) else store.codebook, torch.device("cpu"))


class TestCodes:
    @pytest.mark.parametrize("count", [1, 255, 256, 1023, 2 * TILE + 77])
    @pytest.mark.parametrize(("store", "kind", "other"), STORES, ids=str)
    def test_signed_codes_are_those_of_the_store(
        self, store: Any, kind: MomentKind, other: MomentKind, count: int
    ) -> None:
        """An average that takes the new value in full is the gradient itself, so that codes must agree to the bit."""
        value = numbers(count + 4)[:count]
        expected = store.encode(value.clone(), Noise("", 0))
        codes, absmax = torch.zeros_like(expected["codes"]), torch.zeros_like(expected["absmax"])
        moment = MomentTensor(codes.view(torch.uint8), absmax, kind, table_of(store), store.block)
        rule = ElementRule(rule=StepRule.AVERAGE, first_weight=1.0, step=1.0)
        weight = WeightTensor(torch.zeros(count))
        launch_elementwise(weight, GradientTensor(value), moment, NO_MOMENT, rule, None, moves_second=False)
        assert torch.equal(absmax, expected["absmax"])
        assert torch.equal(codes.view(torch.uint8), expected["codes"].view(torch.uint8))

    @pytest.mark.parametrize("count", [255, 2 * TILE + 77])
    @pytest.mark.parametrize(("store", "other", "kind"), STORES, ids=str)
    def test_unsigned_codes_are_those_of_the_store(
        self, store: Any, kind: MomentKind, other: MomentKind, count: int
    ) -> None:
        from dataclasses import replace

        store, value = replace(store, signed=False), numbers(count + 4)[:count]
        expected = store.encode(value * value, Noise("", 0))
        codes, absmax = torch.zeros_like(expected["codes"]), torch.zeros_like(expected["absmax"])
        moment = MomentTensor(codes.view(torch.uint8), absmax, kind, table_of(store), store.block)
        rule = ElementRule(rule=StepRule.ADAM, first_weight=1.0, second_weight=1.0, eps=1e-8, step=1.0)
        weight = WeightTensor(torch.zeros(count))
        launch_elementwise(weight, GradientTensor(value), NO_MOMENT, moment, rule, None, moves_second=True)
        assert torch.equal(absmax, expected["absmax"])
        assert torch.equal(codes.view(torch.uint8), expected["codes"].view(torch.uint8))

    @pytest.mark.parametrize(("store", "kind", "other"), STORES, ids=str)
    def test_codes_are_read_as_the_store_reads_them(self, store: Any, kind: MomentKind, other: MomentKind) -> None:
        """An average that takes nothing of the gradient is what was kept; the weight becomes its negative."""
        value = numbers(TILE + 400)
        fields = store.encode(value.clone(), Noise("", 0))
        expected = store.read(fields, value.shape)
        moment = MomentTensor(fields["codes"].view(torch.uint8), fields["absmax"], kind, table_of(store), store.block)
        param = torch.zeros_like(value)
        rule = ElementRule(rule=StepRule.AVERAGE, first_weight=0.0, step=1.0)
        gradient = GradientTensor(torch.zeros_like(value))
        launch_elementwise(WeightTensor(param), gradient, moment, NO_MOMENT, rule, None, moves_second=False)
        assert torch.equal(-param, expected)


class TestGradient:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("on_device", [False, True])
    def test_clamp_then_scale_then_penalty(self, dtype: torch.dtype, on_device: bool) -> None:
        grad, param = numbers(1500).to(dtype), numbers(1500, seed=1)
        expected = param - (grad.float().clamp(-0.5, 0.5) * 0.25 + param * 0.125)
        scale = torch.tensor(0.25) if on_device else 0.25
        gradient = GradientTensor(grad, 0.5, scale, penalty=0.125)
        launch_elementwise(
            WeightTensor(param), gradient, NO_MOMENT, NO_MOMENT, ElementRule(step=1.0), None, moves_second=False
        )
        assert torch.equal(param, expected)

    @pytest.mark.parametrize("count", [1, CHECKED, 2 * CHECKED + 3])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    def test_finite_check(self, dtype: torch.dtype, count: int, bad: float) -> None:
        grad = torch.ones(count, dtype=dtype)
        grad[0] = torch.finfo(dtype).max
        assert launch_finite_check(grad)
        assert not launch_finite_check(grad, largest=100.0)
        assert launch_finite_check(-torch.ones(count, dtype=dtype), largest=1.0)
        grad[-1] = bad
        assert not launch_finite_check(grad)
        assert launch_finite_check(grad[:0])


@pytest.mark.parametrize("how", list(WriteKind), ids=str)
def test_a_flag_that_is_not_set_leaves_every_byte(how: WriteKind) -> None:
    value = numbers(TILE + 100)
    param = value.to(torch.bfloat16)
    extra = {WriteKind.KAHAN: torch.bfloat16, WriteKind.SPLIT16: torch.int16, WriteKind.SPLIT8: torch.int8}.get(how)
    beside = None if extra is None else torch.arange(len(value)).to(extra)
    store = stores.Block4()
    fields = store.encode(value.clone(), Noise("", 0))
    moment = MomentTensor(fields["codes"], fields["absmax"], MomentKind.SIGNED4, table_of(store), store.block)
    second = value.square()
    tensors = [t for t in (param, beside, fields["codes"], fields["absmax"], second) if t is not None]
    before = [tensor.clone() for tensor in tensors]
    rule = ElementRule(rule=StepRule.ADAM, first_weight=0.5, second_weight=0.5, eps=1e-8, step=1.0)
    operands = (WeightTensor(param, beside, how), GradientTensor(value * math.nan), moment)
    kept = MomentTensor(second, kind=MomentKind.FULL32)
    launch_elementwise(*operands, kept, rule, torch.tensor(False), moves_second=True)
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
    launch_elementwise(
        operands[0], GradientTensor(value.flip(0)), moment, kept, rule, torch.tensor(True), moves_second=True
    )
    assert not any(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
