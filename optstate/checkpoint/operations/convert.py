"""Convert a checkpoint into a new file: open, plan, refuse what was not agreed to, write, report."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from optstate.checkpoint.document.canonical_names import with_canonical_names
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.errors import CheckpointError, UsageError
from optstate.checkpoint.open_checkpoint import open_checkpoint, refuse_streams
from optstate.checkpoint.operations.conversion_report import ConversionReport, make_report
from optstate.checkpoint.operations.plan_conversion import Conversion, parse_slot_target, plan_copy, plan_stores
from optstate.checkpoint.operations.run_conversion import (
    NATIVE,
    Track,
    check_target,
    choose_layout,
    export,
    list_layouts,
    list_notes,
)
from optstate.stores.registry import parse_store

__all__ = ["Converted", "convert"]

MOST_CHANGES = 3
"""Clauses about the rule in one message."""


@dataclass(frozen=True)
class Converted:
    """What `convert` did, or would do.

    source, target: paths. format: whose file the target is. recipe: of the new state, "" where it has no name.
    report: the conversion in numbers. notes: what a person should know of both files. written: False for a dry run.
    """

    source: str
    target: str
    format: str
    recipe: str
    report: ConversionReport
    notes: tuple[str, ...]
    written: bool


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str | None = None,
    slots: Mapping[str, str] = {},
    recipe: str | None = None,
    settings: Mapping[str, str] = {},
    format: str | None = None,
    key: str | None = None,
    names: str | None = None,
    optimizer: str | None = None,
    max_shard_size: int | None = None,
    allow_lossy: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    track: Track = iter,
) -> Converted:
    """Write what a checkpoint becomes in other stores, for another recipe, or as another library's file.

    Memory: the statistics of one parameter in fp32, and their new tensors. The target is replaced at once or not at
    all.

    Args:
        source: a file or folder of any kind that `open` takes.
        target: the file to write.
        to: the words of a store for every statistic, as "bf16" or "block8".
        slots: words of a store by statistic, or "drop" to leave it out.
        recipe: the recipe whose state it becomes.
        settings: hyper-parameters of that recipe, as Python writes them.
        format: whose file to write: "optstate", "torch", "bitsandbytes" ...; by default that which the target's suffix
            says.
        key: where in the file the state is, as for `open`.
        names: names for numbered parameters, as for `open`.
        optimizer: whose state it is, as for `open`.
        max_shard_size: bytes above which a file of optstate's own becomes several with an index.
        allow_lossy: accept that numbers, or the rule, change.
        dry_run: plan and report, and write nothing.
        overwrite: replace the target if it exists.
        track: what the parameters go through while they are written, such as a progress bar.

    Raises:
        UsageError: for options that exclude each other, and words that name nothing.
        CheckpointError: if the source cannot be read or the target cannot be written; refused without consent, where
            the target exists, and for what cannot be converted.
    """
    target = Path(target)
    _check_words(to, slots, recipe, settings, format)
    refuse_streams(source, target)
    checkpoint = with_canonical_names(open_checkpoint(source, key=key, names=names, optimizer=optimizer))
    conversion = plan(checkpoint, to, slots, recipe, settings)
    layout = choose_layout(conversion, target, format)
    if max_shard_size is not None and layout != NATIVE:
        raise UsageError(f"--max-shard-size is for files of optstate's own: a file of {layout} is one")
    check_target(conversion, target, layout, overwrite=overwrite or dry_run)
    report, notes = make_report(conversion), list_notes(conversion, layout)
    if not dry_run:
        if not allow_lossy:
            _refuse_losses(conversion, report)
        report = export(conversion, target, layout, overwrite=overwrite, track=track, max_shard_size=max_shard_size)
    path, made = conversion.checkpoint.path, conversion.document.recipe
    return Converted(path, str(target), layout, made, report, notes, not dry_run)


def plan(
    checkpoint: Checkpoint,
    to: str | None = None,
    slots: Mapping[str, str] = {},
    recipe: str | None = None,
    settings: Mapping[str, str] = {},
) -> Conversion:
    """Plan a conversion, see `convert`; raises CheckpointError (refused) for what cannot be converted."""
    try:
        if recipe is not None:
            if not checkpoint.document.parameters:
                raise ValueError("it has no parameters, so there is nothing to make state of another recipe of")
            from optstate.checkpoint.operations.plan_recipe import plan_recipe  # imports the optimizer

            conversion = plan_recipe(checkpoint, recipe, settings)
        elif to is not None or slots:
            conversion = plan_stores(checkpoint, to, slots)
        else:
            conversion = plan_copy(checkpoint)
        conversion.check()
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(checkpoint.path, f"cannot be converted: {error}", refused=True) from None
    return conversion


def _check_words(
    to: str | None, slots: Mapping[str, str], recipe: str | None, settings: Mapping[str, str], format: str | None
) -> None:
    """Raise UsageError for what no checkpoint makes right."""
    if recipe is not None and (to is not None or slots):
        raise UsageError("--recipe decides the stores: leave out --to and --slot")
    if settings and recipe is None:
        raise UsageError("--set is about the new recipe: give --recipe")
    if format is not None and format not in list_layouts():
        raise UsageError(f"--format {format!r}: {_nearest(format, list_layouts())}")
    try:
        if recipe is not None:
            from optstate.checkpoint.operations.plan_recipe import parse_settings

            parse_settings(recipe, settings)
        for words in slots.values():
            parse_slot_target(words)
        if to is not None:
            parse_store(to)
    except (ValueError, TypeError, LookupError) as error:
        raise UsageError(str(error)) from None


def _nearest(word: str, known: Sequence[str]) -> str:
    """Say which known word is meant, or all of them."""
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"one of {', '.join(known)}"


def _refuse_losses(conversion: Conversion, planned: ConversionReport) -> None:
    """Raise CheckpointError (refused) if numbers or the rule would change."""
    if conversion.lossless:
        return
    rows = ", ".join(f"{row.slot} {row.was} -> {row.now}" for row in planned.rows if not row.lossless)
    what = [f"the rule would change: {'; '.join(planned.changes[:MOST_CHANGES])}"] if planned.changes else []
    reason = f"not converted: {', and '.join([*what, *([f'numbers would change in {rows}'] if rows else [])])}"
    raise CheckpointError(conversion.checkpoint.path, reason, "--allow-lossy accepts that", refused=True)
