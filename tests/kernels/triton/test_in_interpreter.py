"""The tests of the kernels run in a process of their own, as Triton decides once whether it compiles or interprets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from optstate.kernels.triton_steps import interprets
from tests.support.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed")

NAMES = [
    "test_kernels",
    "test_steps",
    "test_tables",
    "test_two_statistics",
    "test_device_numbers",
    "test_large_parameters",
]
MODULES = [f"tests/kernels/triton/{name}.py" for name in NAMES]


@pytest.mark.slow
@pytest.mark.skipif(interprets(), reason="this is the process with the interpreter")
def test_kernels_under_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-n", "0", "-p", "no:cacheprovider", *MODULES],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    for module in MODULES:
        assert module in run.stdout
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
