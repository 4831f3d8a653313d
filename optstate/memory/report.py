"""An estimate as text and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from optstate.memory.model import KINDS
from optstate.memory.result import RecipeEstimate, Result
from optstate.memory.verdict import CONTEXT, FRAGMENTATION

__all__ = ["facts", "filled", "gib", "lines_of", "plot", "setting_words", "text"]

GIB = 2**30

LEAST = 0.001
"""A size in GiB below which no digits are shown."""

WIDTH = 100
"""Columns of a line of text."""

WIDEST = 5
"""Number of recipes beside each other in one table, which then stays narrower than `WIDTH`."""

WORDS = {"logits": "logits and loss", "state": "optimizer state", "scratch": "scratch of updates and losses"}

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#ccb974", "#937860")


def gib(nbytes: int | None) -> str:
    """Format bytes as a number of GiB, without the unit; "-" for an unknown size."""
    if nbytes is None:
        return "-"
    size = nbytes / GIB
    if 0 < size < LEAST:
        return f"<{LEAST:g}"
    return f"{size:.2f}" if size >= 1 else f"{size:.3g}"


def setting_words(estimate: Result) -> str:
    """Describe the setting of the run in words."""
    setting = estimate.setting
    words = [setting.dtype]
    if any(one.peak_bytes is not None for one in estimate.recipes):
        words.append(f"batch {setting.batch_size} x {setting.seq_len}" if estimate.sized else "inputs as given")
        words.append(f"{setting.attention} attention")
        words.append("activation checkpointing" if setting.checkpointing else "no checkpointing")
    else:
        words.append("nothing was run")
    if setting.weights != "auto":
        words.append(f"weights {setting.weights}")
    if setting.grad_accum > 1:
        words.append(f"{setting.grad_accum} micro-batches a step")
    if setting.clip != "none":
        words.append(f"clipped by {setting.clip}")
    if estimate.world_size > 1:
        words.append(f"one of {estimate.world_size} devices, {estimate.shard}")
    return ", ".join(words)


def facts(estimate: Result) -> list[tuple[str, str]]:
    """Return what was estimated, as names and values."""
    tensors = f" in {estimate.tensors} tensors"
    found = [
        ("model", f"{estimate.source}: {estimate.parameters:,} parameters{tensors}"),
        ("from", estimate.origin),
        ("run", setting_words(estimate)),
    ]
    if estimate.gpu is not None:
        found.append(("gpu", f"{estimate.gpu.name}: {gib(estimate.gpu.nbytes)} GiB"))
    return found


# --- the table ----------------------------------------------------------------------------------------------------

Line = tuple[str, str, Callable[[RecipeEstimate], str]]
"""A line of the table: its name, the key of the figure whose basis it shows, and its cell for a recipe."""


def lines_of(estimate: Result) -> list[Line]:
    """Return the lines of the table, in GiB."""

    def part(kind: str) -> Callable[[RecipeEstimate], str]:
        return lambda one: gib(one.at_peak.get(kind, 0) if one.peak_bytes is not None else None)

    def device(which: int) -> Callable[[RecipeEstimate], str]:
        return lambda one: gib(one.device_bytes[which] if one.device_bytes is not None else None)

    least, most = (f"{size / 1e9:g}" for size in CONTEXT)
    lines: list[Line] = [
        ("update", "", lambda one: "fused" if one.fused_backward else "step()"),
        ("weights", "weights_bytes", lambda one: gib(one.weights_bytes)),
        ("gradients", "gradients_bytes", lambda one: gib(one.gradients_bytes)),
        ("optimizer state", "state_bytes", lambda one: gib(one.state_bytes)),
        ("gradients, most at once", "gradients_most_bytes", lambda one: gib(one.gradients_most_bytes)),
        ("activations, most at once", "activations_bytes", lambda one: gib(one.activations_bytes)),
        ("allocated at the peak", "peak_bytes", lambda one: gib(one.peak_bytes)),
        *((f"  {WORDS.get(kind, kind)}", "at_peak", part(kind)) for kind in KINDS),
        ("where the peak is", "peak_phase", lambda one: (one.peak_phase or "-").partition(":")[0]),
        (f"reserved, x {FRAGMENTATION:g}", "reserved_bytes", lambda one: gib(one.reserved_bytes)),
        (f"device, allocated + {least} GB", "device_bytes", device(0)),
        (f"device, reserved + {most} GB", "device_bytes", device(1)),
    ]
    if estimate.gpu is not None:
        lines.append((f"on {estimate.gpu.name}", "verdict", lambda one: one.verdict or "-"))
    return lines


def text(estimate: Result) -> str:
    """Format an estimate as a table for people, at most 100 columns wide if names are not too long."""
    head = [filled(f"{name:6s} {value}", 7) for name, value in facts(estimate)]
    blocks = [
        _block(estimate, estimate.recipes[start : start + WIDEST]) for start in range(0, len(estimate.recipes), WIDEST)
    ]
    below = [filled(line) for line in _below(estimate)]
    return "\n".join([*head, *blocks, "", *below])


def filled(line: str, indent: int = 2) -> str:
    """Break a line that is too long."""
    return textwrap.fill(line, WIDTH, subsequent_indent=" " * indent)


def _block(estimate: Result, recipes: Sequence[RecipeEstimate]) -> str:
    rows = [("GiB", *(one.recipe for one in recipes), "basis")]
    for name, key, cell in lines_of(estimate):
        bases = list(dict.fromkeys(one.basis[key] for one in recipes if key in one.basis))
        rows.append((name, *(cell(one) for one in recipes), " or ".join(bases)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [""]
    for row in rows:
        numbers = "".join(cell.rjust(max(width, 8) + 2) for cell, width in zip(row[1:-1], widths[1:-1], strict=True))
        lines.append(f"{row[0].ljust(widths[0])}{numbers}  {row[-1]}".rstrip())
    return "\n".join(lines)


def _below(estimate: Result) -> Iterator[str]:
    """Yield the lines below the table: places of the peaks, notes, what is not included, versions."""
    for what, recipes in grouped((one.peak_phase, one.recipe) for one in estimate.recipes if one.peak_phase):
        yield f"peak: {what.replace(':', ' at ', 1)} ({', '.join(recipes)})"
    for what, recipes in grouped((one.how, one.recipe) for one in estimate.recipes if one.how):
        everywhere = len(recipes) == len(estimate.recipes)
        yield f"trace: {what}" + ("" if everywhere else f" ({', '.join(recipes)})")
    for note in estimate.notes:
        yield f"note: {note}"
    for what, recipes in grouped((note, one.recipe) for one in estimate.recipes for note in one.notes):
        yield f"note: {what} ({', '.join(recipes)})"
    yield "not included: " + "; ".join(estimate.not_included)
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in estimate.versions.items())


def grouped(pairs: Iterator[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Group recipes by the text that they have in common, in order."""
    found: dict[str, list[str]] = {}
    for what, recipe in pairs:
        found.setdefault(what, []).append(recipe)
    return list(found.items())


