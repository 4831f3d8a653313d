"""What each of 8 to 4096 devices holds and sends for LLaMA 7B, 70B and 405B: the optimizers, on shards without values.

    python benchmarks/scale.py [--quick] [--jobs N] [--json PATH]

No such machines are needed, and nothing is timed: see `simulated.py` for what is real in it. bf16 weights, FSDP2 with a
group for each layer and one for the rest. Needs the extra `bench`. Exit code 0, whether goals are met or missed.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from report import Goal, environment, number, print_goals, print_table, text, write_json
from rich.console import Console
from simulated import Sharded, one_of, simulate

from optstate.memory.model import Model, Setting
from optstate.memory.shard import per_rank
from optstate.memory.sources import find_model
from optstate.recipes import registry

MODELS = {"7B": "llama-7b", "70B": "llama-3-70b", "405B": "llama-3.1-405b"}
WORLDS = (8, 64, 512, 4096)
QUICK = ("adalomo", "adamw8bit", "adamw")
RECIPES = ("adalomo", "lomo", "adafactor", "came", "adamfactor", "adamw8bit", "adamw")

Rows = list[dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three recipes on 8 and 4096 devices only")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was counted to PATH")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per processor)")
    options = parser.parse_args()
    console = Console(width=150)
    results: dict[str, Any] = {"schema": "optstate.benchmark.scale/1", **environment(), "quick": options.quick}
    worlds, recipes = ((8, 4096), QUICK) if options.quick else (WORLDS, RECIPES)
    start = time.perf_counter()
    cases = [(name, world, recipes) for name in MODELS for world in worlds]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as processes:
        found = list(processes.map(count, *zip(*cases, strict=True)))
    results["seconds"] = time.perf_counter() - start
    results["rss"] = max(case["rss"] for case in found)
    results["sharding"] = [case["sharding"] for case in found]
    results["rows"] = [row for case in found for row in case["rows"]]
    console.print(f"torch {results['torch']}, {options.jobs} processes\n", highlight=False)
    print_sharding(console, results["sharding"])
    print_recipes(console, results["rows"])
    goals = goals_of(results)
    print_goals(console, goals)
    results["goals"] = [goal.as_dict() for goal in goals]
    write_json(options.json, results)
    return 0


def count(name: str, world: int, recipes: tuple[str, ...]) -> dict[str, Any]:
    """Count for one model and number of devices what sharding and each recipe mean for a device.

    Returns:
        The counts of sharding, one row per recipe, and the memory that counting took.
    """
    torch.set_num_threads(1)
    model, rows = find_model(MODELS[name]), []
    with one_of(world) as mesh:
        sharded = Sharded.of(model, mesh)
        for recipe in recipes:
            row = {"name": recipe, "model": name, "world": world, **simulate(sharded, registry.get(recipe))}
            rows.append({**row, **shares_of(row), "estimate_error": error_of_estimate(model, row)})
        sharding = {"name": name, "world": world, **sharding_of(model, sharded)}
    return {"sharding": sharding, "rows": rows, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def sharding_of(model: Model, sharded: Sharded) -> dict[str, Any]:
    """Return the bytes on rank 0, what FSDP2 sends from there in a step, and how much of both is padding.

    `whole` counts the weights that are gathered at the fullest moment, `idle` the devices without a row of the smallest
    parameter.
    """
    even = sum(param.nbytes for param in model.parameters)
    return {
        "parameters": model.numel,
        "weights": sharded.weights,
        "largest_group": max(sharded.group_bytes),
        "whole": sharded.padded[0] + sum(sorted(sharded.padded[1:])[-2:]),
        "padding": sum(sharded.padded) / even - 1,
        "sent": sharded.sent,
        "collectives": sharded.collectives,
        "groups": len(sharded.groups),
        "idle": max(sharded.world - min(param.shape[0] for param in model.parameters), 0),
    }


def shares_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return two ratios: state that all devices keep alike to all that a device keeps, and our traffic to FSDP2's."""
    kept = row["weights"] + row["fused_gradients"] + row["state"]
    return {"repeated": row["state_whole"] / kept, "traffic": row["fused_sent"] / row["fsdp_sent"]}


