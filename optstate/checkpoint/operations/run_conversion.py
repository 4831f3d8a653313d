"""Carry out a conversion into a file of optstate's own, one parameter at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from optstate.checkpoint.document.document import KEY, Document, Parameter, version_of_optstate
from optstate.checkpoint.document.document_json import to_json
from optstate.checkpoint.files.safetensors_set import create_set
from optstate.checkpoint.files.safetensors_writer import header_size
from optstate.checkpoint.files.tensor_bytes import bytes_of
from optstate.checkpoint.operations.conversion_report import Report, report_of
from optstate.checkpoint.operations.convert_values import Recoder
from optstate.checkpoint.operations.plan_conversion import Conversion
from optstate.checkpoint.operations.read_values import Values

__all__ = ["Track", "carry_out", "converted_document", "eps_of", "write_converted"]

Track = Callable[[Iterable[Parameter]], Iterable[Parameter]]
"""Passes the parameters on, and may show how far the work has come."""

USUAL_EPS = 1e-8

MOST_HISTORY, LEFT_OUT = 64, "left_out"
"""Conversions that a document tells of, and the key under which it says how many others there were."""


def write_converted(
    conversion: Conversion,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    track: Track = iter,
    max_shard_size: int | None = None,
) -> Report:
    """Write what a checkpoint becomes as one safetensors file, and report what was lost.

    Memory: the statistics of one parameter in fp32, and their new tensors. The file is replaced at once or not at all.
    More than `max_shard_size` bytes become several files with an index. A new file has the permissions of the source.

    Raises:
        CheckpointError: if the target exists (refused unless `overwrite`) or cannot be written.
        OSError, UnreadableStatisticError: if the source cannot be read.
    """
    entries = conversion.entries
    widest = converted_document(conversion, _widest(report_of(conversion)))
    room = header_size({KEY: to_json(widest)}, entries)
    kept, limit = conversion.checkpoint.permissions, max_shard_size
    with create_set(path, entries, room=room, limit=limit, overwrite=overwrite, permissions=kept) as file:
        report = carry_out(conversion, lambda key, tensor: file.put(key, bytes_of(tensor)), track)
        file.finish({KEY: to_json(converted_document(conversion, report))})
    return report


def carry_out(conversion: Conversion, put: Callable[[str, Tensor], Any], track: Track = iter) -> Report:
    """Make every new tensor and hand it to `put(key, tensor)`, parameter by parameter."""
    recoder = Recoder(Values(conversion.checkpoint))
    document = conversion.checkpoint.document
    by_name = {param.name: param for param in document.parameters}
    params = [by_name[name] for name in conversion.transfers]
    followers = [*params[1:], None][: len(params)]  # a file may hold no parameters at all
    for param, following in zip(track(params), followers, strict=True):
        if following is not None:
            recoder.values.announce(following)
        recoder.carry(conversion.transfers[param.name], eps_of(document.groups[param.group].hyper), put)
    return report_of(conversion, recoder.figures, recoder.total)


def converted_document(conversion: Conversion, report: Report) -> Document:
    """The new document with this conversion in its history, unless nothing but the container changes."""
    source = conversion.checkpoint
    document, was = conversion.document, source.document
    if conversion.changes_nothing and (document.recipe, document.source) == (was.recipe, was.source):
        return document
    entry = {
        "tool": "optstate",
        "version": version_of_optstate(),
        "from": {"kind": source.kind, "recipe": was.recipe, "source": was.source},
        **report.to_history(),
    }
    return replace(document, history=_bounded((*document.history, entry)))


def _bounded(history: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """The first and the last entries of a long history, and how many there were between them."""
    if len(history) <= MOST_HISTORY:
        return history
    first, *others = history
    left_out = 0
    if others[0].keys() == {LEFT_OUT} and isinstance(others[0][LEFT_OUT], int):
        left_out = others.pop(0)[LEFT_OUT]
    last = others[len(others) - (MOST_HISTORY - 2) :]
    return (first, {LEFT_OUT: left_out + len(others) - len(last)}, *last)


def _widest(report: Report) -> Report:
    """The report with the figures that take most room in JSON."""
    most: dict[str, Any] = dict.fromkeys(
        ("relative_error", "update_relative_error", "update_cosine", "inflation"), -math.inf
    )
    rows = tuple(replace(row, **most, zeros=2**63) for row in report.rows)
    return replace(report, rows=rows, update_relative_error=-math.inf, update_cosine=-math.inf)


def eps_of(hyper: dict[str, Any]) -> float:
    """What the recipe adds to the root of the second moment; that of Adam where it does no such thing."""
    eps = hyper.get("eps")
    try:
        return float(eps) if isinstance(eps, float | int) and not isinstance(eps, bool) else USUAL_EPS
    except OverflowError:  # an integer that is no eps of anything
        return USUAL_EPS
