"""Training runs in worker processes, and a file that remembers the finished ones."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from quality_rows import Row, row_of

import optstate

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # first while these are read: both folders have a gpt.py
from corpus import Corpus, UsageError, read_corpus  # noqa: E402
from gpt import GPT  # noqa: E402
from lm import Run, Settings, measure_memory  # noqa: E402

sys.path.remove(str(EXAMPLES))

__all__ = ["BATCH", "GPT", "Finished", "Job", "Result", "UsageError", "measure", "parts", "perform", "train", "workers"]

BATCH = 8
WINDOWS = 256
"""Windows of validation text: twice the demo's, a twentieth of a run's time."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A training run, by all that defines it but the code: names, numbers, and the fingerprint of the text.

    split: "selection" or "validation", the text whose loss is reported.
    """

    row: str
    lr: float
    seed: int
    steps: int
    split: str
    corpus: str
    batch: int = BATCH
    torch: str = str(torch.__version__)

    @property
    def settings(self) -> Settings:
        """The settings of the demo's `Run`."""
        row = row_of(self.row)
        return Settings(row.recipe, self.lr, row.fused, self.steps, self.batch, row.dtype, self.seed)


@cache
def parts() -> dict[str, Corpus]:
    """Return the demo's text twice, with the selection text and with the validation text to report the loss on."""
    selection, validation = read_corpus(None, GPT().config.context).set_aside()
    return {"selection": selection, "validation": validation}


def optimizer_of(row: Row) -> Callable[[GPT, Settings], optstate.Optimizer]:
    """Return a function that builds the row's optimizer, as the demo's `Run` takes one."""
    return lambda model, settings: row.optimizer(model, settings.lr)


def train(job: Job) -> Result:
    """Train to the end, or to the first number that is not finite, and validate.

    Returns:
        loss: in nats per byte, None if the run diverged; steps: those taken; seconds.
    """
    start = time.perf_counter()
    run = Run(parts()[job.split], job.settings, build=optimizer_of(row_of(job.row)))
    loss = math.nan
    try:
        while run.step < job.steps and (not run.losses or math.isfinite(run.losses[-1])):
            run.advance()
        loss = run.validate(WINDOWS)
    except optstate.NonFiniteGradientError:
        pass  # what a diverging run ends with, before its loss shows it
    return {"loss": loss if math.isfinite(loss) else None, "steps": run.step, "seconds": time.perf_counter() - start}


def measure(job: Job) -> Result:
    """Measure the bytes of a run like this one.

    Returns:
        state_bytes: of the optimizer's tensors; peak_bytes: the most that is allocated from the start of the backward
        pass to the end of the update with a batch of a few bytes.
    """
    memory = measure_memory(parts()[job.split], job.settings, optimizer_of(row_of(job.row)))
    return {"state_bytes": memory.state, "peak_bytes": memory.backward_and_update}


class Finished:
    """Results of finished runs, one JSON object per line of a file that is only appended to."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self._results: dict[Job, Result] = {}
        self._whole = True
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            text = path.read_text()
            self._whole = text.endswith("\n") or not text
            self._results = {} if fresh else dict(filter(None, map(_parse, text.splitlines())))

    def __getitem__(self, job: Job) -> Result:
        return self._results[job]

    def __contains__(self, job: Job) -> bool:
        return job in self._results

    def add(self, job: Job, result: Result) -> None:
        """Remember a result, on disk at once."""
        self._results[job] = result
        with self.path.open("a") as stream:
            # A process that was killed may have left half a line, which is then a line of its own.
            stream.write(("" if self._whole else "\n") + json.dumps({"job": asdict(job), "result": result}) + "\n")
        self._whole = True


def _parse(line: str) -> tuple[Job, Result] | None:
    """Parse a line into a run and its result; None for half a line, or a line of a version with other fields."""
    try:
        entry = json.loads(line)
        return Job(**entry["job"]), entry["result"]
    except (ValueError, TypeError, KeyError):
        return None


def workers(count: int) -> ProcessPoolExecutor:
    """Start processes of one thread each: runs then neither slow each other down nor depend on their number."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_start)


def _start() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End with the parent process: a worker whose parent was killed would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def perform(
    pool: ProcessPoolExecutor, work: Callable[[Job], Result], jobs: Iterable[Job]
) -> Iterator[tuple[Job, Result | Exception]]:
    """Yield each job with its result, or the exception that it raised, as the jobs finish."""
    futures = {pool.submit(work, job): job for job in jobs}
    for future in as_completed(futures):
        try:
            yield futures[future], future.result()
        except BrokenProcessPool:
            raise
        except Exception as error:
            yield futures[future], error
