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
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from corpus import Corpus, UsageError, read_corpus
from gpt import GPTConfig
from lm import Run, Settings, measure_memory, train
from report import summary, table
from rich.console import Console
from train_lm import OneLineParser, positive

import optstate

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"adamw": "#b0482f", "adalomo": "#1f6f8b"}


def main(argv: list[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results (%(default)s)")
    parser.add_argument("--corpus", type=Path, help="a file or a folder of text (Python's standard library)")
    parser.add_argument("--steps", type=positive, default=Settings().steps, help="of each run (%(default)s)")
    parser.add_argument("--seed", type=int, default=Settings().seed, help="of weights and batches (%(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error("--steps must be at least 2: the run is saved and resumed in its middle")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        demonstrate(args, Console())
    except (OSError, UsageError) as error:
        parser.error(str(error))
    return 0


def demonstrate(args: argparse.Namespace, console: Console) -> None:
    """Train twice, compare, resume, and write the results down."""
    begun = time.perf_counter()
    corpus = read_corpus(args.corpus, GPTConfig().context)
    middle, checkpoint = args.steps // 2, args.out / "adalomo.pt"
    print(f"{corpus.source}: {len(corpus.train):,} bytes to train on, {len(corpus.valid):,} to validate on", flush=True)

    # Learning rates and the moment of the update are each recipe's own: see OPTIONS and FUSED_BY_DEFAULT in lm.py.
    adamw = Run(corpus, Settings("adamw", steps=args.steps, seed=args.seed))
    adalomo = Run(corpus, Settings("adalomo", steps=args.steps, seed=args.seed))
    assert all(map(torch.equal, adamw.model.parameters(), adalomo.model.parameters())), "one start for both"
    numbers = [finish(adamw, console), finish(adalomo, console, save_at=(middle, checkpoint))]
    batch = f"{adamw.settings.batch} x {adamw.context} bytes"
    title = f"{numbers[0]['parameters']:,} parameters, {args.steps} steps of {batch}"
    console.print(table(title, *numbers))

    resumed = resume(checkpoint, corpus, adalomo.settings, console)
    difference = largest_difference(resumed.losses[middle:], adalomo.losses[middle:])
    print(
        f"resumed after step {middle}: the {args.steps - middle} losses that follow differ from those of the "
        f"uninterrupted run by at most {difference:g}"
    )
    assert difference == 0, "a resumed run must repeat the uninterrupted one bit for bit"

    plot(numbers, resumed.losses, middle, args.out / "loss.png")
    seconds = time.perf_counter() - begun
    result = {
        **corpus.description(),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "runs": numbers,
        "resume": {"after_step": middle, "compared_losses": args.steps - middle, "largest_difference": difference},
    }
    (args.out / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    optstate.save(adamw.optimizer, args.out / "adamw.safetensors")
    print(f"{args.out}/ holds loss.png, summary.json, adalomo.pt and adamw.safetensors; {seconds:.0f} s in all")
    print(f"try: optstate convert {args.out}/adamw.safetensors converted.safetensors --recipe adalomo --dry-run")


def finish(run: Run, console: Console, save_at: tuple[int, Path] | None = None) -> dict[str, Any]:
    """Train a run to its end, on the way writing one checkpoint if asked, and return its numbers."""
    memory, before = measure_memory(run.corpus, run.settings), run.validate()
    train(run, run.settings.steps, console, save_at)
    return summary(run, memory, before)


def resume(checkpoint: Path, corpus: Corpus, settings: Settings, console: Console) -> Run:
    """Build model, optimizer and schedule anew and continue from the file."""
    run = Run(corpus, settings)
    run.load(checkpoint)
    train(run, settings.steps, console, label="adalomo, resumed")
    return run


def largest_difference(resumed: list[float], uninterrupted: list[float]) -> float:
    """Return the largest difference between the losses of the same steps of two runs."""
    return max(abs(a - b) for a, b in zip(resumed, uninterrupted, strict=True))


def plot(numbers: list[dict[str, Any]], resumed: list[float], middle: int, path: Path) -> None:
    """Draw the loss curve of each run, and that of the resumed run on top of the last one's second half."""
    figure, axes = plt.subplots(figsize=(8, 4.8), dpi=150, layout="constrained")
    for run in numbers:
        steps, colour = range(1, len(run["losses"]) + 1), COLOURS[run["recipe"]]
        label = f"{run['recipe']}, validation {run['validation_loss_after']:.2f}"
        axes.plot(steps, run["losses"], color=colour, alpha=0.2, linewidth=0.7)
        axes.plot(steps, smooth(run["losses"]), color=colour, linewidth=1.8, label=label)
    again = smooth(resumed)[middle:]
    steps = range(middle + 1, middle + 1 + len(again))
    axes.plot(steps, again, color="black", linewidth=1.4, linestyle=(0, (1, 4)), label="adalomo, resumed from its file")
    axes.axvline(middle, color="grey", linewidth=0.8)
    axes.annotate("saved here", (middle, axes.get_ylim()[1]), (5, -14), textcoords="offset points", color="grey")
    axes.set(xlabel="step", ylabel="training loss, nats per byte", xlim=(0, len(resumed)))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def smooth(losses: list[float]) -> list[float]:
    """Average each loss with those of the ten steps before and after, fewer at the ends."""
    return [fmean(losses[max(0, i - 10) : i + 11]) for i in range(len(losses))]


if __name__ == "__main__":
    sys.exit(main())
