"""AdamW and AdaLomo side by side on real text, then a stop and a resume: python examples/demo.py (some minutes).

Both train the same small GPT from the same weights on the same batches, AdamW stepped as usual, AdaLomo fused into the
backward pass. Then AdaLomo's checkpoint from the middle is loaded into a new model and optimizer, and the run is
continued: every further loss equals that of the uninterrupted run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
import torch
from corpus import Corpus, UsageError, read_corpus
from gpt import GPTConfig
from lm import Memory, Run, Settings, measure_memory, options_of, train
from rich.console import Console
from rich.table import Table
from train_lm import OneLineParser, positive, size

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"adamw": "#b0482f", "adalomo": "#1f6f8b"}


class Trained:
    """A finished run with its losses on the validation text and its memory."""

    def __init__(self, corpus: Corpus, settings: Settings, console: Console, save_at: tuple[int, Path] | None) -> None:
        self.settings = settings
        self.memory: Memory = measure_memory(corpus, settings)
        self.run = Run(corpus, settings)
        self.first_weights = [p.detach().clone() for p in self.run.model.parameters()]
        self.before = self.run.validate()
        train(self.run, settings.steps, console, save_at)
        self.after = self.run.validate()

    def summary(self) -> dict[str, Any]:
        """For `summary.json`."""
        return {
            "recipe": self.settings.recipe,
            "fused_backward": self.settings.fused,
            "options": options_of(self.settings),
            "validation_loss_before": self.before,
            "validation_loss_after": self.after,
            **{f"{key}_bytes": value for key, value in asdict(self.memory).items()},
            "median_step_seconds": self.run.step_seconds,
            "losses": self.run.losses,
        }


def main(argv: list[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results (%(default)s)")
    parser.add_argument("--steps", type=positive, default=Settings().steps, help="of each run (%(default)s)")
    parser.add_argument("--seed", type=int, default=Settings().seed, help="of weights and batches (%(default)s)")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        demonstrate(args, Console())
    except (OSError, UsageError) as error:
        parser.error(str(error))
    return 0


def demonstrate(args: argparse.Namespace, console: Console) -> None:
    """Train twice, compare, resume, and write the results down."""
    begun = time.perf_counter()
    corpus = read_corpus(None, GPTConfig().context)
    middle, checkpoint = args.steps // 2, args.out / "adalomo.pt"
    print(f"{corpus.source}: {len(corpus.train):,} bytes to train on, {len(corpus.valid):,} to validate on")

    adamw = Trained(corpus, settings_of("adamw", args), console, None)
    adalomo = Trained(corpus, settings_of("adalomo", args), console, (middle, checkpoint))
    assert all(map(torch.equal, adamw.first_weights, adalomo.first_weights)), "both must start from the same weights"
    console.print(comparison(adamw, adalomo))

    resumed = resume(corpus, adalomo.settings, checkpoint, console)
    difference = largest_difference(resumed.losses[middle:], adalomo.run.losses[middle:])
    print(
        f"resumed after step {middle}: the {args.steps - middle} losses that follow differ from those of the "
        f"uninterrupted run by at most {difference:g}"
    )
    assert difference == 0, "a resumed run must repeat the uninterrupted one bit for bit"

    plot(adamw, adalomo, resumed, middle, args.out / "loss.png")
    summary = {
        "corpus": {"source": corpus.source, "training_bytes": len(corpus.train), "sha256": corpus.fingerprint},
        "model": {**asdict(adalomo.run.model.config), "parameters": parameters_of(adalomo.run)},
        "steps": args.steps,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "runs": [adamw.summary(), adalomo.summary()],
        "resume": {"after_step": middle, "compared_losses": args.steps - middle, "largest_difference": difference},
        "seconds": time.perf_counter() - begun,
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{args.out}/ has loss.png, summary.json and adalomo.pt; {summary['seconds']:.0f} s in all")


def settings_of(recipe: str, args: argparse.Namespace) -> Settings:
    """Learning rates and the moment of the update are the recipe's own; see `lm.OPTIONS`."""
    return Settings(recipe=recipe, steps=args.steps, seed=args.seed)


def resume(corpus: Corpus, settings: Settings, checkpoint: Path, console: Console) -> Run:
    """Build model, optimizer and schedule anew and continue from the file."""
    run = Run(corpus, settings)
    run.load(checkpoint)
    train(run, settings.steps, console)
    return run


def largest_difference(resumed: list[float], uninterrupted: list[float]) -> float:
    """Between the losses of the same steps."""
    return max(abs(a - b) for a, b in zip(resumed, uninterrupted, strict=True))


def parameters_of(run: Run) -> int:
    """Number of elements of all parameters."""
    return sum(p.numel() for p in run.model.parameters())


def comparison(adamw: Trained, adalomo: Trained) -> Table:
    """The numbers of both runs, one row per measure."""
    steps, count = adamw.settings.steps, parameters_of(adamw.run)
    table = Table(title=f"{count:,} parameters, {steps} steps of {adamw.settings.batch} x {adamw.run.context} bytes")
    table.add_column("")
    for trained in (adamw, adalomo):
        table.add_column(trained.settings.label, justify="right")
    rows = {
        "validation loss before, nats per byte": lambda t: f"{t.before:.3f}",
        "validation loss after": lambda t: f"{t.after:.3f}",
        "optimizer state": lambda t: size(t.memory.state),
        "gradients alive, peak": lambda t: size(t.memory.gradients),
        "gradients and scratch, peak": lambda t: size(t.memory.backward_and_update),
        "time per step, median": lambda t: f"{t.run.step_seconds * 1e3:.0f} ms",
    }
    for name, show in rows.items():
        table.add_row(name, show(adamw), show(adalomo))
    table.caption = (
        "Peaks are counted by PyTorch's allocator from the start of backward to the end of the update, with a batch "
        "of 8 bytes, so that activations do not count. Scratch includes what backward itself needs."
    )
    return table


def plot(adamw: Trained, adalomo: Trained, resumed: Run, middle: int, path: Path) -> None:
    """Both loss curves, and the resumed one on top of the second half of AdaLomo's."""
    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=150, layout="constrained")
    for trained in (adamw, adalomo):
        losses, colour = trained.run.losses, COLOURS[trained.settings.recipe]
        axes.plot(range(1, len(losses) + 1), losses, color=colour, alpha=0.2, linewidth=0.7)
        label = f"{trained.settings.label} (validation {trained.after:.2f})"
        axes.plot(range(1, len(losses) + 1), smooth(losses), color=colour, linewidth=1.8, label=label)
    again = smooth(resumed.losses)[middle:]
    steps = range(middle + 1, middle + 1 + len(again))
    axes.plot(steps, again, color="black", linewidth=1.2, linestyle=(0, (1, 3)), label="adalomo, resumed from file")
    axes.axvline(middle, color="grey", linewidth=0.8)
    axes.annotate("saved, resumed", (middle, axes.get_ylim()[1]), (4, -12), textcoords="offset points", color="grey")
    axes.set(xlabel="step", ylabel="training loss, nats per byte", xlim=(0, adamw.settings.steps))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def smooth(losses: list[float]) -> list[float]:
    """Running average over about ten steps."""
    return list(accumulate(losses, lambda mean, loss: 0.9 * mean + 0.1 * loss))


if __name__ == "__main__":
    sys.exit(main())
