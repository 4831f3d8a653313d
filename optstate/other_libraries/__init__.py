"""Other libraries' optimizers: which of their hyper-parameters change the rule. Imports no torch."""

from __future__ import annotations

from optstate.other_libraries.flags import Departure, OtherRule, Switch, departures, followed, strays, visible
from optstate.other_libraries.libraries import ALL, known_format, other_formats, rule_named, rule_with_keys, stem_of

__all__ = [
    "ALL",
    "Departure",
    "OtherRule",
    "Switch",
    "departures",
    "followed",
    "known_format",
    "other_formats",
    "rule_named",
    "rule_with_keys",
    "stem_of",
    "strays",
    "visible",
]
