"""When steps in Triton are chosen: decided without a GPU, and without importing Triton."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from optstate.kernels import native, triton_steps
from optstate.kernels.backend import check_backend, choose_backend
from optstate.kernels.triton_steps import availability
from tests.support.forks import run_script

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleSpec | None]]:
    """What is found under the name triton, to be set by a test."""
    specs: dict[str, ModuleSpec | None] = {"triton": ModuleSpec("triton", None, origin="triton/__init__.py")}
    find = importlib.util.find_spec
    monkeypatch.setattr(availability, "find_spec", lambda name: specs[name] if name in specs else find(name))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    availability.is_installed.cache_clear()
    yield specs
    availability.is_installed.cache_clear()


def test_cuda_devices_take_triton_where_it_is_installed(found: dict[str, ModuleSpec | None]) -> None:
    assert choose_backend("auto", CUDA) == ("triton", "")
    assert choose_backend("triton", CUDA) == ("triton", "")
    assert choose_backend("native", CUDA) == ("eager", "no compiled steps for cuda")
    assert choose_backend("eager", CUDA) == ("eager", "eager was chosen")
    check_backend("triton")


@pytest.mark.parametrize("spec", [None, ModuleSpec("triton", None)], ids=["nothing", "a folder of that name"])
def test_without_triton_the_transforms_run_and_the_plan_says_why(
    found: dict[str, ModuleSpec | None], spec: ModuleSpec | None
) -> None:
    found["triton"] = spec
    backend, why = choose_backend("auto", CUDA)
    assert backend == "eager"
    assert "pip install 'optstate[triton]'" in why
    with pytest.raises(ValueError, match="the package triton is not installed"):
        check_backend("triton")


def test_other_devices_never_take_triton(found: dict[str, ModuleSpec | None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("triton", CPU)[0] == "eager"
    assert "not on cpu" in choose_backend("triton", CPU)[1]
    assert choose_backend("auto", torch.device("mps"))[0] == "eager"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", CPU) == ("triton", "")
    assert choose_backend("auto", CPU)[0] != "triton"


def test_tiles_hold_as_much_as_those_of_the_compiled_steps() -> None:
    """One rule says which blocks both can keep: those that divide a tile."""
    assert triton_steps.TILE == native.TILE


@pytest.mark.slow
def test_triton_is_not_imported_before_a_step_needs_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch, optstate; from optstate import recipes;"
        "recipes.get('adalomo')([('w', torch.nn.Parameter(torch.ones(4, 4)))], lr=1e-3).plan();"
        "from optstate.kernels.backend import choose_backend; choose_backend('auto', torch.device('cuda'));"
        "print('optstate.kernels.triton_steps.tiles' in sys.modules)"
    )
    assert run_script(program).stdout.strip() == "False"
