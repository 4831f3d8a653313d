"""What smaller optimizer state costs in quality: the demo's language model, trained with every recipe.

    python benchmarks/quality.py [--rows GLOB ...] [--steps N] [--seeds N] [--jobs N] [--json PATH] [--quick] [--fresh]

All rows train the same model from the same weights on the same tokens. Each recipe takes its learning rate from a
grid of three, by the loss on a part of the text that is neither trained on nor reported. Finished runs are kept in
runs/quality/runs.jsonl, so a table that was interrupted goes on where it stopped; after a change of the code, --fresh
runs everything again. Exit code 0, whether goals are met or missed; 1 if a row could not be run.
"""

from __future__ import annotations

import argparse
import difflib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

os.environ["OMP_NUM_THREADS"] = "1"  # of each worker process
os.environ["KINETO_LOG_LEVEL"] = "99"  # the memory profiler announces each start and stop otherwise

from quality_report import RowResult, header, print_report
from quality_rows import ROWS, Row, grid, match, needed, searching_row
from quality_runs import Finished, Job, Result, UsageError, measure, parts, perform, train, workers
from rich.console import Console

STEPS, SEEDS = 300, 3
QUICK_STEPS, QUICK_SEEDS = 10, 1
SELECTION_SEED = 1000
"""The seed of the runs that choose learning rates; the others have 0, 1, 2 ..."""

PROBE_LR = 1e-6
"""The learning rate while memory is measured, with which nothing diverges."""

FINISHED = Path(__file__).resolve().parents[1] / "runs" / "quality" / "runs.jsonl"


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a wrong argument in one line on stderr, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main() -> int:
    options = parse_arguments()
    console = Console(width=128, highlight=False)
    try:
        bench = Benchmark(options)
        console.print(header(bench.description()), soft_wrap=True)
        with workers(options.jobs) as pool:
            try:
                bench.run(pool)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()  # instead of finishing the runs in progress
                raise
    except KeyboardInterrupt:
        print(f"interrupted: finished runs are in {FINISHED}, the same command goes on from there", file=sys.stderr)
        return 130
    except (UsageError, BrokenProcessPool) as error:
        print(f"quality.py: stopped: {error}", file=sys.stderr)
        return 1
    report = print_report(console, bench.results(), bench.learning_rates(), bench.origin())
    if options.json:
        everything = {"schema": "optstate.benchmark.quality/1", **bench.description(), **report}
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 1 if bench.failures else 0


def parse_arguments() -> argparse.Namespace:
    epilog = "rows:\n" + "\n".join(f"  {row.name}" for row in ROWS)
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog="quality.py", description=__doc__, epilog=epilog, formatter_class=form)
    rows_help = "only the rows that fit, and those they are compared with; * stands for anything, case does not matter"
    parser.add_argument("--rows", nargs="+", metavar="GLOB", default=["*"], help=rows_help)
    parser.add_argument("--steps", type=positive, metavar="N", help=f"of each run ({STEPS})")
    parser.add_argument("--seeds", type=positive, metavar="N", help=f"runs of each row ({SEEDS})")
    parser.add_argument("--jobs", type=positive, metavar="N", default=2, help="processes of one thread (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was found to PATH")
    quick_help = f"{QUICK_STEPS} steps and {QUICK_SEEDS} seed: whether everything runs, the losses say nothing"
    parser.add_argument("--quick", action="store_true", help=quick_help)
    parser.add_argument("--fresh", action="store_true", help="ignore what earlier calls have finished")
    options = parser.parse_args()
    options.steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    options.seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    try:
        options.rows = match(options.rows)
    except LookupError as error:
        names = [row.name for row in ROWS]
        near = difflib.get_close_matches(error.args[0], names, n=1, cutoff=0.3)
        parser.error(f"no row fits {error.args[0]!r}; {f'did you mean {near[0]!r}?' if near else '--help lists them'}")
    if options.json:
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"cannot write {options.json}: {error.strerror}")
        if options.json.is_dir() or not os.access(options.json.parent, os.W_OK):
            parser.error(f"cannot write {options.json}: it must be a file in a folder that can be written to")
    return options


