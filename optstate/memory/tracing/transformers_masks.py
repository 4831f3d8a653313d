"""Attention masks of transformers, as in a run with values."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["one_sequence_per_row"]

MODULE, FUNCTION = "transformers.masking_utils", "find_packed_sequence_indices"


@contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Let models of transformers take each row for one sequence, as they do where tensors have values.

    The models look at the positions whether a row holds several sequences. Positions without values may be anything, so
    the models would build masks of `batch x length x length`, and one more in each layer, that no ordinary run has.
    """
    module = sys.modules.get(MODULE)
    original = getattr(module, FUNCTION, None)
    if module is None or original is None:
        yield
        return
    setattr(module, FUNCTION, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(module, FUNCTION, original)
