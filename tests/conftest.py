"""What every test run needs."""

import gc
import os
import re
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import settings

# Tests share the cores with each other: several threads each would only wait. Children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A run in the background of a shell ignores Ctrl-C, or the end of its terminal, and hands that on to the processes that
# tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The suite gives the same answer twice; `pytest --hypothesis-profile=explore` looks for what nobody has seen.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def options_read_once() -> Iterator[None]:
    """Let `typer.testing` read the options of the commands once, not for every command that a test runs."""
    from typer.main import get_command

    with mock.patch("typer.testing._get_command", cache(get_command)):
        yield


LONGEST = ("ranks", "slow", "peer")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files of which the marks of the run want nothing: to import other people's trainers takes seconds."""
    wanted = config.getoption("markexpr")
    if collection_path.suffix != ".py" or "not" not in wanted:
        return None
    line = re.search(r"^pytestmark = .*$", collection_path.read_text(encoding="utf-8"), re.M)
    marks = re.findall(r"pytest\.mark\.(\w+)", line[0]) if line else []
    return True if any(re.fullmatch(rf"(?:.* and )?not {mark}(?: and .*)?", wanted) for mark in marks) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the workers of xdist begin with what takes longest, so that none ends long after the others."""
    if hasattr(config, "workerinput"):
        items.sort(
            key=lambda item: next((i for i, mark in enumerate(LONGEST) if item.get_closest_marker(mark)), len(LONGEST))
        )


def pytest_collection_finish() -> None:
    """Leave out of every search for garbage, and for engines among live objects, what was there before the tests."""
    gc.freeze()
