"""The answer of an estimate: the bytes of every recipe, where its peak is, and whether it fits."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optstate.memory import verdict
from optstate.memory.model import KINDS, Alive, Setting
from optstate.memory.verdict import CONTEXT, FRAGMENTATION, Gpu

__all__ = [
    "ASSUMED",
    "EXACT",
    "NOT_INCLUDED",
    "SCHEMA",
    "TRACED",
    "Estimate",
    "RecipeEstimate",
    "describe_setting",
    "draw_estimate",
    "format_estimate",
    "format_gib",
    "list_facts",
    "make_lines",
    "setting_tree",
    "wrap",
]

SCHEMA = "optstate.estimate/1"

EXACT, TRACED, ASSUMED = "exact", "traced", "assumed"
"""The basis of a figure: computed from shapes, traced in a run on tensors without values, or a rule of thumb."""

NOT_INCLUDED = (
    "what the CUDA context takes beyond the assumed 0.3 to 1 GB",
    "fragmentation of the allocator beyond the assumed factor",
    "workspaces of cuBLAS, cuDNN, NCCL and fused attention",
    "what torch.compile and custom kernels save or add",
    "a data loader that pins or prefetches batches on the GPU",
    "other processes on the GPU, a display among them",
)


@dataclass(frozen=True)
class RecipeEstimate:
    """The memory that one recipe needs on one device, in bytes; unknown figures are None.

    Attributes:
        weights_bytes, buffer_bytes, gradients_bytes, state_bytes: from shapes. `gradients_bytes` is one gradient of
            every parameter, or the largest gradient where each is used and freed in the backward pass.
        activations_bytes, logits_bytes, scratch_bytes: the most at any moment.
        gradients_most_bytes: the most gradients at any moment, which can be more than `gradients_bytes`: a tied
            parameter has several gradients that wait to be summed, and accumulation adds one to those that are there.
        peak_bytes: the most of everything together.
        peak_phase: where the peak is, as in `Trace.phase`.
        at_peak: the bytes of the peak by kind.
        basis: how each figure came about: exact, traced or assumed.
        alive: the largest tensors at the peak.
        how: how the trace was made, or why there is none.
        notes: what a reader of the figures should know.
        gpu: the GPU that the recipe should fit, or None.
    """

    recipe: str
    fused_backward: bool
    weights_bytes: int
    gradients_bytes: int
    state_bytes: int
    buffer_bytes: int = 0
    activations_bytes: int | None = None
    logits_bytes: int | None = None
    scratch_bytes: int | None = None
    peak_bytes: int | None = None
    peak_phase: str | None = None
    at_peak: Mapping[str, int] = field(default_factory=dict)
    basis: Mapping[str, str] = field(default_factory=dict)
    alive: tuple[Alive, ...] = field(default=(), repr=False)
    how: str = ""
    notes: tuple[str, ...] = ()
    gpu: Gpu | None = None
    gradients_most_bytes: int | None = None

    @property
    def known_bytes(self) -> int:
        """Bytes that are alive together whatever the activations are: a lower bound of the peak."""
        return self.weights_bytes + self.buffer_bytes + self.gradients_bytes + self.state_bytes

    @property
    def reserved_bytes(self) -> int | None:
        """Bytes that PyTorch's allocator reserves for the peak: assumed."""
        return None if self.peak_bytes is None else verdict.reserved_bytes(self.peak_bytes)

    @property
    def device_bytes(self) -> tuple[int, int] | None:
        """Bytes that the device shows as used, least and most: assumed."""
        return None if self.peak_bytes is None else verdict.device_bytes(self.peak_bytes)

    @property
    def verdict(self) -> str | None:
        """ "fits", "tight" or "no"; "unknown" where only a lower bound is known and that fits; None without a GPU."""
        if self.gpu is None:
            return None
        if self.peak_bytes is not None:
            return verdict.judge_peak(self.peak_bytes, self.gpu.nbytes)
        return verdict.NO if verdict.judge_peak(self.known_bytes, self.gpu.nbytes) == verdict.NO else verdict.UNKNOWN

    def to_json(self) -> dict[str, Any]:
        """Return the estimate of the recipe as plain data."""
        return {
            "recipe": self.recipe,
            "fused_backward": self.fused_backward,
            "weights_bytes": self.weights_bytes,
            "buffer_bytes": self.buffer_bytes,
            "gradients_bytes": self.gradients_bytes,
            "state_bytes": self.state_bytes,
            "gradients_most_bytes": self.gradients_most_bytes,
            "activations_bytes": self.activations_bytes,
            "logits_bytes": self.logits_bytes,
            "scratch_bytes": self.scratch_bytes,
            "known_bytes": self.known_bytes,
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak_phase,
            "at_peak": dict(self.at_peak),
            "reserved_bytes": self.reserved_bytes,
            "device_bytes": list(self.device_bytes) if self.device_bytes is not None else None,
            "verdict": self.verdict,
            "basis": dict(self.basis),
            "how": self.how,
            "notes": list(self.notes),
            "alive": [_alive_tree(item) for item in self.alive],
        }


