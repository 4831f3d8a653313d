"""Every kernel compiles for the GPUs that people have, without registers that spill to memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "which", "least"), [(80, ["--first"], 8), (90, [], 50), (100, ["--first"], 8)])
def test_no_kernel_spills_registers(arch: int, which: list[str], least: int, tmp_path: Path) -> None:
    """A spill would be traffic to memory that the declared bytes do not count."""
    found = tmp_path / "aot.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--arch", str(arch), *which, "--json", str(found)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = json.loads(found.read_text())
    assert {kernel["arch"] for kernel in kernels} == {arch}
    assert len(kernels) >= least
    assert [kernel["name"] for kernel in kernels if kernel["spills"] or kernel["registers"] > 168] == []
    require_same_sums({(kernel["kernel"], kernel["name"]): kernel["sums"] for kernel in kernels})


def require_same_sums(sums: dict[tuple[str, str], list[str]]) -> None:
    """Require that sums in steps of many parameters add in the order of single steps, for the same bits.

    The order follows from how the elements lie in threads. The interpreter, which has none, cannot tell.
    """
    for (kernel, name), layouts in sums.items():
        single = kernel.removesuffix("_table")
        if kernel != single and (single, f"{single}, {name}") in sums:
            assert layouts == sums[single, f"{single}, {name}"]
    assert sums["apply_full_table", "fp32"]
