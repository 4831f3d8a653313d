"""`optstate convert`: state in other stores, for another recipe, or in another library's file."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optstate.checkpoint.errors import CheckpointError
from optstate.text import escaped

from .opening import KEY, NAMES, OPTIMIZER, not_a_stream
from .output import JSON, bytes_text, failing, print_json, print_lines, print_table, progress

if TYPE_CHECKING:
    from optstate.checkpoint.document.checkpoint import Checkpoint
    from optstate.checkpoint.operations.conversion_report import Report, Row
    from optstate.checkpoint.operations.plan_conversion import Conversion

SCHEMA = "optstate.convert/1"
MOST_CHANGES = 3
"""Clauses about the rule in one message."""


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint of any kind that `inspect` reads.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The file to write.")],
    to: Annotated[
        str | None, typer.Option(metavar="STORE", help="Put every statistic into this store: fp32, bf16, block8 ...")
    ] = None,
    slot: Annotated[
        list[str] | None,
        typer.Option(metavar="SLOT=STORE", help='Put one statistic into a store, or "drop" it. Repeatable.'),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Make it state of this recipe; see `optstate recipes`.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A hyper-parameter of the new recipe. Repeatable."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option("--format", metavar="LAYOUT", help="Whose file to write: optstate, torch, bitsandbytes ..."),
    ] = None,
    names: NAMES = None,
    key: KEY = None,
    optimizer: OPTIMIZER = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Write several files with an index above this size: 5GB.")
    ] = None,
    allow_lossy: Annotated[bool, typer.Option("--allow-lossy", help="Accept that numbers change.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")] = False,
    as_json: JSON = False,
) -> None:
    """Convert a checkpoint: other stores, another recipe, another library's file.

    What loses nothing is done at once. What changes numbers needs
    --allow-lossy, and tells by how much: of every statistic, and of the update
    that follows from it.

    Examples:

      optstate convert optimizer.pt opt.safetensors --names names.txt

      optstate convert opt.safetensors optimizer.pt --format torch

      optstate convert a.safetensors b.safetensors --slot exp_avg_sq=factored

      optstate convert a.safetensors b.safetensors --recipe lion --set lr=1e-4
    """
    by_slot, settings = _pairs("--slot", slot), _pairs("--set", setting)
    limit = _size(max_shard_size) if max_shard_size is not None else None
    _check_words(to, by_slot, recipe, settings, layout)
    with failing():
        not_a_stream(source, target)
        from optstate.checkpoint.document.canonical_names import with_canonical_names
        from optstate.checkpoint.open_checkpoint import open_checkpoint

        opened = open_checkpoint(source, key=key, names=names, optimizer=optimizer)
        checkpoint = with_canonical_names(opened)
        conversion = _planned(checkpoint, to, by_slot, recipe, settings)
        layout = _layout(conversion, layout, target)
        if limit is not None and layout != "optstate":
            raise typer.BadParameter(f"--max-shard-size is for files of optstate's own: a file of {layout} is one")
        report, notes = _carried_out(conversion, target, layout, limit, allow_lossy, dry_run, force)
        if as_json:
            print_json(_tree(conversion, report, notes, target, layout, dry_run))
        else:
            _print(report, notes, target, layout, dry_run)


def _check_words(
    to: str | None, by_slot: dict[str, str], recipe: str | None, settings: dict[str, str], layout: str | None
) -> None:
    """Refuse as wrong use what no checkpoint makes right: options that exclude each other, words that name nothing."""
    if recipe is not None and (to is not None or by_slot):
        raise typer.BadParameter("--recipe decides the stores: leave out --to and --slot")
    if settings and recipe is None:
        raise typer.BadParameter("--set is about the new recipe: give --recipe")
    if layout is not None:
        from optstate.checkpoint.operations.export import LAYOUTS

        if layout not in LAYOUTS:
            raise typer.BadParameter(f"--format {layout!r}: {_nearest(layout, LAYOUTS)}")
    try:
        if recipe is not None:
            from optstate.checkpoint.operations.plan_recipe import settings_of

            settings_of(recipe, settings)
        if to is not None or by_slot:
            from optstate.checkpoint.operations.plan_conversion import store_of
            from optstate.stores.registry import from_words

            for words in by_slot.values():
                store_of(words)
            if to is not None:
                from_words(to)
    except (ValueError, TypeError, LookupError) as error:
        raise typer.BadParameter(str(error)) from None


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"one of {', '.join(known)}"


def _pairs(option: str, given: Sequence[str] | None) -> dict[str, str]:
    pairs = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise typer.BadParameter(f"{option} {text!r}: give NAME=VALUE")
        pairs[name] = value
    return pairs


def _size(text: str) -> int:
    """Bytes of "5GB" (powers of 1000) or "5GiB" (powers of 1024)."""
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1, "": 1}
    number = text.rstrip("kKmMgGiIbB ")
    try:
        size = int(float(number) * units[text[len(number) :].strip().lower()])
    except (ValueError, KeyError, OverflowError):
        raise typer.BadParameter(f"--max-shard-size {text!r}: give a number of bytes, such as 5GB") from None
    if size < 1:
        raise typer.BadParameter(f"--max-shard-size {text!r}: at least one byte")
    return size


def _planned(
    checkpoint: Checkpoint, to: str | None, by_slot: dict[str, str], recipe: str | None, settings: dict[str, str]
) -> Conversion:
    from optstate.checkpoint.operations.plan_conversion import in_stores, unchanged
    from optstate.checkpoint.operations.plan_recipe import as_recipe

    try:
        if recipe is not None and not checkpoint.document.parameters:
            raise ValueError("it has no parameters, so there is nothing to make state of another recipe of")
        if recipe is not None:
            conversion = as_recipe(checkpoint, recipe, settings)
        elif to is not None or by_slot:
            conversion = in_stores(checkpoint, to, by_slot)
        else:
            conversion = unchanged(checkpoint)
        conversion.check()
    except (ValueError, TypeError, LookupError) as error:
        raise CheckpointError(checkpoint.path, f"cannot be converted: {error}", refused=True) from None
    return conversion


def _layout(conversion: Conversion, asked: str | None, target: Path) -> str:
    """Whose file to write: as asked, else by the target's suffix."""
    from optstate.checkpoint.operations.export import NATIVE, layout_for

    if asked is None and target.suffix not in (".pt", ".pth", ".bin"):
        return NATIVE
    return layout_for(conversion, asked)


