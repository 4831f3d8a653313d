"""Draws the README's picture: what training LLaMA-7B needs at its peak, part by part, and the memory of a 24 GiB card.

Nothing is allocated: `optstate.estimate` runs the model and the recipes on tensors without values. Run it to print the
table and write `docs/memory_by_part.png`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import optstate

RECIPES = ("adamw", "adamw8bit", "lomo", "adalomo")


def answer(recipes: Sequence[str] = RECIPES):
    """LLaMA-7B in bf16, one sequence of 2048 tokens, activations recomputed layer by layer."""
    return optstate.estimate("llama-7b", recipe=list(recipes), seq_len=2048, checkpointing=True, gpu="24GiB")


def main() -> None:
    """Print the table and draw the bars."""
    found = answer()
    print(found)
    found.plot(Path(__file__).with_name("memory_by_part.png"))


if __name__ == "__main__":
    main()
