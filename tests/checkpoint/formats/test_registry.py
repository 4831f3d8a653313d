"""Formats are found by themselves: ours in their folder, those of other packages by entry points."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import nn

import optstate
from optstate.checkpoint import formats
from optstate.checkpoint.formats.registry import find_formats
from optstate.other_libraries.libraries import OWN_FORMATS
from optstate.recipes import Lion
from tests.support.forks import run_command

pytestmark = pytest.mark.slow

# --- a package of somebody else's ---------------------------------------------------------------------------------

GADGET = '''
"""A library's optimizer, and how its checkpoints are kept."""

from optstate.formats import LION, NEEDED, Format, Kept, Layout, OtherRule, Switch, read_tables, translate, write_tables

RULE = OtherRule(
    "gadget",
    "GadgetLion",
    "lion",
    needs=frozenset({"rate", "betas", "shrink"}),
    numbers=frozenset({"rate", "betas", "shrink"}),
    switches={"uphill": Switch((False,), "it goes uphill")},
)


def write_hypers(writer, place, group):
    hyper = writer.common(group)
    theirs = {**hyper, "rate": hyper.pop("lr"), "shrink": hyper.pop("weight_decay")}
    kept = {key: value for key, value in theirs.items() if key not in ("lr", "weight_decay")}
    return translate(writer, place, kept, {"rate": NEEDED, "betas": NEEDED, "shrink": NEEDED, "uphill": False})


LAYOUT = Layout("GadgetLion", RULE, {"exp_avg": Kept(LION["exp_avg"], "pace")}, hypers=write_hypers)


def our_words(hyper, rule):
    words = {"rate": "lr", "shrink": "weight_decay"}
    return {words.get(key, key): value for key, value in hyper.items() if key != "uphill"}


