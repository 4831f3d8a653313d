"""Readers of other libraries' optimizer state: what `torch.save(optimizer.state_dict())` wrote. Imports no torch.

Each module knows one library. A reader is given the parts of a state_dict and returns None if they are not in its
layout.
"""

from __future__ import annotations

from optstate.checkpoint.formats.choose_reader import read, read_file

__all__ = ["read", "read_file"]
