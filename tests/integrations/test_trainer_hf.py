"""Transformers' Trainer, run for real: as a plain loop would, or refused with a way out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

import optstate
from adalomo import AdaLomo, Lomo
from optstate.recipes import AdamW8bit
from optstate.weights import StochasticRounding
from tests.support.trainer_runs import (
    QUIET,
    Recording,
    as_on_a_gpu_in_fp16,
    assert_close,
    assert_equal,
    by_hand,
    fresh_accelerate,  # noqa: F401
    loss_over,
    stacked,
    tiny_llama,
    weights_of,
    windows,
)

pytestmark = pytest.mark.peer

STEPS, SIZE = 6, 2


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values = {
        **QUIET,
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": SIZE,
    }
    return TrainingArguments(**{**values, **changes})


def make(model: Any, args: TrainingArguments, kind: type[Trainer] = Trainer, **given: Any) -> tuple[Trainer, Recording]:
    collator = Recording()
    count = args.max_steps * SIZE * args.gradient_accumulation_steps
    return kind(model, args, train_dataset=windows(count), data_collator=collator, **given), collator


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def linear(lr: float) -> Callable[[int], float]:
    """Trainer's default schedule."""
    return lambda step: lr * (STEPS - step) / STEPS


@pytest.mark.parametrize("fused", [False, True], ids=["stepped", "fused"])
def test_an_optimizer_handed_over_trains_as_by_hand(fused: bool, tmp_path: Path) -> None:
    model, plain = tiny_llama(), tiny_llama()
    optimizer = AdaLomo(model.named_parameters(), lr=2e-2, fused_backward=fused)
    scheduler = LambdaLR(optimizer, lambda step: (STEPS - step) / STEPS)
    trainer, seen = make(model, arguments(tmp_path), optimizers=(optimizer, scheduler))
    trainer.train()
    other = AdaLomo(plain.named_parameters())
    losses = by_hand(plain, other, seen.batches[:STEPS], linear(2e-2))
    assert_close(model, plain)
    assert losses_of(trainer) == pytest.approx(losses, rel=1e-4)  # logged with four digits
    assert loss_over(model, seen.batches) < loss_over(tiny_llama(), seen.batches) - 0.01