FORMAT = Format(
    name="gadget",
    read=lambda found, optimizer: read_tables(found, [LAYOUT], "gadget"),
    write=lambda writer: write_tables(writer, [LAYOUT], {"lion": LAYOUT}),
    stores={"": frozenset({"Full"})},
    rules=(RULE,),
    our_words=our_words,
)
'''
"""41 lines, and nothing in the tree knows of them."""


class GadgetLion(torch.optim.Optimizer):
    """Lion under other names."""

    def __init__(self, params: Any, rate: float = 1e-3, shrink: float = 0.1) -> None:
        super().__init__(params, {"rate": rate, "betas": (0.9, 0.95), "shrink": shrink, "uphill": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for param in group["params"]:
                pace = self.state[param].setdefault("pace", torch.zeros_like(param))
                param.mul_(1 - group["rate"] * group["shrink"])
                param.sub_(torch.sign(torch.lerp(param.grad, pace, first)), alpha=group["rate"])
                pace.lerp_(param.grad, 1 - second)


def install(folder: Path, value: str = "gadget_optim:FORMAT", source: str = GADGET) -> None:
    (folder / "gadget_optim.py").write_text(source)
    about = folder / "gadget_optim-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: gadget-optim\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[optstate.formats]\ngadget = {value}\n")


def run(folder: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """The command line, with the other package installed."""
    return run_command(*arguments, installed=folder)


def done(folder: Path, *arguments: Any) -> dict[str, Any]:
    result = run(folder, *arguments, "--json")
    assert result.returncode == 0, result.stderr
    tree: dict[str, Any] = json.loads(result.stdout)
    return tree


def model() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    return [("a.weight", nn.Parameter(torch.randn(6, 5))), ("a.bias", nn.Parameter(torch.randn(5)))]


def train(optimizer: Any, params: list[tuple[str, nn.Parameter]], first: int) -> None:
    for step in range(first, first + 3):
        for _, param in params:
            param.grad = torch.sin(3 * param.detach() + step)
        optimizer.step()


def test_another_packages_library_is_read_and_written(tmp_path: Path) -> None:
    """inspect, check, diff, convert there and back; and both go on as the other would have."""
    install(tmp_path)
    theirs, ours, again = tmp_path / "theirs.pt", tmp_path / "ours.safetensors", tmp_path / "again.pt"
    params = model()
    optimizer = GadgetLion([param for _, param in params])
    train(optimizer, params, 0)
    torch.save(optimizer.state_dict(), theirs)
    assert (done(tmp_path, "inspect", theirs)["kind"], done(tmp_path, "inspect", theirs)["recipe"]) == (
        "gadget",
        "lion",
    )
    assert done(tmp_path, "check", theirs)["issues"] == []
    assert done(tmp_path, "convert", theirs, ours)["lossless"]
    assert done(tmp_path, "diff", theirs, ours)["equal"]
    assert done(tmp_path, "convert", ours, again, "--format", "gadget")["format"] == "gadget"
    first, second = torch.load(theirs), torch.load(again)
    assert first["param_groups"] == second["param_groups"]
    assert all(torch.equal(first["state"][i]["pace"], second["state"][i]["pace"]) for i in (0, 1))

    recipe = tmp_path / "lion.safetensors"
    done(tmp_path, "convert", theirs, recipe, "--recipe", "lion")
    copies = [(name, nn.Parameter(param.detach().clone())) for name, param in params]
    lion = Lion([param for _, param in copies])
    optstate.load(lion, recipe)
    train(lion, copies, 3)
    train(optimizer, params, 3)
    for (_, mine), (_, other) in zip(copies, params, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)

    optstate.save(lion, tmp_path / "lion6.safetensors")
    done(tmp_path, "convert", tmp_path / "lion6.safetensors", tmp_path / "gadget6.pt", "--format", "gadget")
    fresh = GadgetLion([param for _, param in params], rate=1.0, shrink=0.0)
    fresh.load_state_dict(torch.load(tmp_path / "gadget6.pt"))
    train(fresh, params, 6)
    train(lion, copies, 6)
    for (_, mine), (_, other) in zip(copies, params, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-6, atol=1e-7)


def test_a_flag_of_another_packages_rule_is_honoured(tmp_path: Path) -> None:
    """Also in a file of our own that was made from theirs: the rule is found again by the library's name."""
    install(tmp_path)
    params = model()
    optimizer = GadgetLion([param for _, param in params])
    train(optimizer, params, 0)
    optimizer.param_groups[0]["uphill"] = True
    torch.save(optimizer.state_dict(), tmp_path / "theirs.pt")
    done(tmp_path, "convert", tmp_path / "theirs.pt", tmp_path / "ours.safetensors")
    for name in ("theirs.pt", "ours.safetensors"):
        told = done(tmp_path, "check", tmp_path / name)["issues"]
        assert ["uphill=True: it goes uphill" in issue["what"] for issue in told] == [True]


@pytest.mark.parametrize(
    ("value", "source", "why"),
    [
        ("gadget_optim:FORMAT", "raise RuntimeError('no such device')", "RuntimeError: no such device"),
        ("gadget_optim:NOTHING", GADGET, "AttributeError"),
        ("gadget_optim:FORMAT", "FORMAT = 3", "it is a int, no optstate.formats.Format"),
        ("gadget_optim:FORMAT", GADGET.replace('name="gadget"', 'name="other"'), "its `name` is 'other'"),
        ("gadget_optim:FORMAT", GADGET.replace("(RULE,)", "'RULE'"), "its `rules` are no tuple of OtherRule"),
    ],
)
def test_a_broken_package_is_named_in_one_line_and_left_out(value: str, source: str, why: str, tmp_path: Path) -> None:
    install(tmp_path, value, source)
    optimizer = torch.optim.AdamW([param for _, param in model()])
    torch.save(optimizer.state_dict(), tmp_path / "adamw.pt")
    result = run(tmp_path, "inspect", tmp_path / "adamw.pt", "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["kind"] == "torch"
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert "gadget" in line
    assert why in line


@pytest.mark.parametrize("mistake", ["None.read", "1 / 0", "raise SystemExit(3)"])
def test_a_format_that_fails_on_a_file_stops_nobody_elses(mistake: str, tmp_path: Path) -> None:
    """One line for each file, in the reading of which any package may err; writing with it ends in a line, too."""
    read = 'lambda found, optimizer: read_tables(found, [LAYOUT], "gadget")'
    assert read in GADGET
    source = GADGET.replace(f"read={read}", "read=fails, is_at=fails")
    source = source.replace("write=lambda writer: ", "write=fails or ")
    install(tmp_path, source=source.replace("FORMAT =", f"def fails(*arguments):\n    {mistake}\n\n\nFORMAT ="))
    adamw, ours = tmp_path / "folder" / "optimizer.pt", tmp_path / "ours.safetensors"
    adamw.parent.mkdir()
    torch.save(torch.optim.AdamW([param for _, param in model()]).state_dict(), adamw)
    for place, lines in ((adamw, 1), (adamw.parent, 2)):
        result = run(tmp_path, "inspect", place, "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["kind"] == "torch"
        said = result.stderr.splitlines()
        assert len(said) <= lines
        assert all("the format 'gadget' of another package fails: " in line for line in said)
    optstate.save(Lion(model()), ours)
    result = run(tmp_path, "convert", ours, tmp_path / "gadget.pt", "--format", "gadget")
    assert result.returncode == 4, result.stderr
    (line,) = result.stderr.splitlines()
    assert "cannot be written as gadget state: the format 'gadget' of another package fails: " in line


def test_no_package_takes_the_name_of_one_of_ours(tmp_path: Path) -> None:
    """A format of theirs that claims every file would read ours otherwise."""
    install(tmp_path, source=GADGET.replace('name="gadget"', 'name="torch"'))
    points = tmp_path / "gadget_optim-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text().replace("gadget =", "torch ="))
    torch.save(torch.optim.AdamW([param for _, param in model()]).state_dict(), tmp_path / "adamw.pt")
    result = run(tmp_path, "inspect", tmp_path / "adamw.pt", "--json")
    assert json.loads(result.stdout)["kind"] == "torch"
    (line,) = result.stderr.splitlines()
    assert "is hidden by optstate's own of that name" in line


# --- ours ---------------------------------------------------------------------------------------------------------


def test_every_module_beside_the_registry_declares_a_format() -> None:
    folder = Path(formats.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "registry"}
    assert len(find_formats()) == len(modules)
    names = [found.name for found in find_formats()]
    assert len(set(names)) == len(names)
    assert set(names) <= OWN_FORMATS


def test_inspecting_a_file_of_ours_imports_no_format(tmp_path: Path) -> None:
    optstate.save(Lion(model()), tmp_path / "ours.safetensors")
    code = dedent(f"""
        import sys
        from optstate.checkpoint.open_checkpoint import open_checkpoint
        open_checkpoint({str(tmp_path / "ours.safetensors")!r})
        print(sorted(name for name in sys.modules if name.startswith("optstate.checkpoint.formats.")))
    """)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
