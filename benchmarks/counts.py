"""What an optimizer step launches and moves on an accelerator that need not be there, exactly, and the fewest bytes.

    python benchmarks/counts.py [--quick] [--jobs N] [--json PATH]

Every registered recipe, fp32 and bf16, both ways of writing bf16 weights, on three sets of parameters; other libraries
beside. Nothing is timed, and no tensor has values: see `dispatch.py` for what is counted. Needs the extra `bench`;
libraries that are missing are named. Exit code 0, whether goals are met or missed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
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
from optstate.optimizer.whole_steps import FOR_BACKEND
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
QUICK, QUICK_SETS = ("adalomo", "adamw", "adamw8bit"), ("110M", "small")
DEVICE = "cuda"
BACKENDS = {"eager": DEVICE, "native": "cpu", "triton": DEVICE}
"""Backend -> type of the device whose steps are counted. What has no whole step there is counted as eager."""
WHOLE_STEPS: dict[str, tuple[Any, ...]] = {
    "eager": (),
    "native": FOR_BACKEND["native"],
    "triton": FOR_BACKEND["triton"],
}

BYTES_LIMIT, LAUNCHES_LIMIT = 1.3, 3.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three recipes on the two smaller sets")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was counted to PATH")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per processor)")
    parser.add_argument(
        "--backend", choices=BACKENDS, action="append", help="count these only, without other libraries"
    )
    options = parser.parse_args()
    backends = tuple(options.backend or BACKENDS)
    console = Console(width=130)
    results: dict[str, Any] = {"schema": "optstate.benchmark.counts/1", **environment(), "quick": options.quick}
    console.print(f"torch {results['torch']}, fake tensors that stand for {DEVICE}\n", highlight=False)
    recipes, sets = (QUICK, QUICK_SETS) if options.quick else (registry.names(), tuple(SHAPES))
    others = () if options.backend else PEERS
    cases = [(name, who, backends) for name in sets for who in (*recipes, *others)]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as processes:
        found = list(processes.map(count_case, *zip(*cases, strict=True)))
    results["rows"] = [row for rows in found for row in rows]
    for name in sets:
        print_counts(console, name, [row for row in results["rows"] if row["set"] == name])
    results["missing"] = [
        who for (name, who, _), rows in zip(cases, found, strict=True) if not rows and name == sets[0]
    ]
    for missing in results["missing"]:
        console.print(f"not counted, as it is not installed: {missing}", highlight=False)
    goals = goals_of(results["rows"])
    print_goals(console, goals)
    results["goals"] = [goal.as_dict() for goal in goals]
    write_json(options.json, results)
    return 0


def count_case(name: str, who: str, backends: tuple[str, ...]) -> Rows:
    """Return the rows of one recipe or another library's optimizer on one set; none of what is not installed."""
    torch.set_num_threads(1)
    shapes = SHAPES[name]()
    rows = rows_of_peer(who, shapes) if who in PEERS else rows_of_recipe(who, shapes, backends)
    return [{"set": name, **row} for row in rows]


# --- our recipes ------------------------------------------------------------------------------------------------------


def rows_of_recipe(recipe: str, shapes: Shapes, backends: tuple[str, ...]) -> Rows:
    """Count a recipe in each backend, dtype, and way of writing that differs in that dtype: fp32 weights are exact."""
    rows = []
    for dtype_name, dtype in DTYPES.items():
        for way, weights in WEIGHTS.items():
            if dtype == torch.float32 and way != "plain":
                continue
            name = registry.describe(recipe)["class"].rpartition(":")[2]
            for backend in backends:
                cost, floor = count_recipe(recipe, shapes, dtype, weights, backend)
                rows.append(row_of(f"optstate {name}", dtype_name, way, backend, shapes, cost, floor))
    return rows