def _carried_out(
    conversion: Conversion,
    target: Path,
    layout: str,
    limit: int | None,
    allow_lossy: bool,
    dry_run: bool,
    force: bool,
) -> tuple[Report, tuple[str, ...]]:
    from optstate.checkpoint.operations.conversion_report import report_of
    from optstate.checkpoint.operations.export import check_target, export, notes_of

    check_target(conversion, target, layout, overwrite=force or dry_run)
    planned, notes = report_of(conversion), notes_of(conversion, layout)
    if dry_run:
        return planned, notes
    if not conversion.lossless and not allow_lossy:
        rows = ", ".join(f"{row.slot} {row.was} -> {row.now}" for row in planned.rows if not row.lossless)
        what = [f"the rule would change: {'; '.join(planned.changes[:MOST_CHANGES])}"] if planned.changes else []
        reason = f"not converted: {', and '.join([*what, *([f'numbers would change in {rows}'] if rows else [])])}"
        raise CheckpointError(conversion.checkpoint.path, reason, "--allow-lossy accepts that", refused=True)

    def track(parameters: Any) -> Any:
        return progress(parameters, len(conversion.transfers), "parameters")

    report = export(conversion, target, layout, overwrite=force, track=track, max_shard_size=limit)
    return report, notes


# --- what is said of it -------------------------------------------------------------------------------------------


