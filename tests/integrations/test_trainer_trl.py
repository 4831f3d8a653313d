"""TRL's SFTTrainer, run for real: it is Trainer with other defaults, gradient checkpointing among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from adalomo import AdaLomo
from tests.support.trainer_runs import (
    QUIET,
    assert_close,
    assert_equal,
    fresh_accelerate,  # noqa: F401
    tiny_llama,
    weights_of,
    windows,
)

pytestmark = pytest.mark.peer

STEPS, SIZE = 6, 4
BOTH = pytest.mark.parametrize("fused", [False, True], ids=["stepped", "fused"])


def sentences(count: int) -> Dataset:
    texts = [bytes(item["input_ids"].tolist()).decode(errors="ignore") for item in windows(count)]
    return Dataset.from_dict({"prompt": [text[:8] for text in texts], "completion": [text[8:] for text in texts]})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="Ā", pad_token="Ā")


def build(folder: Path, fused: bool, dtype: torch.dtype = torch.float32, **changes: Any) -> SFTTrainer:
    values = {
        **QUIET,
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": SIZE,
        "bf16": False,
    }
    return SFTTrainer(
        tiny_llama(dtype),
        SFTConfig(**{**values, **changes}),
        train_dataset=sentences(24 * SIZE),
        processing_class=byte_tokenizer(),
        optimizer_cls_and_kwargs=(AdaLomo, {"lr": 3e-2, "fused_backward": fused}),
    )


def losses_of(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("reentrant", [False, True])
def test_fused_and_stepped_fine_tuning_are_the_same(reentrant: bool, tmp_path: Path) -> None:
    """Its gradient checkpointing runs parts of the model twice, and each gradient must still arrive once."""
    settings = {
        "max_steps": 24,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    stepped, fused = (build(tmp_path, fused, **settings) for fused in (False, True))
    before = weights_of(stepped.model)
    for trainer in (stepped, fused):
        trainer.train()
        assert trainer.model.is_gradient_checkpointing
        assert losses_of(trainer)[-1] < losses_of(trainer)[0] - 0.2
    assert_close(fused.model, stepped.model)
    assert not any(torch.equal(p, before[name]) for name, p in stepped.model.named_parameters())


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(
    dtype: torch.dtype, fused: bool, tmp_path: Path
) -> None:
    settings = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole, resumed = (build(tmp_path, fused, dtype, **settings) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert losses_of(resumed) == losses_of(whole)
    assert len(losses_of(whole)) == STEPS
    assert_equal(weights_of(resumed.model), weights_of(whole.model))
    assert next(whole.model.parameters()).dtype == dtype


def test_its_default_norm_clip_is_refused_when_fused_before_anything_changes(tmp_path: Path) -> None:
    trainer = build(tmp_path, fused=True, max_grad_norm=SFTConfig.max_grad_norm)
    before = weights_of(trainer.model)
    with pytest.raises(RuntimeError, match=r"SFTTrainer is set to max_grad_norm=1.0 and would clip nothing"):
        trainer.train()
    assert_equal(weights_of(trainer.model), before)


def test_accumulation_is_refused_when_fused_before_anything_changes(tmp_path: Path) -> None:
    trainer = build(tmp_path, fused=True, gradient_accumulation_steps=2)
    before = weights_of(trainer.model)
    with pytest.raises(RuntimeError, match="gradient accumulation is on"):
        trainer.train()
    assert_equal(weights_of(trainer.model), before)
