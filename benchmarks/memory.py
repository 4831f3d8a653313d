"""Traced memory of training steps beside what they allocate on the CPU, and shallow traces beside whole ones.

    python benchmarks/memory.py [--quick] [--json PATH]

A LLaMA of 3.3 million parameters through transformers (4 layers of width 256, fp32, 2 x 128 tokens): the tracer
counts exact bytes here, without an allocator's rounding. The traces beside real steps are those for a CPU, the ones of
an estimate are for a GPU: they differ where a kernel does, as attention with dropout, which this model has not. Needs
the extra `bench`. Exit code 0, whether goals are met or missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from memory_runs import SMALL, large_run, llama, real_bytes
from report import Goal, environment, number, print_goals, print_table, text, write_json
from rich.console import Console

from optstate.memory.model import Setting
from optstate.memory.tracing.extrapolate import trace_model
from optstate.memory.tracing.trace import trace
from optstate.recipes import registry

THREADS = 2
RECIPES = ("adalomo", "lomo", "adafactor", "adamw", "adamw8bit", "lion")
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"fused_backward": True},
    {"fused_backward": True, "checkpointing": True, "attention": "eager"},
    {"fused_backward": True, "checkpointing": True, "clip": "norm", "tied": True},
    {"fused_backward": True, "attention": "eager", "grad_accum": 2, "tied": True},
    {"checkpointing": True, "clip": "norm", "grad_accum": 2},
    {"attention": "eager", "tied": True},
)
DEEP = 12

Rows = list[dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one recipe")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was measured to PATH")
    options = parser.parse_args()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    recipes = RECIPES[:1] if options.quick else RECIPES
    console = Console(width=130)
    results: dict[str, Any] = {"schema": "optstate.benchmark.memory/1", **environment(), "quick": options.quick}
    results["transformers"] = version("transformers")
    results["large"] = large_run()
    results["grid"] = [against_the_allocator(name, way) for name in recipes for way in WAYS]
    results["depth"] = [against_the_whole(name, way) for name in recipes for way in WAYS]
    console.print(
        f"{results['cpu']}, torch {results['torch']}, transformers {results['transformers']}, "
        f"{results['threads']} threads\n",
        highlight=False,
    )
    print_grid(console, results["grid"])
    print_depth(console, results["depth"])
    goals = goals_of(results)
    print_goals(console, goals)
    results["goals"] = [goal.as_dict() for goal in goals]
    write_json(options.json, results)
    return 0


def against_the_allocator(name: str, way: dict[str, Any]) -> dict[str, Any]:
    """Compare a traced step with a real one, in signed fractions of the real figure.

    `error` is that of the peak, `error_beyond` that of what a step adds to weights and state.
    """
    setting, tied = setting_of(way)
    model, recipe = llama(SMALL, 4, tied), registry.get(name)
    found = trace(model, recipe, setting, device="cpu")
    before, beyond = real_bytes(model, recipe, setting)
    return {
        **row_of(name, way),
        "traced": found.peak,
        "real": before + beyond,
        "phase": found.phase,
        "error": found.peak / (before + beyond) - 1,
        "error_beyond": (found.peak - before) / beyond - 1,
    }


def against_the_whole(name: str, way: dict[str, Any]) -> dict[str, Any]:
    """Compare a trace with few layers and one with all 12, as for an accelerator; `difference` of peaks in bytes."""
    setting, tied = setting_of(way)
    model, recipe = llama(SMALL, DEEP, tied), registry.get(name)
    start = time.perf_counter()
    short, how = trace_model(model, recipe, setting)
    between = time.perf_counter()
    whole, _ = trace_model(model, recipe, setting, exact=True)
    end = time.perf_counter()
    same = (short.at_peak, short.most, short.phase) == (whole.at_peak, whole.most, whole.phase)
    return {
        **row_of(name, way),
        "how": how,
        "extrapolated": "extrapolated" in how,
        "short": short.peak,
        "whole": whole.peak,
        "difference": abs(short.peak - whole.peak),
        "same": same,
        "short_s": between - start,
        "whole_s": end - between,
    }


def setting_of(way: dict[str, Any]) -> tuple[Setting, bool]:
    """Return the setting of a way to train, and whether its model ties the head."""
    options = {key: value for key, value in way.items() if key != "tied"}
    return Setting(dtype="float32", batch_size=2, seq_len=128, **options), way.get("tied", False)


def row_of(name: str, way: dict[str, Any]) -> dict[str, Any]:
    words = {"fused_backward": "fused", "attention": "eager", "clip": "clipped", "grad_accum": "2 batches"}
    return {"name": name, "setting": ", ".join(words.get(key, key) for key in way) or "stepped", "way": way}


def print_grid(console: Console, rows: Rows) -> None:
    caption = "signed errors of the traced figure; beyond: of what a step adds to weights, state and inputs"
    columns = [
        ("recipe", text("name")),
        ("setting", text("setting")),
        ("traced MB", number("traced", ".2f", 1e-6)),
        ("real MB", number("real", ".2f", 1e-6)),
        ("error %", number("error", "+.2f", 100)),
        ("beyond %", number("error_beyond", "+.2f", 100)),
        ("peak in", text("phase")),
    ]
    print_table(console, "Traces beside real steps", caption, columns, rows)


def print_depth(console: Console, rows: Rows) -> None:
    columns = [
        ("recipe", text("name")),
        ("setting", text("setting")),
        ("extrapolated MB", number("short", ".3f", 1e-6)),
        ("whole MB", number("whole", ".3f", 1e-6)),
        ("difference B", number("difference", ".0f")),
        ("s", number("short_s", ".2f")),
        ("whole s", number("whole_s", ".2f")),
    ]
    print_table(console, f"Traces with 3, 4 and 5 layers beside those with {DEEP}", "", columns, rows)


def goals_of(results: dict[str, Any]) -> list[Goal]:
    grid, depth, large = results["grid"], results["depth"], results["large"]
    return [
        Goal(f"largest error of {len(grid)} peaks", 100 * max(abs(row["error"]) for row in grid), 2.0, "%"),
        Goal("largest error beyond weights and state", 100 * max(abs(row["error_beyond"]) for row in grid), 2.0, "%"),
        Goal("largest difference of an extrapolated peak", max(row["difference"] for row in depth), 0, "bytes"),
        Goal("extrapolations that differ in kinds or phase", sum(not row["same"] for row in depth), 0),
        Goal("settings that could not be extrapolated", sum(not row["extrapolated"] for row in depth), 0),
        Goal("`optstate estimate llama-7b --checkpointing`, imports included", large["seconds"], 6.0, "s"),
        Goal("memory of that process", large["rss"] / 1e9, 1.0, "GB"),
    ]


if __name__ == "__main__":
    sys.exit(main())