def _tree(
    conversion: Conversion, report: Report, notes: Sequence[str], target: Path, layout: str, dry_run: bool
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "path": conversion.checkpoint.path,
        "target": str(target),
        "format": layout,
        "recipe": conversion.document.recipe or None,
        "written": not dry_run,
        "lossless": report.lossless,
        "changes": list(report.changes),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "update_relative_error": _finite(report.update_relative_error),
        "update_cosine": report.update_cosine,
        "slots": [_row_tree(row) for row in report.rows],
        "notes": list(notes),
    }


def _row_tree(row: Row) -> dict[str, Any]:
    tree = asdict(replace(row))
    tree["from"], tree["to"] = tree.pop("was"), tree.pop("now")
    for name in ("relative_error", "update_relative_error", "inflation"):
        tree[name] = _finite(tree[name])
    return tree


def _finite(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else str(value)


def _print(report: Report, notes: Sequence[str], target: Path, layout: str, dry_run: bool) -> None:
    if sys.stdout.isatty():
        _print_for_people(report)
    else:
        print_table(COLUMNS, [_cells(row) for row in report.rows])
        typer.echo()
    ratio = f" ({report.bytes_after / report.bytes_before:.4f})" if report.bytes_before else ""
    facts = [
        ("format", layout),
        ("state", f"{bytes_text(report.bytes_before)} -> {bytes_text(report.bytes_after)}{ratio}"),
        ("numbers", "unchanged" if all(row.lossless for row in report.rows) else "changed"),
        *(("rule", f"changes: {change}") for change in report.changes),
    ]
    if not report.lossless and report.update_cosine is not None:
        error = _number(report.update_relative_error)
        facts.append(("update", f"relative error {error}, cosine {report.update_cosine:.6f}"))
    facts += [("note", note) for note in notes]
    facts.append(("nothing written", str(target)) if dry_run else ("written", str(target)))
    print_lines(facts)


COLUMNS = (
    "SLOT",
    "FROM",
    "TO",
    "PARAMETERS",
    "BYTES",
    "NEW BYTES",
    "ERROR",
    "UPDATE ERROR",
    "COSINE",
    "INFLATION",
    "ZEROS",
)
"""Of the table in a pipe, always all of them; on a terminal only those that say something."""


def _print_for_people(report: Report) -> None:
    """A table that fits 80 columns, and below it what is rare."""
    columns, lossy = ["SLOT", "PARAMS", "FROM", "TO", "BYTES"], any(row.relative_error for row in report.rows)
    if lossy:
        columns += ["ERROR", "UPDATE", "COSINE"]
    rows = []
    for row in report.rows:
        size = bytes_text(row.bytes_after)
        cosine = "-" if row.update_cosine is None else f"{row.update_cosine:.4f}"
        errors = [_short(row.relative_error), _short(row.update_relative_error), cosine] if lossy else []
        rows.append(
            (
                row.slot,
                str(row.parameters),
                _plain(row.was),
                "=" if row.lossless and row.now == row.was else _plain(row.now),
                size,
                *errors,
            )
        )
    print_table(columns, rows)
    for row in report.rows:
        if row.inflation is not None and row.inflation > 1:
            typer.echo(escaped(f"{row.slot}: the step of one element grows {row.inflation:.3g} times, others by less"))
        if row.zeros:
            typer.echo(escaped(f"{row.slot}: {row.zeros} elements become zero"))


def _plain(store: str) -> str:
    """A store in fewer words where nothing is lost by it."""
    return store.removesuffix("()").replace("Full(dtype='bfloat16')", "bf16").replace("Full(dtype='float16')", "fp16")


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _cells(row: Row) -> tuple[str, ...]:
    cosine = "-" if row.update_cosine is None else f"{row.update_cosine:.6f}"
    return (
        row.slot,
        row.was,
        row.now,
        str(row.parameters),
        str(row.bytes_before),
        str(row.bytes_after),
        _number(row.relative_error),
        _number(row.update_relative_error),
        cosine,
        _number(row.inflation),
        "-" if row.zeros is None else str(row.zeros),
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
