"""The numbers of training runs: as a dict for JSON, and side by side in a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lm import Memory, Run, options_of
from rich.table import Table

__all__ = ["size", "summary", "table"]

CAPTION = (
    "Peaks are those of one step with a batch of 8 bytes, where activations hardly count. The second adds up what is "
    "allocated from the start of backward to the end of the update, temporaries of backward included."
)

ROWS = {
    "validation loss before, nats per byte": lambda s: f"{s['validation_loss_before']:.3f}",
    "validation loss after": lambda s: f"{s['validation_loss_after']:.3f}",
    "optimizer state": lambda s: size(s["state_bytes"]),
    "gradients, peak": lambda s: size(s["gradients_bytes"]),
    "gradients and scratch, peak": lambda s: size(s["backward_and_update_bytes"]),
    "time per step, median": lambda s: duration(s["median_step_seconds"]),
}


def summary(run: Run, memory: Memory, before: float) -> dict[str, Any]:
    """Return what was trained, how, and what came out, after one more validation."""
    settings = run.settings
    return {
        **asdict(settings),
        "fused_backward": settings.fused,
        "options": options_of(settings),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "stopped_at_step": run.step,
        "validation_loss_before": before,
        "validation_loss_after": run.validate(),
        **{f"{key}_bytes": value for key, value in asdict(memory).items()},
        "median_step_seconds": run.step_seconds,
        "losses": run.losses,
    }


def table(title: str, *summaries: dict[str, Any]) -> Table:
    """Lay out runs side by side: one row per measure, one column per run."""
    result = Table(title=title, caption=CAPTION, title_justify="left", caption_justify="left")
    result.add_column("")
    for each in summaries:
        how = "fused" if each["fused_backward"] else "stepped"
        result.add_column(f"{each['recipe']}, {how}", justify="right")
    for name, show in ROWS.items():
        result.add_row(name, *map(show, summaries))
    return result


def size(count: int) -> str:
    """Format a number of bytes in KiB or MiB."""
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def duration(seconds: float | None) -> str:
    """Format a time in milliseconds."""
    return "no step taken" if seconds is None else f"{seconds * 1e3:.0f} ms"
