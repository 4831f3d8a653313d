"""Train a small byte-level GPT on real text with any recipe, stepped or fused into the backward pass.

    python examples/train_lm.py
    python examples/train_lm.py --recipe adamw --steps 200 --json adamw.json
    python examples/train_lm.py --dtype bfloat16 --corpus my_texts/
    python examples/train_lm.py --stop-at 150 --save half.pt
    python examples/train_lm.py --resume half.pt

By default the text is the source of Python's own standard library, and losses are in nats per byte: a model that
knows nothing has ln 256 = 5.55.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from corpus import Corpus, UsageError, read_corpus
from gpt import GPTConfig
from lm import OPTIONS, Run, Settings, measure_memory, options_of, train
from rich.console import Console
from rich.table import Table

import optstate

__all__ = ["OneLineParser", "main", "positive", "size"]


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong argument in one line on stderr, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    """An argument that must be a whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above zero")
    return int(text)


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    console = Console()
    try:
        check_paths(args)
        run, summary = train_and_measure(args, console)
        if args.save:
            run.save(args.save)
            console.print(f"saved after step {run.step}: {args.save}")
        if args.json:
            args.json.write_text(json.dumps(summary, indent=2) + "\n")
    except UsageError as error:
        parser.error(str(error))
    except optstate.NonFiniteGradientError as error:
        print(f"{parser.prog}: stopped: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Settings()
    known = ", ".join(OPTIONS)
    parser.add_argument("--recipe", default=defaults.recipe, help=f"an installed recipe: {known} ... (%(default)s)")
    parser.add_argument("--steps", type=positive, default=defaults.steps, help="length of the run (%(default)s)")
    parser.add_argument("--corpus", type=Path, help="a file or a folder of text (Python's standard library)")
    fused_help = "update inside the backward pass (for adalomo and lomo)"
    parser.add_argument("--fused-backward", action=argparse.BooleanOptionalAction, help=fused_help)
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default=defaults.dtype, help="of the weights (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of weights and batches (%(default)s)")
    parser.add_argument("--lr", type=float, help="peak learning rate (one that suits the recipe)")
    parser.add_argument("--stop-at", type=positive, metavar="STEP", help="stop early, to --resume later")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--save", type=Path, metavar="PATH", help="write a checkpoint when training stops")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="continue from a checkpoint")
    return parser


def check_paths(args: argparse.Namespace) -> None:
    """Find out before training, not after it, that a result cannot be written."""
    for path in (args.json, args.save):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UsageError(f"cannot write {path}: it must be a file in an existing folder")


def train_and_measure(args: argparse.Namespace, console: Console) -> tuple[Run, dict[str, Any]]:
    """The run the arguments ask for, and its numbers."""
    corpus = read_corpus(args.corpus, GPTConfig().context)
    settings = Settings(
        recipe=args.recipe,
        lr=args.lr,
        fused_backward=args.fused_backward,
        steps=args.steps,
        dtype=args.dtype,
        seed=args.seed,
    )
    run = Run(corpus, settings)
    if args.resume:
        run.load(args.resume)
    memory = measure_memory(corpus, settings)
    started_at, before = run.step, run.validate()
    train(run, min(args.stop_at or args.steps, args.steps), console)
    summary = {
        **describe(corpus, settings, run),
        "started_at_step": started_at,
        "stopped_at_step": run.step,
        "validation_loss_before": before,
        "validation_loss_after": run.validate(),
        **{f"{key}_bytes": value for key, value in asdict(memory).items()},
        "median_step_seconds": run.step_seconds if run.seconds else None,
        "losses": run.losses,
    }
    console.print(table_of(summary))
    return run, summary


def describe(corpus: Corpus, settings: Settings, run: Run) -> dict[str, Any]:
    """What was trained, on what, and how."""
    return {
        **asdict(settings),
        "fused_backward": settings.fused,
        "options": options_of(settings),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "corpus": corpus.source,
        "training_bytes": len(corpus.train),
        "validation_bytes": len(corpus.valid),
    }


def table_of(summary: dict[str, Any]) -> Table:
    """The numbers of one run."""
    how = "fused" if summary["fused_backward"] else "stepped"
    title = f"{summary['recipe']}, {how}, {summary['dtype']}: {summary['parameters']:,} parameters"
    table = Table("", title, title=f"{summary['corpus']}, {summary['training_bytes']:,} bytes", title_justify="left")
    seconds = summary["median_step_seconds"]
    steps = f"steps {summary['started_at_step']} to {summary['stopped_at_step']}"
    losses = f"{summary['validation_loss_before']:.3f} -> {summary['validation_loss_after']:.3f}"
    table.add_row(f"validation loss, nats per byte, {steps}", losses)
    table.add_row("optimizer state", size(summary["state_bytes"]))
    table.add_row("gradients alive at once, at most", size(summary["gradients_bytes"]))
    table.add_row("allocated during backward and update, at most", size(summary["backward_and_update_bytes"]))
    table.add_row("median time of a step", "no step taken" if seconds is None else f"{seconds * 1e3:.0f} ms")
    return table


if __name__ == "__main__":
    sys.exit(main())
