"""The options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["JSON", "KEY", "NAMES", "OPTIMIZER"]

JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
KEY = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Where in the file the state is, if there is more: optimizer, optimizer_states.0"),
]
NAMES = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|MODULE:FACTORY",
        help="Names of parameters that the file only numbers: a list, one a line with an empty line between groups, "
        "or what builds the model.",
    ),
]
OPTIMIZER = Annotated[
    str | None, typer.Option(metavar="NAME", help="Whose state it is, where the file does not tell: AdamW, Lion ...")
]
