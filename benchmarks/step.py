"""What one optimizer step costs on a CPU, ours and others': time, scratch memory, hooks, peak of a backward pass.

    python benchmarks/step.py [--quick] [--rounds N] [--json PATH]

One process, one thread, CPU time, interleaved rounds, medians. Needs the extra `bench`. Exit code 0, whether goals
are met or missed; 1 if two implementations of one rule do not agree, before anything is timed.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["KINETO_LOG_LEVEL"] = "99"  # the memory profiler announces each start and stop otherwise

import agreement
import fused
import hooks
import peers
import torch
from report import Goal, environment, number, parse_arguments, print_goals, print_table, text, write_json
from rich.console import Console
from shapes import SETS
from timing import DTYPES
from update import measure_update

SCRATCH_LIMIT = 8e6
HOOK_LIMITS = {291: 6.0, 723: 15.0}
"""Goals in milliseconds per step, by number of parameters."""

Rows = list[dict[str, Any]]


def main() -> int:
    options = parse_arguments(__doc__.splitlines()[0], "3 rounds and the 25M set only", quick_rounds=3, rounds=9)
    torch.set_num_threads(1)
    console = Console(width=120)
    results: dict[str, Any] = {"schema": "optstate.benchmark.step/1", **environment()}
    results |= {"rounds": options.rounds, "quick": options.quick}
    console.print(
        f"{results['cpu']} ({results['capability']}), torch {results['torch']}, {results['threads']} thread, "
        f"{options.rounds} rounds\n",
        highlight=False,
    )
    results["agreement"], results["rounding"] = agreement.compare_updates(), agreement.compare_rounding()
    print_agreement(console, results["agreement"], results["rounding"])
    if not check_agreement(results["agreement"]):
        return 1
    results["update"] = measure_updates(console, options.rounds, SETS[:1] if options.quick else SETS)
    results["hooks"] = [row for n in hooks.LAYERS for row in hooks.measure_hooks(n, 5 * options.rounds)]
    print_hooks(console, results["hooks"])
    results["training"] = [row for name in DTYPES for row in fused.measure_training(name, options.rounds)]
    print_training(console, results["training"])
    idle = (peers.SGD_FUSED, "bf16") in agreement.without_update(results["agreement"])
    goals = [
        *update_goals(results["update"], "which stores nothing, " if idle else ""),
        *scratch_goals(results["update"]),
        *hook_goals(results["hooks"]),
        *peak_goals(results["training"]),
    ]
    print_goals(console, goals)
    results["goals"] = [goal.as_dict() for goal in goals]
    write_json(options.json, results)
    return 0


def check_agreement(rows: Rows) -> bool:
    """Return whether all pairs agree, and print the names of those that do not on stderr."""
    different = [row for row in rows if row["verdict"] == "DIFFER"]
    for row in different:
        print(
            f"verification failed: {row['name']} and {row['reference']} ({row['dtype']}, {row['part']}) end "
            f"{row['relative_l2']:.2g} apart, more than {row['bound']:g}; nothing was timed",
            file=sys.stderr,
        )
    return not different


def measure_updates(console: Console, rounds: int, sets: Any) -> Rows:
    """Measure time and scratch of every set and dtype, and print each set's two tables."""
    rows: Rows = []
    for parameters in sets:
        for dtype_name in DTYPES:
            part = measure_update(parameters, dtype_name, rounds)
            print_update_times(console, f"{parameters.name} {dtype_name}", part)
            rows += part
    print_scratch(console, rows)
    return rows


def print_agreement(console: Console, rows: Rows, rounding: Rows) -> None:
    columns = [
        ("optimizer", text("name")),
        ("reference", text("reference")),
        ("dtype", text("dtype")),
        ("part", text("part")),
        ("relative L2", number("relative_l2", ".1e")),
        ("bound", number("bound", ".0e")),
        ("verdict", text("verdict")),
    ]
    title = f"Agreement: total update of {agreement.STEPS} steps on the {SETS[0].name} set"
    print_table(console, title, "", columns, rows)
    columns = [
        ("optimizer", text("name")),
        ("not rounded correctly %", number("misrounded", ".3f", 100)),
        ("unchanged %", number("unchanged", ".2f", 100)),
    ]
    title = f"Gradient descent in bf16, one step at lr {agreement.LOMO_LR}: elements that are not p - lr g rounded once"
    print_table(console, title, "", columns, rounding)
    for name, dtype in agreement.without_update(rows):
        console.print(
            f"[bold]{name} leaves {dtype} parameters as they are[/bold] in this version of torch: its times below are "
            f"those of a loop that stores nothing. {peers.SGD_LOOP} does update.\n"
        )


