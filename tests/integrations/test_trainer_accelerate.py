"""A loop under accelerate, run for real: as a plain loop would, or refused with a way out."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import optstate
from adalomo import AdaLomo, Lomo
from optstate.recipes import AdamW8bit
from tests.support.models import assert_same, state_of
from tests.support.trainer_runs import (
    as_on_a_gpu_in_fp16,
    assert_close,
    assert_equal,
    batches,
    by_hand,
    fresh_accelerate,  # noqa: F401
    fuse_if,
    loss_over,
    tiny_llama,
    weights_of,
    windows,
)

pytestmark = pytest.mark.peer

STEPS, SIZE, CLIP = 6, 2, 0.3


def loader(count: int = STEPS) -> DataLoader:
    return DataLoader(windows(count * SIZE), batch_size=SIZE)


@pytest.mark.parametrize("fused", [False, True], ids=["stepped", "fused"])
def test_a_prepared_loop_trains_as_by_hand(fused: bool) -> None:
    model, plain = tiny_llama(), tiny_llama()
    optimizer = AdaLomo(model.named_parameters(), lr=2e-2, fused_backward=fused)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    accelerator = Accelerator(cpu=True)
    prepared, wrapped, scheduler, data = accelerator.prepare(model, optimizer, scheduler, loader())
    losses = []
    for batch in data:
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        wrapped.step()
        scheduler.step()
        wrapped.zero_grad()
        losses.append(loss.item())
    other = AdaLomo(plain.named_parameters())
    assert losses == pytest.approx(by_hand(plain, other, batches(STEPS), lambda step: 2e-2 / (1 + step)), abs=1e-6)
    assert_close(model, plain)
    assert loss_over(model, batches(STEPS)) < loss_over(tiny_llama(), batches(STEPS)) - 0.01


@pytest.mark.parametrize("recipe", [AdaLomo, AdamW8bit])
@pytest.mark.parametrize("fused", [False, True], ids=["stepped", "fused"])
def test_the_state_survives_prepare_which_loads_it_into_itself(recipe: Any, fused: bool) -> None:
    """torch's own loading would cast a bf16 model's fp32 statistics to bf16 and uint8 codes to floats."""
    model = tiny_llama(torch.bfloat16)
    optimizer = recipe(model.named_parameters(), lr=2e-2)
    by_hand(model, optimizer, batches(2))
    before = state_of(optimizer)
    fuse_if(fused, optimizer)
    prepared, wrapped = Accelerator(cpu=True).prepare(model, optimizer)
    assert_same(state_of(optimizer), before)
    assert wrapped.param_groups is optimizer.param_groups
    assert prepared is model


def test_accumulation_equals_that_by_hand_when_stepped() -> None:
    model, plain = tiny_llama(), tiny_llama()
    train_accumulating(model, Lomo(model.named_parameters(), lr=1.0))
    by_hand(plain, Lomo(plain.named_parameters(), lr=1.0), batches(2 * STEPS), accumulation=2)
    assert_close(model, plain)


def test_accumulation_is_refused_when_fused_before_anything_changes() -> None:
    """Otherwise each micro-batch would be a step of its own."""
    model = tiny_llama()
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"gradient accumulation is on.*or run backward under fused.accumulate\(\)"):
        train_accumulating(model, Lomo(model.named_parameters(), lr=1.0, fused_backward=True))
    assert_equal(weights_of(model), before)


def test_accumulation_is_exact_when_fused_and_said_so() -> None:
    """The remedy the refusal names."""
    model, plain = tiny_llama(), tiny_llama()
    optimizer = Lomo(model.named_parameters(), lr=1.0)
    train_accumulating(model, optimizer, optstate.fuse_backward(optimizer))
    by_hand(plain, Lomo(plain.named_parameters(), lr=1.0), batches(2 * STEPS), accumulation=2)
    assert_close(model, plain)


def train_accumulating(model: Any, optimizer: optstate.Optimizer, fused: Any = None) -> None:
    """accelerate's loop for two micro-batches a step."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, wrapped, data = accelerator.prepare(model, optimizer, loader(2 * STEPS))
    for batch in data:
        with accelerator.accumulate(model):
            last = accelerator.sync_gradients
            with nullcontext() if last or fused is None else fused.accumulate():
                accelerator.backward(model(**batch).loss)
            wrapped.step()
            wrapped.zero_grad()


