"""Every kernel compiles for the GPUs that people have, without registers that spill to memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.forks import run_script
from tests.support.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed")

ARCHITECTURES = {80, 90, 100}


@pytest.mark.slow
def test_no_kernel_spills_registers(tmp_path: Path) -> None:
    """A spill would be traffic to memory that the declared bytes do not count.

    Every variant is compiled for one architecture, by turns, so that each kernel is compiled for all of them; nothing
    is taken from an earlier run. `python -m benchmarks.aot` compiles every variant for all.
    """
    found = tmp_path / "aot.json"
    run = run_script(ROOT / "benchmarks" / "aot.py", "--turns", "--json", found)
    assert run.returncode == 0, run.stderr[-4000:]
    compiled = json.loads(found.read_text())
    assert len({(each["kernel"], each["name"]) for each in compiled}) >= 50
    kernels = {each["kernel"] for each in compiled}
    assert len(kernels) >= 8
    assert {(each["kernel"], each["arch"]) for each in compiled} == {
        (k, arch) for k in kernels for arch in ARCHITECTURES
    }
    assert [each["name"] for each in compiled if each["spills"] or each["registers"] > 168] == []
    require_same_sums({(each["kernel"], each["name"]): each["sums"] for each in compiled})


def require_same_sums(sums: dict[tuple[str, str], list[str]]) -> None:
    """Require that sums in steps of many parameters add in the order of single steps, for the same bits.

    The order follows from how the elements lie in threads. The interpreter, which has none, cannot tell.
    """
    for (kernel, name), layouts in sums.items():
        single = kernel.removesuffix("_table")
        if kernel != single and (single, f"{single}, {name}") in sums:
            assert layouts == sums[single, f"{single}, {name}"]
    assert sums["apply_full_table", "fp32"]
