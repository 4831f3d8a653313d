"""Starting processes that are forks of one, which takes seconds to import torch and does nothing else but fork.

`Starter.run` runs a function in such a process, or in several that this one forks; `run_script` runs a program, and
`run_command` the command line.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from select import select
from signal import SIGKILL
from subprocess import PIPE, CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.paths import ROOT

SHARED = ("torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "optstate.checkpoint")
"""Modules that torch and optstate import at their first step, save or load: imported once, not by every process."""


class Starter:
    """A process that has imported what all others need, and is forked for each of them."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        command = [sys.executable, "-m", "tests.support.forks"]
        self.process = subprocess.Popen(command, env=environment, bufsize=0, stdin=PIPE, stdout=PIPE)
        atexit.register(self.process.communicate)  # which ends it: there is no more to do

    def share(self, module: str) -> None:
        """Import a module in the process that is forked, so that not every fork has to."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([module]).encode() + b"\n")
        assert self.process.stdout.readline() == b"shared\n"

    def run(self, function: str, *arguments: Any, log: Path, timeout: float) -> int:
        """Run a function, "module:name", with arguments that JSON can hold, and return the exit code of its process.

        All that the function started is killed when it is through, or after `timeout` seconds, which is an error.
        log: the file that gets what is printed.
        """
        with self.running(function, *arguments, log=log) as codes:
            ended, _, _ = select([self.process.stdout], [], [], timeout)
        assert ended, f"the processes took more than {timeout} seconds"
        return codes[0]

    @contextmanager
    def running(self, function: str, *arguments: Any, log: Path) -> Iterator[list[int]]:
        """Have a function run beside the block, at whose end all that it started is killed and its exit code is added
        to the list. This starter runs nothing else meanwhile."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([function, arguments, str(log)]).encode() + b"\n")
        leader, codes = int(self.process.stdout.readline()), list[int]()
        try:
            yield codes
        finally:
            with suppress(ProcessLookupError):
                os.killpg(leader, SIGKILL)
            codes.append(int(self.process.stdout.readline()))


@cache
def starter() -> Starter:
    """Return the one starter of these tests."""
    return Starter()


def run_script(
    script: Path, *arguments: str | Path, world: int = 1, first: str = "", timeout: float = 600
) -> CompletedProcess[str]:
    """Run a Python program in the project's folder as `python script arguments` would, or as torchrun would if `world`,
    the number of processes, is above one. first: a function, "module:name", that is called before the program."""
    command = [str(script), *map(str, arguments)]
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        code = starter().run(
            "tests.support.forks:be_program", command, world, first, str(out), log=err, timeout=timeout
        )
        return CompletedProcess(command, code, out.read_text(), err.read_text())


def be_program(command: list[str], world: int, first: str, out: str) -> None:
    """Be the program of this command, in one process or several, which print to a file; call `first` before."""
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.chdir(ROOT)
    if world > 1:
        be_ranks(world)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    if first:
        call(first)
    runpy.run_path(command[0], run_name="__main__")


def run_command(*arguments: str | Path, installed: Path | None = None, timeout: float = 600) -> CompletedProcess[str]:
    """Run `optstate arguments`, as a person does beside whom the packages in a folder are installed."""
    command = list(map(str, arguments))
    folder = "" if installed is None else str(installed)
    with TemporaryDirectory() as place:
        out, err = Path(place) / "out", Path(place) / "err"
        code = starter().run("tests.support.forks:be_command", command, folder, str(out), log=err, timeout=timeout)
        return CompletedProcess(command, code, out.read_text(), err.read_text())


def be_command(command: list[str], installed: str, out: str) -> None:
    """Be the command line, with the packages of a folder, and print to a file."""
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    if installed:
        sys.path.insert(0, installed)
    sys.argv = ["optstate", *command]
    importlib.import_module("optstate_cli.main").app()


def be_ranks(world: int) -> None:
    """Fork a process for each rank, which returns with the variables that torchrun sets; and end when all have."""
    for name in ("transformers", "accelerate"):  # what examples of several processes import, once for all of them
        importlib.import_module(name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            return
        children.append(child)
    sys.exit(max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children))


# --- the starter's own process ---------------------------------------------------------------------------------------


def serve() -> None:
    """Run each function that comes in as a line in a fork: say who leads it, and, in a second line, its exit code.

    A line that is the name of a module alone has it imported here.
    """
    import torch

    torch.set_num_threads(1)
    for name in SHARED:
        importlib.import_module(name)
    tests = os.getppid()
    gc.freeze()  # what was imported is no garbage, nor an engine that optimizers would have to look for
    for line in sys.stdin:
        job = json.loads(line)
        if len(job) == 1:
            importlib.import_module(job[0])
            gc.freeze()
            print("shared", flush=True)
            continue
        leader = os.fork()
        if leader == 0:
            lead(*job)
        print(leader, flush=True)
        while not (ended := os.waitpid(leader, os.WNOHANG))[0]:
            time.sleep(0.02)
            if os.getppid() != tests:  # which were killed: nobody waits for this
                with suppress(ProcessLookupError):
                    os.killpg(leader, SIGKILL)
                return
        print(os.waitstatus_to_exitcode(ended[1]), flush=True)


def call(function: str, *arguments: Any) -> None:
    """Call a function, "module:name"."""
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)


def lead(function: str, arguments: list[Any], log: str) -> None:
    """Run a function in a session of its own, and end with the exit code that a program of it would have."""
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        call(function, *arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        print(end.code if isinstance(end.code, str) else "", end="", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
