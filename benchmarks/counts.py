"""What an optimizer step launches and moves, counted exactly for an accelerator that need not be there, beside its floor.

    python benchmarks/counts.py [--quick] [--json PATH]

Every registered recipe, fp32 and bf16, both ways of writing bf16 weights, on three sets of parameters; other libraries
beside. Nothing is timed, and no tensor has values: see `dispatch.py` for what is counted. Needs the extra `bench`;
libraries that are missing are named. Exit code 0, whether goals are met or missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from byte_floor import byte_floor
from count_peers import PEERS, count_peer
from dispatch import Cost, DispatchCounter
from peers import MissingPeer
from report import Goal, environment, number, print_goals, print_table, text, write_json
from rich.console import Console
from shapes import SETS, llama_shapes, small_shapes
from timing import DTYPES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import optstate
from optstate import kernels
from optstate.optimizer.plan import ParamPlan
from optstate.recipes import registry
from optstate.weights import Plain, StochasticRounding, Weights

Shapes = Mapping[str, tuple[int, ...]]
Rows = list[dict[str, Any]]

SHAPES: dict[str, Callable[[], Shapes]] = {
    "7B": lambda: llama_shapes(4096, 11008, 32, head=True),
    "110M": SETS[1].shapes,
    "small": small_shapes,
}
TITLES = {"7B": "LLaMA-7B", "110M": "a LLaMA-like model of 110M parameters", "small": "many small tensors"}
WEIGHTS: dict[str, Weights] = {"plain": Plain(), "stochastic": StochasticRounding()}
QUICK = ("adalomo", "adamw", "adamw8bit")
DEVICE = "cuda"

BYTES_LIMIT, LAUNCHES_LIMIT = 2.0, 4.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"the recipes {', '.join(QUICK)}, the small set and 110M")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was counted to PATH")
    options = parser.parse_args()
    console = Console(width=120)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"schema": "optstate.benchmark.counts/1", **environment(), "quick": options.quick}
    console.print(f"torch {results['torch']}, fake tensors that stand for {DEVICE}\n", highlight=False)
    recipes = QUICK if options.quick else tuple(registry.names())
    results["rows"], results["missing"] = [], []
    for name in ("110M", "small") if options.quick else SHAPES:
        rows = [row for recipe in recipes for row in rows_of_recipe(recipe, SHAPES[name]())]
        theirs, results["missing"] = rows_of_peers(SHAPES[name]())
        rows = [{"set": name, **row} for row in rows + theirs]
        print_counts(console, name, rows)
        results["rows"] += rows
    for missing in results["missing"]:
        console.print(f"not counted, as it is not installed: {missing}", highlight=False)
    goals = goals_of(results["rows"])
    print_goals(console, goals)
    results["goals"] = [goal.as_dict() for goal in goals]
    write_json(options.json, results)
    return 0


# --- our recipes ------------------------------------------------------------------------------------------------------


def rows_of_recipe(recipe: str, shapes: Shapes) -> Rows:
    """Count one recipe in each dtype and each way of writing that differs in that dtype: fp32 weights are exact."""
    rows = []
    for dtype_name, dtype in DTYPES.items():
        for way, weights in WEIGHTS.items():
            if dtype == torch.float32 and way != "plain":
                continue
            with fake_optimizer(recipe, shapes, dtype, weights) as optimizer:
                cost, floor = count_step(optimizer), floor_of(optimizer)
            name = registry.describe(recipe)["class"].rpartition(":")[2]
            rows.append(row_of(f"optstate {name}", dtype_name, way, shapes, cost, floor))
    return rows


@contextmanager
def fake_optimizer(
    recipe: str, shapes: Shapes, dtype: torch.dtype, weights: Weights
) -> Iterator[optstate.Optimizer]:
    """Build a recipe on parameters without values, in a mode in which it can be stepped."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [(name, nn.Parameter(torch.empty(shape, dtype=dtype))) for name, shape in shapes.items()]
        yield registry.get(recipe)(params, lr=1e-3, weights=weights)


