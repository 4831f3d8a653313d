"""`optstate convert`: state in other stores, for another recipe, or in another library's file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optstate import checkpoint
from optstate.text import escaped

from .options import JSON, KEY, NAMES, OPTIMIZER
from .output import Columns, bytes_text, failing, finite, print_json, print_lines, print_table, progress

if TYPE_CHECKING:
    from optstate.checkpoint.operations.conversion_report import ConversionReport, ConversionRow
    from optstate.checkpoint.operations.convert import Converted

SCHEMA = "optstate.convert/1"


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
    with failing():
        found = checkpoint.convert(
            source,
            target,
            to=to,
            slots=by_slot,
            recipe=recipe,
            settings=settings,
            format=layout,
            key=key,
            names=names,
            optimizer=optimizer,
            max_shard_size=limit,
            allow_lossy=allow_lossy,
            dry_run=dry_run,
            overwrite=force,
            track=partial(progress, what="parameters"),
        )
        if as_json:
            print_json(_tree(found))
        else:
            _print(found)


def _pairs(option: str, given: Sequence[str] | None) -> dict[str, str]:
    """Return what a repeated NAME=VALUE option says."""
    pairs = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise typer.BadParameter(f"{option} {text!r}: give NAME=VALUE")
        pairs[name] = value
    return pairs


def _size(text: str) -> int:
    """Return the bytes of "5GB" (powers of 1000) or "5GiB" (powers of 1024)."""
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1, "": 1}
    number = text.rstrip("kKmMgGiIbB ")
    try:
        size = int(float(number) * units[text[len(number) :].strip().lower()])
    except (ValueError, KeyError, OverflowError):
        raise typer.BadParameter(f"--max-shard-size {text!r}: give a number of bytes, such as 5GB") from None
    if size < 1:
        raise typer.BadParameter(f"--max-shard-size {text!r}: at least one byte")
    return size


# --- what is said of it -------------------------------------------------------------------------------------------


def _tree(found: Converted) -> dict[str, Any]:
    report = found.report
    return {
        "schema": SCHEMA,
        "path": found.source,
        "target": found.target,
        "format": found.format,
        "recipe": found.recipe or None,
        "written": found.written,
        "lossless": report.lossless,
        "changes": list(report.changes),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "update_relative_error": finite(report.update_relative_error),
        "update_cosine": report.update_cosine,
        "slots": [_row_tree(row) for row in report.rows],
        "notes": list(found.notes),
    }


def _row_tree(row: ConversionRow) -> dict[str, Any]:
    tree = asdict(row)
    tree["from"], tree["to"] = tree.pop("was"), tree.pop("now")
    return tree | {name: finite(tree[name]) for name in ("relative_error", "update_relative_error", "inflation")}


def _print(found: Converted) -> None:
    report = found.report
    if sys.stdout.isatty():
        _print_for_people(report)
    else:
        print_table(COLUMNS, report.rows)
        typer.echo()
    ratio = f" ({report.bytes_after / report.bytes_before:.4f})" if report.bytes_before else ""
    facts = [
        ("format", found.format),
        ("state", f"{bytes_text(report.bytes_before)} -> {bytes_text(report.bytes_after)}{ratio}"),
        ("numbers", "unchanged" if all(row.lossless for row in report.rows) else "changed"),
        *(("rule", f"changes: {change}") for change in report.changes),
    ]
    if not report.lossless and report.update_cosine is not None:
        facts.append(
            ("update", f"relative error {report.update_relative_error:.4g}, cosine {report.update_cosine:.6f}")
        )
    facts += [("note", note) for note in found.notes]
    facts.append(("written" if found.written else "nothing written", found.target))
    print_lines(facts)


COLUMNS: Columns = {
    "SLOT": attrgetter("slot"),
    "FROM": attrgetter("was"),
    "TO": attrgetter("now"),
    "PARAMETERS": attrgetter("parameters"),
    "BYTES": attrgetter("bytes_before"),
    "NEW BYTES": attrgetter("bytes_after"),
    "ERROR": attrgetter("relative_error"),
    "UPDATE ERROR": attrgetter("update_relative_error"),
    "COSINE": lambda row: None if row.update_cosine is None else f"{row.update_cosine:.6f}",
    "INFLATION": attrgetter("inflation"),
    "ZEROS": attrgetter("zeros"),
}
"""Of the table in a pipe, always all of them; on a terminal only those that say something."""

SHORT_COLUMNS: Columns = {
    "SLOT": attrgetter("slot"),
    "PARAMS": attrgetter("parameters"),
    "FROM": lambda row: _plain(row.was),
    "TO": lambda row: "=" if row.lossless and row.now == row.was else _plain(row.now),
    "BYTES": lambda row: bytes_text(row.bytes_after),
}
ERROR_COLUMNS: Columns = {
    "ERROR": lambda row: _short(row.relative_error),
    "UPDATE": lambda row: _short(row.update_relative_error),
    "COSINE": lambda row: None if row.update_cosine is None else f"{row.update_cosine:.4f}",
}


def _print_for_people(report: ConversionReport) -> None:
    """Print a table that fits 80 columns, and below it what is rare."""
    lossy = any(row.relative_error for row in report.rows)
    print_table({**SHORT_COLUMNS, **(ERROR_COLUMNS if lossy else {})}, report.rows)
    for row in report.rows:
        if row.inflation is not None and row.inflation > 1:
            typer.echo(escaped(f"{row.slot}: the step of one element grows {row.inflation:.3g} times, others by less"))
        if row.zeros:
            typer.echo(escaped(f"{row.slot}: {row.zeros} elements become zero"))


def _plain(store: str) -> str:
    """Return a store in fewer words where nothing is lost by it."""
    return store.removesuffix("()").replace("Full(dtype='bfloat16')", "bf16").replace("Full(dtype='float16')", "fp16")


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.2g}"
