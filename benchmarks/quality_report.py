"""Means, ratios and verdicts of the quality benchmark, and how they are printed."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from statistics import fmean, stdev
from typing import Any

import torch
from quality_rows import Row
from quality_runs import BATCH, GPT, WINDOWS
from report import cpu_name
from rich.console import Console
from rich.table import Table

__all__ = ["RowResult", "header", "model_size", "print_report"]

CAPTION = """\
loss: validation loss at the end of training in nats per byte, mean and standard deviation over the seeds. \
ratio: to the loss of the row whose number follows "of", mean and standard deviation of the ratios seed by seed (both \
runs start from the same weights and see the same tokens). state: bytes of the optimizer's tensors per parameter, \
where a Kahan or Split row keeps the rest of its bf16 weights too. peak: 10^6 bytes of gradients and scratch from the \
start of backward to the end of the update, measured with a batch of a few bytes. fused: updated inside backward. \
bf16: the model's weights and gradients, otherwise fp32; auto rounds stochastically. Rows with Adam's moments have \
betas 0.9, 0.95 and weight decay 0.01, all others their recipe's defaults. paper lr: 1e-3, which AdaLomo's paper has \
for trained models, fixed."""

Numbers = tuple[float, float | None]
"""Mean and standard deviation; the deviation of a single value is None."""


@dataclass(frozen=True)
class RowResult:
    """A row and all that was found: `runs` in the order of the seeds, `failure` if it could not be run."""

    number: int
    row: Row
    lr: float | None
    runs: list[dict[str, Any]]
    memory: dict[str, int]
    failure: str | None

    @property
    def losses(self) -> list[float] | None:
        """The losses, one per seed; None if the row failed, or not all runs reached the end."""
        values = [run["loss"] for run in self.runs]
        return None if self.failure or not values or None in values else values

    @property
    def trouble(self) -> str | None:
        """The reason why there are no losses, in a word or two; None if there are losses."""
        if self.failure:
            return "not run"
        return "diverged" if self.losses is None else None

    @property
    def explanation(self) -> str | None:
        """The trouble in a sentence."""
        if self.failure:
            return f"could not be run: {self.failure}"
        if self.lr is None:
            return "diverged with every learning rate of its recipe's grid"
        ends = [f"seed {i} after {run['steps']} steps" for i, run in enumerate(self.runs) if run["loss"] is None]
        return f"diverged: {', '.join(ends)}" if ends else None


@cache
def model_size() -> int:
    """Return the number of parameters of the demo's model."""
    return sum(p.numel() for p in GPT().parameters())


def header(about: dict[str, Any]) -> str:
    """Describe the machine, the model and the training, then the text."""
    length = GPT().config.context
    tokens, jobs = about["steps"] * BATCH * length, about["jobs"]
    machine = f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}"
    threads = f"{jobs} process{'es' if jobs > 1 else ''} of 1 thread"
    run = f"{about['steps']} steps of {BATCH} x {length} bytes = {tokens:,} tokens"
    seeds = f"{about['seeds']} seed{'s' if about['seeds'] > 1 else ''}"
    parts = [f"{about['training_bytes']:,} bytes to train on", f"{about['selection_bytes']:,} to choose learning rates"]
    parts.append(f"{about['validation_bytes']:,} to report the loss on, in {WINDOWS} windows")
    quick = "A quick look at whether everything runs: the losses below say nothing.\n" if about["quick"] else ""
    return (
        f"{machine}, {threads}; byte-level GPT of {model_size():,} parameters, {run}, {seeds}\n"
        f"{about['corpus']}: {', '.join(parts)}; 10 % warmup, then a cosine to a tenth of the learning rate\n{quick}"
    )


def print_report(
    console: Console, results: list[RowResult], learning_rates: dict[str, dict[str, Any]], origin: str
) -> dict[str, Any]:
    """Print learning rates, rows, explanations and verdicts, and return all of it for JSON."""
    by_name = {result.row.name: result for result in results}
    if learning_rates:
        console.print(
            "Learning rates: loss on the selection text with a seed of its own. All rows of a recipe take the best."
        )
        console.print(_learning_rate_table(learning_rates))
    console.print(f"\nQuality, {origin}")
    console.print(_row_table(results, by_name))
    console.print(CAPTION)
    for result in results:
        if result.explanation:
            console.print(f"{result.row.name} {result.explanation}", markup=False, soft_wrap=True)
    verdicts = [verdict for result in results if (verdict := judge(result, by_name))]
    if verdicts:
        console.print("\nGoals")
    for verdict in verdicts:
        console.print(f"{verdict['verdict']:6} {verdict['what']}", markup=False, soft_wrap=True)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "parameters": model_size(),
        "learning_rates": learning_rates,
        "rows": [_as_dict(result, by_name) for result in results],
        "goals": verdicts,
    }


