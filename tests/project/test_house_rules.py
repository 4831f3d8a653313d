"""Rules of the house that no linter knows: what is a verb, what has one home, what is private, what goes in circles."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import grimp
from optstate_cli import app

from tests.support.paths import ROOT

PACKAGES = {"optstate": ROOT / "optstate", "adalomo": ROOT / "adalomo", "optstate_cli": ROOT / "cli"}

PUBLIC = (
    "optstate",
    "optstate.recipes",
    "optstate.checkpoint",
    "optstate.stores",
    "optstate.updates",
    "optstate.weights",
)
"""Packages whose name stands before a function's where people call it: `recipes.get`, `checkpoint.compare`."""

BARE_VERBS = """
add apply assign build call cast change check choose close collect compare compute convert copy count create decode
delete describe do dump encode evaluate execute export find fix format gather get give handle hide identify import init
inspect list load look make match measure merge move note open parse pick plan prepare print process put raise read
remove rename replace report require reserve resolve run save scan search send set show solve split start step stop
store summarize take trace transform update validate walk wrap write
"""
"""Verbs that say nothing without their object: `read` what?"""

MOST_LINES = 400

LONGER_FILES: dict[str, str] = {
    "optstate/checkpoint/files/pickle_machine.py": "one interpreter: an instruction is a method, and there are seventy",
    "optstate/checkpoint/files/safetensors_header.py": "one header, read fast and then judged part by part",
    "optstate/memory/result.py": "one answer: its figures, its text and its picture",
}
"""Files of more lines than that, each with the reason why it is still one idea."""

LOOK_PRIVATE = {
    "_asdict": "a named tuple's own, for everybody",
    "_replace": "a named tuple's own, for everybody",
}
"""Names with an underscore that are public nevertheless."""

NOBODYS_MEMBERS = {"array._tensor": "an attribute that files/tensor_bytes.py gives an array to keep its memory alive"}
"""Attributes that only share their name with a member of a class of ours."""

LOOPS = (
    *("add_weight", "apply_update", "ema", "ema_of_square", "multiply_out", "sum_of_squares", "sums"),
    *("sums_of_difference", "sums_of_rows", "weight_sum_of_squares"),
)

SAME_NAMES: dict[str, str] = {
    "words_of_ours": "every format has one, which its Format names",
    **dict.fromkeys(LOOPS, "a loop in eager PyTorch, and the choice between that and the compiled one"),
}
"""Public names with more than one home, each with the reason."""


@dataclass(frozen=True)
class Module:
    """A source file of the project: `name` as it is imported, `path` for people, `text` and its syntax `tree`."""

    name: str
    path: str
    text: str
    tree: ast.Module


def modules_in(folder: Path, package: str, root: Path) -> Iterator[Module]:
    """Yield the modules of one package folder, in the order of their paths."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join((package, *(part for part in parts if part != "__init__")))
        text = path.read_text()
        yield Module(name, path.relative_to(root).as_posix(), text, ast.parse(text))


@cache
def project() -> tuple[Module, ...]:
    return tuple(module for package, folder in PACKAGES.items() for module in modules_in(folder, package, ROOT))


@cache
def names_people_type() -> frozenset[tuple[str, str]]:
    """Module and name of everything in a public package's `__all__`."""
    exported = [getattr(import_module(package), name) for package in PUBLIC for name in import_module(package).__all__]
    return frozenset((item.__module__, item.__name__) for item in exported if hasattr(item, "__module__"))


@cache
def commands() -> frozenset[tuple[str, str]]:
    """Module and name of the functions that are commands, whose names are the commands'."""
    callbacks = [command.callback for command in app.registered_commands if command.callback]
    return frozenset((callback.__module__, callback.__name__) for callback in callbacks)


def is_public(name: str) -> bool:
    return not name.startswith("_")


# --- what is looked for: each takes modules and lists the places that break the rule ------------------------------


