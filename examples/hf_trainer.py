"""Transformers' Trainer with AdaLomo fused into the backward pass: python examples/hf_trainer.py (some seconds).

Trainer builds the optimizer here, from a class and its arguments. One that you have built, with a route or groups of
your own, goes in as `optimizers=(optimizer, scheduler)`.
"""

from __future__ import annotations

import tempfile

from small_llama import small_llama, steps_from_command_line, windows
from transformers import Trainer, TrainingArguments

from adalomo import AdaLomo


def main() -> None:
    """Train, and print how far the loss went down."""
    steps = steps_from_command_line(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            max_grad_norm=0,  # Trainer's 1.0 would come after the fused update, and is refused
            gradient_accumulation_steps=1,  # a fused update is made at every backward
            lr_scheduler_type="cosine",  # drives the optimizer's lr below; TrainingArguments' own lr is not read
            logging_steps=max(1, steps // 6),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            small_llama(),
            arguments,
            train_dataset=windows(16 * steps),
            # Stepped instead: leave out fused_backward; max_grad_norm and accumulation then work as always.
            optimizer_cls_and_kwargs=(AdaLomo, {"lr": 5e-2, "fused_backward": True}),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]  # means since the last entry
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte in {steps} steps")


if __name__ == "__main__":
    main()