def error_of_estimate(model: Model, row: dict[str, Any]) -> float:
    """Return the largest relative error of an estimate with `--shard fsdp`, of weights, gradients and state."""
    worst = 0.0
    for fused in (False, True):
        plan = registry.get(row["name"])(on_meta(model)).plan()
        said = per_rank(model, plan, Setting(fused_backward=fused), row["world"], "fsdp")
        pairs = [
            (said.weights, row["weights"]),
            (said.state, row["state"]),
            (said.gradients, row["fused_gradients" if fused else "gradients"]),
        ]
        worst = max(worst, *(abs(a - b) / max(b, 1) for a, b in pairs))
    return worst


def on_meta(model: Model) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the model's parameters whole, without memory."""
    dtypes = {param.name: getattr(torch, param.dtype) for param in model.parameters}
    return [
        (param.name, torch.nn.Parameter(torch.empty(param.shape, dtype=dtypes[param.name], device="meta")))
        for param in model.parameters
    ]


def print_sharding(console: Console, rows: Rows) -> None:
    columns = [
        ("model", text("name")),
        ("devices", text("world")),
        ("weights MiB", number("weights", ".1f", 2**-20)),
        ("largest group MiB", number("largest_group", ".2f", 2**-20)),
        ("gathered MiB", number("whole", ".0f", 2**-20)),
        ("padding %", number("padding", ".2f", 100)),
        ("idle devices", text("idle")),
        ("sent GiB", number("sent", ".2f", 2**-30)),
        ("collectives", text("collectives")),
        ("groups", text("groups")),
    ]
    caption = (
        "rank 0, bf16. gathered: whole weights of two layers and of the root. padding: rows that only fill parts "
        "up, of the weights.\nidle: devices without a row of the smallest parameter. sent: by FSDP2 from a device "
        "in a step, the layers' all-gathers twice,\nthe root's and all reduce-scatters once, each (W - 1) / W of "
        "what is gathered"
    )
    print_table(console, "Sharding alone", caption, columns, rows)


def print_recipes(console: Console, rows: Rows) -> None:
    columns = [
        ("recipe", text("name")),
        ("model", text("model")),
        ("devices", text("world")),
        ("gradients MiB", number("gradients", ".1f", 2**-20)),
        ("fused MiB", number("fused_gradients", ".2f", 2**-20)),
        ("state MiB", number("state", ".2f", 2**-20)),
        ("whole MiB", number("state_whole", ".2f", 2**-20)),
        ("repeated %", number("repeated", ".2f", 100)),
        ("sums", text("collectives")),
        ("fused", text("fused_collectives")),
        ("sent MiB", number("fused_sent", ".2f", 2**-20)),
        ("of FSDP's %", number("traffic", ".3f", 100)),
    ]
    caption = (
        "rank 0. fused MiB: gradients alive at once. whole: state that every device has all of; repeated: its share "
        "of weights, fused gradients\nand state. sums: all-reduces of the optimizer in a step, and in a fused one; "
        "sent: by these when fused, 2 (W - 1) / W of their bytes"
    )
    print_table(console, "The optimizer on shards", caption, columns, rows)


def goals_of(results: dict[str, Any]) -> list[Goal]:
    rows = results["rows"]
    per_group = max(row["fused_collectives"] / row["groups"] for row in rows)
    goals = [
        Goal("largest error of the estimate", 100 * max(row["estimate_error"] for row in rows), 2.0, "%"),
        Goal("all-reduces of a fused optimizer per group", per_group, 2),
        Goal("what a fused optimizer sends, of what FSDP2 does", 100 * max(row["traffic"] for row in rows), 1.0, "%"),
    ]
    for world in sorted({row["world"] for row in rows}):
        share = 100 * max(row["repeated"] for row in rows if row["world"] == world)
        goals.append(Goal(f"state that all of {world} devices repeat, of what one keeps", share, 5.0, "%"))
    return [
        *goals,
        Goal("the whole count", results["seconds"], 600.0, "s"),
        Goal("memory of a process", results["rss"] / 1e9, 2.0, "GB"),
    ]


if __name__ == "__main__":
    sys.exit(main())
