"""What compressed state costs and saves on a CPU: bytes per parameter, update time and scratch, beside bitsandbytes.

    python benchmarks/low_bit.py [--quick] [--rounds N] [--json PATH]

One process, one thread, CPU time, interleaved rounds, medians. Needs the extra `bench`. Exit code 0, whether goals
are met or missed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

os.environ["KINETO_LOG_LEVEL"] = "99"  # the memory profiler announces each start and stop otherwise

import bitsandbytes
import peers
import torch
from report import Goal, environment, number, parse_arguments, print_goals, print_table, text, write_json
from rich.console import Console
from shapes import SETS, gradients_of, module_of
from timing import DTYPES, Action, interleaved, ratio, spread
from torch import nn
from update import LR, loader, scratch_of

import optstate
from adalomo import AdaLomo
from optstate import recipes, stores, weights

MATRIX = (4096, 11008)
SCRATCH_LIMIT = 8e6
BNB, OUR_ADAMW8BIT = "bitsandbytes AdamW8bit", "optstate AdamW8bit"
BNB_LION = "bitsandbytes Lion8bit"
TORCH_ADAMW = "torch AdamW fused"

Rows = list[dict[str, Any]]
Build = Callable[[Iterable[Any]], optstate.Optimizer]


@dataclass(frozen=True)
class Kept:
    """A recipe whose state is measured, and the most bytes per parameter it should keep."""

    name: str
    build: Build
    dtype: torch.dtype = torch.float32
    at_most: float | None = None
    beyond: str = ""
    """The name of a recipe whose bytes are taken off first."""


KEPT = [
    Kept("AdamW", recipes.AdamW),
    Kept("AdamW8bit", recipes.AdamW8bit, at_most=2.04),
    Kept("AdamW4bit", recipes.AdamW4bit, at_most=1.07),
    Kept("AdamW4bit, rank1", lambda p: recipes.AdamW4bit(p, rank1=True), at_most=1.07),
    Kept("AdamW, Float8 moments", lambda p: recipes.AdamW(p, first=stores.Float8(), second=stores.Float8())),
    Kept("AdamFactor", recipes.AdamFactor, at_most=1.02),
    Kept("AdamFactor, 4-bit", lambda p: recipes.AdamFactor(p, first=stores.Block4())),
    Kept("AdamMini", recipes.AdamMini, at_most=4.001),
    Kept("Lion8bit", recipes.Lion8bit),
    Kept("SGDM8bit", recipes.SGDM8bit),
    Kept("CAME", recipes.CAME),
    Kept("CAME, 8-bit", lambda p: recipes.CAME(p, first=stores.Block8())),
    Kept("SM3", recipes.SM3),
    Kept("AdaLomo", AdaLomo, at_most=0.003),
    Kept("AdaLomo, bf16 Split(8)", lambda p: AdaLomo(p, weights=weights.Split(8)), torch.bfloat16, 1.0, "AdaLomo"),
    Kept("AdaLomo, bf16 Split(16)", lambda p: AdaLomo(p, weights=weights.Split(16)), torch.bfloat16, 2.0, "AdaLomo"),
    Kept("AdaLomo, bf16 Kahan", lambda p: AdaLomo(p, weights=weights.Kahan()), torch.bfloat16, 2.0, "AdaLomo"),
]


def main() -> int:
    options = parse_arguments(__doc__.splitlines()[0], "2 rounds", quick_rounds=2, rounds=5)
    torch.set_num_threads(1)
    console = Console(width=120)
    results: dict[str, Any] = {"schema": "optstate.benchmark.low_bit/1", **environment()}
    results |= {"rounds": options.rounds, "quick": options.quick, "bitsandbytes": bitsandbytes.__version__}
    console.print(
        f"{results['cpu']} ({results['capability']}), torch {results['torch']}, bitsandbytes "
        f"{results['bitsandbytes']}, {results['threads']} thread, {options.rounds} rounds\n",
        highlight=False,
    )
    results["bytes"] = measure_bytes()
    print_bytes(console, results["bytes"])
    results["update"] = [row for name in DTYPES for row in measure_updates(name, options.rounds)]
    for name in DTYPES:
        print_updates(console, name, [row for row in results["update"] if row["dtype"] == name])
    goals = [*byte_goals(results["bytes"]), *update_goals(results["update"])]
    print_goals(console, goals)
    results["goals"] = [goal.as_dict() for goal in goals]
    write_json(options.json, results)
    return 0


def measure_bytes() -> Rows:
    """Return the bytes of the state tensors of one matrix after a step, per element of the matrix."""
    rows = []
    for kept in KEPT:
        param = nn.Parameter(torch.full(MATRIX, 0.01, dtype=kept.dtype))
        optimizer = kept.build([("matrix", param)])
        param.grad = torch.full(MATRIX, 0.001, dtype=kept.dtype)
        optimizer.step()
        planned = optimizer.plan().nbytes
        if planned != optimizer.state_nbytes():
            raise RuntimeError(f"{kept.name}: {planned} bytes planned, {optimizer.state_nbytes()} kept")
        rows.append({"name": kept.name, "per_parameter": optimizer.state_nbytes() / param.numel()})
    return rows


def contestants(dtype: torch.dtype) -> list[peers.Contestant]:
    """Return every compressed recipe, its weights written plainly, beside the same rule elsewhere."""
    plain = weights.Plain()
    everyone = [
        peers.Contestant(OUR_ADAMW8BIT, peers.ours(recipes.AdamW8bit, weights=plain)),
        peers.Contestant(BNB, peers.torchs(bitsandbytes.optim.AdamW8bit)),
        peers.Contestant("optstate Lion8bit", peers.ours(recipes.Lion8bit, weights=plain)),
        peers.Contestant(BNB_LION, peers.torchs(bitsandbytes.optim.Lion8bit)),
        peers.Contestant("optstate SGDM8bit", peers.ours(recipes.SGDM8bit, weights=plain)),
        peers.Contestant("optstate AdamW4bit", peers.ours(recipes.AdamW4bit, weights=plain)),
        peers.Contestant("optstate AdamW, Float8", peers.ours(float8_adamw, weights=plain)),
        peers.Contestant("optstate AdamFactor", peers.ours(recipes.AdamFactor, weights=plain)),
        peers.Contestant("optstate AdamMini", peers.ours(recipes.AdamMini, weights=plain)),
        peers.Contestant("optstate CAME", peers.ours(recipes.CAME, weights=plain)),
        peers.Contestant("optstate SM3", peers.ours(recipes.SM3, weights=plain)),
        *(
            peers.Contestant(f"{OUR_ADAMW8BIT}, {way}", peers.ours(recipes.AdamW8bit, weights=way), only=torch.bfloat16)
            for way in (weights.StochasticRounding(), weights.Kahan(), weights.Split(8), weights.Split(16))
        ),
        peers.Contestant(TORCH_ADAMW, peers.torchs(torch.optim.AdamW, fused=True)),
    ]
    return [c for c in everyone if c.only in (None, dtype)]


def float8_adamw(params: Iterable[Any], lr: float, **options: Any) -> optstate.Optimizer:
    return recipes.AdamW(params, lr=lr, first=stores.Float8(), second=stores.Float8(), **options)


def measure_updates(dtype_name: str, rounds: int) -> Rows:
    """Measure time and scratch of one step, one row per contestant, on the smaller parameter set."""
    dtype = DTYPES[dtype_name]
    module = module_of(SETS[0].shapes(), dtype)
    grads = gradients_of(module)
    millions = sum(g.numel() for g in grads) / 1e6
    runners = {c.name: c.build(module, LR) for c in contestants(dtype)}
    seconds = interleaved(
        {name: Action(loader(runner, grads), runner.step) for name, runner in runners.items()}, rounds
    )
    return [
        {
            "set": SETS[0].name,
            "dtype": dtype_name,
            "name": name,
            "ms_per_million": 1e3 * median(seconds[name]) / millions,
            "spread": spread(seconds[name]),
            "per_bitsandbytes": ratio(seconds, name, BNB_LION if "Lion" in name else BNB),
            "per_adamw_fused": ratio(seconds, name, TORCH_ADAMW),
            "scratch_bytes": scratch_of(runner, grads),
        }
        for name, runner in runners.items()
    ]


def print_bytes(console: Console, rows: Rows) -> None:
    columns = [("recipe", text("name")), ("bytes per parameter", number("per_parameter", ".4f"))]
    shape = " x ".join(map(str, MATRIX))
    print_table(console, f"State of a {shape} matrix", "measured from the state tensors after a step", columns, rows)


def print_updates(console: Console, dtype_name: str, rows: Rows) -> None:
    columns = [
        ("optimizer", text("name")),
        ("ms per 10^6", number("ms_per_million", ".2f")),
        ("spread %", number("spread", ".0f", 100)),
        ("/ bitsandbytes", number("per_bitsandbytes", ".3f")),
        ("/ AdamW fused", number("per_adamw_fused", ".1f")),
        ("scratch MB", number("scratch_bytes", ".2f", 1e-6)),
    ]
    caption = (
        "milliseconds of CPU time per step and 10^6 parameters; ratios are medians over the rounds: Lion8bit over "
        "bitsandbytes' Lion8bit, all others over its AdamW8bit"
    )
    print_table(console, f"Update, {SETS[0].name} {dtype_name}", caption, columns, rows)


def byte_goals(rows: Rows) -> list[Goal]:
    """Return the goals for bytes per parameter; a way to write weights counts what it adds to the same recipe."""
    found = {row["name"]: row["per_parameter"] for row in rows}
    goals = []
    for kept in KEPT:
        if kept.at_most is not None:
            what = f"state of {kept.name}{f' beyond {kept.beyond}' if kept.beyond else ''}"
            goals.append(Goal(what, found[kept.name] - found.get(kept.beyond, 0.0), kept.at_most, "B per parameter"))
    return goals


def update_goals(rows: Rows) -> list[Goal]:
    """Return the goals for 8-bit AdamW against bitsandbytes', and for scratch of everything that is block by block."""
    goals = []
    for row in rows:
        case = f"{row['set']} {row['dtype']}"
        if row["name"] == OUR_ADAMW8BIT:
            goals.append(Goal(f"AdamW8bit / bitsandbytes AdamW8bit, update, {case}", row["per_bitsandbytes"], 0.6))
        if row["name"].startswith("optstate") and "SM3" not in row["name"]:
            goals.append(
                Goal(f"scratch of {row['name']}, {case}", row["scratch_bytes"] / 1e6, SCRATCH_LIMIT / 1e6, "MB")
            )
    return goals


if __name__ == "__main__":
    sys.exit(main())
