"""The tests of the kernels run in a process of their own, as Triton decides once whether it compiles or interprets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from optstate.kernels.triton_steps import interprets
from tests.support.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed")

OF_MANY = ["test_tables", "test_two_statistics", "test_device_numbers", "test_large_parameters"]
"""Modules that share a process, whose start takes seconds."""


@pytest.mark.slow
@pytest.mark.skipif(interprets(), reason="this is the process with the interpreter")
@pytest.mark.parametrize("modules", [["test_kernels"], ["test_steps"], OF_MANY])
def test_kernels_under_the_interpreter(modules: list[str]) -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            *(f"tests/kernels/triton/{module}.py" for module in modules),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