def count_step(optimizer: optstate.Optimizer, on: str = DEVICE) -> Cost:
    """Return the cost of a step of all parameters. Of those that are planned alike one is counted, for all.

    Args:
        optimizer: of fake tensors, in their mode.
        on: type of the device that they stand for.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    alike: dict[Any, list[tuple[Tensor, ParamPlan]]] = {}
    for param, plan in zip(params, optimizer.plan(), strict=True):
        spec = plan.spec
        kind = spec.shape, spec.dtype, str(plan.chain), str(plan.stores), str(plan.weights)
        alike.setdefault(kind, []).append((param, plan))
    return sum((count_parameter(optimizer, *ones[0], on) * len(ones) for ones in alike.values()), Cost())


def count_parameter(optimizer: optstate.Optimizer, param: Tensor, plan: ParamPlan, on: str) -> Cost:
    """Return the cost of one parameter in a step: what a backend that does whole steps says, or what is dispatched."""
    whole_step = getattr(plan, "whole_step", None)
    if whole_step is not None:
        launches, nbytes = whole_step.cost(plan)
        return Cost(launches, nbytes)
    return count_dispatched(optimizer, param, on)


def count_dispatched(optimizer: optstate.Optimizer, param: Tensor, on: str) -> Cost:
    """Step one parameter twice, and return the cost of the second step: the first is no typical one."""
    param.grad = torch.empty_like(param)
    with kernels.rehearsal(on):
        optimizer.step()
    counter = DispatchCounter()
    with kernels.rehearsal(on, every_round=True), counter:
        optimizer.step()
    param.grad = None
    return counter.cost


def floor_of(optimizer: optstate.Optimizer) -> int:
    """Return the fewest bytes of a step of all parameters."""
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    return sum(byte_floor(plan, group) for plan, group in zip(optimizer.plan(), groups, strict=True))


# --- rows, tables, goals ----------------------------------------------------------------------------------------------


def rows_of_peers(shapes: Shapes) -> tuple[Rows, list[str]]:
    """Count what other libraries do, and name those that are not installed."""
    rows, missing = [], []
    for peer in PEERS:
        try:
            for dtype_name, dtype in DTYPES.items():
                cost, floor = count_peer(peer, shapes, dtype)
                rows.append(row_of(peer.name, dtype_name, "plain", shapes, cost, floor))
        except MissingPeer:
            missing.append(peer.name)
    return rows, missing


def row_of(name: str, dtype: str, weights: str, shapes: Shapes, cost: Cost, floor: int) -> dict[str, Any]:
    """Return one row: totals, and the ratios that are compared."""
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    return {
        "name": name,
        "dtype": dtype,
        "weights": weights,
        "launches": cost.launches,
        "launches_per_tensor": cost.launches / len(shapes),
        "bytes": cost.bytes,
        "bytes_per_parameter": cost.bytes / elements,
        "floor_per_parameter": floor / elements,
        "per_floor": cost.bytes / floor,
        "waits": cost.waits,
    }


def print_counts(console: Console, name: str, rows: Rows) -> None:
    shapes = SHAPES[name]()
    millions = sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e6
    columns = [
        ("optimizer", text("name")),
        ("dtype", text("dtype")),
        ("weights", text("weights")),
        ("launches", number("launches", ",")),
        ("/ tensor", number("launches_per_tensor", ".1f")),
        ("bytes/param", number("bytes_per_parameter", ".2f")),
        ("floor", number("floor_per_parameter", ".2f")),
        ("/ floor", number("per_floor", ".2f")),
        ("waits", number("waits", ",")),
    ]
    caption = (
        "launches: kernels in one step; bytes/param: read and written by these kernels, caches aside; floor: the fewest "
        "bytes of the recipe;\nwaits: how often the host waits for the device"
    )
    title = f"One step of {TITLES[name]}: {len(shapes):,} tensors, {millions:,.1f} million parameters"
    print_table(console, title, caption, columns, rows)


def goals_of(rows: Rows) -> list[Goal]:
    """Return the goals of our recipes, each for its worst dtype and way of writing: bytes, launches, waits."""
    ours = [row for row in rows if row["name"].startswith("optstate ")]
    goals = []
    for name in dict.fromkeys(row["name"] for row in ours):
        for place in dict.fromkeys(row["set"] for row in ours):
            mine = [row for row in ours if (row["name"], row["set"]) == (name, place)]
            most = {key: max(row[key] for row in mine) for key in ("per_floor", "launches_per_tensor")}
            goals.append(Goal(f"{name}, {place}, bytes / floor", most["per_floor"], BYTES_LIMIT))
            goals.append(Goal(f"{name}, {place}, launches per tensor", most["launches_per_tensor"], LAUNCHES_LIMIT))
    goals.append(Goal("times the host waits in a step of ours", max(row["waits"] for row in ours), 0))
    return goals


if __name__ == "__main__":
    sys.exit(main())
