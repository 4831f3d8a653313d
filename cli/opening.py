"""What commands ask about a checkpoint that does not say everything itself."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["KEY", "NAMES", "OPTIMIZER"]

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
