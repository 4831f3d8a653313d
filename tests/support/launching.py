"""Starting several processes that run cases together, as torchrun would; and what each of them does.

All are forks of one process, which takes seconds to import torch and what else they share, and does nothing but fork.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from select import select
from signal import SIGKILL
from subprocess import PIPE
from typing import Any

import torch
import torch.distributed as dist

from tests.support.paths import ROOT

SHARED = ("torch._dynamo", "torch.distributed.checkpoint.state_dict", "optstate.checkpoint")
"""Modules that torch and optstate import at their first step, save or load: imported once, not by every process."""

Case = tuple[Any, ...]
"""The name of a function and its arguments."""


def launch(
    module: str,
    world: int,
    cases: Sequence[Case],
    folder: Path,
    *,
    timeout: float,
    collective_timeout: float | None = None,
    killed: Collection[int] = (),
) -> list[dict[Any, Any]]:
    """Run cases, functions of a module, one after the other in `world` processes, and give the results of each rank.

    A result is found under the case with its arguments as strings; an exception leaves its traceback as the result.

    timeout: seconds for everything. collective_timeout: seconds that a process waits for another. killed: the ranks
    that die of SIGKILL on the way and leave nothing; the others must end well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(list(cases), folder / "cases.pt")
    starter().run([module, str(folder), collective_timeout, world], timeout)
    log, codes = (folder / "log").read_text()[-3000:], folder / "codes"
    assert codes.exists(), log
    expected = [-SIGKILL if rank in killed else 0 for rank in range(world)]
    assert json.loads(codes.read_text()) == expected, (codes.read_text(), log)
    files = [folder / f"results{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=False) if file.exists() else {} for file in files]


class Starter:
    """A process that has imported what all others need, and is forked for each of them."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        command = [sys.executable, "-m", "tests.support.launching"]
        self.process = subprocess.Popen(command, env=environment, bufsize=0, stdin=PIPE, stdout=PIPE)
        atexit.register(self.end)

    def run(self, job: list[Any], timeout: float) -> None:
        """Run a job, the arguments of `start_ranks`, and kill what is left of it after these seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        leader = int(self.process.stdout.readline())
        try:
            ended, _, _ = select([self.process.stdout], [], [], timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(leader, SIGKILL)
            self.process.stdout.readline()
        assert ended, f"the processes took more than {timeout} seconds"

    def end(self) -> None:
        """End the process: it reads that there is no more to do."""
        self.process.communicate()


@cache
def starter() -> Starter:
    """Return the one starter of these tests."""
    return Starter()


def key_of(case: Case) -> Case:
    """What the result of a case is found under."""
    return (case[0], *map(str, case[1:]))


def failed(value: Any) -> bool:
    """Whether a case left a traceback instead of a result."""
    return isinstance(value, str) and "Traceback" in value


def result(results: dict[Any, Any], *case: Any) -> Any:
    """The result of a case, which must have one."""
    found = results[key_of(case)]
    assert not failed(found), found
    return found


def serve() -> None:
    """Start the processes of each job that comes in as a line: say who leads them, and, in a second line, their end."""
    torch.set_num_threads(1)
    for name in SHARED:
        importlib.import_module(name)
    gc.freeze()  # what was imported is no garbage, nor an engine that optimizers would have to look for
    for line in sys.stdin:
        module, folder, collective_timeout, world = json.loads(line)
        leader = os.fork()
        if leader == 0:
            lead(module, Path(folder), collective_timeout, world)
        print(leader, flush=True)
        os.waitpid(leader, 0)
        print("ended", flush=True)


def lead(module: str, folder: Path, collective_timeout: float | None, world: int) -> None:
    """Start the processes of a job in a session of their own, leave their exit codes in a file, and end."""
    code = 1
    try:
        os.setsid()
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        start_ranks(module, folder, collective_timeout, world)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def start_ranks(module: str, folder: Path, collective_timeout: float | None, world: int) -> None:
    """Start the processes as forks, so that what they need is imported once, and leave their exit codes in a file."""
    functions = importlib.import_module(module)
    gc.freeze()
    limit = timedelta(seconds=collective_timeout) if collective_timeout else None
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run_cases(functions, folder, limit, rank, world)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "codes").write_text(json.dumps(codes))


def run_cases(functions: Any, folder: Path, limit: timedelta | None, rank: int, world: int) -> None:
    """Run the cases named in a file, and leave this rank's results beside it."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # trainers read them; the store below is what counts
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
    results = {}
    for case in torch.load(folder / "cases.pt", weights_only=False):
        try:
            results[key_of(case)] = getattr(functions, case[0])(*case[1:])
        except Exception:
            results[key_of(case)] = traceback.format_exc()
    torch.save(results, folder / f"results{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    serve()
