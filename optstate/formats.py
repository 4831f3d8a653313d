"""What a package needs to add another library's checkpoints, for every command to take them.

Declare one `Format` and offer it by an entry point of the group `optstate.formats`, under the format's name. Libraries
that keep one tensor per statistic need a table, a `Layout`, and no code to read or write: `read_tables` and
`write_tables` do both. What its groups call by other names `Format.our_words` and `Layout.hypers` translate, and a
`Meaning` says under which of the library's keys an average's weight of the past is. `optstate.testing.check_format`
says what is wrong; `examples/plugin` is a whole package.
Imports no torch: neither should the module that declares a format, or `optstate inspect` waits for torch.
"""

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.formats.registry import find_format, find_formats
from optstate.checkpoint.formats.shared.format import Format, NewFolder
from optstate.checkpoint.formats.shared.hyper_parameters import NEEDED, translate
from optstate.checkpoint.formats.shared.parameter_reader import Draft, FormatSource, build_checkpoint
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.checkpoint.formats.shared.statistics import (
    ADAFACTOR,
    ADAM,
    CAME,
    FIRST,
    LION,
    SECOND,
    SGD,
    SM3,
    SQUARE,
    UNKNOWN,
    Meaning,
)
from optstate.checkpoint.formats.shared.tables import Kept, Layout, by_key, factored, read_tables, whole, write_tables
from optstate.checkpoint.formats.shared.tree_writer import LayoutError, Tree, TreeWriter, check_rule, check_statistics
from optstate.other_libraries import OtherRule, Switch

__all__ = [
    "ADAFACTOR",
    "ADAM",
    "CAME",
    "FIRST",
    "LION",
    "NEEDED",
    "SECOND",
    "SGD",
    "SM3",
    "SQUARE",
    "UNKNOWN",
    "Checkpoint",
    "CheckpointError",
    "Draft",
    "Format",
    "FormatSource",
    "Kept",
    "Layout",
    "LayoutError",
    "Meaning",
    "NewFolder",
    "OtherRule",
    "StateDict",
    "Switch",
    "Tree",
    "TreeWriter",
    "build_checkpoint",
    "by_key",
    "check_rule",
    "check_statistics",
    "factored",
    "find_format",
    "find_formats",
    "read_tables",
    "translate",
    "whole",
    "write_tables",
]
