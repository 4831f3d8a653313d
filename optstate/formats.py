"""What a package needs that adds a library's checkpoints: a `Format`, and tables to read and write it with.

Entry points of the group `optstate.formats` name a `Format` each, under the library's name. A library that keeps one
flat tensor per statistic is a `Layout`: `read_tables` and `write_tables` do the rest. Imports no torch.
"""

from __future__ import annotations

from optstate.checkpoint.formats.registry import find_format, find_formats
from optstate.checkpoint.formats.shared.format import Format, NewFolder
from optstate.checkpoint.formats.shared.hyper_parameters import NEEDED, translate
from optstate.checkpoint.formats.shared.parameter_reader import Draft, Source, build_checkpoint
from optstate.checkpoint.formats.shared.state_dict import StateDict
from optstate.checkpoint.formats.shared.statistics import ADAFACTOR, ADAM, CAME, LION, SGD, SM3, Meaning
from optstate.checkpoint.formats.shared.tables import Kept, Layout, by_key, factored, read_tables, whole, write_tables
from optstate.checkpoint.formats.shared.tree_writer import LayoutError, TreeWriter, check_rule, check_statistics
from optstate.other_libraries import OtherRule, Switch

__all__ = [
    "ADAFACTOR",
    "ADAM",
    "CAME",
    "LION",
    "NEEDED",
    "SGD",
    "SM3",
    "Draft",
    "Format",
    "Kept",
    "Layout",
    "LayoutError",
    "Meaning",
    "NewFolder",
    "OtherRule",
    "Source",
    "StateDict",
    "Switch",
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
