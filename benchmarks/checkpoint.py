"""What saving, loading and converting optimizer state costs beside plain file access: time, and memory.

    python benchmarks/checkpoint.py [--quick] [--size GB] [--folder PATH] [--rounds N] [--json PATH]

One process, at most two threads, wall-clock time, interleaved rounds, medians. The state is AdamW's of a LLaMA-like
model in fp32, in memory once or twice; files in a temporary folder take up to three times its size. Needs Linux and
the extra `bench`. Exit code 0, whether goals are met or missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import checkpoint_io as io
import torch
from checkpoint_convert import CACHES, CONVERSIONS, READ, can_measure_peak, measure_converting, peak_of_converting
from report import Goal, environment, number, parse_arguments, print_goals, print_table, text, write_json
from rich.console import Console
from timing import ratio, spread

import optstate

THREADS = 2
QUICK, FULL = 0.25e9, 4e9
PEAK_BEYOND = 100e6
"""Bytes of memory that a conversion may take beyond three of the largest tensor."""

Rows = list[dict[str, Any]]


def main() -> int:
    options = parse_arguments(
        __doc__.splitlines()[0], f"2 rounds with {QUICK / 1e9:g} GB", quick_rounds=2, rounds=3, add=add_options
    )
    nbytes = options.size or (QUICK if options.quick else FULL)
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    console = Console(width=120)
    results: dict[str, Any] = {"schema": "optstate.benchmark.checkpoint/1", **environment()}
    results |= {"rounds": options.rounds, "quick": options.quick, "safetensors": version("safetensors")}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(results, Path(folder), nbytes, options.rounds)
    console.print(
        f"{results['cpu']} ({results['capability']}), torch {results['torch']}, safetensors {results['safetensors']}, "
        f"{results['threads']} threads, {options.rounds} rounds, {results['tensors']} tensors of "
        f"{results['bytes'] / 1e9:.2f} GB\n",
        highlight=False,
    )
    print_saving(console, results["saving"])
    for cache in CACHES:
        print_loading(console, cache, results["loading"][cache])
    print_converting(console, results["converting"])
    print_peaks(console, results["peaks"])
    goals = [
        *saving_goals(results["saving"]),
        *loading_goals(results["loading"]["warm"]),
        *converting_goals(results["converting"]),
        *peak_goals(results["peaks"]),
    ]
    print_goals(console, goals)
    results["goals"] = [goal.as_dict() for goal in goals]
    write_json(options.json, results)
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=gigabytes, metavar="GB", help=f"bytes of state (default {FULL / 1e9:g}GB)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")


def gigabytes(given: str) -> float:
    """Parse a size such as "0.25" or "0.25GB" into bytes."""
    size = float(given.upper().removesuffix("GB")) * 1e9
    if size <= 0:
        raise ValueError(given)
    return size


def measure(results: dict[str, Any], folder: Path, nbytes: float, rounds: int) -> None:
    """Measure everything, one after the other; a state is let go before the next one is made."""
    optimizer = io.adamw_of(io.llama_of(nbytes))
    size = optimizer.state_nbytes()
    results |= {"bytes": size, "tensors": len(io.tensors_of(optimizer))}
    results["saving"] = rows_of(io.measure_saving(optimizer, folder, rounds), size, io.SAVE)
    path = folder / "opt.safetensors"
    optstate.save(optimizer, path)
    io.check_loading(optimizer, path)
    results["loading"] = {
        cache: rows_of(io.measure_loading(optimizer, path, rounds, cache == "cold"), size, io.LOAD) for cache in CACHES
    }
    largest = max(tensor.nbytes for tensor in io.tensors_of(optimizer).values())
    del optimizer
    results["converting"] = converting_rows(measure_converting(path, folder, rounds), size)
    results["peaks"] = peak_rows("a model", path, folder, largest)
    matrix = io.adamw_of(io.one_matrix_of(nbytes / 2))
    optstate.save(matrix, path)
    largest = max(tensor.nbytes for tensor in io.tensors_of(matrix).values())
    del matrix
    results["peaks"] += peak_rows("one large matrix", path, folder, largest)


def rows_of(seconds: io.Seconds, size: int, ours: str) -> Rows:
    """Return one row per way; the goals are about `ours_per_this`."""
    return [
        {
            "name": name,
            "seconds": median(taken),
            "spread": spread(taken),
            "bytes_per_second": size / median(taken),
            "ours_per_this": ratio(seconds, ours, name),
        }
        for name, taken in seconds.items()
    ]


def converting_rows(seconds: io.Seconds, size: int) -> Rows:
    return [
        {
            "name": name,
            "seconds": median(taken),
            "spread": spread(taken),
            "bytes_per_second": size / median(taken),
            "per_cold_read": 1 / ratio(seconds, name, f"{READ}, cold"),
        }
        for name, taken in seconds.items()
    ]


def peak_rows(what: str, path: Path, folder: Path, largest: int) -> Rows:
    """Return one row per conversion; none where the system does not tell a peak."""
    if not can_measure_peak():
        return []
    limit = 3 * largest + PEAK_BEYOND
    return [
        {
            "name": f"{what}, {name}",
            "largest": largest,
            "peak": peak_of_converting(path, folder, slots),
            "limit": limit,
        }
        for name, slots in CONVERSIONS.items()
    ]


COLUMNS = [
    ("seconds", number("seconds", ".3f")),
    ("spread %", number("spread", ".0f", 100)),
    ("GB/s", number("bytes_per_second", ".2f", 1e-9)),
]


def print_saving(console: Console, rows: Rows) -> None:
    caption = (
        "each writes a new file; without fsync the data are still in memory when the call returns. optstate.save also "
        "puts the file in place at once (fsync of its folder)"
    )
    columns = [("", text("name")), *COLUMNS, ("optstate.save / this", number("ours_per_this", ".3f"))]
    print_table(console, "Saving", caption, columns, rows)


def print_loading(console: Console, cache: str, rows: Rows) -> None:
    caption = (
        "into memory that is there; load_file alone maps the file, and reads nothing before a tensor is looked at"
        if cache == "warm"
        else "the system was told to forget the file's pages; what runs the machine may still hold them"
    )
    columns = [("", text("name")), *COLUMNS, ("optstate.load / this", number("ours_per_this", ".3f"))]
    print_table(console, f"Loading, {cache} page cache", caption, columns, rows)


def print_converting(console: Console, rows: Rows) -> None:
    caption = "bytes of the source; every conversion measures what it loses, and ends with fsync"
    columns = [("", text("name")), *COLUMNS, ("speed / cold read", number("per_cold_read", ".3f"))]
    print_table(console, "Converting from fp32", caption, columns, rows)


def print_peaks(console: Console, rows: Rows) -> None:
    columns = [
        ("", text("name")),
        ("largest tensor MB", number("largest", ".1f", 1e-6)),
        ("peak MB", number("peak", ".1f", 1e-6)),
        ("limit MB", number("limit", ".1f", 1e-6)),
    ]
    caption = (
        "peak of resident memory beyond that before the conversion; cached pages of files are not the process's own"
    )
    print_table(console, "Memory of converting", caption, columns, rows)


def saving_goals(rows: Rows) -> list[Goal]:
    found = {row["name"]: row["ours_per_this"] for row in rows}
    return [
        Goal(f"optstate.save / {io.PLAIN_WRITE}, seconds", found[io.PLAIN_WRITE], 1.15),
        Goal(f"optstate.save / {io.THEIR_SAVE_SYNCED}, seconds", found[io.THEIR_SAVE_SYNCED], 1.0),
    ]


def loading_goals(rows: Rows) -> list[Goal]:
    found = {row["name"]: row["ours_per_this"] for row in rows}
    return [
        Goal(f"optstate.load / {io.PLAIN_READ}, warm, seconds", found[io.PLAIN_READ], 1.15),
        Goal(f"optstate.load / {io.THEIR_LOAD_COPIED}, warm, seconds", found[io.THEIR_LOAD_COPIED], 1.0),
    ]


def converting_goals(rows: Rows) -> list[Goal]:
    """Return the goal of at least half the speed of a cold read: at most twice its time."""
    found = {row["name"]: row["per_cold_read"] for row in rows}
    return [Goal(f"{name}, cold / cold read, seconds", 1 / found[f"{name}, cold"], 2.0) for name in CONVERSIONS]


def peak_goals(rows: Rows) -> list[Goal]:
    return [Goal(f"peak of memory, {row['name']}", row["peak"] / 1e6, row["limit"] / 1e6, "MB") for row in rows]


if __name__ == "__main__":
    sys.exit(main())
