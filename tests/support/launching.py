"""Starting several processes that run cases together, as torchrun would; and what each of them does.

All are forks of one process that has imported torch, see `tests.support.forks`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Collection, Sequence
from datetime import timedelta
from pathlib import Path
from signal import SIGKILL
from typing import Any

import torch
import torch.distributed as dist

from tests.support.forks import starter

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
    job = ("tests.support.launching:start_ranks", module, str(folder), collective_timeout, world)
    starter().run(*job, log=folder / "log", timeout=timeout)
    log, codes = (folder / "log").read_text()[-3000:], folder / "codes"
    assert codes.exists(), log
    expected = [-SIGKILL if rank in killed else 0 for rank in range(world)]
    assert json.loads(codes.read_text()) == expected, (codes.read_text(), log)
    files = [folder / f"results{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=False) if file.exists() else {} for file in files]


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


def start_ranks(module: str, folder: str, collective_timeout: float | None, world: int) -> None:
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
                run_cases(functions, Path(folder), limit, rank, world)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (Path(folder) / "codes").write_text(json.dumps(codes))


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
