"""Tables, goals and the machine's description."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def parse_arguments(
    description: str,
    quick: str,
    quick_rounds: int,
    rounds: int,
    add: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """Parse the options of a benchmark in rounds: `quick`, `rounds` and `json`.

    Args:
        description: of the benchmark, for the help.
        quick: what `--quick` does, for the help.
        quick_rounds: number of rounds with `--quick`, unless `--rounds` is given.
        rounds: number of rounds without.
        add: adds further options to the parser.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--rounds", type=int, help=f"interleaved rounds of each measurement (default {rounds})")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was measured to PATH")
    add(parser)
    options = parser.parse_args()
    if options.rounds is None:
        options.rounds = quick_rounds if options.quick else rounds
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write what was measured, if a path was given."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


@dataclass(frozen=True)
class Goal:
    """A measured value and what it should be at most, or for `strict` below."""

    what: str
    value: float
    limit: float
    unit: str = ""
    strict: bool = False

    @property
    def met(self) -> bool:
        return self.value < self.limit if self.strict else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def print_table(console: Console, title: str, caption: str, columns: Iterable[Column], rows: Iterable[Row]) -> None:
    """Print one line per row; the first column is text, the others are numbers. Rows of ours stand out."""
    columns = list(columns)
    table = Table()
    for i, (header, _) in enumerate(columns):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        style = "bold" if str(row.get("name", "")).startswith("optstate") else ""
        table.add_row(*(show(row) for _, show in columns), style=style)
    console.print(f"[bold]{title}[/bold]", highlight=False)
    console.print(table)
    console.print(f"{caption}\n" if caption else "", highlight=False)


def print_goals(console: Console, goals: Iterable[Goal]) -> None:
    """Print one line per goal."""
    console.print("[bold]Goals[/bold]")
    for goal in goals:
        verdict = "[green]MET   [/green]" if goal.met else "[red]MISSED[/red]"
        sign = "<" if goal.strict else "<="
        unit = f" {goal.unit}" if goal.unit else ""
        console.print(f"{verdict} {goal.what}: {goal.value:.3f} {sign} {goal.limit:.4g}{unit}", highlight=False)


def number(key: str, form: str = ".2f", scale: float = 1.0) -> Callable[[Row], str]:
    """Return a column's function that shows `row[key] * scale`, or a dash for None."""
    return lambda row: "-" if row[key] is None else format(row[key] * scale, form)


def text(key: str) -> Callable[[Row], str]:
    """Return a column's function that shows `row[key]` as it is."""
    return lambda row: str(row[key])


def environment(packages: Iterable[str] = ("lomo-optim", "pytorch_optimizer")) -> dict[str, Any]:
    """Return date, processor, threads and versions.

    packages: what is compared with.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": {name: version_of(name) for name in packages},
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def version_of(package: str) -> str | None:
    """Return the version of a package, None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the processor's model name where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
