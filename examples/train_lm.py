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
from pathlib import Path
from typing import Any, NoReturn

from corpus import UsageError, read_corpus
from gpt import GPTConfig
from lm import OPTIONS, Run, Settings, measure_memory, train
from report import summary, table
from rich.console import Console

import optstate

__all__ = ["OneLineParser", "main", "positive"]


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a wrong argument in one line on stderr, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    """Parse an argument that must be a whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above zero")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    console = Console()
    try:
        check_paths(args)
        run, numbers = train_and_measure(args, console)
        if args.save:
            run.save(args.save)
            console.print(f"saved after step {run.step}: {args.save}")
        if args.json:
            args.json.write_text(json.dumps(numbers, indent=2) + "\n")
    except UsageError as error:
        parser.error(str(error))
    except optstate.NonFiniteGradientError as error:
        print(f"{parser.prog}: stopped: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
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
    """Check before training, not after it, that the results can be written.

    Raises:
        UsageError: if the folder of a result does not exist, or the path is a folder.
    """
    for path in (args.json, args.save):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UsageError(f"cannot write {path}: it must be a file in an existing folder")


def train_and_measure(args: argparse.Namespace, console: Console) -> tuple[Run, dict[str, Any]]:
    """Train the run that the arguments ask for, and return it with its numbers."""
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
        continue_from(args.resume, run)
    memory, started_at, before = measure_memory(corpus, settings), run.step, run.validate()
    train(run, min(args.stop_at or args.steps, args.steps), console)
    numbers = {**corpus.description(), "started_at_step": started_at, **summary(run, memory, before)}
    title = f"{numbers['parameters']:,} parameters, {settings.dtype}, steps {started_at} to {run.step}, {corpus.source}"
    console.print(table(title, numbers))
    return run, numbers


def continue_from(checkpoint: Path, run: Run) -> None:
    """Load a checkpoint and say from where training goes on."""
    planned = run.load(checkpoint)
    print(f"resumed after step {run.step}: {checkpoint}")
    if planned != run.settings.steps:
        print(f"the saved run was to take {planned} steps, this one takes {run.settings.steps}: the schedule changes")


if __name__ == "__main__":
    sys.exit(main())