def bare_verbs(modules: Iterable[Module], allowed: frozenset[tuple[str, str]] = frozenset()) -> list[str]:
    """List public module functions whose name is a verb without an object."""
    return [
        f"{module.path}:{node.lineno} {node.name}()"
        for module in modules
        for node in module.tree.body
        if isinstance(node, ast.FunctionDef)
        and node.name in BARE_VERBS.split()
        and (module.name, node.name) not in allowed
    ]


def homes(modules: Iterable[Module], left_out: frozenset[tuple[str, str]] = frozenset()) -> dict[str, list[str]]:
    """Return the places where each public class, function or type alias is defined."""
    found: dict[str, list[str]] = {}
    for module in modules:
        for node in module.tree.body:
            for name in defined_names(node):
                if is_public(name) and (module.name, name) not in left_out:
                    found.setdefault(name, []).append(f"{module.path}:{node.lineno}")
    return found


def defined_names(node: ast.stmt) -> list[str]:
    """Return the names of classes, functions and type aliases, but not of constants and type variables."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    return [name for name in assigned([node]) if name[0].isupper() and not name.isupper()]


def with_several_homes(modules: Iterable[Module], left_out: frozenset[tuple[str, str]] = frozenset()) -> list[str]:
    """List public names that are defined in more than one module, with the modules."""
    found = homes(modules, left_out)
    return [f"{name}: {', '.join(places)}" for name, places in sorted(found.items()) if len(places) > 1]


def foreign_private_names(modules: Iterable[Module]) -> list[str]:
    """List private names that a module takes from another module of the project, by import or as an attribute.

    An attribute counts as another module's where a class of the project has a member of this name, but the file at hand
    defines none. Private names of torch and the like are none of the project's.
    """
    modules = list(modules)
    names = {module.name for module in modules}
    members = {name for module in modules for name in private_members(module.tree)}
    found = []
    for module in modules:
        own, aliases = private_names(module.tree), set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if f"{node.module}.{alias.name}" in names:
                        aliases.add(alias.asname or alias.name)
                    elif node.module in names and is_private(alias.name):
                        found.append(f"{module.path}:{node.lineno} import {alias.name}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                owner = ast.unparse(node.value)
                if f"{owner}.{node.attr}" in NOBODYS_MEMBERS:
                    continue
                if owner in aliases or node.attr in members - own:
                    found.append(f"{module.path}:{node.lineno} {owner}.{node.attr}")
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in LOOK_PRIVATE


def private_members(tree: ast.AST) -> set[str]:
    """Return the private methods, class attributes and attributes of `self` that a file defines."""
    members = {name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for name in assigned(node.body)}
    stored = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if ast.unparse(node.value) in ("self", "cls")
    }
    return {name for name in members | stored if is_private(name)}


def private_names(tree: ast.Module) -> set[str]:
    """Return every private name that a file defines: those of the module, and the members of its classes."""
    return private_members(tree) | {name for name in assigned(tree.body) if is_private(name)}


def assigned(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that the statements of a module or a class define."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def circles(imports: dict[str, set[str]]) -> list[str]:
    """List circles of imports: for each a way from a module back to itself. Circles with a common import count once."""
    imports = {module: set(imported) for module, imported in imports.items()}
    found = []
    while True:
        try:
            TopologicalSorter(imports).prepare()
        except CycleError as error:
            way: list[str] = error.args[1][::-1]
            found.append(" -> ".join(way))
            imports[way[0]].discard(way[1])
        else:
            return found


@cache
def project_imports() -> dict[str, set[str]]:
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def too_long(modules: Iterable[Module]) -> list[str]:
    """List files of more than `MOST_LINES` lines."""
    counts = [(module.path, module.text.count("\n")) for module in modules]
    return [f"{path}: {lines} lines" for path, lines in counts if lines > MOST_LINES]


# --- the rules ----------------------------------------------------------------------------------------------------


def assert_none(places: list[str]) -> None:
    assert not places, "\n" + "\n".join(places)


def test_no_function_is_named_by_a_bare_verb() -> None:
    """`read` could read anything: `read_header`. Where people type the package's name too, that names the object."""
    assert_none(bare_verbs(project(), names_people_type() | commands()))


