"""Writing state that is split among devices into one file: every device takes part, one writes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.stored import Pieces, Stored
from optstate.checkpoint.tensors import load, read_into
from optstate.collectives import LostProcessError, collective, from_all
from optstate.placement import copy_part, here, index_here, is_distributed, whole

__all__ = ["any_distributed", "failing_together", "read_part_into", "write_gathered"]

Named = Iterator[tuple[str, Tensor]]


def any_distributed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether at least one of the tensors is split among devices or replicated on them as a DTensor."""
    return any(is_distributed(tensor) for tensor in tensors.values())


@contextmanager
def failing_together(path: Any, tensors: Any) -> Iterator[None]:
    """Every rank must run the body; where it raises on one, it raises on all, so that none waits for another.

    tensors: in what repr() tells apart, what is to be gathered: rank 0 must have a part of all of it.

    Raises:
        CheckpointError: if the body raised on another rank, another rank is gone or late, or has other tensors.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    if not isinstance(failure, LostProcessError):
        try:
            with collective():
                digest = hashlib.sha256(repr(tensors).encode()).hexdigest()
                told = from_all((_reason(failure), digest), (dist.group.WORLD,))
        except LostProcessError as error:
            failure = failure or error
    if isinstance(failure, LostProcessError):
        hint = "the file is what it was before, or the complete new one; load it in new processes"
        raise CheckpointError(path, f"saving broke off: {failure}", hint) from failure.__cause__
    if failure is not None:
        raise failure
    for rank, (reason, _) in told.items():
        if reason is not None:
            raise CheckpointError(path, f"not saved, rank {rank} failed: {reason}")
    if len({digest for _, digest in told.values()}) > 1:
        what = "the ranks have parts of different parameters, which cannot be gathered into one file"
        raise CheckpointError(path, what, "use torch.distributed.checkpoint", refused=True)


def _reason(failure: BaseException | None) -> str | None:
    """Why a rank failed, for the others."""
    if isinstance(failure, CheckpointError):
        return f"{failure.reason}; {failure.hint}" if failure.hint else failure.reason
    return None if failure is None else str(failure) or type(failure).__name__


def write_gathered(tensors: Mapping[str, Tensor], write: Callable[[Named], None]) -> None:
    """Call `write` with the whole tensors, one after the other, on rank 0; every rank must call this.

    One whole tensor at a time is in memory. Where `write` raises, the other ranks come to the end all the same.

    Raises:
        LostProcessError: if another process does not take part.
    """
    gathered = ((name, _whole(tensor)) for name, tensor in tensors.items())
    try:
        if dist.get_rank() == 0:
            write(gathered)
    finally:
        for _ in gathered:
            pass  # all have to take part in gathering what is left


def read_part_into(own: Tensor, stored: Stored) -> None:
    """Fill `own`, or what of it is on this device, from a tensor of a file: only the rows that it needs are read."""
    index = index_here(own)
    if not index:
        read_into(here(own), stored)
        return
    if not isinstance(stored, Pieces) and stored.stride is None and stored.elements:
        rows, row = index[0], stored.nbytes // own.shape[0]
        shape = (rows.stop - rows.start, *own.shape[1:])
        part = load(replace(stored, start=stored.start + rows.start * row, shape=shape))
        here(own).copy_(part[(slice(None), *index[1:])])
    else:
        copy_part(own, load(stored))


def _whole(tensor: Tensor) -> Tensor:
    with collective():
        return whole(tensor)
