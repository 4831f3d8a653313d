"""What the commands do with thousands of damaged files; run as a program, in a process of its own with little memory.

For every case: a result or one CheckpointError on one line, in time, and without anything that a reader must not do.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import datetime
import functools
import io
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import numpy as np
import torch
import typer.main
from optstate_cli import app

import optstate
from adalomo import AdaLomo
from optstate import recipes
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import inconsistencies, refuse_contradictions
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files import torch_archive_reader
from optstate.checkpoint.files.safetensors_check import structural_issues
from optstate.checkpoint.files.tensor_bytes import measure_tensor
from optstate.checkpoint.files.torch_archive_writer import create_torch
from optstate.checkpoint.formats.registry import choose_format, writable_formats, write_state
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.operations.check_values import find_uneven_means, find_value_issues
from optstate.checkpoint.operations.compare import compare
from optstate.checkpoint.operations.conversion_report import make_report
from optstate.checkpoint.operations.plan_conversion import plan_copy, plan_stores
from optstate.checkpoint.operations.read_values import Values
from optstate.checkpoint.operations.summarize import Summary, summarize
from tests.support.fuzzing import (
    damaged,
    damaged_json,
    damaged_pickle,
    damaged_tree,
    damaged_zip,
    pickle_of,
    rezipped,
    safetensors_of,
    tree_for_torch,
    writable,
)
from tests.support.models import loss_of, mlp
from tests.support.paths import DATA

T = TypeVar("T")

COMMAND = typer.main.get_command(app)
COMMANDS = 0.04
"""Of how many cases the whole command is run, too."""

ARGUMENTS = (
    ("inspect", "A", "--tensors", "--json"),
    ("inspect", "A", "--stats"),
    ("check", "A"),
    ("check", "A", "--json"),
    ("convert", "A", "new.safetensors", "--dry-run"),
    ("convert", "A", "new.pt", "--to", "block8", "--dry-run", "--json"),
    ("diff", "A", "A", "--tensors"),
)

SPARE = 200 << 20
"""Bytes that reading may take, besides what the process has with everything imported."""


# --- what a case must come to -------------------------------------------------------------------------------------

_watched: list[str] | None = None
HARMFUL = (
    "exec",
    "import",
    "marshal.",
    "pickle.",
    "code.",
    "ctypes.dlopen",
    "os.",
    "pty.",
    "shutil.",
    "socket.",
    "subprocess.",
    "urllib.",
    "tempfile.",
)
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv")


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event == "open":
        if args[2] & 0xFF:  # anything but O_RDONLY in the access mode, or O_CREAT
            _watched.append(f"{event} {args[:3]}")
    elif event.startswith(HARMFUL) and event not in HARMLESS:
        _watched.append(f"{event} {str(args)[:200]}")


class _Watched:
    def __enter__(self) -> list[str]:
        global _watched
        _watched = []
        return _watched

    def __exit__(self, *_: object) -> None:
        global _watched
        _watched = None


def opened(path: Path) -> Summary | None:
    """What `inspect` shows; None for a file that only has issues."""
    if path.suffix in (".safetensors", ".json"):
        structural_issues(path)
    summary = summarize(path)
    for issue in inconsistencies(summary.checkpoint) if summary.checkpoint is not None else ():
        assert issue.severity in ("error", "warning")
    return summary


def checked(summary: Summary) -> None:
    """What `check` does besides."""
    checkpoint = summary.checkpoint
    for row in summary.rows:
        measure_tensor(row.stored)
    list(
        find_value_issues([(row.name, row.stored) for row in summary.rows], checkpoint.document if checkpoint else None)
    )
    if checkpoint is not None:
        list(find_uneven_means(checkpoint))


def converted(checkpoint: Checkpoint, random: Random) -> None:
    """What `convert --dry-run` does, and what it makes for other libraries; these errors are refusals to it."""
    refuse_contradictions(checkpoint)
    for stores in (None, random.choice(["block8", "block4", "factored", "bf16", "float8"])):
        with suppress(ValueError, ArithmeticError):
            conversion = plan_copy(checkpoint) if stores is None else plan_stores(checkpoint, stores, {})
            conversion.check()
            make_report(conversion)
            entries = {entry.name: entry for entry in conversion.entries}
            known = random.random() < 0.5
            layout = random.choice(writable_formats()) if known else choose_format(conversion.document)
            write_state(layout, conversion.document, entries)


def compared(a: Checkpoint, b: Checkpoint) -> None:
    """What `diff` does."""
    if not any(issue.severity == "error" for issue in inconsistencies(a)):
        compare(a, b, tolerance=1e-6)
        compare(a, a, tolerance=1e-6)


@dataclass
class Results:
    """Counts, and what went wrong."""

    cases: collections.Counter[str] = field(default_factory=collections.Counter)
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")


def attempt(what: str, action: Callable[[], T], results: Results) -> T | None:
    """Do it, and note how it ends; only a result or one line of a CheckpointError is right."""
    result = None
    with _Watched() as events:
        try:
            result = action()
            outcome, problem = "result", ""
        except CheckpointError as error:
            line = str(error)
            outcome = "refused" if error.refused else "unreadable"
            problem = "" if line.isprintable() and len(line) < 1000 else f"message {line[:1500]!r} ({len(line)})"
        except BaseException as error:
            outcome = "raised"
            frames = traceback.extract_tb(error.__traceback__)
            problem = f"{type(error).__name__}: {str(error)[:200]} at " + " < ".join(
                f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-5:])
            )
    results.outcomes[outcome] += 1
    for found in [problem] * bool(problem) + events:
        results.failures.append(f"{what}: {found}")
    return result


def case(what: str, path: Path, sound: Checkpoint, random: Random, results: Results) -> None:
    """All commands on one path."""
    began = time.process_time()
    summary = attempt(f"{what} inspect", lambda: opened(path), results)
    if summary is not None:
        attempt(f"{what} check", lambda: checked(summary), results)
        checkpoint = summary.checkpoint
        if checkpoint is not None and any(key not in checkpoint.tensors for key in keys_of(checkpoint)):
            checkpoint = attempt(f"{what} open", lambda: open_checkpoint(path), results)
        if checkpoint is not None:
            attempt(f"{what} convert", lambda: converted(checkpoint, random), results)
            attempt(f"{what} diff", lambda: compared(checkpoint, sound), results)
    if random.random() < COMMANDS:
        attempt(f"{what} command", lambda: commanded(path, random.randrange(len(ARGUMENTS)), results), results)
    results.slowest = max(results.slowest, (time.process_time() - began, what))


def keys_of(checkpoint: Checkpoint) -> list[str]:
    return [key for param in checkpoint.document.parameters for key in param.keys]


def commanded(path: Path, number: int, results: Results) -> None:
    """The command itself: an answer, or one line and its exit code."""
    arguments = [str(path) if word == "A" else word for word in ARGUMENTS[number]]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = COMMAND.main(arguments, "optstate", standalone_mode=False) or 0
    told, complaint = out.getvalue(), err.getvalue()
    right = complaint == "" if code in (0, 1) else code in (3, 4) and (told, complaint.count("\n")) == ("", 1)
    assert right, (arguments, code, told[:200], complaint[:500])
    assert all(char in "\t\n" or char.isprintable() for char in told + complaint), arguments
    results.cases["commands"] += 1


# --- cases --------------------------------------------------------------------------------------------------------


def native_files(folder: Path) -> list[Path]:
    """Files of this library, of all of its stores."""
    paths = []
    for name, build in (
        ("adamw8bit", recipes.AdamW8bit),
        ("adamw4bit", recipes.AdamW4bit),
        ("adalomo", AdaLomo),
        ("came", recipes.CAME),
        ("sm3", recipes.SM3),
        ("adammini", recipes.AdamMini),
    ):
        optimizer = trained(build)
        paths.append(folder / f"{name}.safetensors")
        optstate.save(optimizer, paths[-1])
    return paths


def trained(build: Callable[..., Any]) -> Any:
    model = mlp(torch.float32, 600)
    optimizer = build(model.named_parameters())
    loss_of(model, 0).backward()
    optimizer.step()
    return optimizer


def training(state: Any) -> Any:
    """A training checkpoint with values that nobody here knows."""
    return {
        "args": argparse.Namespace(lr=0.1, when=datetime.timedelta(1)),
        "model": torch.nn.Linear(3, 2),
        "buffer": collections.deque([torch.eye(2).to_sparse()], maxlen=3),
        "best": [functools.partial(int, base=2), np.float64(0.5), collections.defaultdict(list, {1: [2]})],
        "optimizer": {f"a.{i}": {"state": {0: state["state"][i]}, "param_groups": one_of(state, i)} for i in (0, 1, 2)},
    }


def one_of(state: Any, place: int) -> Any:
    """The group of a parameter, with it alone."""
    return [{**group, "params": [0]} for group in state["param_groups"] if place in group["params"]]


def folders(place: Path) -> list[Path]:
    """Folders that hold one checkpoint each, as their tools write them."""
    place.mkdir()
    names = sorted(path.name for path in DATA.iterdir() if path.name.startswith(("dcp_", "deepspeed_", "lerobot_")))
    for name in names:
        shutil.copytree(DATA / name, place / name)
    trainer, accelerate, shards = (place / name for name in ("trainer", "accelerate", "shards"))
    for folder in (trainer, accelerate, shards):
        folder.mkdir()
    shutil.copy(DATA / "hf_trainer_adamw" / "optimizer.pt", trainer)
    (trainer / "trainer_state.json").write_text(json.dumps({"global_step": 3, "epoch": 0.5, "log_history": [{}]}))
    shutil.copy(DATA / "hf_adafactor" / "optimizer.pt", accelerate / "optimizer.bin")
    optstate.save(trained(recipes.AdamW8bit), shards / "opt.safetensors", max_shard_size=20_000)
    return [*(place / name for name in names), trainer, accelerate, shards]


class NotWrittenError(Exception):
    """What was made of a tree is nothing that a file could hold."""


class Corpus:
    """Sound checkpoints of every kind, and cases made of them."""

    def __init__(self, place: Path) -> None:
        self.place = place
        (place / "native").mkdir()
        self.natives = native_files(place / "native")
        zips = sorted(path for path in DATA.glob("*/*.pt") if path.parent.name[:7] != "hostile")
        self.zips = [path for path in zips if path.name == "optimizer.pt"]
        old = place / "native" / "old.pt"
        torch.save(torch.load(DATA / "torch_adamw" / "optimizer.pt"), old, _use_new_zipfile_serialization=False)
        strange = place / "native" / "strange.pt"
        torch.save(training(torch.load(DATA / "torch_adamw" / "optimizer.pt")), strange)
        self.folders = folders(place / "folders")
        untouched = dict(zip(self.folders, folders(place / "untouched"), strict=True))
        self.content = {path: path.read_bytes() for path in [*self.natives, *self.zips, old, strange]}
        self.content |= {path: path.read_bytes() for folder in self.folders for path in files_in(folder)}
        self.single = [*self.natives, *self.zips, old, strange]
        trees = [path for path in self.content if path.suffix in (".pt", ".bin") and path != strange]
        self.trees = {path: writable(torch_archive_reader.read_torch_file(path)) for path in trees}
        self.metadata = {
            path: torch_archive_reader.read_pickle(path) for path in self.content if path.name == ".metadata"
        }
        self.sound = {}
        for path in [*self.single, *self.folders]:
            try:
                self.sound[path] = open_checkpoint(untouched.get(path, path))
            except CheckpointError:  # heavyball's
                self.sound[path] = open_checkpoint(self.natives[0])

    def write(self, path: Path, random: Random, kind: str) -> bytes:
        """The content of a file, damaged in one of the ways that are meant for its kind of file."""
        content, other = self.content[path], self.content[random.choice([*self.content])] or b"x"
        if kind == "pickle" and path.name == ".metadata":
            return damaged_pickle(content, other, random)
        if kind == "tree" and path.name == ".metadata":
            return pickle_of(damaged_tree(self.metadata[path], random))
        if kind == "tree" and path.suffix == ".json":
            return damaged_json(content.decode(), random).encode("utf-8", "surrogatepass")
        if path.suffix == ".safetensors" and kind in ("tree", "pickle"):
            return self.document(path, random)
        if content[:2] == b"PK":
            if kind == "zip":
                return damaged_zip(content, random)
            if kind == "pickle":
                return rezipped(content, lambda data: damaged_pickle(data, other, random))
            if kind == "tree" and path in self.trees:
                return torch_file_of(damaged_tree(self.trees[path], random), self.place / "tree.pt")
        return damaged(content, other, random)

    def document(self, path: Path, random: Random) -> bytes:
        """A safetensors file with another header, or with another document in it."""
        content = self.content[path]
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        document = header.get("__metadata__", {}).get("optstate")
        if document is None or random.random() < 0.3:
            return safetensors_of(damaged_json(json.dumps(header), random), content[end:])
        header["__metadata__"]["optstate"] = damaged_json(document, random)
        return safetensors_of(json.dumps(header), content[end:])

    def file(self, kind: str, random: Random) -> tuple[Path, Path]:
        """One damaged file."""
        source = random.choice(self.natives if kind == "document" else self.zips if kind == "zip" else self.single)
        path = self.place / f"case{source.suffix}"
        path.write_bytes(self.write(source, random, "tree" if kind == "document" else kind))
        return path, source

    @contextmanager
    def folder(self, random: Random) -> Iterator[tuple[Path, Path]]:
        """A folder in which one file is damaged, missing, or another one."""
        folder = random.choice(self.folders)
        path = random.choice(files_in(folder))
        match random.randrange(12):
            case 0:
                path.unlink()
            case 1:
                path.write_bytes(random.choice([*self.content.values()]))
            case _:
                path.write_bytes(self.write(path, random, random.choice(["bytes", "zip", "pickle", "tree", "tree"])))
        yield folder, folder
        path.write_bytes(self.content[path])


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def torch_file_of(tree: Any, path: Path) -> bytes:
    """A tree as a file of torch.save."""
    try:
        with create_torch(path, tree_for_torch(tree), overwrite=True):
            pass
    except (TypeError, ValueError) as error:
        raise NotWrittenError from error
    return path.read_bytes()


KINDS = {"document": 5500, "bytes": 6000, "pickle": 4000, "tree": 2400, "folder": 1600, "zip": 900}
"""How many cases of each."""

SHARE = 10
"""The suite runs the first tenth of each kind, `python -m tests.support.fuzz_cases all` every case."""


def run(corpus: Corpus, kind: str, number: int, results: Results) -> None:
    """One case, the same every time."""
    random = Random(f"{kind} {number}")
    try:
        made = corpus.folder(random) if kind == "folder" else nullcontext(corpus.file(kind, random))
        with made as (path, source):
            case(f"{kind} {number}", path, corpus.sound[source], random, results)
            results.cases[kind] += 1
    except NotWrittenError:
        results.cases["not written"] += 1


def warm_up(corpus: Corpus) -> None:
    """Import everything: nothing may be imported because of what is in a file, but for the encodings of its names."""
    for encoding in ("cp437", "raw_unicode_escape", "unicode_escape"):
        codecs.lookup(encoding)
    results = Results()
    for path, sound in corpus.sound.items():
        case(f"sound {path}", path, sound, Random(0), results)
        for number in range(len(ARGUMENTS)):
            commanded(path, number, results)
        for param in sound.document.parameters:
            for slot in param.slots:
                with suppress(ValueError):
                    Values(sound).read(param, slot)
    assert not results.failures, results.failures


def limit_memory() -> None:
    """No more than `SPARE` bytes besides what is there."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        data = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + SPARE, data + SPARE))


def main() -> None:
    """The share of the suite, `all` cases, or those of a kind that are named: `document 17 18`."""
    torch.set_num_threads(1)
    results = Results()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        corpus = Corpus(Path(place))
        warm_up(corpus)
        limit_memory()
        sys.addaudithook(_watch)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if len(sys.argv) > 2:
            for number in range(int(sys.argv[2]), int(sys.argv[3])):
                run(corpus, sys.argv[1], number, results)
        else:
            for kind, count in KINDS.items():
                for number in range(count if sys.argv[1:] == ["all"] else count // SHARE):
                    run(corpus, kind, number, results)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({**vars(results), "grown": grown * (1 if sys.platform == "darwin" else 1024)}))


if __name__ == "__main__":
    main()