def _alive_tree(item: Alive) -> dict[str, Any]:
    shape, nbytes = list(item.shape), item.nbytes
    return {"what": item.what, "kind": item.kind, "shape": shape, "dtype": item.dtype, "bytes": nbytes}


@dataclass(frozen=True)
class Estimate:
    """The answer of `optstate.estimate`. `print` it; `optstate.memory.solve` searches on from it.

    source, origin: what was estimated, and where that is from. parameters: elements; tensors: how many tensors hold
    them. setting: the run, but for what each recipe decides. sized: whether inputs follow its batch size and length.
    world_size, shard: over how many devices, and how. question: the `Question` that is answered, to ask on.
    """

    source: str
    origin: str
    parameters: int
    tensors: int
    setting: Setting
    recipes: tuple[RecipeEstimate, ...]
    gpu: Gpu | None = None
    world_size: int = 1
    shard: str = "none"
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    not_included: tuple[str, ...] = NOT_INCLUDED
    question: object = field(default=None, repr=False, compare=False)
    sized: bool = True

    def __str__(self) -> str:
        return format_estimate(self)

    def __getitem__(self, recipe: str) -> RecipeEstimate:
        """Return the estimate of a recipe by its name."""
        for one in self.recipes:
            if one.recipe == recipe:
                return one
        raise KeyError(recipe)

    @property
    def fits(self) -> bool:
        """Whether one of the recipes fits the GPU for sure: not if verdicts are "tight" or "unknown".

        True without a GPU, where nothing was to fit.
        """
        return self.gpu is None or any(one.verdict == verdict.FITS for one in self.recipes)

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as plain data of the schema `optstate.estimate/1`."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "origin": self.origin,
            "parameters": self.parameters,
            "tensors": self.tensors,
            "setting": setting_tree(self),
            "gpu": None if self.gpu is None else {"name": self.gpu.name, "bytes": self.gpu.nbytes},
            "recipes": [one.to_json() for one in self.recipes],
            "notes": list(self.notes),
            "not_included": list(self.not_included),
            "versions": dict(self.versions),
        }

    def plot(self, path: str | Path) -> None:
        """Draw the memory of each recipe, part by part, and that of the GPU as a line; needs matplotlib."""
        draw_estimate(self, path)


GIB = verdict.GIB


LEAST = 0.001
"""A size in GiB below which no digits are shown."""


WIDTH = 100
"""Columns of a line of text."""


WIDEST = 5
"""Number of recipes beside each other in one table, which then stays narrower than `WIDTH`."""


WORDS = {"logits": "logits and loss", "state": "optimizer state", "scratch": "scratch of updates and losses"}


COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#ccb974", "#937860")


def format_gib(nbytes: int | None) -> str:
    """Return a number of GiB, without the unit; "-" for what is not known."""
    if nbytes is None:
        return "-"
    size = nbytes / GIB
    if 0 < size < LEAST:
        return f"<{LEAST:g}"
    return f"{size:.2f}" if size >= 1 else f"{size:.3g}"


def setting_tree(estimate: Estimate) -> dict[str, Any]:
    """Return the run as plain data; sizes are None where inputs have their own."""
    setting = estimate.setting
    return {
        "dtype": setting.dtype,
        "weights": setting.weights,
        "batch_size": setting.batch_size if estimate.sized else None,
        "seq_len": setting.seq_len if estimate.sized else None,
        "grad_accum": setting.grad_accum,
        "checkpointing": setting.checkpointing,
        "attention": setting.attention,
        "clip": setting.clip,
        "world_size": estimate.world_size,
        "shard": estimate.shard,
    }


def describe_setting(estimate: Estimate) -> str:
    """Return the run in words."""
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


def list_facts(estimate: Estimate) -> list[tuple[str, str]]:
    """List what was estimated, as names and values."""
    tensors = f" in {estimate.tensors} tensors"
    found = [
        ("model", f"{estimate.source}: {estimate.parameters:,} parameters{tensors}"),
        ("from", estimate.origin),
        ("run", describe_setting(estimate)),
    ]
    if estimate.gpu is not None:
        found.append(("gpu", f"{estimate.gpu.name}: {format_gib(estimate.gpu.nbytes)} GiB"))
    return found


Line = tuple[str, str, Callable[["RecipeEstimate"], str]]
"""A line of the table: its name, the key of the figure whose basis it shows, and its cell for a recipe."""


