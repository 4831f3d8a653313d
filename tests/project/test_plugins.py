"""Packages that add recipes and stores: what is broken is named in one line, and stops nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from optstate_cli import app
from typer.testing import CliRunner

from optstate import recipes, stores
from optstate.plugins import PluginWarning
from optstate.stores import registry
from tests.support.plugins import install

pytestmark = pytest.mark.slow

OURS = recipes.names()

RECIPE = """
import optstate

class {name}(optstate.Optimizer):
    "Plain descent."

    def __init__(self, params, lr=1.0):
        super().__init__(params, optstate.chain(), lr=lr)
"""

STORE = """
from dataclasses import dataclass
from optstate.stores import Store

@dataclass(frozen=True)
class {name}(Store):
    bits: int = 8
"""


@pytest.mark.parametrize(
    ("value", "source", "said"),
    [
        ("absent:Mine", "", "its import fails: ModuleNotFoundError: No module named 'absent'"),
        ("broken1:Mine", "import torch\n1 / 0\n", "its import fails: ZeroDivisionError: division by zero"),
        ("broken2:Mine", "raise SystemExit('bye')\n", "its import fails: SystemExit: bye"),
        ("broken3:Mine", "x = (\n", "its import fails: SyntaxError"),
        ("broken4:Mine", "Other = 1\n", "its import fails: AttributeError"),
        ("broken5:Mine", "Mine = 3\n", "it is a int, which makes no optimizer of parameters"),
        ("broken6:Mine", "class Mine: pass\n", "it is a class, but none of optstate.Optimizer's"),
    ],
)
def test_a_broken_recipe_is_named_in_one_line_and_left_out(
    value: str, source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = value.partition(":")[0]
    sound = {"good_recipe": RECIPE.format(name="Good")}
    modules = sound if module == "absent" else {**sound, module: source}
    points = {"optstate.recipes": {"mine": value, "good": "good_recipe:Good"}}
    install(monkeypatch, tmp_path, "theirs", points, modules)
    with pytest.warns(PluginWarning) as caught:
        assert recipes.names() == sorted([*OURS, "good"])
    (line,) = [str(warning.message) for warning in caught]
    assert line.startswith(f"the recipe 'mine' ({value} of the package theirs) is left out: {said}")
    assert "\n" not in line
    with pytest.raises(LookupError, match="the recipe 'mine' .* is left out"):
        recipes.get("mine")
    with warnings.catch_warnings():  # said once is enough
        warnings.simplefilter("error")
        result = CliRunner().invoke(app, ["recipes", "--json"])
    assert result.exit_code == 0
    assert [row["name"] for row in json.loads(result.stdout)["recipes"]] == sorted([*OURS, "good"])


def test_a_broken_package_is_one_line_on_the_error_stream_of_a_command(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        install(patch, tmp_path, "theirs", {"optstate.recipes": {"mine": "absent:Mine"}})
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")]), *sys.path])
    command = [sys.executable, "-c", "from optstate_cli import app; app(['recipes'])"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert done.returncode == 0
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == OURS
    (line,) = done.stderr.splitlines()
    assert "the recipe 'mine' (absent:Mine of the package theirs) is left out" in line


def test_of_two_recipes_with_one_name_ours_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = recipes.get("adamw")
    modules = {"usurper": RECIPE.format(name="AdamW")}
    install(monkeypatch, tmp_path, "a_package_before_ours", {"optstate.recipes": {"adamw": "usurper:AdamW"}}, modules)
    with pytest.warns(
        PluginWarning, match=r"^the recipe 'adamw' \(usurper:AdamW .* is hidden by the recipe 'adamw' \(opt"
    ):
        assert recipes.get("adamw") is ours


def test_an_installed_store_is_known_by_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'zipped' is none of AxisMax"):
        registry.parse_store("zipped")
    modules = {"zipped_store": STORE.format(name="Zipped")}
    install(monkeypatch, tmp_path, "zips", {"optstate.stores": {"zipped": "zipped_store:Zipped"}}, modules)
    assert str(registry.parse_store("zipped")) == "Zipped()"
    assert str(registry.parse_store("Zipped(bits=4)")) == "Zipped(bits=4)"
    assert "zipped" in registry.store_names()
    with pytest.raises(ValueError, match="unexpected keyword"):
        registry.parse_store("Zipped(size=4)")


@pytest.mark.parametrize(
    "words", ["Zipped(bits=open('x'))", "os.system('ls')", "Zipped(*[1])", "__import__('os')", "eval"]
)
def test_words_build_registered_stores_of_constants_and_call_nothing_else(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {"zipped_too": STORE.format(name="Zipped")}
    install(monkeypatch, tmp_path, "zips", {"optstate.stores": {"zipped": "zipped_too:Zipped"}}, modules)
    with pytest.raises(ValueError, match="is none of"):
        registry.parse_store(words)


@pytest.mark.parametrize(
    ("name", "module", "source", "said"),
    [
        ("other", "no_store1", STORE.format(name="Mine"), "its entry point must be called 'mine'"),
        ("mine", "no_store2", "Mine = 3\n", "it is no subclass of optstate.stores.Store"),
        (
            "mine",
            "no_store3",
            "from optstate.stores import Store\nclass Mine(Store): pass\n",
            "it is no frozen dataclass",
        ),
        ("mine", "no_store4", "1 / 0\n", "its import fails: ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_store_is_named_and_left_out(
    name: str, module: str, source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, "theirs", {"optstate.stores": {name: f"{module}:Mine"}}, {module: source})
    with pytest.warns(PluginWarning, match=said):
        assert registry.store_names() == sorted(registry.OWN)
    with pytest.raises(ValueError, match=said):
        registry.parse_store(name)


def test_of_two_stores_with_one_name_ours_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"usurping_store": STORE.format(name="Block8")}
    install(monkeypatch, tmp_path, "theirs", {"optstate.stores": {"block8": "usurping_store:Block8"}}, modules)
    with pytest.warns(PluginWarning, match=r"the store 'block8' .* is hidden by optstate's own of that name"):
        registry.store_names()
    assert registry.parse_store("block8") == stores.Block8()
