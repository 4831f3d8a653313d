"""What a step of a chain that no whole step knows costs on a CPU: compiled loops beside eager PyTorch.

    python benchmarks/composed.py [--quick] [--rounds N] [--json PATH]

One process, interleaved rounds, medians of ratios: CPU time with one thread, wall-clock time with two. Exit code 0,
whether goals are met or missed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from report import Goal, environment, number, parse_arguments, print_goals, print_table, text, write_json
from rich.console import Console
from timing import DTYPES, Action, interleaved, ratio
from torch import Tensor, nn

import optstate
from adalomo import AdaLomo
from optstate import kernels, stores, updates
from optstate.recipes import AdamW8bit
from optstate.testing.devices import CutParameter

SHAPE = (2048, 2048)
EAGER, COMPILED, WHOLE = "eager", "native", "whole step"
EAGER_GOALS = {
    "clip, adam, cautious, decay": 1.0,
    "clip, 8-bit adam, cautious, decay": 0.5,
    "AdaLomo in two parts": 0.7,
}
"""The most that a step with compiled loops may take of the eager one's time."""

OF_WHOLE = "AdamW8bit by its transforms"
WHOLE_GOAL, THREADS_GOAL = 2.0, 1.7

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class cautious(updates.Transform):  # noqa: N801
    """Leave out what does not point along the gradient (arXiv 2411.16085): a transform that is not the library's."""

    absorbs_decay: ClassVar[bool] = True

    def __call__(self, update: updates.Update, state: updates.State, ctx: updates.Context) -> updates.Update:
        value = kernels.multiply_out(update)
        return updates.Update(value.mul_((value * ctx.grad) > 0), finite=update.finite)


@dataclass(frozen=True)
class own_adam(updates.scale_by_adam):  # noqa: N801
    """Adam's transform under another name, which no whole step knows."""


def chain_of(store: stores.Store) -> optstate.updates.Chain:
    adam = updates.scale_by_adam(store, store)
    return optstate.chain(updates.clip_by_norm(1.0), adam, cautious(), updates.add_decayed_weights(0.01))


def stepped(make: Callable[[Any], optstate.Optimizer], dtype: torch.dtype, backend: str) -> Action:
    """Return a step of a matrix."""
    param = nn.Parameter(torch.randn(SHAPE).to(dtype))
    param.grad = torch.randn(SHAPE).to(dtype)
    optimizer = make([("p", param)])
    optimizer.use_backend(backend)
    return Action(lambda: None, optimizer.step)


def in_parts(dtype: torch.dtype, backend: str) -> Action:
    """Return a step of AdaLomo on the two halves of a matrix, as two devices make it: both halves are timed."""
    cut = CutParameter(AdaLomo, SHAPE, (2, 1), dtype)
    cut.use_backend(backend)
    grads: list[Tensor] = [torch.randn_like(param) for param in cut.params]
    return Action(lambda: None, lambda: cut.step_parts(grads, 2))


def actions_of(name: str, dtype: torch.dtype) -> dict[str, Action]:
    if name == "AdaLomo in two parts":
        return {backend: in_parts(dtype, backend) for backend in (EAGER, COMPILED)}
    if name == OF_WHOLE:
        own = optstate.chain(own_adam(stores.Block8(), stores.Block8()), updates.add_decayed_weights(0.01))
        by_transforms = stepped(lambda params: optstate.Optimizer(params, own, lr=1e-3), dtype, COMPILED)
        return {WHOLE: stepped(AdamW8bit, dtype, COMPILED), COMPILED: by_transforms}
    store = stores.Block8() if "8-bit" in name else stores.Full()
    make = lambda params: optstate.Optimizer(params, chain_of(store), lr=1e-3)  # noqa: E731
    return {backend: stepped(make, dtype, backend) for backend in (EAGER, COMPILED)}


def measure(name: str, dtype_name: str, rounds: int) -> dict[str, Any]:
    """Measure one chain: CPU time with one thread, then wall-clock time with one and with two, round by round."""
    actions = actions_of(name, DTYPES[dtype_name])
    base = next(iter(actions))
    torch.set_num_threads(1)
    seconds = interleaved(actions, rounds)
    elements = SHAPE[0] * SHAPE[1]
    row = {"name": name, "dtype": dtype_name, "base": base, "per_base": ratio(seconds, COMPILED, base)}
    row |= {key: min(seconds[of]) / elements * 1e9 for key, of in (("base_ns", base), ("compiled_ns", COMPILED))}
    run = actions[COMPILED].run
    threads = {str(n): Action(lambda n=n: torch.set_num_threads(n), run) for n in (1, 2)}
    row["speedup"] = ratio(interleaved(threads, rounds, clock=time.perf_counter), "1", "2")
    torch.set_num_threads(1)
    return row


def main() -> int:
    options = parse_arguments(__doc__.splitlines()[0], "3 rounds", quick_rounds=3, rounds=9)
    console = Console(width=120)
    results: dict[str, Any] = {"schema": "optstate.benchmark.composed/1", **environment(), "rounds": options.rounds}
    rows = [measure(name, dtype, options.rounds) for name in (*EAGER_GOALS, OF_WHOLE) for dtype in DTYPES]
    columns = [
        ("chain", text("name")),
        ("dtype", text("dtype")),
        ("beside", text("base")),
        ("its ns", number("base_ns", ".1f")),
        ("compiled ns", number("compiled_ns", ".1f")),
        ("compiled / it", number("per_base", ".2f")),
        ("2 threads", number("speedup", ".2f")),
    ]
    caption = "ns: least CPU time of an element; 2 threads: wall-clock time of one thread over that of two, compiled"
    print_table(console, f"A step of a matrix of {SHAPE[0]}x{SHAPE[1]}", caption, columns, rows)
    goals = goals_of(rows)
    print_goals(console, goals)
    write_json(options.json, results | {"rows": rows, "goals": [goal.as_dict() for goal in goals]})
    return 0


def goals_of(rows: Rows) -> list[Goal]:
    """Return the goals of time, each beside its base, and of two threads, where more is better."""
    limits = EAGER_GOALS | {OF_WHOLE: WHOLE_GOAL}
    goals = [
        Goal(f"{row['name']}, {row['dtype']}, compiled / {row['base']}", row["per_base"], limits[row["name"]])
        for row in rows
    ]
    shares = [
        Goal(f"{row['name']}, {row['dtype']}, two threads / one, seconds", 1 / row["speedup"], 1 / THREADS_GOAL)
        for row in rows
    ]
    return [*goals, *shares]


if __name__ == "__main__":
    sys.exit(main())