def positive(text: str) -> int:
    """Parse an argument that must be a whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above zero")
    return int(text)


class Benchmark:
    """The rows of one call and their results: first memory, then learning rates, then the losses."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows = needed(options.rows)
        self.recipes = list(dict.fromkeys(row.recipe for row in self.rows if row.lr is None))
        self.finished = Finished(FINISHED, options.fresh)
        self.memory: dict[str, Result] = {}
        self.failures: dict[str, str] = {}
        self.total = 3 * len(self.recipes) + options.seeds * len(self.rows)
        self.done = self.kept = 0
        self.begun = time.perf_counter()

    def run(self, pool: ProcessPoolExecutor) -> None:
        """Do everything that is not done yet, saying so on stderr."""
        self._measure(pool)
        self._train(pool, (job for recipe in self.recipes for job in self._search(recipe)))
        self._train(pool, (job for row in self.rows for job in self._runs(row)))

    def _measure(self, pool: ProcessPoolExecutor) -> None:
        """Measure memory, from the code as it is now. A row that cannot be built shows here, before any training."""
        rows = {*self.rows, *map(searching_row, self.recipes)}
        for job, result in perform(pool, measure, [self._job(row, PROBE_LR, 0) for row in rows]):
            if isinstance(result, Exception):
                self._fail(job, result)
            else:
                self.memory[job.row] = result

    def _train(self, pool: ProcessPoolExecutor, jobs: Iterable[Job]) -> None:
        asked = list(jobs)
        wanted = [job for job in asked if job.row not in self.failures]
        self.total -= len(asked) - len(wanted)
        missing = [job for job in wanted if job not in self.finished]
        self.kept += len(wanted) - len(missing)
        self.done += len(wanted) - len(missing)
        for job, result in perform(pool, train, missing):
            self.done += 1
            if isinstance(result, Exception):
                self._fail(job, result)
            else:
                self.finished.add(job, result)
                self._tell(job, result)

    def _tell(self, job: Job, result: Result) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - self.begun), 60)
        what = "selection" if job.split == "selection" else f"seed {job.seed}"
        loss = "diverged" if result["loss"] is None else f"loss {result['loss']:.4f}"
        line = f"[{self.done:>3}/{self.total}  {minutes:>2}:{seconds:02}]  {job.row}, {what}, lr {job.lr:g}: {loss}"
        print(f"{line}  ({result['seconds']:.0f} s)", file=sys.stderr, flush=True)

    def _fail(self, job: Job, error: Exception) -> None:
        if job.row not in self.failures:
            self.failures[job.row] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{job.row} could not be run: {self.failures[job.row]}", file=sys.stderr, flush=True)

    def _job(self, row: Row, lr: float, seed: int, split: str = "validation") -> Job:
        return Job(row.name, lr, seed, self.options.steps, split, parts()[split].fingerprint[:12])

    def _search(self, recipe: str) -> list[Job]:
        return [self._job(searching_row(recipe), lr, SELECTION_SEED, "selection") for lr in grid(recipe)]

    def _runs(self, row: Row) -> list[Job]:
        lr = self.learning_rate(row)
        return [] if lr is None else [self._job(row, lr, seed) for seed in range(self.options.seeds)]

    def learning_rate(self, row: Row) -> float | None:
        """Return a row's own learning rate, or its recipe's; None if the recipe's could not be chosen."""
        return row.lr if row.lr is not None else self.learning_rates()[row.recipe]["chosen"]

    def learning_rates(self) -> dict[str, dict[str, Any]]:
        """Return for each recipe the row that searched, its losses on the selection text, and the best rate."""
        found = {}
        for recipe in self.recipes:
            jobs = [job for job in self._search(recipe) if job in self.finished]
            losses = {job.lr: self.finished[job]["loss"] for job in jobs}
            known = {lr: loss for lr, loss in losses.items() if loss is not None}
            chosen = min(known, key=known.__getitem__) if known else None
            found[recipe] = {"row": searching_row(recipe).name, "losses": losses, "chosen": chosen}
        return found

    def results(self) -> list[RowResult]:
        """Return what is known of each row."""
        results = []
        for number, row in enumerate(self.rows, 1):
            runs = [self.finished[job] for job in self._runs(row) if job in self.finished]
            failure = self.failures.get(row.name)
            if failure is None and row.lr is None and searching_row(row.recipe).name in self.failures:
                failure = f"{searching_row(row.recipe).name}, which chooses the learning rate, could not be run"
            memory = self.memory.get(row.name, {})
            results.append(RowResult(number, row, self.learning_rate(row), runs, memory, failure))
        return results

    def origin(self) -> str:
        """Return, in words, how many runs are behind the table, and how many of them earlier calls did."""
        seconds = time.perf_counter() - self.begun
        earlier = f", {self.kept} of them done by earlier calls (--fresh does all again)" if self.kept else ""
        return f"{self.done} runs{earlier}, {seconds / 60:.0f} min"

    def description(self) -> dict[str, Any]:
        """Return what was run, for the header and for JSON."""
        texts = parts()
        return {
            "quick": self.options.quick,
            "steps": self.options.steps,
            "seeds": self.options.seeds,
            "jobs": self.options.jobs,
            "selection_seed": SELECTION_SEED,
            "corpus": texts["validation"].source,
            "training_bytes": len(texts["validation"].train),
            "selection_bytes": len(texts["selection"].valid),
            "validation_bytes": len(texts["validation"].valid),
            "runs": self.total,
            "runs_from_earlier_calls": self.kept,
        }


if __name__ == "__main__":
    sys.exit(main())
