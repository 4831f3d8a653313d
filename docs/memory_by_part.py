"""Draws the README's picture: what training LLaMA-7B keeps in memory besides activations, part by part.

Every number comes from shapes: the optimizers are built on the meta device, which allocates nothing, and their
plans are asked for their bytes. Run it to print the numbers and write `docs/memory_by_part.png`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import nn

import optstate
from adalomo import AdaLomo, Lomo
from optstate.recipes import AdamW

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer state")


def llama_7b() -> list[tuple[str, nn.Parameter]]:
    """Names and bf16 meta parameters of LLaMA-7B: 32 layers, width 4096, feed-forward 11008, vocabulary 32000."""
    width, inner, vocabulary = 4096, 11008, 32000
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (vocabulary, width)}
    for i in range(32):
        shapes |= {f"layers.{i}.{name}_proj": (width, width) for name in "qkvo"}
        shapes |= {f"layers.{i}.{name}_proj": (inner, width) for name in ("gate", "up")}
        shapes |= {f"layers.{i}.down_proj": (width, inner)}
        shapes |= {f"layers.{i}.{name}_norm": (width,) for name in ("input", "post")}
    shapes |= {"norm": (width,), "lm_head": (vocabulary, width)}
    return [(k, nn.Parameter(torch.empty(s, dtype=torch.bfloat16, device="meta"))) for k, s in shapes.items()]


def gib_by_part(optimizer: optstate.Optimizer, fused: bool) -> tuple[float, float, float]:
    """GiB of weights, of gradients alive at once, and of state."""
    sizes = [param.spec.numel * param.spec.dtype.itemsize for param in optimizer.plan()]
    gradients = max(sizes) if fused else sum(sizes)
    return sum(sizes) / GIB, gradients / GIB, optimizer.state_nbytes() / GIB


def main() -> None:
    """Print the table and draw the bars."""
    rows = {
        "AdamW": gib_by_part(AdamW(llama_7b()), fused=False),
        "Lomo, fused backward": gib_by_part(Lomo(llama_7b()), fused=True),
        "AdaLomo, fused backward": gib_by_part(AdaLomo(llama_7b()), fused=True),
    }
    print(f"{'GiB':26s}" + "".join(f"{part:>18s}" for part in PARTS) + f"{'sum':>10s}")
    for name, values in rows.items():
        print(f"{name:26s}" + "".join(f"{value:18.2f}" for value in values) + f"{sum(values):10.2f}")

    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    left = [0.0] * len(rows)
    for i, (part, colour) in enumerate(zip(PARTS, ("#4c72b0", "#dd8452", "#55a868"), strict=True)):
        widths = [values[i] for values in rows.values()]
        axes.barh(list(rows), widths, left=left, label=part, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, total in enumerate(left):
        axes.text(total + 0.6, y, f"{total:.1f} GiB", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, max(left) * 1.12)
    axes.set_xlabel("GiB for LLaMA-7B in bf16, activations not included")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("memory_by_part.png"), dpi=150)


if __name__ == "__main__":
    main()
