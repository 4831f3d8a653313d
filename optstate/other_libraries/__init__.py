"""Other libraries' optimizers: which of their hyper-parameters change the rule. Imports no torch."""

from __future__ import annotations

from optstate.other_libraries.flags import Departure, OtherRule, Switch, departures, followed, strays, visible
from optstate.other_libraries.libraries import ALL, FORMATS, find_rule, find_rule_by_keys, other_formats, stem_of

__all__ = [
    "ALL",
    "FORMATS",
    "Departure",
    "OtherRule",
    "Switch",
    "departures",
    "find_rule",
    "find_rule_by_keys",
    "followed",
    "other_formats",
    "stem_of",
    "strays",
    "visible",
]
