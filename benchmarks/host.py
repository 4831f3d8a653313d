"""What building and fusing an optimizer of thousands of small parameters costs the host.

    python benchmarks/host.py [--quick] [--rounds N] [--json PATH]

One process, one thread, CPU time, interleaved rounds, medians. Every parameter is new in every round. Exit code 0,
whether goals are met or missed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from report import Goal, environment, number, parse_arguments, print_goals, print_table, text, write_json
from rich.console import Console
from timing import Action, interleaved, spread
from torch import Tensor, nn

import optstate

LAYERS = 1000
"""Each with a weight of 64 x 64 and a bias of 64."""

WIDTH = 64
RECIPES = ("adalomo", "adamw8bit", "adamw")
BUILD_LIMIT = 20.0
"""Goal in microseconds for a parameter, its state included."""

FUSE_LIMIT = 20.0
"""Goal in microseconds for a parameter, the search for engines included."""

Named = list[tuple[str, nn.Parameter]]
Rows = list[dict[str, Any]]


def main() -> int:
    options = parse_arguments(__doc__.splitlines()[0], "3 rounds", quick_rounds=3, rounds=9)
    torch.set_num_threads(1)
    console = Console(width=120)
    results: dict[str, Any] = {"schema": "optstate.benchmark.host/1", **environment(packages=())}
    results |= {"rounds": options.rounds, "quick": options.quick, "parameters": 2 * LAYERS}
    console.print(
        f"{results['cpu']} ({results['capability']}), torch {results['torch']}, {results['threads']} thread, "
        f"{options.rounds} rounds, {2 * LAYERS} parameters\n",
        highlight=False,
    )
    results["build"] = measure_building(options.rounds)
    results["fuse"] = measure_fusing(options.rounds)
    columns = [
        ("what", text("name")),
        ("us per parameter", number("microseconds")),
        ("spread %", number("spread", ".0f", 100)),
    ]
    allocation = "Allocating: the same tensors of zeros, made in a loop, which no optimizer can do without."
    print_table(console, "Building an optimizer", allocation, columns, results["build"])
    print_table(console, "Fusing it into the backward pass", "", columns, results["fuse"])
    goals = goals_of(results)
    print_goals(console, goals)
    results["goals"] = [goal.as_dict() for goal in goals]
    write_json(options.json, results)
    return 0


def layers() -> Named:
    """Return new named parameters."""
    shapes = {"weight": (WIDTH, WIDTH), "bias": (WIDTH,)}
    return [
        (f"layers.{layer}.linear.{name}", nn.Parameter(torch.ones(shape)))
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    ]


def measure_building(rounds: int) -> Rows:
    """Rows for building each optimizer, for making its state alone, and for PyTorch's AdamW, which makes none yet."""
    actions = {}
    for name in RECIPES:
        make = partial(optstate.recipes.get(name), lr=1e-3)
        state = [v for s in make(layers()).state.values() for v in s.values() if isinstance(v, Tensor)]
        shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in state]
        actions[f"optstate {name}"] = with_new_layers(make)
        actions[f"allocating for {name}"] = with_new_layers(partial(allocate, shapes))
    actions["torch AdamW, without state"] = with_new_layers(lambda named: torch.optim.AdamW(named, lr=1e-3))
    return rows_of(actions, rounds)


def measure_fusing(rounds: int) -> Rows:
    """Rows for hooking a built optimizer, and for putting a hook on each of its parameters alone."""
    built: list[optstate.Optimizer] = []
    named: Named = []

    def prepare() -> None:
        named[:] = layers()
        built[:] = [optstate.recipes.get("adalomo")(named, lr=1e-3)]

    def hook() -> None:
        for _, param in named:
            param.register_post_accumulate_grad_hook(lambda _: None)  # type: ignore[no-untyped-call]

    fused = Action(prepare, lambda: optstate.fuse_backward(built[0]))
    return rows_of({"optstate fuse_backward": fused, "hooks of PyTorch alone": Action(prepare, hook)}, rounds)


def allocate(shapes: list[tuple[tuple[int, ...], torch.dtype]], _: Named) -> list[Tensor]:
    """Return a tensor of zeros for each shape, whatever the parameters."""
    return [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes]


def with_new_layers(function: Callable[[Named], object]) -> Action:
    """Call `function` with parameters that nobody has seen; what it returns lives until the next round."""
    named: Named = []
    kept: list[object] = []

    def prepare() -> None:
        kept.clear()
        named[:] = layers()

    return Action(prepare, lambda: kept.append(function(named)))


def rows_of(actions: dict[str, Action], rounds: int) -> Rows:
    """Measure actions that treat every parameter once."""
    seconds = interleaved(actions, rounds, warmups=2)
    each = 1e6 / (2 * LAYERS)
    return [
        {"name": name, "microseconds": each * median(values), "spread": spread(values)}
        for name, values in seconds.items()
    ]


def goals_of(results: dict[str, Any]) -> list[Goal]:
    """Return the goals for what is ours."""
    limits = {"build": BUILD_LIMIT, "fuse": FUSE_LIMIT}
    return [
        Goal(f"{part} with {row['name']}, per parameter", row["microseconds"], limit, "us")
        for part, limit in limits.items()
        for row in results[part]
        if row["name"].startswith("optstate")
    ]


if __name__ == "__main__":
    sys.exit(main())
