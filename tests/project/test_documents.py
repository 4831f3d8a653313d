"""What the documents show is what happens: every code block runs, every named file exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def blocks(name: str) -> list[str]:
    found = BLOCK.findall((ROOT / name).read_text())
    assert found, f"{name} has no code blocks"
    return found


@pytest.mark.parametrize("index", range(len(blocks("README.md"))))
def test_each_readme_block_runs_on_its_own(index: int) -> None:
    exec(compile(blocks("README.md")[index], f"README.md block {index + 1}", "exec"), {"__name__": "readme"})


def test_the_migration_guide_runs_from_top_to_bottom() -> None:
    namespace = {"__name__": "guide"}
    for i, source in enumerate(blocks("examples/migrate_from_lomo_optim.md"), 1):
        exec(compile(source, f"migrate_from_lomo_optim.md block {i}", "exec"), namespace)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/performance.md"])
def test_documents_name_only_files_and_targets_that_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    for path in re.findall(r"\b(?:docs|examples|benchmarks|optstate|tests|cli|adalomo)/[\w./]*\w", text):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_every_room_stands_in_the_list_of_rooms() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = set(re.findall(r"`([\w/]+(?:\.py)?)/?`", text[text.index("## The rooms") : text.index("## To add")]))
    rooms = [
        path for path in (ROOT / "optstate").iterdir() if path.name not in ("__init__.py", "__pycache__", "py.typed")
    ]
    for room in rooms:
        assert {f"optstate/{room.name}", f"optstate/{room.name}/", room.name} & listed, room.name


def test_the_readme_lists_every_public_part() -> None:
    from optstate import recipes, stores, updates, weights

    text = (ROOT / "README.md").read_text()
    parts = [n for n, x in vars(updates).items() if isinstance(x, type) and issubclass(x, updates.Transform)]
    parts += [n for n, x in vars(stores).items() if isinstance(x, type) and issubclass(x, stores.Store)]
    parts += [n for n, x in vars(weights).items() if isinstance(x, type) and issubclass(x, weights.Weights)]
    for name in set(parts) - {"Transform", "Chain", "Store", "Weights"}:
        assert f"`{name}" in text, name
    for name in recipes.names():
        assert f"`{name}`" in text, name


def test_the_picture_shows_what_the_readme_says() -> None:
    """Its sums are those in the text under it, and 75.3 GiB of AdamW's are weights, gradients and fp32 moments."""
    import runpy

    module = runpy.run_path(str(ROOT / "docs" / "memory_by_part.py"))
    assert {"adamw", "adalomo"} <= set(module["RECIPES"])
    found = module["answer"](["adamw", "adalomo"])
    peaks = {one.recipe: one.peak_bytes / 2**30 for one in found.recipes}
    said = re.search(
        r"!\[Memory for LLaMA-7B by part: ([\d.]+) GiB with AdamW, ([\d.]+) GiB", (ROOT / "README.md").read_text()
    )
    assert said is not None
    assert [float(number) for number in said.groups()] == [round(peaks["adamw"], 1), round(peaks["adalomo"], 1)]
    count = 6_738_415_616
    assert (found["adamw"].weights_bytes, found["adamw"].state_bytes) == (2 * count, 8 * count)
    assert found["adamw"].at_peak["gradients"] == pytest.approx(2 * count, rel=1e-6)
    for one in found.recipes:
        assert sum(one.at_peak.values()) == one.peak_bytes


def test_the_commands_of_the_checkpoint_section_run(tmp_path: Path) -> None:
    import shlex

    from optstate_cli import app
    from typer.testing import CliRunner

    section = (ROOT / "README.md").read_text().partition("## Checkpoints")[2].partition("\n## ")[0]
    section = section.replace("/tmp/", f"{tmp_path}/")
    (source,) = BLOCK.findall(section)
    exec(compile(source, "README.md, checkpoints", "exec"), {"__name__": "readme"})
    commands = [line for line in re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)[0].splitlines() if line]
    assert len(commands) == 6
    for command in commands:
        name, *arguments = shlex.split(command, comments=True)
        assert name == "optstate"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (command, result.output)