@pytest.mark.parametrize("fused", [False, True], ids=["stepped", "fused"])
def test_a_class_and_its_arguments_train_as_by_hand_with_trainers_own_groups(fused: bool, tmp_path: Path) -> None:
    model, plain = tiny_llama(), tiny_llama()
    built = (AdaLomo, {"lr": 2e-2, "fused_backward": fused})
    trainer, seen = make(model, arguments(tmp_path, weight_decay=0.5), optimizer_cls_and_kwargs=built)
    trainer.train()
    named = list(plain.named_parameters())
    groups = [
        {"params": [p for n, p in named if "norm" not in n], "weight_decay": 0.5},
        {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]
    by_hand(plain, AdaLomo(groups), seen.batches[:STEPS], linear(2e-2))
    assert_close(model, plain)


@pytest.mark.parametrize("handed_over", [False, True])
def test_trainers_default_norm_clip_is_refused_when_fused_before_anything_changes(
    handed_over: bool, tmp_path: Path
) -> None:
    """Otherwise it clips nothing: gradients are gone, the norm it logs is 0, and training goes on."""
    model = tiny_llama()
    before = weights_of(model)
    if handed_over:
        given: dict[str, Any] = {"optimizers": (Lomo(model.named_parameters(), fused_backward=True), None)}
    else:
        given = {"optimizer_cls_and_kwargs": (Lomo, {"fused_backward": True})}
    trainer, _ = make(model, arguments(tmp_path, max_grad_norm=TrainingArguments.max_grad_norm), **given)
    with pytest.raises(RuntimeError, match=r"max_grad_norm=1.0 and would clip nothing.*Pass max_grad_norm=0"):
        trainer.train()
    assert_equal(weights_of(model), before)
    assert all(p.grad is None for p in model.parameters())
    trainer.args.max_grad_norm = 0
    trainer.train()
    assert not torch.equal(weights_of(model)["lm_head.weight"], before["lm_head.weight"])


def test_a_trainer_that_takes_over_later_is_looked_at_too(tmp_path: Path) -> None:
    """The look at the first backward is not the last: Trainer loads the state it finds, and then comes another."""
    model = tiny_llama()
    optimizer = Lomo(model.named_parameters(), fused_backward=True)
    model(**stacked(windows(2))).loss.backward()
    optimizer.step()
    trainer, _ = make(model, arguments(tmp_path, max_grad_norm=0.5), optimizers=(optimizer, None))
    with pytest.raises(RuntimeError, match=r"max_grad_norm=0.5 and would clip nothing"):
        trainer.train()


def test_another_optimizers_trainer_is_no_obstacle(tmp_path: Path) -> None:
    other = tiny_llama()
    trainer, _ = make(other, arguments(tmp_path, max_grad_norm=1.0), optimizers=(Lomo(other.parameters()), None))
    trainer.train()
    model = tiny_llama()
    optimizer = Lomo(model.named_parameters(), fused_backward=True)
    model(**stacked(windows(2))).loss.backward()
    optimizer.step()


CLIP = 0.3


class Measuring(Trainer):
    """The remedy the refusal names: the norm is measured where the loss is known."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().compute_loss(model, *args, **kwargs)
        self.norms = [*getattr(self, "norms", []), self.fused.grad_norm(loss).item()]
        return loss


@pytest.mark.parametrize("asked_of_trainer_too", [False, True])
def test_clipping_by_the_norm_is_exact_when_the_loss_is_measured_first(
    asked_of_trainer_too: bool, tmp_path: Path
) -> None:
    """With Lomo, whose step is as long as the gradient."""
    model, plain, unclipped = tiny_llama(), tiny_llama(), tiny_llama()
    optimizer = Lomo(model.named_parameters(), lr=1.0)
    args = arguments(tmp_path, max_grad_norm=CLIP if asked_of_trainer_too else 0, lr_scheduler_type="constant")
    trainer, seen = make(model, args, Measuring, optimizers=(optimizer, None))
    trainer.fused = optstate.fuse_backward(optimizer, clip_grad_norm=CLIP)
    trainer.train()
    by_hand(plain, Lomo(plain.named_parameters(), lr=1.0), seen.batches[:STEPS], clip=CLIP)
    assert_close(model, plain)
    assert min(trainer.norms) > CLIP
    by_hand(unclipped, Lomo(unclipped.named_parameters(), lr=1.0), seen.batches[:STEPS])
    with pytest.raises(AssertionError):
        assert_close(model, unclipped, atol=1e-3)


def test_trainers_norm_clip_works_when_stepped(tmp_path: Path) -> None:
    model, plain = tiny_llama(), tiny_llama()
    args = arguments(tmp_path, max_grad_norm=CLIP, lr_scheduler_type="constant")
    trainer, seen = make(model, args, optimizers=(Lomo(model.named_parameters(), lr=1.0), None))
    trainer.train()
    by_hand(plain, Lomo(plain.named_parameters(), lr=1.0), seen.batches[:STEPS], clip=CLIP)
    assert_close(model, plain)


def test_accumulation_is_refused_when_fused_before_anything_changes(tmp_path: Path) -> None:
    """Otherwise each micro-batch would be a step of its own."""
    model = tiny_llama()
    before = weights_of(model)
    built = (AdaLomo, {"fused_backward": True})
    trainer, _ = make(model, arguments(tmp_path, gradient_accumulation_steps=2), optimizer_cls_and_kwargs=built)
    with pytest.raises(RuntimeError, match="gradient accumulation is on.*leave the update to step"):
        trainer.train()
    assert_equal(weights_of(model), before)


class Accumulating(Trainer):
    """The remedy the refusal names."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with nullcontext() if self.accelerator.sync_gradients else self.fused.accumulate():
            return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("fused", [False, True], ids=["stepped", "fused"])
def test_accumulation_equals_that_by_hand(fused: bool, tmp_path: Path) -> None:
    """Stepped as it is, fused with Trainer's earlier micro-batches under fused.accumulate()."""
    model, plain = tiny_llama(), tiny_llama()
    optimizer = Lomo(model.named_parameters(), lr=1.0)
    args = arguments(tmp_path, gradient_accumulation_steps=2, lr_scheduler_type="constant")
    trainer, seen = make(model, args, Accumulating if fused else Trainer, optimizers=(optimizer, None))
    if fused:
        trainer.fused = optstate.fuse_backward(optimizer)
    trainer.train()
    by_hand(plain, Lomo(plain.named_parameters(), lr=1.0), seen.batches[: 2 * STEPS], accumulation=2)
    assert_close(model, plain)


@pytest.mark.parametrize(
    ("recipe", "dtype", "fused"),
    [
        (AdaLomo, torch.float32, False),
        (AdaLomo, torch.bfloat16, True),
        (AdamW8bit, torch.bfloat16, False),
        (AdamW8bit, torch.bfloat16, True),
    ],
    ids=["adalomo", "adalomo in bf16, fused", "adamw8bit in bf16", "adamw8bit in bf16, fused"],
)
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(
    recipe: Any, dtype: torch.dtype, fused: bool, tmp_path: Path
) -> None:
    """Trainer loads with weights_only, and torch's own loading would cast statistics and codes to bf16."""

    def build() -> Trainer:
        model = tiny_llama(dtype)
        optimizer = recipe(model.named_parameters(), lr=2e-2)
        if fused:
            optstate.fuse_backward(optimizer)
        args = arguments(tmp_path, save_strategy="steps", save_steps=STEPS // 2)
        trainer, _ = make(model, args, optimizers=(optimizer, None))
        return trainer

    whole, resumed = build(), build()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert losses_of(resumed) == losses_of(whole)
    assert len(losses_of(whole)) == STEPS
    assert_equal(weights_of(resumed.model), weights_of(whole.model))
    if dtype == torch.bfloat16:
        assert {type(param.weights) for param in whole.optimizer.optimizer.plan()} == {StochasticRounding}


def test_a_grad_scaler_is_refused_when_fused_before_anything_changes(tmp_path: Path) -> None:
    """Otherwise the scaled gradient would be applied."""
    model = tiny_llama()
    before = weights_of(model)
    optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
    trainer, _ = make(model, arguments(tmp_path), optimizers=(optimizer, None))
    as_on_a_gpu_in_fp16(trainer.accelerator)
    with pytest.raises(RuntimeError, match=r"GradScaler is in use.*Train in bf16 without a scaler"):
        trainer.train()
    assert_equal(weights_of(model), before)
    trainer.accelerator.scaler = trainer.optimizer.scaler = None
    del trainer
    gc.collect()
