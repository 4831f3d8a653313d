"""TRL's SFTTrainer with AdaLomo fused into the backward pass: python examples/trl_sft.py (some seconds).

Prompts and completions are neighbouring stretches of Python's sources; the tokenizer knows the 256 bytes.
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from small_llama import small_llama, steps_from_command_line, windows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from adalomo import AdaLomo


def main() -> None:
    """Fine-tune, and print how far the loss went down."""
    steps = steps_from_command_line(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            max_length=64,
            max_grad_norm=0,  # TRL's 1.0 would come after the fused update, and is refused
            logging_steps=max(1, steps // 6),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,  # on by default
        )
        trainer = SFTTrainer(
            small_llama(),
            arguments,
            train_dataset=prompts_and_completions(16 * steps),
            processing_class=byte_tokenizer(),
            # Stepped instead: leave out fused_backward; max_grad_norm and accumulation then work as always.
            optimizer_cls_and_kwargs=(AdaLomo, {"lr": 5e-2, "fused_backward": True}),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]  # means since the last entry
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte in {steps} steps")


def prompts_and_completions(count: int) -> Dataset:
    """Return `count` prompts with their completions; SFTTrainer counts the loss of the completions only."""
    texts = [bytes(window["input_ids"].tolist()).decode(errors="ignore") for window in windows(count)]
    return Dataset.from_dict({"prompt": [text[:16] for text in texts], "completion": [text[16:] for text in texts]})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with a token per byte; byte 0, which no text has, ends and pads."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    byte_0 = chr(256)  # how this alphabet writes it
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=byte_0, pad_token=byte_0)


if __name__ == "__main__":
    main()