def count_recipe(
    recipe: str, shapes: Shapes, dtype: torch.dtype, weights: Weights, backend: str = "eager"
) -> tuple[Cost, int]:
    """Return the cost of a step of all parameters in a backend, and the fewest bytes of such a step.

    Everything is planned; of the parameters that are planned alike one is stepped, for all of them.
    """
    make = registry.get(recipe)

    def build(names: Iterable[str], device: str) -> optstate.Optimizer:
        params = [(name, nn.Parameter(torch.empty(shapes[name], dtype=dtype, device=device))) for name in names]
        return make(params, lr=1e-3, weights=weights)

    planned = build(shapes, "meta")
    alike: dict[Any, list[str]] = {}
    for plan in planned.plan():
        kind = plan.spec.shape, str(plan.chain), str(plan.stores), str(plan.weights)
        alike.setdefault(kind, []).append(plan.spec.name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        times = {names[0]: len(names) for names in alike.values()}
        return count_step(build(times, "cpu"), times, backend), floor_of(planned)


def count_step(optimizer: optstate.Optimizer, times: Mapping[str, int], backend: str = "eager") -> Cost:
    """Return the cost of a step of all parameters.

    Args:
        optimizer: of fake tensors, in their mode.
        times: name of a parameter -> the number of parameters like it.
        backend: a key of `BACKENDS`.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    alike: dict[Any, list[Cost]] = {}
    for param, plan in zip(params, optimizer.plan(), strict=True):
        joined = getattr(find_step(plan, backend), "joined", None)
        kind = plan.spec.name if joined is None else joined.likeness
        each = [count_parameter(optimizer, param, plan, backend)] * times[plan.spec.name]
        alike.setdefault((joined is not None, kind), []).extend(each)
    costs = [share_launches(each) if is_joined else sum(each, Cost()) for (is_joined, _), each in alike.items()]
    return sum(costs, Cost())


def share_launches(costs: list[Cost]) -> Cost:
    """Return the cost of parameters that one set of launches steps: as many launches as for one of them."""
    return replace(sum(costs, Cost()), launches=costs[0].launches)


def find_step(plan: ParamPlan, backend: str) -> Any:
    """Return the whole step of a parameter in a backend; None if there is none."""
    found = (kind.of(plan) for kind in WHOLE_STEPS[backend])
    return next((step for step in found if step is not None), None)


def count_parameter(optimizer: optstate.Optimizer, param: Tensor, plan: ParamPlan, backend: str) -> Cost:
    """Return the cost of one parameter in a step: what its whole step says, or what is dispatched without one."""
    step = find_step(plan, backend)
    if step is not None:
        return Cost(getattr(step, "launches", step.passes), step.moved_bytes)
    return count_dispatched(optimizer, param, BACKENDS[backend])


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


def rows_of_peer(name: str, shapes: Shapes) -> Rows:
    """Count another library's optimizer in each dtype; nothing if the library is not installed."""
    try:
        found = {dtype_name: count_peer(PEERS[name], shapes, dtype) for dtype_name, dtype in DTYPES.items()}
    except MissingPeer:
        return []
    return [row_of(name, dtype_name, "plain", "eager", shapes, *counted) for dtype_name, counted in found.items()]


def row_of(name: str, dtype: str, weights: str, backend: str, shapes: Shapes, cost: Cost, floor: int) -> dict[str, Any]:
    """Return one row: totals, and the ratios that are compared."""
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    return {
        "name": name,
        "dtype": dtype,
        "weights": weights,
        "backend": backend,
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
        ("backend", text("backend")),
        ("launches", number("launches", ",.0f")),
        ("/ tensor", number("launches_per_tensor", ".1f")),
        ("bytes/param", number("bytes_per_parameter", ".2f")),
        ("floor", number("floor_per_parameter", ".2f")),
        ("/ floor", number("per_floor", ".2f")),
        ("waits", number("waits", ",.0f")),
    ]
    caption = (
        "launches: kernels in one step; bytes/param: what these kernels read and write, caches aside\n"
        "floor: the fewest bytes of the recipe; waits: how often the host waits for the device"
    )
    title = f"One step of {TITLES[name]}: {len(shapes):,} tensors, {millions:,.1f} million parameters"
    print_table(console, title, caption, columns, rows)


def goals_of(rows: Rows) -> list[Goal]:
    """Return the goals of our recipes, each for its worst dtype and way of writing: bytes, launches, waits."""
    ours = [row for row in rows if row["name"].startswith("optstate ")]
    ours = [row for row in ours if row["backend"] != "eager"] or ours  # the transforms are what the others are beside
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
