"""Processes killed while they replace a checkpoint: the old or the new one is there, complete."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import inconsistencies
from optstate.checkpoint.files.tensor_bytes import bytes_of, load_tensor
from optstate.checkpoint.open_checkpoint import open_checkpoint

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("OPTSTATE_KILLS", "25"))

ACTIONS = {
    "save": "opt.safetensors",
    "save a set": "opt.safetensors",
    "convert": "opt.safetensors",
    "convert to torch": "opt.pt",
}
"""What is done, and to which file."""

# Makes the sources. For every line (action, target, the first of the two) it forks a child that says its number and
# replaces the target by the one and the other for ever, and waits for its end. What is needed is imported before: a
# fork takes a few milliseconds. A line without the first: it writes one of them, and says how long two take.
WRITER = """
import contextlib, os, sys, time
import torch, typer.main
import optstate
from optstate.checkpoint import open_checkpoint
from optstate.checkpoint.live import save
from optstate.checkpoint.operations import run_conversion
from optstate.recipes import AdamW
from optstate_cli import app

torch.set_num_threads(1)
folder = sys.argv[1]
command = typer.main.get_command(app)
silent = open(os.devnull, "w")

def optimizer_of(value):
    params = [(f"{i}.weight", torch.nn.Parameter(torch.full((256, 256), value))) for i in range(4)]
    optimizer = AdamW(params, lr=1e-3)
    for step in range(int(value)):
        for _, param in params:
            param.grad = torch.full_like(param, value)
        optimizer.step()
    return optimizer

def replace(action, target, which):
    if action.startswith("save"):
        optstate.save(optimizers[which], target, max_shard_size=600_000 if action.endswith("set") else None)
    else:
        with contextlib.redirect_stdout(silent):
            code = command.main(["convert", sources[which], target, "--force"], "optstate", standalone_mode=False)
        assert not code

optimizers = [optimizer_of(2.0), optimizer_of(3.0)]
sources = [os.path.join(folder, f"{which}.safetensors") for which in (0, 1)]
for optimizer, source in zip(optimizers, sources):
    optstate.save(optimizer, source)
print("ready", flush=True)
for line in sys.stdin:
    action, target, first = line.rstrip().split(":")
    if not first:
        replace(action, target, 0)
        began = time.perf_counter()
        replace(action, target, 1)
        replace(action, target, 0)
        print(time.perf_counter() - began, flush=True)
        continue
    child = os.fork()
    if child == 0:
        try:
            print(os.getpid(), flush=True)
            while True:
                replace(action, target, int(first))
                replace(action, target, 1 - int(first))
        finally:
            os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Writer:
    """The process that starts writing processes. sources: the two checkpoints that they write again and again."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.sources = [folder / "0.safetensors", folder / "1.safetensors"]

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def kills(self, action: str, target: Path, count: int) -> Iterator[int]:
        """Write one of them, start a process that replaces it, kill that, and give its exit code; again and again."""
        draw = random.Random(action)
        longest = 1.5 * float(self.ask(f"{action}:{target}:"))
        for number in range(count):
            child = int(self.ask(f"{action}:{target}:{number % 2}"))
            time.sleep(draw.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
            yield int(self.answer())


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writer]:
    folder = tmp_path_factory.mktemp("sources")
    command = [sys.executable, "-c", WRITER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        made = Writer(process, folder)
        assert made.answer() == "ready\n"
        yield made
        assert process.stdin is not None
        process.stdin.close()


def content(checkpoint: Checkpoint) -> tuple[list[str], tuple[int, ...]]:
    """Hashes of all numbers of a checkpoint in the order of its parameters, and the steps."""
    assert inconsistencies(checkpoint) == []
    slots = [slot for param in checkpoint.document.parameters for slot in param.slots.values()]
    tensors = [load_tensor(stored) for slot in slots for stored in checkpoint.fields_of(slot).values()]
    return [sha256(bytes_of(tensor)).hexdigest() for tensor in tensors], checkpoint.document.steps


TEMPORARY = r"\.optstate-[0-9a-f]+\.tmp"
OF_A_SET = r"opt(-\d+)?-\d{5}-of-\d{5}\.safetensors"


@pytest.mark.parametrize("action", ACTIONS)
def test_a_killed_process_leaves_the_old_or_the_new_checkpoint(action: str, writer: Writer, tmp_path: Path) -> None:
    """Nothing else but temporary files, and of a set files that no index names."""
    target = tmp_path / ACTIONS[action]
    expected = [content(open_checkpoint(source)) for source in writer.sources]
    found = []
    for code in writer.kills(action, target, KILLS):
        assert code == -signal.SIGKILL
        checkpoint = open_checkpoint(target)
        found.append(expected.index(content(checkpoint)))
        others = {path.name for path in tmp_path.iterdir()} - {Path(file).name for file in checkpoint.files}
        allowed = f"{TEMPORARY}|{OF_A_SET}" if action.endswith("set") else TEMPORARY
        assert all(re.fullmatch(allowed, other) for other in others), others
    print(f"{len(found)} kills, {action}: {found.count(0)} times the one checkpoint, {found.count(1)} the other")
    if KILLS >= 20:
        assert set(found) == {0, 1}
        assert others  # else no kill came in the middle of a write, and this shows nothing
