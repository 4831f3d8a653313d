"""Starting several processes that run cases together, as torchrun would; and what each of them does."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from signal import SIGKILL
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
    root = str(ROOT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    command = [
        sys.executable,
        "-m",
        "tests.support.launching",
        module,
        str(folder),
        str(collective_timeout or ""),
        str(world),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, SIGKILL)
    codes = json.loads((folder / "codes").read_text()) if process.returncode == 0 else process.returncode
    expected = [-SIGKILL if rank in killed else 0 for rank in range(world)]
    assert codes == expected, (codes, (folder / "log").read_text()[-3000:])
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


def main(module: str, folder: Path, collective_timeout: str, world: int) -> None:
    """Start the processes as forks, so that what they need is imported once, and leave their exit codes in a file."""
    torch.set_num_threads(1)
    functions = importlib.import_module(module)
    for name in SHARED:
        importlib.import_module(name)
    limit = timedelta(seconds=float(collective_timeout)) if collective_timeout else None
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
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