# --- the picture --------------------------------------------------------------------------------------------------


def plot(estimate: Result, path: str | Path) -> None:
    """Draw stacked bars, one for each recipe, and the memory of the GPU as a line, into a file.

    Bars are the memory alive at the peak; for a model that was not traced, the memory known from shapes.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [_parts(one) for one in estimate.recipes]
    figure = Figure(figsize=(8, 1.5 + 0.4 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)  # whatever backend is set, and no window
    axes = figure.add_subplot()
    names = [one.recipe + (", fused" if one.fused_backward else "") for one in estimate.recipes]
    places = list(range(len(bars)))
    left = [0.0] * len(bars)
    for kind, colour in zip(KINDS, COLOURS, strict=True):
        widths = [parts.get(kind, 0) / GIB for parts in bars]
        if any(widths):
            axes.barh(places, widths, left=left, label=WORDS.get(kind, kind), color=colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    limit = estimate.gpu.nbytes / GIB if estimate.gpu is not None else 0.0
    reach = max(*left, limit)
    for place, total in zip(places, left, strict=True):
        axes.text(total + 0.01 * reach, place, f"{gib(round(total * GIB))} GiB", va="center")
    if estimate.gpu is not None:
        axes.axvline(limit, color="#c44e52", linestyle="--", label=f"{estimate.gpu.name}")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, reach * 1.14)
    traced = all(one.peak_bytes is not None for one in estimate.recipes)
    axes.set_xlabel(
        f"GiB {'allocated at the peak' if traced else 'without activations'}: {estimate.source}, "
        f"{setting_words(estimate)}",
        fontsize="small",
    )
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(path), dpi=150)


def _parts(one: RecipeEstimate) -> dict[str, int]:
    if one.peak_bytes is not None:
        return dict(one.at_peak)
    weights = one.weights_bytes + one.buffer_bytes
    return {"weights": weights, "gradients": one.gradients_bytes, "state": one.state_bytes}
