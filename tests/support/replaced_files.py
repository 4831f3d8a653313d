"""A process that saves two versions of a checkpoint by turns, and counts of what a reader beside it found.

As a program it prints the counts: `python -m tests.support.replaced_files 300`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from optstate_cli import app
from torch import nn
from typer.testing import CliRunner

import optstate
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.tensor_bytes import load_tensor
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.recipes import AdamW
from tests.support.forks import starter

__all__ = ["ACTIONS", "SETS", "fresh", "held", "saving", "seen"]

PARAMETERS, SHAPE = 6, (40, 40)
SETS = {"one file": 0, "a set": 30_000}
"""Most bytes in a file."""


def fresh(value: float = 0.0) -> optstate.Optimizer:
    """An optimizer whose first moments are all the same number, a tenth of `value`."""
    named = [(f"p{i}", nn.Parameter(torch.zeros(SHAPE))) for i in range(PARAMETERS)]
    optimizer = AdamW(named, lr=1e-3)
    for _, param in named:
        param.grad = torch.full_like(param, value)
    optimizer.step()
    return optimizer


def save_for_ever(path: str, limit: int) -> None:
    """Put the one and the other in place until the process is ended."""
    versions = fresh(10.0), fresh(20.0)
    optstate.save(versions[0], path, max_shard_size=limit or None)
    print("ready", flush=True)
    while True:
        for version in versions:
            optstate.save(version, path, max_shard_size=limit or None)


@contextmanager
def saving(path: Path, limit: int) -> Iterator[None]:
    """Another process that saves without end."""
    log = path.parent / "log"
    with starter().running("tests.support.replaced_files:save_for_ever", str(path), limit, log=log):
        deadline = time.monotonic() + 60
        while not log.exists() or log.read_text() != "ready\n":
            assert time.monotonic() < deadline, log.exists() and log.read_text()
            time.sleep(0.01)
        yield


def held(path: Path) -> set[int]:
    """The numbers among a file's first moments, one for every version in it; read tensor by tensor."""
    checkpoint = open_checkpoint(path)
    keys = [param.slots["exp_avg"].fields[""] for param in checkpoint.document.parameters]
    return {round(number) for key in keys for number in load_tensor(checkpoint.tensors[key]).unique().tolist()}


def loaded(path: Path, folder: Path) -> set[int]:
    optimizer = fresh()
    optstate.load(optimizer, path)
    return {round(number) for state in optimizer.state.values() for number in state["exp_avg"].unique().tolist()}


def converted(path: Path, folder: Path) -> set[int]:
    target = folder / "converted.safetensors"
    command("convert", path, target, "--force")
    return held(target)


def compared(path: Path, folder: Path) -> set[int]:
    """The verdicts on the file beside itself: each side is one version, so the same of all statistics, or none."""
    tree = json.loads(command("diff", path, path, "--tensors", "--json", codes=(0, 1)))
    first = [row for row in tree["tensors"] if row["slot"] == "exp_avg"]
    return {1 if row["verdict"] == "equal" else 2 for row in first}


def inspected(path: Path, folder: Path) -> set[int]:
    tree = json.loads(command("inspect", path, "--stats", "--filter", "*/exp_avg", "--json"))
    return {round(row["stats"][key]) for row in tree["tensors"] for key in ("minimum", "maximum")}


def checked(path: Path, folder: Path) -> set[int]:
    """Nothing is ever wrong with a file that is replaced at once."""
    tree = json.loads(command("check", path, "--json"))
    return {1} if tree["ok"] else {1, 2}


ACTIONS: dict[str, Callable[[Path, Path], set[int]]] = {
    "load": loaded,
    "convert": converted,
    "diff": compared,
    "inspect": inspected,
    "check": checked,
}


def command(*arguments: Any, codes: tuple[int, ...] = (0,)) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code in (3, 4):
        raise CheckpointError(str(arguments[1]), result.stderr.strip())
    assert result.exit_code in codes, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result.stdout


def seen(times: int, path: Path, action: str) -> Counter[str]:
    """What so many readings of a path beside a saver came to: "1", "2" for its two versions, "mixed", or "refused"."""
    counts: Counter[str] = Counter()
    for _ in range(times):
        try:
            found = ACTIONS[action](path, path.parent)
        except CheckpointError as error:
            counts[f"refused: {error.reason[:90]}"] += 1
        else:
            counts["mixed" if len(found) > 1 else str(*found)] += 1
    return counts


if __name__ == "__main__":
    for kind, most in SETS.items():
        with tempfile.TemporaryDirectory() as place, saving(Path(place) / "opt.safetensors", most):
            for each in ACTIONS:
                print(kind, each, dict(seen(int(sys.argv[1]), Path(place) / "opt.safetensors", each)), flush=True)
