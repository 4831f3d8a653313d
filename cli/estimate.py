"""`optstate estimate`: what training a model needs in memory, before it is trained."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optstate.text import shown

from .options import JSON
from .output import FINDINGS, UNREADABLE, USAGE, columns_of_tuples, failing, print_json, print_lines, print_table, stop

if TYPE_CHECKING:
    from optstate.memory.result import Estimate, RecipeEstimate
    from optstate.memory.solve import Change, LargestSize

DEFAULT = "adalomo"
"""The recipe where none is asked for and the source names none."""

MODEL_HELP = (
    "A published model (llama-7b, qwen2-7b, gpt2 ...), a config.json or a folder with one, a safetensors file or "
    "index, an optimizer's checkpoint, or package.module:factory."
)

FIGURES = (
    "weights_bytes",
    "buffer_bytes",
    "gradients_bytes",
    "gradients_most_bytes",
    "state_bytes",
    "activations_bytes",
    "logits_bytes",
    "scratch_bytes",
    "known_bytes",
    "peak_bytes",
    "reserved_bytes",
)


def estimate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", metavar="NAME", help="See `optstate recipes`. Repeatable.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="NAME,NAME", help="Several recipes beside each other.")
    ] = None,
    fused_backward: Annotated[
        bool | None,
        typer.Option(
            "--fused-backward/--no-fused-backward",
            help="Update inside the backward pass; without either, what the recipe is made for.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="Of weights and gradients: bf16, fp16, fp32.")] = "bf16",
    weights: Annotated[
        str,
        typer.Option(metavar="WAY", help="How weights are written: auto, plain, stochastic, kahan, split8, split16."),
    ] = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", metavar="N", help="Sequences per micro-batch.")] = 1,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", "-s", metavar="N", help="Tokens per sequence: 2048, or as many as go.")
    ] = None,
    grad_accum: Annotated[int, typer.Option("--grad-accum", metavar="N", help="Micro-batches per step.")] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations layer by layer.")
    ] = False,
    attention: Annotated[str, typer.Option("--attn", metavar="KIND", help="sdpa or eager.")] = "sdpa",
    clip: Annotated[str, typer.Option(metavar="KIND", help="norm: by the global norm of gradients; none.")] = "none",
    gpu: Annotated[
        str | None, typer.Option(metavar="SIZE|NAME", help="Does it fit? 24GiB, 24GB, RTX4090, A100-80 ...")
    ] = None,
    world_size: Annotated[int, typer.Option("--world-size", metavar="N", help="Devices; figures are of one.")] = 1,
    shard: Annotated[str, typer.Option(metavar="KIND", help="What they divide: none, zero1, zero2, fsdp.")] = "none",
    inputs: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="MODULE:FUNCTION",
            help="What a model of your own is called with: a function of batch size and length.",
        ),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Trace all layers instead of extrapolating.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="List the tensors that are alive at the peak.")] = False,
    solve: Annotated[
        str | None, typer.Option(metavar="batch|seq", help="The largest batch or sequence that fits --gpu.")
    ] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Draw it: a .png, .svg or .pdf.")] = None,
    as_json: JSON = False,
) -> None:
    """Estimate what training MODEL needs on a GPU: weights, gradients, state, activations, and the peak of all.

    Nothing is allocated or downloaded, and no GPU is needed: the model and the recipe's real optimizer run on tensors
    without values. With --gpu it says whether that fits and, if not, what would.

    Exit code 0: a recipe fits for sure, or there is no --gpu. 1: none does, or it is tight or unknown. 2: wrong use.
    3: MODEL cannot be read.

    Examples:

      optstate estimate llama-7b --recipe adalomo --gpu 24GiB

      optstate estimate ./my-model --compare lomo,adalomo,adamw8bit,adamw -b 4 -s 4096 --checkpointing

      optstate estimate mypackage.models:build --input mypackage.models:batch --recipe adamw --explain
    """
    assumed = ""
    with failing(), _answering(model):
        from optstate.memory.estimate import estimate as answer  # imports torch: not for --help
        from optstate.memory.solve import find_changes, find_largest

        if solve is not None or gpu is not None:
            _check(solve, gpu)
        names = _named(recipe, compare)
        if not names:
            names, assumed = _recipe_of(model)
        found = answer(
            model,
            recipe=names,
            fused_backward=fused_backward,
            dtype=dtype,
            weights=weights,
            batch_size=batch_size,
            seq_len=seq_len,
            grad_accum=grad_accum,
            checkpointing=checkpointing,
            attention=attention,
            clip=clip,
            world_size=world_size,
            shard=shard,
            example_inputs=inputs,
            gpu=gpu,
            exact=exact,
        )
        if assumed:
            found = replace(found, notes=(*found.notes, assumed))
        sizes = find_largest(found, solve) if solve is not None else None
        changes = find_changes(found) if sizes is None and gpu is not None and not found.fits else None
    if plot is not None:
        _plot(found, plot)
    with failing():
        if as_json:
            print_json(_tree(found, sizes, changes, explain))
        elif sys.stdout.isatty():
            _print(found, sizes, changes, explain)
        else:
            _print_columns(found, sizes, changes, explain)
    if not (found.fits if sizes is None else any(one.value for one in sizes)):
        raise typer.Exit(FINDINGS)


@contextmanager
def _answering(source: str) -> Iterator[None]:
    """Turn a question that cannot be answered into one line on stderr and an exit code; keep libraries from talking."""
    from optstate.memory.errors import QuestionError

    debug = os.environ.get("OPTSTATE_DEBUG") == "1"
    before = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            if not debug:
                logging.disable(logging.WARNING)
                warnings.simplefilter("ignore")
            yield
    except QuestionError as error:
        if debug:
            raise
        stop(str(error), USAGE)
    except ValueError as error:
        from optstate.memory.sources import SourceError

        if debug or not isinstance(error, SourceError):
            raise
        text, name = str(error), shown(source)
        stop(text if text.startswith(name) else f"{name}: {text}", USAGE if error.usage else UNREADABLE)
    finally:
        logging.disable(before)


def _check(solve: str | None, gpu: str | None) -> None:
    """Refuse --solve and --gpu at once that would be refused seconds later."""
    from optstate.memory.errors import QuestionError
    from optstate.memory.solve import QUANTITIES
    from optstate.memory.verdict import find_gpu as gpu_of

    if solve is not None and solve not in QUANTITIES:
        raise QuestionError(f"--solve {solve!r}: give {' or '.join(QUANTITIES)}")
    if gpu is None:
        raise QuestionError("--solve needs --gpu: the memory to fit")
    gpu_of(gpu)


def _named(named: Sequence[str] | None, compared: str | None) -> list[str]:
    """Return the recipes asked for."""
    names = [name for text in (*(named or ()), compared or "") for name in text.split(",")]
    chosen = [name.strip() for name in names if name.strip()]
    if not chosen and (named or compared is not None):
        from optstate.memory.errors import QuestionError

        raise QuestionError("--recipe and --compare need names: see `optstate recipes`")
    return chosen


def _recipe_of(source: str) -> tuple[list[str], str]:
    """Find the recipe whose state a checkpoint holds, else take the default; return what is to be said of that, too."""
    from optstate.memory.sources import SourceError, recipe_of

    if not os.path.lexists(source) or os.path.lexists(os.path.join(source, "config.json")):
        return [DEFAULT], ""
    try:
        name = recipe_of(source)
    except SourceError:  # no optimizer's checkpoint
        return [DEFAULT], ""
    if name:
        return [name], ""
    return [DEFAULT], f"the file names no recipe of optstate: {DEFAULT} is assumed, so give its own with --recipe"


def _plot(found: Estimate, path: str) -> None:
    try:
        found.plot(path)
    except ModuleNotFoundError:
        stop("--plot needs matplotlib: pip install matplotlib", USAGE)
    except (OSError, ValueError) as error:  # a folder that is not there, an ending that is no kind of picture
        stop(f"--plot {shown(path)}: {error}", USAGE)


# --- JSON ---------------------------------------------------------------------------------------------------------


def _tree(
    found: Estimate, sizes: Sequence[LargestSize] | None, changes: Sequence[Change] | None, explain: bool
) -> dict[str, Any]:
    tree = found.to_json()
    if not explain:
        for one in tree["recipes"]:
            del one["alive"]
    if sizes is not None:
        tree["solved"] = [
            {
                "recipe": one.recipe,
                "quantity": one.quantity,
                "value": one.value,
                "peak_bytes": one.estimate.peak_bytes if one.estimate is not None else None,
                "why": one.why or None,
            }
            for one in sizes
        ]
    if changes is not None:
        tree["would_fit"] = [
            {
                "kind": one.kind,
                "what": one.what,
                "options": one.options,
                "recipe": one.estimate.recipe,
                "peak_bytes": one.estimate.peak_bytes,
                "verdict": one.estimate.verdict,
            }
            for one in changes
        ]
    return tree


# --- text ---------------------------------------------------------------------------------------------------------


def _print(
    found: Estimate, sizes: Sequence[LargestSize] | None, changes: Sequence[Change] | None, explain: bool
) -> None:
    """For a person."""
    from optstate.memory.result import format_gib, wrap

    typer.echo(str(found))
    if explain:
        for one in found.recipes:
            typer.echo(f"\nalive at the peak of {one.recipe}")
            columns = columns_of_tuples("GIB", "KIND", "SHAPE", "DTYPE", "WHAT")
            print_table(columns, [(format_gib(nbytes), *row) for nbytes, *row in _alive(one)])
    for size in sizes or ():
        typer.echo(wrap(_size_words(size)))
    for change in changes or ():
        peak = format_gib(change.estimate.peak_bytes)
        typer.echo(wrap(f"would fit: {change.what}, {peak} GiB at the peak (traced): {change.options}"))
    if changes is not None and not changes:
        typer.echo(wrap(f"would fit: {_nothing_fits(found)}"))


def _print_columns(
    found: Estimate, sizes: Sequence[LargestSize] | None, changes: Sequence[Change] | None, explain: bool
) -> None:
    """For a program: the same columns always. Sizes are bytes."""
    from optstate.memory.result import list_facts

    lines = [*list_facts(found), *(("note", note) for note in found.notes)]
    lines += [("note", f"{one.recipe}: {note}") for one in found.recipes for note in one.notes]
    lines += [("trace", f"{one.recipe}: {one.how}") for one in found.recipes if one.how]
    lines += [("not included", what) for what in found.not_included]
    lines += [("version", f"{name} {version}") for name, version in found.versions.items()]
    lines += [("solved", _size_words(size)) for size in sizes or ()]
    lines += [("would fit", f"{change.what}: {change.options}") for change in changes or ()]
    if changes is not None and not changes:
        lines.append(("would fit", _nothing_fits(found)))
    print_lines(lines)
    typer.echo()
    columns = columns_of_tuples("RECIPE", "WHAT", "VALUE", "GIB", "BASIS")
    print_table(columns, [row for one in found.recipes for row in _rows(one)])
    if explain:
        typer.echo()
        columns = columns_of_tuples("RECIPE", "BYTES", "KIND", "SHAPE", "DTYPE", "TENSOR")
        print_table(columns, [(one.recipe, *row) for one in found.recipes for row in _alive(one)])


def _rows(one: RecipeEstimate) -> Iterator[tuple[str, ...]]:
    """Every figure of a recipe, each in a line: what is not known is "-"."""
    figures: list[tuple[str, str, Any]] = [(name, name, getattr(one, name)) for name in FIGURES]
    figures += [(f"at_peak.{kind}", "at_peak", nbytes) for kind, nbytes in one.at_peak.items()]
    least, most = one.device_bytes or (None, None)
    figures += [("device_bytes.least", "device_bytes", least), ("device_bytes.most", "device_bytes", most)]
    words = [
        ("fused_backward", str(one.fused_backward).lower()),
        ("peak_phase", one.peak_phase),
        ("verdict", one.verdict),
    ]
    for what, key, nbytes in figures:
        size = "-" if nbytes is None else f"{nbytes / 2**30:.6f}"
        yield one.recipe, what, "-" if nbytes is None else str(nbytes), size, one.basis.get(key, "-")
    for what, word in words:
        yield one.recipe, what, word or "-", "-", one.basis.get(what, "-")


def _alive(one: RecipeEstimate) -> list[tuple[Any, ...]]:
    return [(item.nbytes, item.kind, "x".join(map(str, item.shape)), item.dtype, item.what) for item in one.alive]


def _nothing_fits(found: Estimate) -> str:
    from optstate.memory.verdict import UNKNOWN

    if any(one.verdict == UNKNOWN for one in found.recipes):
        return "unknown, as long as activations are: the trace says why"
    return "nothing that was tried; divide it among devices, or take a smaller model"


def _size_words(size: LargestSize) -> str:
    from optstate.memory.result import format_gib

    what = {"batch": "batch", "seq": "sequence"}[size.quantity]
    why = f"; {size.why}" if size.why else ""
    if size.estimate is None:
        return f"{size.recipe}: no {what} fits for sure, not even of 1{why}"
    peak = format_gib(size.estimate.peak_bytes)
    return f"{size.recipe}: the largest {what} that fits is {size.value}, {peak} GiB at the peak (traced){why}"
