"""The package as a whole: imports, layers, registry, command line."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from optstate_cli import app
from typer.testing import CliRunner

import optstate
from adalomo import AdaLomo
from tests.support.forks import run_script
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_optstate_does_not_import_what_it_only_sometimes_needs() -> None:
    heavy = ["bitsandbytes", "transformers", "matplotlib", "typer", "rich", "adalomo", "optstate_cli", "safetensors"]
    found = run_python(f"import sys, optstate; print([m for m in {heavy!r} if m in sys.modules])")
    assert found.strip() == "[]"


def test_names_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, optstate; names = dir(optstate); assert 'torch' not in sys.modules\n"
        "import optstate.checkpoint.files.safetensors_header; assert 'torch' not in sys.modules\n"
        "from optstate import *; from optstate import Optimizer as O; import pickle\n"
        "assert set(optstate.__all__) <= set(names) & set(globals())\n"
        "assert O is optstate.Optimizer is Optimizer\n"
        "assert stores.Full() == pickle.loads(pickle.dumps(stores.Full()))\n"
        "try: optstate.nothing\n"
        "except AttributeError as error: print(error)"
    )
    assert run_python(code).strip() == "module 'optstate' has no attribute 'nothing'"


def test_importing_optstate_works_without_bitsandbytes() -> None:
    run_python("import sys; sys.modules['bitsandbytes'] = None\nimport optstate, adalomo")


def test_importing_optstate_costs_little_beyond_torch() -> None:
    """Under 40 % on top of importing torch itself (about 10 % in practice), best of three."""
    code = (
        "import time; t = time.perf_counter(); import torch; a = time.perf_counter(); import optstate\n"
        "print((time.perf_counter() - a) / (a - t))"
    )
    assert any(float(run_python(code)) < 0.4 for _ in range(3))


def test_imports_go_one_way() -> None:
    """The contracts in pyproject.toml, checked by import-linter."""
    done = subprocess.run(["lint-imports"], cwd=ROOT, capture_output=True, text=True, env=path_with_scripts())
    assert done.returncode == 0, done.stdout
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout)


def path_with_scripts() -> dict[str, str]:
    import os

    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}


def test_the_library_names_no_recipe() -> None:
    """Generic code does not know AdaLomo; documentation strings may cite it."""
    for path in (ROOT / "optstate").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not re.match(r"\s*(from|import) adalomo", line), path


def test_the_registry_holds_every_installed_recipe() -> None:
    assert set(optstate.recipes.names()) >= {"adafactor", "adalomo", "adamw", "lion", "lomo", "sgd"}
    assert optstate.recipes.get("adalomo") is AdaLomo


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(LookupError, match="no recipe named 'adalom'; did you mean 'adalomo'"):
        optstate.recipes.get("adalom")
    with pytest.raises(LookupError, match="installed: adafactor"):
        optstate.recipes.get("zzz")


def test_third_parties_add_recipes_by_entry_point(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "import optstate\n"
        "class Mine(optstate.Optimizer):\n"
        "    'A recipe of one line.'\n"
        "    def __init__(self, params, lr=1.0): super().__init__(params, optstate.chain(), lr=lr)\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[optstate.recipes]\nmine = theirs:Mine\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import optstate, torch\n"
        "p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)\n"
        "optstate.recipes.get('mine')([p], lr=0.5).step()\n"
        "print('mine' in optstate.recipes.names(), p.tolist())"
    )
    assert run_script(script).stdout.strip() == "True [0.5, 0.5]"


class TestCommandLine:
    def test_recipes_as_json(self) -> None:
        result = CliRunner().invoke(app, ["recipes", "--json"])
        assert result.exit_code == 0
        data = json.loads(result.stdout)
        assert data["schema"] == "optstate.recipes/1"
        row = next(r for r in data["recipes"] if r["name"] == "adalomo")
        assert row["class"] == "adalomo:AdaLomo"
        assert row["package"] == "optstate"
        assert len(row["summary"]) > 20

    def test_recipes_in_a_pipe_is_plain_columns(self) -> None:
        result = CliRunner().invoke(app, ["recipes"])
        assert result.exit_code == 0
        assert [line.split("\t")[0] for line in result.stdout.splitlines()] == optstate.recipes.names()

    def test_version(self) -> None:
        result = CliRunner().invoke(app, ["--version"])
        assert result.stdout.strip() == f"optstate {importlib.metadata.version('optstate')}"

    def test_a_wrong_command_is_a_usage_error(self) -> None:
        assert CliRunner().invoke(app, ["inspcet"]).exit_code == 2

    def test_the_console_script_is_installed(self) -> None:
        done = subprocess.run(["optstate", "recipes"], capture_output=True, text=True, env=path_with_scripts())
        assert done.returncode == 0
        assert "adalomo" in done.stdout


def test_every_folder_of_code_is_in_the_installed_package() -> None:
    declared = re.search(r"^packages = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert declared is not None
    folders = [path.parent for root in ("optstate", "adalomo") for path in (ROOT / root).rglob("__init__.py")]
    names = [".".join(folder.relative_to(ROOT).parts) for folder in folders]
    assert sorted(re.findall(r'"(.+)"', declared[1])) == sorted([*names, "optstate_cli"])
