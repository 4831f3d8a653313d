"""Lightning's Trainer, run for real: as a plain loop would, or refused with a way out."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from adalomo import AdaLomo, Lomo
from tests.support.models import assert_same, state_of
from tests.support.pairwise import pairwise
from tests.support.trainer_runs import (
    Batch,
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
BOTH = pytest.mark.parametrize("fused", [False, True], ids=["stepped", "fused"])


class Automatic(lightning.LightningModule):
    """Lightning calls backward and step by itself, the one inside the other."""

    def __init__(
        self,
        recipe: Any = AdaLomo,
        lr: float = 2e-2,
        fused: bool = False,
        clip: float | None = None,
        dtype: torch.dtype = torch.float32,
        scheduled: bool = False,
    ) -> None:
        super().__init__()
        self.model = tiny_llama(dtype)
        self.make = lambda: recipe(self.model.named_parameters(), lr=lr)
        self.is_fused, self.clip, self.scheduled = fused, clip, scheduled
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.handle: Any = None

    def configure_optimizers(self) -> Any:
        optimizer = self.make()
        self.handle = fuse_if(self.is_fused, optimizer, self.clip)
        if not self.scheduled:
            return optimizer
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def loss(self, batch: Batch) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        if self.is_fused and self.clip:
            self.norms.append(self.handle.grad_norm(loss).item())
        return loss

    def training_step(self, batch: Batch) -> Tensor:
        return self.loss(batch)


class Manual(Automatic):
    """The module calls them; `micro` batches make a step."""

    def __init__(self, *, micro: int = 1, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False
        self.micro = micro

    def training_step(self, batch: Batch, index: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        last = (index + 1) % self.micro == 0
        with nullcontext() if last or not self.is_fused else self.handle.accumulate():
            self.manual_backward(self.loss(batch) / self.micro)
        if last:
            if self.clip and not self.is_fused:
                self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            if scheduler:
                scheduler.step()


def fit(module: Automatic, count: int = STEPS, ckpt: Path | None = None, **settings: Any) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    settings = {"max_epochs": 1, "enable_checkpointing": False, **settings}
    trainer = lightning.Trainer(**quiet, **settings)
    trainer.fit(
        module, DataLoader(windows(count * SIZE), batch_size=SIZE), ckpt_path=ckpt, weights_only=True if ckpt else None
    )
    return trainer


@BOTH
@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_a_fit_trains_as_by_hand(kind: type[Automatic], fused: bool) -> None:
    """Automatic, backward runs inside step(closure): a fused step that ignored its closure would never train."""
    module, plain = kind(fused=fused, scheduled=True), tiny_llama()
    trainer = fit(module)
    optimizer = AdaLomo(plain.named_parameters())
    losses = by_hand(plain, optimizer, batches(STEPS), lambda step: 2e-2 / (1 + step))
    assert module.losses == pytest.approx(losses, abs=1e-6)
    assert_close(module.model, plain)
    assert loss_over(module.model, batches(STEPS)) < loss_over(tiny_llama(), batches(STEPS)) - 0.01
    assert trainer.global_step == STEPS


@pytest.mark.parametrize(
    ("kind", "dtype", "fused"), pairwise((Automatic, Manual), (torch.float32, torch.bfloat16), (False, True)), ids=str
)
def test_a_resumed_fit_repeats_the_uninterrupted_one_to_the_bit(
    kind: type[Automatic], dtype: torch.dtype, fused: bool, tmp_path: Path
) -> None:
    def build() -> Automatic:
        return kind(fused=fused, scheduled=True, dtype=dtype)

    whole, resumed = build(), build()
    first, second = (
        {
            "max_epochs": 2,
            "enable_checkpointing": True,
            "callbacks": [ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
        }
        for folder in (tmp_path / "first", tmp_path / "second")
    )
    trainer = fit(whole, **first)
    again = fit(resumed, ckpt=tmp_path / "first" / "epoch=0.ckpt", **second)
    assert resumed.losses == whole.losses[STEPS:]
    assert len(resumed.losses) == STEPS
    assert_equal(weights_of(resumed), weights_of(whole))
    assert_same(state_of(again.optimizers[0]), state_of(trainer.optimizers[0]))


def test_gradient_clip_val_is_refused_when_fused_before_anything_changes() -> None:
    """Otherwise it clips nothing: it comes after the closure, when gradients are gone."""
    module = Automatic(Lomo, lr=1.0, fused=True)
    before = weights_of(module)
    with pytest.raises(
        RuntimeError, match=r"gradient_clip_val=0.3 and would clip nothing.*Leave gradient_clip_val out"
    ):
        fit(module, gradient_clip_val=CLIP)
    assert_equal(weights_of(module), before)


def test_clipping_by_value_is_refused_with_another_way_out() -> None:
    """The norm that a fused backward clips by is no substitute for it, even where the numbers agree."""
    module = Automatic(Lomo, lr=1.0, fused=True, clip=CLIP)
    with pytest.raises(RuntimeError, match="a recipe's own clip_grad_value"):
        fit(module, gradient_clip_val=CLIP, gradient_clip_algorithm="value")


@BOTH
@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_clipping_by_the_norm_equals_that_by_hand(kind: type[Automatic], fused: bool) -> None:
    """Stepped by Lightning, fused by measuring in training_step. With Lomo, whose step is as long as the gradient."""
    module, plain, unclipped = kind(recipe=Lomo, lr=1.0, fused=fused, clip=CLIP), tiny_llama(), tiny_llama()
    fit(module, gradient_clip_val=CLIP if kind is Automatic and not fused else None)
    by_hand(plain, Lomo(plain.named_parameters(), lr=1.0), batches(STEPS), clip=CLIP)
    assert_close(module.model, plain)
    assert len(module.norms) == (STEPS if fused else 0)
    by_hand(unclipped, Lomo(unclipped.named_parameters(), lr=1.0), batches(STEPS))
    with pytest.raises(AssertionError):
        assert_close(module.model, unclipped, atol=1e-3)


def test_accumulate_grad_batches_is_refused_when_fused_before_anything_changes() -> None:
    """Otherwise each batch would be a step of its own."""
    module = Automatic(fused=True)
    before = weights_of(module)
    with pytest.raises(RuntimeError, match=r"accumulate_grad_batches=2, but a fused backward updates at every batch"):
        fit(module, accumulate_grad_batches=2)
    assert_equal(weights_of(module), before)


def test_accumulate_grad_batches_equals_that_by_hand_when_stepped() -> None:
    module, plain = Automatic(Lomo, lr=1.0), tiny_llama()
    fit(module, 2 * STEPS, accumulate_grad_batches=2)
    by_hand(plain, Lomo(plain.named_parameters(), lr=1.0), batches(2 * STEPS), accumulation=2)
    assert_close(module.model, plain)


@BOTH
def test_accumulation_by_hand_in_a_module_is_exact(fused: bool) -> None:
    """The remedy the refusal names."""
    module, plain = Manual(micro=2, recipe=Lomo, lr=1.0, fused=fused), tiny_llama()
    fit(module, 2 * STEPS)
    by_hand(plain, Lomo(plain.named_parameters(), lr=1.0), batches(2 * STEPS), accumulation=2)
    assert_close(module.model, plain)


def test_a_grad_scaler_is_refused_when_fused_before_anything_changes() -> None:
    """Otherwise the scaled gradient would be applied."""
    module = Automatic(fused=True)
    before = weights_of(module)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match=r"GradScaler is in use.*Train in bf16 without a scaler"):
        fit(module, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert_equal(weights_of(module), before)
    del module, scaler
    gc.collect()
