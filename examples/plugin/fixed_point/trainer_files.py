"""Checkpoints of a trainer that keeps Adam's averages as `m` and `v`: `optstate convert opt.pt opt.safetensors`."""

from __future__ import annotations

from typing import Any

from optstate.formats import (
    FIRST,
    NEEDED,
    SECOND,
    Checkpoint,
    Format,
    Kept,
    Layout,
    OtherRule,
    StateDict,
    Tree,
    TreeWriter,
    by_key,
    read_tables,
    write_tables,
)

NAME = "tinytrainer"
HYPERS = {"lr": NEEDED, "betas": NEEDED, "eps": NEEDED, "weight_decay": NEEDED, "tiny_version": 1}
RULE = OtherRule(NAME, "TinyAdam", "adamw", needs=frozenset({"tiny_version"}), numbers=frozenset(HYPERS))
SLOTS = {"exp_avg": Kept(FIRST, "m"), "exp_avg_sq": Kept(SECOND, "v")}
LAYOUT = Layout("TinyAdam", RULE, SLOTS, step_form="int", hypers=by_key(HYPERS))


def read_tiny(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    """Return the checkpoint, or None if the file is another library's."""
    return read_tables(found, [LAYOUT], NAME)


def write_tiny(writer: TreeWriter) -> Tree:
    """Return the trainer's state_dict."""
    return write_tables(writer, [LAYOUT], {"adam": LAYOUT})


def in_our_words(hyper: dict[str, Any], rule: str) -> dict[str, Any]:
    """Return the hyper-parameters that optstate's recipe has, too."""
    return {key: value for key, value in hyper.items() if key != "tiny_version"}


FORMAT = Format(
    name=NAME,
    read=read_tiny,
    write=write_tiny,
    stores={"adam": frozenset({"Full"})},
    rules=(RULE,),
    our_words=in_our_words,
)