def test_a_public_name_has_one_home() -> None:
    found = with_several_homes(project(), commands())
    assert_none([line for line in found if line.partition(":")[0] not in SAME_NAMES])


def test_no_module_uses_private_names_of_another() -> None:
    assert_none(foreign_private_names(project()))


def test_imports_go_in_no_circle() -> None:
    assert_none(circles(project_imports()))


def test_a_file_is_one_idea() -> None:
    assert_none([line for line in too_long(project()) if line.partition(":")[0] not in LONGER_FILES])


def test_no_exception_outlives_its_reason() -> None:
    """Whatever is allowed by name is still there."""
    several = {line.partition(":")[0] for line in with_several_homes(project(), commands())}
    assert several >= SAME_NAMES.keys()
    assert {line.partition(":")[0] for line in too_long(project())} >= LONGER_FILES.keys()


# --- that the rules would notice ----------------------------------------------------------------------------------


def made_up(tmp_path: Path, **files: str) -> list[Module]:
    """Write a package `theirs` with these modules, and return them."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return list(modules_in(folder, "theirs", tmp_path))


def test_a_bare_verb_is_noticed(tmp_path: Path) -> None:
    modules = made_up(tmp_path, a="def read(): ...\ndef read_header(): ...\nclass C:\n    def read(self): ...\n")
    assert bare_verbs(modules) == ["theirs/a.py:1 read()"]
    assert bare_verbs(modules, frozenset({("theirs.a", "read")})) == []
    assert bare_verbs(modules, frozenset({("theirs.b", "read")})) == ["theirs/a.py:1 read()"]


def test_a_second_home_is_noticed(tmp_path: Path) -> None:
    first = "T = TypeVar('T')\nLIMIT = 3\nShape = tuple[int, ...]\nclass Report: ...\ndef _own(): ...\n"
    modules = made_up(tmp_path, a=first, b=f"{first}def Shape_of(): ...\n", c="from theirs.a import Report, Shape\n")
    assert with_several_homes(modules) == [
        "Report: theirs/a.py:4, theirs/b.py:4",
        "Shape: theirs/a.py:3, theirs/b.py:3",
    ]
    assert with_several_homes(modules, frozenset({("theirs.b", "Report"), ("theirs.a", "Shape")})) == []


def test_a_private_name_of_another_module_is_noticed(tmp_path: Path) -> None:
    first = "class Engine:\n    def __init__(self): self._wheels = 4\n    def _turn(self): ...\ndef _start(): ...\n"
    second = (
        "import torch\nfrom torch import _C\nfrom theirs.a import Engine, _start\nfrom theirs import a as engines\n"
        "class Car(Engine):\n    def drive(self, other):\n        self._turn()\n        other._wheels += 1\n"
        "        engines._start()\n        return torch._start, self._own, other._own, self.__class__\n"
        "    def _own(self): ...\n"
    )
    assert sorted(foreign_private_names(made_up(tmp_path, a=first, b=second))) == [
        "theirs/b.py:3 import _start",
        "theirs/b.py:7 self._turn",
        "theirs/b.py:8 other._wheels",
        "theirs/b.py:9 engines._start",
    ]


def test_circles_are_noticed() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    both = circles({"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"e"}, "e": {"c"}})
    assert [set(way.split(" -> ")) for way in sorted(both)] in ([{"a", "b"}, {"c", "d", "e"}],)
    for way in both:
        first, second, *_ = way.split(" -> ")
        assert (first, second) in {("a", "b"), ("b", "a"), ("c", "d"), ("d", "e"), ("e", "c")}


def test_a_long_file_is_noticed(tmp_path: Path) -> None:
    modules = made_up(tmp_path, a="x = 1\n" * MOST_LINES, b="x = 1\n" * (MOST_LINES + 1))
    assert too_long(modules) == [f"theirs/b.py: {MOST_LINES + 1} lines"]