def ratio(result: RowResult, by_name: dict[str, RowResult]) -> Numbers | None:
    """Return the ratio of a row's losses to its reference's, seed by seed; None without either."""
    reference = by_name[result.row.reference].losses if result.row.reference else None
    if result.losses is None or reference is None:
        return None
    return _numbers([a / b for a, b in zip(result.losses, reference, strict=True)])


def judge(result: RowResult, by_name: dict[str, RowResult]) -> dict[str, str] | None:
    """Return MET or MISSED, OPEN where a number that is needed is missing; None for a row without a goal."""
    row, found = result.row, ratio(result, by_name)
    if row.at_most is None and row.above is None:
        return None
    what = f"{row.name}, loss / loss of {row.reference}"
    goal = f"<= {row.at_most:g}" if row.at_most is not None else f"> {row.above:g} and 2 standard deviations apart"
    if found is None:
        verdict = "MISSED" if result.trouble == "diverged" and row.at_most is not None else "OPEN"
        return {"verdict": verdict, "what": f"{what}: {result.trouble or 'nothing to compare with'}, goal {goal}"}
    what = f"{what}: {_ratio(found)}"
    if row.at_most is not None:
        met = found[0] <= row.at_most
    else:
        losses, others = result.losses or [], by_name[str(row.reference)].losses or []
        if len(losses) < 2:
            return {"verdict": "OPEN", "what": f"{what}, goal {goal}, which takes 2 seeds"}
        apart, deviation = fmean(losses) - fmean(others), max(stdev(losses), stdev(others))
        what = f"{what}, {apart:.4f} nats apart where the larger standard deviation is {deviation:.4f}"
        met = found[0] > row.above and apart > 2 * deviation
    return {"verdict": "MET" if met else "MISSED", "what": f"{what}, goal {goal}"}


def _numbers(values: list[float]) -> Numbers:
    return fmean(values), stdev(values) if len(values) > 1 else None


def _ratio(found: Numbers) -> str:
    return f"{found[0]:.4f}" + ("" if found[1] is None else f" ± {found[1]:.4f}")


def _table(*headers: str) -> Table:
    """Print plain columns, the first one text: the same on a screen and in a file."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(headers):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def _learning_rate_table(learning_rates: dict[str, dict[str, Any]]) -> Table:
    table = _table("chosen by", "half", "middle", "double", "chosen")
    for found in learning_rates.values():
        cells = [f"{lr:g}: {'diverged' if loss is None else f'{loss:.4f}'}" for lr, loss in found["losses"].items()]
        cells += ["-"] * (3 - len(cells))
        chosen = found["chosen"]
        edge = " (edge)" if chosen is not None and chosen in (min(found["losses"]), max(found["losses"])) else ""
        table.add_row(found["row"], *cells, "-" if chosen is None else f"{chosen:g}{edge}")
    return table


def _row_table(results: list[RowResult], by_name: dict[str, RowResult]) -> Table:
    table = _table("row", "no.", "loss", "±", "ratio", "of", "goal", "state B/param", "peak MB", "lr")
    for result in results:
        row, found = result.row, ratio(result, by_name)
        mean, deviation = _numbers(result.losses) if result.losses else (None, None)
        goal = f"<= {row.at_most:g}" if row.at_most else f"> {row.above:g}" if row.above else "-"
        memory = result.memory
        table.add_row(
            row.name,
            str(result.number),
            result.trouble or f"{mean:.4f}",
            "-" if deviation is None else f"{deviation:.4f}",
            "-" if found is None else _ratio(found),
            str(by_name[row.reference].number) if row.reference else "-",
            goal,
            f"{memory['state_bytes'] / model_size():.3f}" if memory else "-",
            f"{memory['peak_bytes'] / 1e6:.2f}" if memory else "-",
            "-" if result.lr is None else f"{result.lr:g}",
        )
    return table


def _as_dict(result: RowResult, by_name: dict[str, RowResult]) -> dict[str, Any]:
    row, found = result.row, ratio(result, by_name)
    mean, deviation = _numbers(result.losses) if result.losses else (None, None)
    return {
        "name": row.name,
        "recipe": row.recipe,
        "dtype": row.dtype,
        "fused": row.fused,
        "lr": result.lr,
        "loss_mean": mean,
        "loss_deviation": deviation,
        "reference": row.reference,
        "ratio_mean": found[0] if found else None,
        "ratio_deviation": found[1] if found else None,
        "goal_at_most": row.at_most,
        "goal_above": row.above,
        "state_bytes": result.memory.get("state_bytes"),
        "peak_bytes": result.memory.get("peak_bytes"),
        "runs": result.runs,
        "trouble": result.explanation,
    }
