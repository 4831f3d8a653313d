"""What commands ask about a checkpoint that does not say everything itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.operations.summarize import STREAM

__all__ = ["KEY", "NAMES", "OPTIMIZER", "not_a_stream"]


def not_a_stream(*paths: Path) -> None:
    """Refuse `-`, which stands for a pipe elsewhere: tensors are read where they lie, and written in any order."""
    if STREAM in map(str, paths):
        reason = "a checkpoint is read from a file and written into a file, not through a pipe"
        hint = "give the name of a file; `optstate inspect -` shows the header of what comes through a pipe"
        raise CheckpointError(STREAM, reason, hint, refused=True)


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