def make_lines(estimate: Estimate) -> list[Line]:
    """Return the lines of the table, in GiB."""

    def part(kind: str) -> Callable[[RecipeEstimate], str]:
        return lambda one: format_gib(one.at_peak.get(kind, 0) if one.peak_bytes is not None else None)

    def device(which: int) -> Callable[[RecipeEstimate], str]:
        return lambda one: format_gib(one.device_bytes[which] if one.device_bytes is not None else None)

    least, most = (f"{size / 1e9:g}" for size in CONTEXT)
    lines: list[Line] = [
        ("update", "", lambda one: "fused" if one.fused_backward else "step()"),
        ("weights", "weights_bytes", lambda one: format_gib(one.weights_bytes)),
        ("gradients", "gradients_bytes", lambda one: format_gib(one.gradients_bytes)),
        ("optimizer state", "state_bytes", lambda one: format_gib(one.state_bytes)),
        ("gradients, most at once", "gradients_most_bytes", lambda one: format_gib(one.gradients_most_bytes)),
        ("activations, most at once", "activations_bytes", lambda one: format_gib(one.activations_bytes)),
        ("allocated at the peak", "peak_bytes", lambda one: format_gib(one.peak_bytes)),
        *((f"  {WORDS.get(kind, kind)}", "at_peak", part(kind)) for kind in KINDS),
        ("where the peak is", "peak_phase", lambda one: (one.peak_phase or "-").partition(":")[0]),
        (f"reserved, x {FRAGMENTATION:g}", "reserved_bytes", lambda one: format_gib(one.reserved_bytes)),
        (f"device, allocated + {least} GB", "device_bytes", device(0)),
        (f"device, reserved + {most} GB", "device_bytes", device(1)),
    ]
    if estimate.gpu is not None:
        lines.append((f"on {estimate.gpu.name}", "verdict", lambda one: one.verdict or "-"))
    return lines


def format_estimate(estimate: Estimate) -> str:
    """Format the table for a person, at most 100 columns wide if names are not too long."""
    head = [wrap(f"{name:6s} {value}", 7) for name, value in list_facts(estimate)]
    blocks = [
        _block(estimate, estimate.recipes[start : start + WIDEST]) for start in range(0, len(estimate.recipes), WIDEST)
    ]
    below = [wrap(line) for line in _below(estimate)]
    return "\n".join([*head, *blocks, "", *below])


def wrap(line: str, indent: int = 2) -> str:
    """Break a line where it is too long."""
    return textwrap.fill(line, WIDTH, subsequent_indent=" " * indent)


def _block(estimate: Estimate, recipes: Sequence[RecipeEstimate]) -> str:
    rows = [("GiB", *(one.recipe for one in recipes), "basis")]
    for name, key, cell in make_lines(estimate):
        bases = list(dict.fromkeys(one.basis[key] for one in recipes if key in one.basis))
        rows.append((name, *(cell(one) for one in recipes), " or ".join(bases)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [""]
    for row in rows:
        numbers = "".join(cell.rjust(max(width, 8) + 2) for cell, width in zip(row[1:-1], widths[1:-1], strict=True))
        lines.append(f"{row[0].ljust(widths[0])}{numbers}  {row[-1]}".rstrip())
    return "\n".join(lines)


def _below(estimate: Estimate) -> Iterator[str]:
    """Yield the lines below the table: places of the peaks, notes, what is not included, versions."""
    for what, recipes in group_recipes((one.peak_phase, one.recipe) for one in estimate.recipes if one.peak_phase):
        yield f"peak: {what.replace(':', ' at ', 1)} ({', '.join(recipes)})"
    for what, recipes in group_recipes((one.how, one.recipe) for one in estimate.recipes if one.how):
        everywhere = len(recipes) == len(estimate.recipes)
        yield f"trace: {what}" + ("" if everywhere else f" ({', '.join(recipes)})")
    for note in estimate.notes:
        yield f"note: {note}"
    for what, recipes in group_recipes((note, one.recipe) for one in estimate.recipes for note in one.notes):
        yield f"note: {what} ({', '.join(recipes)})"
    yield "not included: " + "; ".join(estimate.not_included)
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in estimate.versions.items())


def group_recipes(pairs: Iterator[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Group recipes by what they have in common, in order."""
    found: dict[str, list[str]] = {}
    for what, recipe in pairs:
        found.setdefault(what, []).append(recipe)
    return list(found.items())


def draw_estimate(estimate: Estimate, path: str | Path) -> None:
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
        axes.text(total + 0.01 * reach, place, f"{format_gib(round(total * GIB))} GiB", va="center")
    if estimate.gpu is not None:
        axes.axvline(limit, color="#c44e52", linestyle="--", label=f"{estimate.gpu.name}")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, reach * 1.14)
    traced = all(one.peak_bytes is not None for one in estimate.recipes)
    axes.set_xlabel(
        f"GiB {'allocated at the peak' if traced else 'without activations'}: {estimate.source}, "
        f"{describe_setting(estimate)}",
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