@pytest.mark.parametrize("fused", [False, True], ids=["stepped", "fused"])
def test_clipping_by_the_norm_equals_that_by_hand(fused: bool) -> None:
    """Stepped by accelerator.clip_grad_norm_, fused by measuring first. With Lomo, whose step is as long as the
    gradient."""
    model, plain, unclipped = tiny_llama(), tiny_llama(), tiny_llama()
    optimizer = Lomo(model.named_parameters(), lr=1.0)
    handle = fuse_if(fused, optimizer, CLIP)
    accelerator = Accelerator(cpu=True)
    prepared, wrapped, data = accelerator.prepare(model, optimizer, loader())
    norms = []
    for batch in data:
        loss = prepared(**batch).loss
        if fused:
            norms.append(handle.grad_norm(loss).item())
        accelerator.backward(loss)
        if not fused:
            norms.append(accelerator.clip_grad_norm_(prepared.parameters(), CLIP).item())
        wrapped.step()
        wrapped.zero_grad()
    by_hand(plain, Lomo(plain.named_parameters(), lr=1.0), batches(STEPS), clip=CLIP)
    assert_close(model, plain)
    assert min(norms) > CLIP
    by_hand(unclipped, Lomo(unclipped.named_parameters(), lr=1.0), batches(STEPS))
    with pytest.raises(AssertionError):
        assert_close(model, unclipped, atol=1e-3)


def test_a_bare_clip_after_a_fused_backward_reports_a_norm_of_zero() -> None:
    """A limit: a call, unlike a trainer's setting, cannot be seen beforehand, nor afterwards. Only its result tells."""
    model = tiny_llama()
    optimizer = Lomo(model.named_parameters(), lr=1.0, fused_backward=True)
    accelerator = Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared(**batches(1)[0]).loss)
    assert accelerator.clip_grad_norm_(prepared.parameters(), CLIP) == 0
    wrapped.step()


@pytest.mark.parametrize("fused", [False, True], ids=["stepped", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(
    dtype: torch.dtype, fused: bool, tmp_path: Path
) -> None:
    def build() -> tuple[Any, ...]:
        model = tiny_llama(dtype)
        optimizer = AdaLomo(model.named_parameters(), lr=2e-2, fused_backward=fused)
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, optimizer, scheduler)

    def train(accelerator: Any, model: Any, wrapped: Any, scheduler: Any, data: Any) -> list[float]:
        losses = []
        for batch in data:
            loss = model(**batch).loss
            accelerator.backward(loss)
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
            losses.append(loss.item())
        return losses

    data, half = batches(STEPS), STEPS // 2
    whole = build()
    train(*whole, data[:half])
    whole[0].save_state(tmp_path / "half")
    second = train(*whole, data[half:])
    resumed = build()
    resumed[0].load_state(tmp_path / "half")
    assert train(*resumed, data[half:]) == second
    assert_equal(weights_of(resumed[1]), weights_of(whole[1]))
    assert_same(state_of(resumed[2].optimizer), state_of(whole[2].optimizer))


def test_a_grad_scaler_is_refused_when_fused_before_anything_changes() -> None:
    """Otherwise the scaled gradient would be applied."""
    model = tiny_llama()
    before = weights_of(model)
    optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
    accelerator = Accelerator(cpu=True)
    as_on_a_gpu_in_fp16(accelerator)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    with pytest.raises(RuntimeError, match=r"GradScaler is in use.*Train in bf16 without a scaler"):
        accelerator.backward(prepared(**batches(1)[0]).loss)
    assert_equal(weights_of(model), before)
    accelerator.scaler = wrapped.scaler = None
    gc.collect()
