"""Thousands of damaged files of every kind through everything that the commands do with them.

`tests/support/fuzz_cases.py` runs them in a process of its own, with a fixed amount of memory and under watch; one that
fails is run alone with `python -m tests.support.fuzz_cases document 17 18`, and `all` runs 20,000.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optstate.checkpoint.document.contradictions import inconsistencies
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.safetensors_check import structural_issues
from optstate.checkpoint.operations.summarize import summarize
from tests.support.forks import run_script
from tests.support.fuzz_cases import KINDS, SPARE
from tests.support.fuzzing import damaged_json, safetensors_of
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

SECONDS = 2.0
"""Of the processor's time, for all commands on one file."""


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    process = run_script(ROOT / "tests" / "support" / "fuzz_cases.py", timeout=900)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout)
    assert isinstance(found, dict)
    return found


def test_every_case_gives_a_result_or_one_line(results: dict[str, Any]) -> None:
    """And executes, imports and writes nothing."""
    cases = {kind: results["cases"].get(kind, 0) for kind in KINDS}
    print(f"{sum(cases.values())} files, {results['cases']['commands']} commands: {cases}, {results['outcomes']}")
    assert results["failures"][:5] == []
    assert sum(cases.values()) >= 2_000
    assert results["cases"]["commands"] >= 50
    assert set(results["outcomes"]) == {"result", "unreadable", "refused"}
    # Else the damage is too great, or too small, to show anything. Only names that do something are refused.
    assert min(results["outcomes"][each] for each in ("result", "unreadable")) > 100
    assert results["outcomes"]["refused"] > 0


def test_no_case_takes_long_or_much_memory(results: dict[str, Any]) -> None:
    seconds, case = results["slowest"]
    print(f"slowest: {seconds:.3f} s of {case}; memory grew by {results['grown'] >> 20} MiB")
    assert seconds < SECONDS, case
    assert results["grown"] < SPARE


# --- documents, with hypothesis: what fails is made as small as it can be ------------------------------------------

KEYS = ("format_version", "recipe", "groups", "parameters", "clip_grad_norm", "source", "history", "codebooks", "extra")
NUMBERS = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**63, 10**30, 10**400]), st.floats())
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.sampled_from(["Full()", "$float", "inf"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
DOCUMENT = {
    "format_version": 1,
    "recipe": "adamw",
    "groups": [{"hyper": {"lr": 0.1, "betas": {"$tuple": [0.9, 0.99]}}, "parameters": ["w", "b"]}],
    "parameters": [
        {
            "name": name,
            "shape": [2, 2],
            "dtype": "float32",
            "group": 0,
            "step": 3,
            "chain": "scale_by_adam",
            "weights": "Plain()",
            "slots": {
                "exp_avg": {"store": "Full()", "signed": True, "fields": {"": f"{name}/exp_avg"}, "of": "gradient"}
            },
        }
        for name in ("w", "b")
    ],
    "clip_grad_norm": None,
    "source": {"tool": "optstate"},
    "history": [],
    "codebooks": {"map:0123456789abcdef": [0.1 * i for i in range(16)]},
}
TENSORS = {
    f"{name}/exp_avg": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16 * i, 16 * i + 16]}
    for i, name in enumerate(("w", "b"))
}


@settings(max_examples=80, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    others=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2),
    seed=st.one_of(st.none(), st.integers(0, 1 << 30)),
)
def test_documents(others: dict[str, Any], seed: int | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whole parts of a document replaced by any JSON, and some values of the rest by others."""
    text = json.dumps({**DOCUMENT, **others})
    text = text if seed is None else damaged_json(text, Random(seed))
    header = json.dumps({"__metadata__": {"optstate": text}, **TENSORS})
    path = tmp_path_factory.getbasetemp() / "document.safetensors"
    path.write_bytes(safetensors_of(header, bytes(32)))
    try:  # the header itself is invalid where a text has half of a surrogate pair
        assert [issue for issue in structural_issues(path) if issue.severity == "error"] == []
        summary = summarize(path)
    except CheckpointError as error:
        summary, message = None, str(error)
    if summary is None:
        assert message.isprintable()
        assert len(message) < 1000
        return
    if summary.checkpoint is not None:
        inconsistencies(summary.checkpoint)
    if not others and seed is None:
        assert (summary.parameters, summary.elements, summary.steps) == (2, 8, (3,))