def print_update_times(console: Console, name: str, rows: Rows) -> None:
    columns = [
        ("optimizer", text("name")),
        ("ms per 10^6", number("ms_per_million", ".3f")),
        ("spread %", number("spread", ".0f", 100)),
        ("/ AdamW fused", number("per_adamw_fused")),
        ("/ lomo-optim", number("per_lomo_optim")),
    ]
    caption = "milliseconds of CPU time per step and 10^6 parameters; ratios are medians over the rounds"
    print_table(console, f"Update time, {name}", caption, columns, rows)


def print_scratch(console: Console, rows: Rows) -> None:
    """Print scratch in MB: one row per optimizer, one column per set and dtype."""
    cells = {(row["set"], row["dtype"], row["name"]): row["scratch_bytes"] / 1e6 for row in rows}
    cases = list(dict.fromkeys(case[:2] for case in cells))
    names = list(dict.fromkeys(row["name"] for row in rows if row["dtype"] == "bf16"))
    table = [{"name": name, **{" ".join(c): cells.get((*c, name)) for c in cases}} for name in names]
    columns = [("optimizer", text("name")), *((" ".join(c), number(" ".join(c))) for c in cases)]
    caption = "most bytes alive during one warm step beyond those before it: 10^6 bytes"
    print_table(console, "Scratch beyond state, MB", caption, columns, table)


def print_hooks(console: Console, rows: Rows) -> None:
    columns = [
        ("optimizer", text("name")),
        ("parameters", text("parameters")),
        ("backward ms", number("backward_ms")),
        ("backward + step ms", number("step_ms")),
        ("overhead ms", number("overhead_ms")),
        ("/ lomo-optim", number("overhead_per_lomo_optim", ".3f")),
    ]
    caption = "milliseconds of CPU time per step; overhead = with hooks and step() - backward without hooks"
    print_table(console, "Hook overhead, parameters of one element", caption, columns, rows)


def print_training(console: Console, rows: Rows) -> None:
    columns = [
        ("way to train", text("name")),
        ("dtype", text("dtype")),
        ("step ms", number("step_ms", ".1f")),
        ("spread %", number("spread", ".0f", 100)),
        ("/ fwd + bwd", number("per_backward")),
        ("peak MB", number("peak_bytes", ".2f", 1e-6)),
        ("peak B/param", number("peak_per_parameter", ".3f")),
    ]
    title = f"Training a GPT of {rows[0]['parameters'] / 1e6:.1f} million parameters, {fused.TOKENS} tokens per step"
    caption = "peak: most bytes alive beyond those before the step: activations, gradients, temporaries"
    print_table(console, title, caption, columns, rows)


def update_goals(rows: Rows, remark: str) -> list[Goal]:
    """Return the goals for time against lomo-optim and torch's SGD, on which `remark` is a remark."""
    goals = []
    limits = {"fp32": 0.70, "bf16": 0.60}
    for row in rows:
        case = f"{row['set']} {row['dtype']}"
        if row["name"] == peers.OUR_ADALOMO:
            what = f"AdaLomo / lomo-optim AdaLomo, update, {case}"
            goals.append(Goal(what, row["per_lomo_optim"], limits[row["dtype"]]))
        if row["name"] == peers.OUR_ADALOMO_AUTO:
            what = f"AdaLomo, stochastic rounding (the default) / lomo-optim AdaLomo, update, {case}"
            goals.append(Goal(what, row["per_lomo_optim"], limits[row["dtype"]]))
        if row["name"] == peers.OUR_LOMO and row["dtype"] == "bf16":
            goals.append(Goal(f"Lomo / {peers.SGD_FUSED}, {remark}update, {case}", row["per_sgd_fused"], 1.5))
            goals.append(Goal(f"Lomo / {peers.SGD_LOOP}, update, {case}", row["per_sgd_loop"], 1.5))
    return goals


def scratch_goals(rows: Rows) -> list[Goal]:
    """Return the goals for scratch, one per recipe of ours."""
    ours = [row for row in rows if row["ours"]]
    names = [f"scratch of {row['name']}, {row['set']} {row['dtype']}" for row in ours]
    limit = SCRATCH_LIMIT / 1e6
    return [Goal(name, row["scratch_bytes"] / 1e6, limit, "MB") for name, row in zip(names, ours, strict=True)]


def hook_goals(rows: Rows) -> list[Goal]:
    """Return the goals for our overhead per step."""
    return [
        Goal(f"hook overhead, {row['parameters']} parameters", row["overhead_ms"], HOOK_LIMITS[row["parameters"]], "ms")
        for row in rows
        if row["name"].startswith("optstate")
    ]


def peak_goals(rows: Rows) -> list[Goal]:
    """Return the goals for the peak of the fused backward, which is below that with gradients kept."""
    peaks = {row["name"]: row["peak_bytes"] / 1e6 for row in rows if row["dtype"] == "bf16"}
    limit = peaks[fused.KEPT]
    return [Goal(f"peak of {name}, bf16 GPT", peaks[name], limit, "MB", strict=True) for name in fused.FUSED]


if __name__ == "__main__":
    sys.exit(main())
