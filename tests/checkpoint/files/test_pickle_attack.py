"""Hostile pickles (`tests/support/pickle_attack.py`): whatever they ask for, nothing is called, imported or left.

One that fails is found again by its words in what `python -m tests.support.pickle_attack` prints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.forks import run_script
from tests.support.fuzz_cases import SPARE
from tests.support.paths import ROOT
from tests.support.pickle_attack import BITING

pytestmark = pytest.mark.slow

SECONDS = 2.0
"""Of the processor's time, for all that is done with one file."""


def run(*arguments: str) -> Any:
    process = run_script(ROOT / "tests" / "support" / "pickle_attack.py", *arguments)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = run()
    return found


def test_the_pickles_do_harm_where_they_are_executed(tmp_path: Path) -> None:
    """Else the rest would show nothing: Python's own pickle calls what each of them names."""
    assert run("bite", str(tmp_path)) == [*BITING]


def test_nothing_is_called_imported_or_opened(results: dict[str, Any]) -> None:
    """Every file gives a result or one line; Python's audit sees no import, no process, no file but the one read."""
    print(f"{results['cases']['files']} files: {results['outcomes']}")
    assert results["failures"][:5] == []
    assert results["left"] == ["case.pt"]
    assert results["cases"]["files"] >= 1500
    assert set(results["outcomes"]) == {"result", "unreadable", "refused"}
    assert min(results["outcomes"].values()) > 100  # else they were all stopped by the first thing that is odd


def test_no_pickle_takes_long_or_much_memory(results: dict[str, Any]) -> None:
    seconds, case = results["slowest"]
    print(f"slowest: {seconds:.3f} s of {case}; memory grew by {results['grown'] >> 20} MiB")
    assert seconds < SECONDS, case
    assert results["grown"] < SPARE
